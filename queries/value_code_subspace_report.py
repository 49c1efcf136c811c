"""value-code-subspace-report: when residual states come apart by answer value (definitions: part 4, A)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from ..lake import Lake
from ..lake.value_codes import ANSWER_VALUE
from .chart import Trajectory
from .markdown import number, percent
from .report import RowFile, TextTable
from .results import Results
from .value_code_report import FINAL_NORM, ValueCodeReport, no_repeats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .arrays.stage_lens import StageLens

# Half-way from what naming the commonest group would give to 1.
_CARRIES = "leave_one_out_centroid_accuracy >= (1 + largest_group_share) / 2"


class ValueCodeSubspaceReport(ValueCodeReport):
    """When, and at which stage, residual states come apart by answer value, support value or key."""

    stage: tuple[str, ...] = Field(..., min_length=1, description="residual stage to read")
    position_role: tuple[str, ...] = Field(
        ..., min_length=1, description="role whose positions are averaged into one vector per event"
    )
    group_by: tuple[str, ...] = Field(
        ...,
        min_length=1,
        description="token that groups the vectors: position_token, answer_value, or that of a role such as support_value",
    )
    pca_rank: PositiveInt = Field(4, description="directions of the identity and all-vector bases")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "value_code_rows": RowFile("value_code_subspace_rows", "value_code_rows"),
        "summary_rows": RowFile("value_code_subspace_summary_rows", "summary_rows"),
        "subspace_rows": RowFile("value_code_subspace_subspaces", "subspace_rows"),
    }
    tables = (
        TextTable(
            "top_summary",
            "Where the code is readable",
            {
                "step": "checkpoint_step",
                "stage": "stage",
                "role": "position_role",
                "grouped by": "group_by",
                "rows": "num_rows",
                "groups": "num_unique_groups",
                "centroid accuracy": "leave_one_out_centroid_accuracy",
                "of rows": "centroid_scored_rows",
                "identity overlap": "mean_identity_overlap",
                "stage-lens accuracy": "stage_lens_value_accuracy",
                "model accuracy": "final_value_accuracy",
                "stage-lens margin": "mean_stage_lens_value_margin",
            },
            "By descending centroid accuracy, then identity overlap; what has no accuracy comes last.",
        ),
    )
    charts = (
        Trajectory(
            "centroid_accuracy",
            "centroid_chart",
            "How often a state is nearest to its own group",
            about="leave-one-out cosine centroids; one line per stage",
            y="leave_one_out_centroid_accuracy",
            y_title="centroid accuracy",
            series="stage",
            panel="panel",
            y_domain=(0, 1),
        ),
        Trajectory(
            "stage_lens_accuracy",
            "stage_lens_chart",
            "How often the stage, read as the last one, gives the right value",
            about="final LayerNorm and unembedding on the role's mean vector; one line per stage",
            y="stage_lens_value_accuracy",
            y_title="stage-lens accuracy",
            series="stage",
            panel="panel",
            y_domain=(0, 1),
        ),
    )
    how_to_read = (
        "One vector per query event: the residual stream at the stage, averaged over the positions of the role. The stage "
        "lens applies the final LayerNorm (its gain, bias and epsilon) and the unembedding to that mean; at final_norm the "
        "unembedding only. Its margin and accuracy are among the values that compete, not the whole vocabulary. At role "
        "prediction the lens is the readout of that stage.",
        "Centroid accuracy: a vector counts as right if, of all groups' mean vectors, its own group's (itself left out) has "
        "the largest cosine. A group with one vector is not scored, but competes for the others. Naming the commonest "
        "group gives `largest_group_share`.",
        "The identity basis holds the top directions of the groups' mean vectors, each group weighing the same; the "
        "all-vector basis those of all vectors. Both are fitted on the vectors they are compared with. An overlap is "
        "‖Bᵀu‖ of the unit vector, from 0 to 1, not squared, not centred: it says how much of a state lies in the basis, "
        "not whether states differ there.",
        "Singular values beyond the rank are not written; `identity_variance_share` is the share of the squared singular "
        "values that the written ones hold: near 1 means a low-rank code.",
        "`stage_lens_margin_r_squared_vs_final_margin` and `identity_overlap_r_squared_vs_stage_lens_margin` compare raw "
        "numbers without a fit; the second is in other units, so usually far below zero.",
        "`batch_index` is the index of the record in the probe: a lake has no batches.",
    )
    next_queries = (
        (
            "What the model reads at each stage of the prediction position, over training:",
            "SELECT step, stage, avg(value_margin) AS value_margin, avg(correct::INT) AS accuracy FROM readouts "
            "WHERE run = $run GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (9, 1)
    example: ClassVar[str] = (
        "lakebed query value-code-subspace-report --lake demo.lake --run demo --stage layer_0_post_mlp "
        "--stage layer_1_post_mlp --position-role prediction --position-role support_value --group-by answer_value "
        "--out codes"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "stage": ("layer_0_post_mlp", "layer_1_post_mlp", "final_norm"),
        "position_role": ("prediction", "support_value"),
        "group_by": (ANSWER_VALUE, "query_key"),
        # The demo has four keys.
        "pca_rank": 3,
    }

    @field_validator("stage", "position_role", "group_by")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return no_repeats(values)

    def stages_read(self) -> tuple[str, ...]:
        """Those of --stage."""
        return self.stage

    def roles_read(self) -> tuple[str, ...]:
        """Those of --position-role."""
        return self.position_role

    def groupings(self) -> tuple[str, ...]:
        """Those of --group-by."""
        return self.group_by

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Section `value_codes`: one row per (step, stage, role, grouping), lists with one entry per event."""
        from .arrays.lists import RowsOfLists
        from .arrays.side_by_side import side_by_side
        from .arrays.value_codes import code_columns, lens_columns

        candidates = self.candidates(results)
        lens = self.lens(results, candidates.tokens)
        places = {role: self.places(results, role) for role in self.position_role}
        groups = {
            role: {by: self.group_tokens(results, by, places[role]) for by in self.group_by}
            for role in self.position_role
        }

        def read() -> Iterator[tuple[int, str, str, NDArray[np.float64], StageLens]]:
            for step in results.steps:
                at_step = lens(step)
                for stage in self.stage:
                    stored = self.stored(results, stage, step)
                    for role in self.position_role:
                        yield step, stage, role, places[role].means(stored), at_step

        def codes(
            taken: tuple[int, str, str, NDArray[np.float64], StageLens],
        ) -> list[dict[str, Any]]:
            step, stage, role, vectors, at_step = taken
            seen = lens_columns(at_step.logits(vectors, stage == FINAL_NORM), candidates)
            named = {"step": step, "stage": stage, "position_role": role}
            found = code_columns(vectors, groups[role], self.pca_rank, f"{stage} / {role} at step {step}")
            return [{**named, "group_by": by, **seen, **code} for by, code in found]

        rows = RowsOfLists()
        for made in side_by_side(codes, read()):
            for row in made:
                rows.add(row)
        return rows.columns()

    def warnings(self, results: Results) -> list[str]:
        """Groupings that are one and the same, and groups that are not scored."""
        lines = []
        for first, second in self._same_groupings(results):
            lines.append(
                f"{first} and {second} name the same token in every event, so their rows are equal: they cannot tell "
                "whether the code follows one or the other."
            )
        unscored = results.rows(
            "SELECT group_by, max(num_rows - centroid_scored_rows) AS rows, any_value(num_rows) AS total FROM summary_rows "
            "WHERE centroid_scored_rows < num_rows GROUP BY group_by ORDER BY group_by"
        )
        for row in unscored:
            lines.append(
                f"{row['rows']} of {row['total']} vectors grouped by {row['group_by']} are their group's only one and have "
                "no centroid accuracy."
            )
        return lines

    def findings(self, results: Results) -> list[str]:
        """From which stage and step on the role carries the group, where it is clearest, and how broad the code is."""
        role = "prediction" if "prediction" in self.position_role else self.position_role[0]
        by = ANSWER_VALUE if ANSWER_VALUE in self.group_by else self.group_by[0]
        chosen = "FROM summary_rows WHERE position_role = $role AND group_by = $by"
        best = results.first(
            f"{chosen} AND leave_one_out_centroid_accuracy IS NOT NULL "
            "ORDER BY leave_one_out_centroid_accuracy DESC, checkpoint_step, list_position($stages, stage)",
            role=role,
            by=by,
            stages=list(self.stage),
        )
        if best is None:
            return [
                f"No group of {by} at {role} has two vectors, so nothing can be said of when they come apart."
            ]
        onsets = results.rows(
            "SELECT stage, min(checkpoint_step) AS step FROM ("
            f"SELECT *, bool_and({_CARRIES}) OVER (PARTITION BY stage ORDER BY checkpoint_step DESC) AS stays {chosen}) "
            "WHERE stays GROUP BY stage ORDER BY step, list_position($stages, stage)",
            role=role,
            by=by,
            stages=list(self.stage),
        )
        return [
            self._onset(onsets, role, by, best),
            self._clearest(best, role, by),
            self._breadth(results, best),
        ]

    def _onset(self, onsets: list[dict[str, Any]], role: str, by: str, best: dict[str, Any]) -> str:
        chance = percent(best["largest_group_share"])
        if not onsets:
            return (
                f"The {role} position does not carry {by} at the last step at any stage asked for: centroid accuracy stays "
                f"below half-way between naming the commonest group ({chance}) and 100 %."
            )
        first = onsets[0]
        others = "; ".join(f"{row['stage']} from step {row['step']}" for row in onsets[1:])
        return (
            f"The {role} position carries {by} from step **{first['step']}** on, first at **{first['stage']}**"
            f"{f' ({others})' if others else ''}: from there to the last step, centroid accuracy is at least half-way "
            f"between naming the commonest group ({chance}) and 100 %."
        )

    def _clearest(self, best: dict[str, Any], role: str, by: str) -> str:
        return (
            f"{by} is clearest at {best['stage']} / {role}, step {best['checkpoint_step']}: "
            f"{percent(best['leave_one_out_centroid_accuracy'])} of {best['centroid_scored_rows']} vectors are nearest to "
            f"their own of {best['num_unique_groups']} groups; the stage lens gives the right value for "
            f"{percent(best['stage_lens_value_accuracy'])}, the model for {percent(best['final_value_accuracy'])}."
        )

    def _breadth(self, results: Results, best: dict[str, Any]) -> str:
        held = results.first(
            "FROM subspace_rows WHERE checkpoint_step = $step AND stage = $stage AND position_role = $role "
            "AND group_by = $by",
            step=best["checkpoint_step"],
            stage=best["stage"],
            role=best["position_role"],
            by=best["group_by"],
        )
        assert held is not None
        return (
            f"There, {self.pca_rank} of {held['identity_centered_rank']} directions hold "
            f"{percent(held['identity_variance_share'])} of the variance of the group means; a state lies in them with "
            f"overlap {number(best['mean_identity_overlap'])} (all-vector basis: {number(best['mean_all_vector_overlap'])})."
        )

    def _same_groupings(self, results: Results) -> list[tuple[str, str]]:
        rows = results.rows(
            "SELECT a.group_by AS one, b.group_by AS other FROM value_codes AS a JOIN value_codes AS b ON a.step = b.step "
            "AND a.stage = b.stage AND a.position_role = b.position_role AND list_position($by, a.group_by) < "
            "list_position($by, b.group_by) GROUP BY ALL HAVING bool_and(a.group_tokens = b.group_tokens) ORDER BY ALL",
            by=list(self.group_by),
        )
        return [(row["one"], row["other"]) for row in rows]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The formulas in words."""
        return {
            "calculation": {
                "stage_lens": "unembedding · final LayerNorm (mean over the role's positions); no LayerNorm at final_norm",
                "identity_basis": "top right singular vectors of the groups' mean vectors minus their mean",
                "identity_overlap": "norm of the unit vector's projection on the identity basis",
                "centroid": "cosine with each group's mean vector, the vector itself left out of its own",
            }
        }

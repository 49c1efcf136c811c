"""contextual-key-separability: do a head's QK directions tell keys apart in context? (definitions: part 1, J.1)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from .chart import Trajectory
from .contextual_report import ContextualReport, RoleSpec
from .markdown import number, percent
from .report import ReportFailed, RowFile, TextTable
from .results import Results
from .window_options import WindowOptions

if TYPE_CHECKING:
    from ..lake import Lake

QK_PROJECTIONS = ("qk_left", "qk_right", "qk_both")
FULL = "full_residual"
_MEASURED = {
    "within_variance": "within",
    "between_variance": "between",
    "separation_ratio": "ratio",
    "nearest_centroid_accuracy": "nearest_accuracy",
    "nearest_centroid_margin": "nearest_margin",
    "mean_centroid_norm": "mean_centroid_norm",
}


class ContextualKeySeparability(ContextualReport, WindowOptions):
    """Whether residual vectors of different keys stand apart on a head's QK directions, and from when on."""

    context_stage: tuple[str, ...] = Field(
        ..., min_length=1, description="residual stage whose vectors are grouped"
    )
    context_role: str = Field("prediction", description="role at whose positions the vectors are read")
    group_by: str = Field(
        "query_key",
        description="what groups vectors: position_token, answer_value, or a role with one position",
    )
    projection_rank: PositiveInt = Field(4, description="singular directions of W_QK that make a projection")
    include_full_residual: bool = Field(
        False, description="write rows of the unprojected residual stream too"
    )
    permutations: NonNegativeInt = Field(
        0, description="shuffles of the group labels that show what chance looks like"
    )
    permutation_seed: NonNegativeInt = Field(0, description="seed of the shuffles")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "metric_rows": RowFile("contextual_key_separability_rows", "metric_rows", "metric_csv"),
        "group_rows": RowFile("contextual_key_separability_group_rows", "group_rows"),
    }
    tables = (
        TextTable(
            "summary",
            "From the first checkpoint to the last",
            {
                "stage": "context_stage",
                "projection": "projection",
                "dimensions": "projected_dim",
                "ratio at start": "start_separation_ratio",
                "at end": "end_separation_ratio",
                "nearest-centroid accuracy at start": "start_nearest_centroid_accuracy",
                "at end ": "end_nearest_centroid_accuracy",
                "r of ratio with σ₁": "separation_ratio_vs_qk_singular_value_top",
                "r of ratio with answer margin": "separation_ratio_vs_answer_margin",
            },
            about="The ratio is variance between groups over variance within; `full_residual` is the whole stream, for "
            "comparison.",
        ),
    )
    charts = (
        Trajectory(
            "trajectory",
            "trajectory",
            "When the head's QK directions tell the groups apart",
            series="series",
            panel="panel",
            panel_titles={
                "ratio": "between / within",
                "accuracy": "nearest centroid",
                "margin": "answer margin",
                "sigma": "σ₁ of W_QK",
            },
        ),
    )
    how_to_read = (
        "Vectors are the raw residual stream, without LayerNorm and uncentred, projected on the first `projection_rank` "
        "singular directions of the same checkpoint's W_QK: `qk_left` query side, `qk_right` key side, `qk_both` an "
        "orthonormal basis of both together.",
        "The ratio sums over dimensions and weighs every vector the same. With the groups drawn by lot, the "
        "variance between is (groups − 1) / (vectors − 1) of the whole on average, in any projection, and the ratio about "
        "(groups − 1) / (vectors − groups): `chance_separation_ratio`.",
        "Nearest centroid leaves each vector out of its own group's centroid. Always naming the largest group is right in "
        "`largest_group_share`.",
        "With `--permutations N` the group labels are shuffled N times: columns `…_permuted_mean`, `_std`, "
        "`_percentile_95` and `_p_value` = (1 + shuffles that reach the observed number) / (1 + N). The same shuffles "
        "serve every step and projection. Two positions of one event are shuffled as if independent.",
        "A random subspace of k of d dimensions keeps about k/d of the variance between and k/d of that within, so its "
        "ratio is near the full residual's: a head's directions are chosen for the groups only where they exceed that.",
        "`group_rows` has two kinds of rows, said by `row_kind`: every vector with its group, and every group's centroid.",
        "Correlations are over checkpoints: two quantities that both grow correlate without one causing the other.",
        "`batch_index` is the index of the record in the probe, and there is no `--batch-size`: batches belong to "
        "`lakebed extract`.",
    )
    next_queries = (
        (
            "Which keys are still confused? The groups nearest to the common centre at the last step, from the rows "
            "written:",
            "SELECT group_token, group_count, within_variance, centroid_global_squared_distance FROM "
            "'contextual_key_separability_group_rows.parquet' WHERE row_kind = 'group' AND projection = 'qk_both' "
            "QUALIFY checkpoint_step = max(checkpoint_step) OVER () ORDER BY centroid_global_squared_distance",
        ),
        (
            "Mean length of the residual stream at the prediction position, stage by stage:",
            "SELECT a.step, a.stage, avg(sqrt(squared_norm(a.values))) AS length FROM activations a JOIN events e "
            "USING (run, probe, example) WHERE run = $run AND a.position = e.prediction_position GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (4, 1)
    example: ClassVar[str] = (
        "lakebed query contextual-key-separability --lake demo.lake --run demo --head L1H0 --context-stage layer_0_post_mlp "
        "--projection-rank 8 --include-full-residual --permutations 200 --out separability"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "context_stage": ("layer_0_post_mlp",),
        "projection_rank": 4,
        "include_full_residual": True,
        "permutations": 100,
    }

    @field_validator("context_stage")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The one role that is read."""
        return (RoleSpec(self.context_role, self.context_role, self.group_by),)

    def stages(self) -> tuple[str, ...]:
        """The stages asked for."""
        return self.context_stage

    def parameters(self) -> dict[str, Any]:
        """Adds `projection_names`, in report order."""
        return {**super().parameters(), "projection_names": [*QK_PROJECTIONS, FULL]}

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Section `separations`: one row per step, stage and projection."""
        if name != "separations":
            return super().arrays(name, results)
        from . import arrays

        context = self.context(results)[self.context_role]
        groups = arrays.group_by_token(context.token_ids)
        self._check_groups(results)
        directions = self.singular_directions(results, self.projection_rank, "--projection-rank")
        shuffled = arrays.permuted_labels(groups.labels, self.permutations, self.permutation_seed)
        rows = []
        for step, stage, residuals in self.residuals(results):
            vectors = residuals.at(context.rows)
            of_step, rank = directions[step], self.projection_rank
            projected = {
                projection: vectors @ basis
                for projection, basis in arrays.qk_bases(of_step.left[:rank], of_step.right[:rank]).items()
            }
            for place, (projection, points) in enumerate({**projected, FULL: vectors}.items()):
                found = arrays.separation(points, groups)
                if found.ratio != found.ratio:
                    raise ReportFailed(
                        f"{self.report_name()}: at step {step}, {stage}, the vectors of each group are all the same on "
                        f"{projection}: the within-group variance is not above 0, and there is no ratio"
                    )
                wanted = self.permutations and (projection != FULL or self.include_full_residual)
                sampled = arrays.permuted_separation(points, groups, shuffled) if wanted else (None, None)
                rows.append(
                    {
                        "step": step,
                        "context_stage": stage,
                        "stage_place": self.context_stage.index(stage),
                        "projection": projection,
                        "projection_place": place,
                        "projected_dim": points.shape[1],
                        "qk_singular_value_top": float(of_step.values[0]),
                        "qk_singular_value_sum": float(of_step.values[:rank].sum()),
                        **{column: getattr(found, field) for column, field in _MEASURED.items()},
                        "group_within": found.group_within,
                        "group_distance": found.group_distance,
                        "group_norm": found.group_norm,
                        **arrays.chance_columns("separation_ratio", found.ratio, sampled[0]),
                        **arrays.chance_columns(
                            "nearest_centroid_accuracy", found.nearest_accuracy, sampled[1]
                        ),
                    }
                )
        return arrays.as_columns(rows)

    def _check_groups(self, results: Results) -> None:
        """Two groups at least, each of two vectors at least."""
        name = self.report_name()
        total = results.first("FROM group_totals")
        assert total is not None
        if total["num_groups"] < 2:
            raise ReportFailed(
                f"{name}: separation needs at least two groups, and {self.group_by} makes {total['num_groups']} of "
                f"{total['num_vectors']} vectors; choose another --group-by or --split"
            )
        single = results.rows("SELECT group_token FROM groups WHERE group_count < 2 ORDER BY group_token_id")
        if single:
            raise ReportFailed(
                f"{name}: {len(single)} of {total['num_groups']} groups by {self.group_by} have fewer than two vectors "
                f"(such as {single[0]['group_token']!r}), so that none is left for their centroid; choose another "
                "--group-by, or a probe with more records"
            )

    def warnings(self, results: Results) -> list[str]:
        """Where the grouping is trivial, or the window empty."""
        lines = super().warnings(results)
        if not results.value(
            "SELECT count(*) FROM context_vectors WHERE group_token_id <> position_token_id"
        ):
            lines.append(
                f"{self.group_by} is the very token at {self.context_role}: its embedding alone tells the groups "
                "apart, so that the full residual separates them before any training."
            )
        return [*lines, *self.window_warnings(results)]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The summary with the window's fields, and the window as asked for."""
        return {
            "summary": self.summary_with_windows(results, "span, projected_dim"),
            "window_start": self.window_start,
            "window_end": self.window_end,
            "head_label": self.head_label,
            "calculation": {
                "separation_ratio": "between_variance / within_variance, summed over dimensions",
                "nearest_centroid_accuracy": "share of vectors nearest to their own group's centroid, themselves left out",
                "nearest_centroid_margin": "squared distance to the nearest other centroid - that to the own",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Whether and since when the head's directions beat chance and the full residual, per stage."""
        lines = []
        for stage in self.context_stage:
            rows = results.rows(
                "FROM every_metric WHERE context_stage = $stage ORDER BY checkpoint_step", stage=stage
            )
            last = rows[-1]["checkpoint_step"]
            best = max(
                (row for row in rows if row["checkpoint_step"] == last and row["projection"] != FULL),
                key=lambda row: float(row["separation_ratio"]),
            )
            own = [row for row in rows if row["projection"] == best["projection"]]
            full = [row for row in rows if row["projection"] == FULL]
            lines += [_outcome(self, own, full), _accuracy(own, full)]
            if self.permutations:
                lines.append(_against_shuffles(self, own))
        found = _correlated(results)
        return [*lines, *([found] if found else [])]


def _outcome(report: ContextualKeySeparability, own: list[dict[str, Any]], full: list[dict[str, Any]]) -> str:
    first, last, whole = own[0], own[-1], full[-1]
    better = last["separation_ratio"] > whole["separation_ratio"]
    above = [a["separation_ratio"] > b["separation_ratio"] for a, b in zip(own, full, strict=True)]
    since = len(above) - above[::-1].index(False) if False in above else 0
    when = ""
    if len(own) > 1:
        when = f"; it was {number(first['separation_ratio'])} at step {first['checkpoint_step']}"
        if better:
            when += f", and is above the full residual from step {own[since]['checkpoint_step']} on"
    groups = f"{last['num_groups']} groups by {report.group_by}"
    if _beyond_chance(report, last):
        verdict = f"separate {groups}, {'better' if better else 'no better'} than the full residual does"
    else:
        verdict = f"do not separate {groups} beyond {'shuffled labels' if report.permutations else 'chance'}"
    return (
        f"**{report.head_label}'s QK directions {verdict}**, at {last['context_stage']}, step {last['checkpoint_step']}: "
        f"variance between / within is {number(last['separation_ratio'])} on {last['projection']} "
        f"({last['projected_dim']} dimensions), {number(whole['separation_ratio'])} on all {whole['projected_dim']}, "
        f"{number(last['chance_separation_ratio'])} by chance{when}."
    )


def _beyond_chance(report: ContextualKeySeparability, row: Mapping[str, Any]) -> bool:
    if report.permutations:
        return bool(row["separation_ratio_permuted_p_value"] <= 0.05)
    return bool(row["separation_ratio"] > row["chance_separation_ratio"])


def _accuracy(own: list[dict[str, Any]], full: list[dict[str, Any]]) -> str:
    first, last = own[0], own[-1]
    start = (
        f", from {percent(first['nearest_centroid_accuracy'])} at step {first['checkpoint_step']}"
        if len(own) > 1
        else ""
    )
    return (
        f"The nearest centroid on {last['projection']} is the own group's for "
        f"{percent(last['nearest_centroid_accuracy'])} of {last['num_vectors']:,} vectors{start}; on the full residual "
        f"for {percent(full[-1]['nearest_centroid_accuracy'])}, and always naming the largest group would be right for "
        f"{percent(last['largest_group_share'])}."
    )


def _against_shuffles(report: ContextualKeySeparability, own: list[dict[str, Any]]) -> str:
    above = [row["separation_ratio"] > row["separation_ratio_permuted_percentile_95"] for row in own]
    last = own[-1]
    return (
        f"The ratio lies above 95 % of {report.permutations} shuffles of the labels at {sum(above)} of {len(own)} "
        f"checkpoints (at the last, p = {number(last['separation_ratio_permuted_p_value'])}, shuffles "
        f"{number(last['separation_ratio_permuted_mean'])} ± {number(last['separation_ratio_permuted_std'])})."
    )


def _correlated(results: Results) -> str:
    found = results.first(
        f"FROM summary WHERE projection <> '{FULL}' AND isfinite(separation_ratio_vs_answer_margin) "
        "ORDER BY abs(separation_ratio_vs_answer_margin) DESC, context_stage, projection"
    )
    if found is None:
        return ""
    sigma = found["separation_ratio_vs_qk_singular_value_top"]
    return (
        f"Over checkpoints the ratio on {found['projection']} at {found['context_stage']} correlates with the answer "
        f"margin at r = {number(found['separation_ratio_vs_answer_margin'])} and with σ₁ of W_QK at r = {number(sigma)}."
    )

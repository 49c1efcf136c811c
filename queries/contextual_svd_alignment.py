"""contextual-svd-alignment: do a head's QK directions lie where a role's tokens differ? (definitions: part 1, J.2)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from .chart import Trajectory
from .contextual_report import POSITION_TOKEN, ContextualReport, RoleSpec
from .markdown import number
from .report import ReportFailed, RowFile, TextTable
from .results import Results

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..lake import Lake
    from .arrays import Groups, IdentitySubspace
    from .contextual_report import Directions

SIDES = {"left": "query-side", "right": "key-side"}


class ContextualSVDAlignment(ContextualReport):
    """Whether the singular directions of a head's QK form align with what tells a role's tokens apart."""

    context_stage: str = Field(..., description="residual stage whose vectors are read")
    role: tuple[str, ...] = Field(
        (), description="role whose vectors are read, grouped by the token at the position"
    )
    role_spec: tuple[str, ...] = Field(
        (),
        description="label=NAME,context_role=ROLE,group_by=TOKEN or NAME:position_role=ROLE[,group_by=TOKEN]; a role under "
        "a label of its own",
    )
    plot_left_role: str = Field(
        ..., description="label whose alignment with the left (query-side) direction is drawn"
    )
    plot_right_role: str = Field(
        ..., description="label whose alignment with the right (key-side) direction is drawn"
    )
    top_ranks: PositiveInt = Field(4, description="singular directions of W_QK that are compared")
    pca_rank: PositiveInt = Field(4, description="dimensions of the identity and all-vector subspaces")
    permutations: NonNegativeInt = Field(
        0, description="shuffles of the group labels that show what chance looks like"
    )
    permutation_seed: NonNegativeInt = Field(0, description="seed of the shuffles")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "alignment_rows": RowFile("contextual_svd_alignment_rows", "alignment_rows", "alignment_csv"),
        "rank_aggregate_rows": RowFile(
            "contextual_svd_rank_aggregate_rows", "rank_aggregate_rows", "rank_aggregate_csv"
        ),
        "subspace_rows": RowFile("contextual_svd_subspace_rows", "subspace_rows"),
        "role_vector_rows": RowFile("contextual_svd_role_vector_rows", "role_vector_rows"),
    }
    tables = (
        TextTable(
            "first_direction_ends",
            "The first singular direction",
            {
                "role": "role",
                "left on identity, start": "start_left_identity_overlap",
                "end": "end_left_identity_overlap",
                "right on identity, start": "start_right_identity_overlap",
                "end ": "end_right_identity_overlap",
                "left · mean, end": "end_left_mean_cosine",
                "right · mean, end": "end_right_mean_cosine",
            },
            about="Identity overlap is the length of the direction's projection on the subspace in which the role's "
            "token means differ; `left` reads queries, `right` keys.",
        ),
    )
    charts = (
        Trajectory(
            "trajectory",
            "trajectory",
            "Where the head's first QK direction points",
            series="series",
            panel="panel",
            panel_titles={
                "identity": "identity overlap",
                "mean": "|cos| with mean",
                "sigma": "σ₁ of W_QK",
                "margin": "answer margin",
            },
        ),
    )
    how_to_read = (
        "The left singular vectors of W_QK = Σ σ u vᵀ live where queries are read, the right ones where keys are. "
        "Vectors are the raw residual stream at the role's positions, without LayerNorm.",
        "The identity subspace is spanned by the top `pca_rank` principal directions of the token means, each token "
        "weighing the same; the all-vector subspace by those of all vectors. Overlap is ‖Bᵀu‖, a length between 0 and "
        "1, not squared.",
        "A random direction has an expected squared overlap of k/d with k of d dimensions, hence an overlap of about "
        "√(k/d): `chance_overlap`. It is not what unrelated directions of a trained model reach: most variance lies in "
        "few dimensions, and shuffled labels reach more. `--permutations N` gives that level in `…_permuted_…` "
        "columns, with p = (1 + shuffles that reach the observed overlap) / (1 + N). Two positions of one event are "
        "shuffled as if independent.",
        "Signs of singular vectors are arbitrary and nothing here depends on them. `matched_rank` says which rank the same "
        "direction had at the checkpoint before (the pairing of largest |u·u'|·|v·v'| first, over all the head's ranks; "
        "`matched_abs_cosine` is that number): where it differs from `singular_rank`, directions swapped places, and a "
        "jump of a rank's numbers is no change of a direction.",
        "Numerical ranks count what stands above the rounding of float32, in which vectors are stored.",
        "Correlations are over checkpoints: two quantities that both grow correlate without one causing the other.",
        "`batch_index` is the index of the record in the probe, and there is no `--batch-size`: batches belong to "
        "`lakebed extract`.",
    )
    next_queries = (
        (
            "How the first query-side direction turns from checkpoint to checkpoint:",
            "SELECT step, abs_cosine(values, lag(values) OVER (ORDER BY step)) AS abs_cosine FROM singular_vectors "
            "WHERE run = $run AND matrix = 'W_QK' AND layer = 0 AND head = 0 AND rank = 1 AND side = 'left' ORDER BY step",
        ),
        (
            "Which tokens the first key-side direction reads, at the last step, from the residual stream itself:",
            "SELECT p.text, avg(list_dot_product(a.values, s.values)) AS coordinate FROM activations a JOIN events e "
            "USING (run, probe, example) JOIN positions p ON p.run = a.run AND p.probe = a.probe AND p.event = e.event "
            "AND p.position = a.position AND p.kind = 'role' AND p.role = 'support_key' JOIN singular_vectors s ON "
            "s.run = a.run AND s.step = a.step AND s.matrix = 'W_QK' AND s.layer = 1 AND s.head = 0 AND s.rank = 1 AND "
            "s.side = 'right' WHERE a.run = $run AND a.stage = 'layer_0_post_mlp' AND a.step = (SELECT max(step) FROM "
            "singular_values) GROUP BY ALL ORDER BY 2",
        ),
    )
    place: ClassVar[tuple[int, int]] = (4, 2)
    example: ClassVar[str] = (
        "lakebed query contextual-svd-alignment --lake demo.lake --run demo --head L1H0 --context-stage layer_0_post_mlp "
        "--role prediction --role-spec support_value:position_role=support_value --plot-left-role prediction "
        "--plot-right-role support_value --pca-rank 3 --out alignment"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "context_stage": "layer_0_post_mlp",
        "role": ("prediction",),
        "role_spec": ("support_key:position_role=support_key",),
        "plot_left_role": "prediction",
        "plot_right_role": "support_key",
        "pca_rank": 3,
        "permutations": 100,
    }

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        labels = [spec.label for spec in self.role_specs()]
        if not labels:
            raise ValueError("--role or --role-spec is required, at least one")
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ValueError(
                f"label {doubled[0]!r} stands twice among --role and --role-spec; labels must be unique"
            )
        for option, label in (
            ("--plot-left-role", self.plot_left_role),
            ("--plot-right-role", self.plot_right_role),
        ):
            if label not in labels:
                raise ValueError(f"{option} {label!r} is no label; there are {', '.join(labels)}")
        return self

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """Those of `--role`, then those of `--role-spec`."""
        plain = (RoleSpec(role, role, POSITION_TOKEN) for role in self.role)
        return (*plain, *(read_role_spec(text) for text in self.role_spec))

    def stages(self) -> tuple[str, ...]:
        """The one stage."""
        return (self.context_stage,)

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Section `alignments`: one row per step and label."""
        if name != "alignments":
            return super().arrays(name, results)
        from . import arrays

        contexts = self.context(results)
        groups = {label: arrays.group_by_token(context.token_ids) for label, context in contexts.items()}
        shuffled = {
            label: arrays.permuted_labels(found.labels, self.permutations, self.permutation_seed)
            for label, found in groups.items()
        }
        directions = self.singular_directions(results, self.top_ranks, "--top-ranks")
        before: Directions | None = None
        rows = []
        for step, _, residuals in self.residuals(results):
            of_step = directions[step]
            matched = _matched(before, of_step, self.top_ranks)
            before = of_step
            top = {"left": of_step.left[: self.top_ranks], "right": of_step.right[: self.top_ranks]}
            for label, context in contexts.items():
                vectors = residuals.at(context.rows)
                space = self._subspace(vectors, groups[label], f"role {label!r} at step {step}")
                row: dict[str, Any] = {
                    "step": step,
                    "role": label,
                    "num_vectors": len(vectors),
                    "num_unique_tokens": len(groups[label]),
                    "ambient_dim": vectors.shape[1],
                    "singular_values": of_step.values[: self.top_ranks],
                    "identity_centered_rank": space.identity.centered_rank,
                    "identity_singular_values": space.identity.singular_values,
                    "all_vector_centered_rank": space.all_vectors.centered_rank,
                    "all_vector_singular_values": space.all_vectors.singular_values,
                    **matched,
                }
                for side, lines in top.items():
                    observed = arrays.overlap(lines, space.identity.basis)
                    sampled = None
                    if self.permutations:
                        sampled = arrays.permuted_overlaps(
                            vectors, groups[label], shuffled[label], lines, self.pca_rank
                        )
                    row |= {
                        f"{side}_mean_cosine": abs(lines @ space.mean_direction),
                        f"{side}_identity_overlap": observed,
                        f"{side}_all_vector_overlap": arrays.overlap(lines, space.all_vectors.basis),
                        f"{side}_permuted": _chance(observed, sampled),
                    }
                rows.append(row)
        return arrays.as_columns(rows)

    def _subspace(self, vectors: NDArray[np.float64], groups: Groups, what: str) -> IdentitySubspace:
        from .arrays import identity_subspace

        try:
            return identity_subspace(vectors, groups, self.pca_rank, what)
        except ReportFailed as error:
            raise ReportFailed(f"{self.report_name()}: {error}") from error

    def warnings(self, results: Results) -> list[str]:
        """Where directions swapped ranks, so that a rank is not one direction."""
        swapped = results.rows(
            "SELECT DISTINCT checkpoint_step AS step FROM alignment_rows WHERE matched_rank <> singular_rank ORDER BY step"
        )
        lines = super().warnings(results)
        if swapped:
            steps = ", ".join(str(row["step"]) for row in swapped[:8]) + (", …" if len(swapped) > 8 else "")
            lines.append(
                f"Directions up to rank {self.top_ranks} took another's place at {len(swapped)} checkpoints ({steps}): "
                "follow `matched_rank` there, not the rank."
            )
        return lines

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """Correlations over checkpoints by name, and the overlap of a random direction."""
        return {
            "rank1_correlations": _correlations(results, "rank1_correlation_rows", "singular_value"),
            "rank_aggregate_correlations": _correlations(
                results, "rank_aggregate_correlation_rows", "singular_value_top"
            ),
            "chance_overlap": self._chance_overlap(results),
            "head_label": self.head_label,
            "role_specs": [vars(spec) for spec in self.role_specs()],
        }

    def _chance_overlap(self, results: Results) -> float:
        return math.sqrt(self.pca_rank / int(results.value("SELECT ambient_dim FROM measured")))

    def findings(self, results: Results) -> list[str]:
        """Which role's identity the first direction aligns with on either side, since when, and what it goes with."""
        lines = [self._side(results, side) for side in SIDES]
        found = results.first(
            "FROM rank1_correlation_rows WHERE metric LIKE '%_identity_overlap' AND isfinite(with_answer_margin) "
            "ORDER BY abs(with_answer_margin) DESC, role, metric"
        )
        if found is not None:
            side = found["metric"].split("_")[0]
            lines.append(
                f"Over checkpoints the {SIDES[side]} direction's overlap with the identity of {found['role']} "
                f"correlates with the answer margin at r = {number(found['with_answer_margin'])}, and with σ₁ at r = "
                f"{number(found['with_singular_value'])}."
            )
        return lines

    def _side(self, results: Results, side: str) -> str:
        overlap = f"{side}_identity_overlap"
        best = results.first(
            f"FROM first_direction ORDER BY checkpoint_step DESC, {overlap} DESC, role",
        )
        assert best is not None
        rows = results.rows(
            f"SELECT checkpoint_step AS step, {overlap} AS overlap FROM first_direction WHERE role = $label "
            "ORDER BY checkpoint_step",
            label=best["role"],
        )
        chance = self._chance_overlap(results)
        p_value = best[f"{overlap}_permuted_p_value"]
        verdict = (
            f"aligns most with the identity of {best['role']}"
            if (p_value <= 0.05 if self.permutations else best[overlap] > chance)
            else f"aligns with no role's identity beyond {'shuffled labels' if self.permutations else 'chance'}; the "
            f"nearest is {best['role']}"
        )
        text = (
            f"**The first {SIDES[side]} direction of {self.head_label} {verdict}**: overlap {number(best[overlap])} at step "
            f"{best['checkpoint_step']}, where a random direction has {number(chance)}"
        )
        if self.permutations:
            text += (
                f" and shuffled labels reach {number(best[f'{overlap}_permuted_mean'])} on average (p = "
                f"{number(p_value)})"
            )
        if len(rows) > 1:
            peak = max(rows, key=lambda row: float(row["overlap"]))
            text += f". It was {number(rows[0]['overlap'])} at step {rows[0]['step']}"
            if peak is not rows[-1] and peak is not rows[0]:
                text += f" and {number(peak['overlap'])} at most, at step {peak['step']}"
        return f"{text}."


def read_role_spec(text: str) -> RoleSpec:
    """`label=L,context_role=R,group_by=G`, or `L:position_role=R[,group_by=G]`; raises ValueError, naming both forms."""
    label, colon, rest = text.partition(":")
    short = bool(colon) and "=" not in label
    fields: dict[str, str] = {}
    for part in (rest if short else text).split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or name in fields:
            why = f"{name!r} stands twice" if name in fields else f"{part.strip()!r} is no NAME=VALUE"
            raise ValueError(f"--role-spec {text!r}: {why}; {_FORMS}")
        fields[name] = value
    if short:
        fields = {
            "label": label.strip(),
            "context_role": fields.get("position_role", fields.get("context_role", "")),
            "group_by": fields.get("group_by", POSITION_TOKEN),
        }
    absent = [name for name in ("label", "context_role", "group_by") if not fields.get(name)]
    if absent:
        raise ValueError(f"--role-spec {text!r} has no {absent[0]}; {_FORMS}")
    return RoleSpec(fields["label"], fields["context_role"], fields["group_by"])


_FORMS = "write label=NAME,context_role=ROLE,group_by=TOKEN or NAME:position_role=ROLE[,group_by=TOKEN]"


def _matched(before: Directions | None, now: Directions, count: int) -> dict[str, Any]:
    """The rank each of the first `count` directions had a checkpoint before, among all of the head's."""
    from .arrays import match_directions

    if before is None:
        return {"matched_rank": [None] * count, "matched_abs_cosine": [None] * count}
    index, alike = match_directions((before.left, before.right), (now.left, now.right))
    return {"matched_rank": (index[:count] + 1).tolist(), "matched_abs_cosine": alike[:count].tolist()}


def _chance(
    observed: NDArray[np.float64], sampled: NDArray[np.float64] | None
) -> list[dict[str, float | None]]:
    """Per rank, where the observed overlap stands among shuffled ones, Float64[shuffles, ranks]."""
    from .arrays import chance_columns

    found = []
    for place, value in enumerate(observed.tolist()):
        columns = chance_columns("x", value, None if sampled is None else sampled[:, place])
        found.append({name.removeprefix("x_permuted_"): number for name, number in columns.items()})
    return found


def _correlations(results: Results, view: str, sigma: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in results.rows(f"FROM {view}"):
        found[f"{row['role']}.{sigma}_vs_{row['metric']}"] = row["with_singular_value"]
        found[f"{row['role']}.{row['metric']}_vs_answer_margin"] = row["with_answer_margin"]
    return found

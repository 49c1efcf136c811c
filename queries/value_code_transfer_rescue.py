"""value-code-transfer-rescue: can a transferred value code replace the prediction's own (definitions: part 4, C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from ..lake import Lake
from ..lake.datasets import Need
from ..lake.names import spec_id
from ..lake.value_codes import (
    ANSWER_VALUE,
    BASES,
    NOT_REFIT,
    VALUE_CODE_RESCUES,
    WITH_CONTEXT,
    eval_kinds,
    value_code_rescue_parameters,
)
from .chart import Trajectory
from .markdown import number, percent
from .report import RowFile, TextTable
from .results import Results
from .value_code_transfer import ValueCodeTransferReport

SCALARS = (
    "correct_value_logit",
    "value_margin",
    "fixed_clean_competitor_margin",
    "fixed_removed_competitor_margin",
    "negative_answer_loss",
    "value_accuracy",
)
# Fewer than this share of the largest drop is next to nothing to rescue.
_SOME = 0.05


class ValueCodeTransferRescue(ValueCodeTransferReport):
    """Is the prediction's value code causal, and can a code transferred from the source replace it?"""

    context_stage: str | None = Field(None, description="residual stage of the context; with role and rank")
    context_position_role: str | None = Field(
        None, description="role whose positions are averaged into the context"
    )
    context_rank: PositiveInt | None = Field(None, description="rank of the context's identity basis")

    final_values_section: ClassVar[str] = ""
    row_files: ClassVar[Mapping[str, RowFile]] = {
        "rescue_rows": RowFile("value_code_transfer_rescue_rows", "rescue_rows"),
        "summary_rows": RowFile("value_code_transfer_rescue_summary_rows", "summary_rows"),
        "subspace_rows": RowFile("value_code_transfer_rescue_subspaces", "subspace_rows"),
        "pair_rows": RowFile("value_code_transfer_rescue_pairs", "pair_rows"),
    }
    tables = (
        TextTable(
            "top_summary",
            "What is rescued, by what is put in the removed code's place",
            {
                "step": "checkpoint_step",
                "rank": "basis_rank",
                "in its place": "eval_kind",
                "rows": "num_rows",
                "drop of the margin": "total_drop",
                "margin, clean competitor": "fixed_clean",
                "margin, removed run's": "fixed_removed",
                "margin, moving": "moving",
                "answer logit": "logit",
                "log-probability": "log_prob",
                "accuracy then": "value_accuracy",
            },
            "Rescue fractions from means: 0 is the run without the code, 1 the clean run. The drop is that of the margin "
            "against the clean run's competitor, the same whatever is put back. Last step and highest rank first.",
        ),
    )
    charts = (
        Trajectory(
            "rescue_fraction",
            "rescue_chart",
            "How much of what the removed code carries each replacement gives back",
            about="margin over the clean run's competitor: 0 without the code, 1 with the code itself. Cut at −0.5 and 1.5, "
            "steps that lose less than 5 % of the largest drop left out",
            y="rescue_fraction",
            y_title="rescue fraction",
            series="kind",
            panel="panel",
        ),
        Trajectory(
            "margins",
            "margin_chart",
            "What the answer loses without the code, and has with a transferred one",
            about="mean margin of the answer over the clean run's best competitor, held-out examples",
            y="margin",
            y_title="margin, logits",
            series="run",
            panel="panel",
        ),
    )
    how_to_read = (
        ValueCodeTransferReport.split_note,
        "At the target stage and position the clean state h loses its code, h − B Bᵀh, and gets B ẑ in its place; B is the "
        "identity basis of the target (top directions of the token means of the fit examples). The projection is not "
        "centred, so what all values share in these directions goes too. Everything later is recomputed; a record's eval "
        "queries are edited together, those at the same position in a copy of the record each.",
        "oracle_actual_projected puts the code itself back: its fraction is 1 by construction, and its total_drop says "
        "whether the code is causal. A transfer suffices as far as it comes near 1 and its controls do not.",
        ValueCodeTransferReport.controls_note,
        "context_only maps the context's coordinates, source_plus_context source and context together; its controls replace "
        "the source and keep each example's own context. source_plus_context_random_subspace has a map of its own; "
        f"{NOT_REFIT} sends random coordinates through the map that was fitted to the source's basis, as the reference "
        "toolkit does, and says little: it depends on the signs of singular vectors. There is no key control with context.",
        "random_subspace is drawn with torch's CPU generator, seed random_seed + 1009·step + 9176·rank, so that it is that "
        "of published numbers; value-code-transfer-map-report draws other directions.",
        "fixed_clean_competitor_margin keeps the clean run's best wrong value in every run, fixed_removed_competitor_margin "
        "that of the run without the code; value_margin takes each run's own, so that a change of competitor hides in it. "
        "negative_answer_loss is the log-probability over the whole vocabulary, the others are among the values.",
        "mean_rescue_fraction_from_means is the ratio of means, mean_rescue_fraction_per_row the mean of ratios, which rows "
        "with hardly a drop dominate: read the first. Where the drop is small both are noise. rescue_vs_drop_r_squared "
        "compares rescue and drop row by row, without a fit.",
        "Findings say clearly more where it is by more than 5 points, fractions above 100 % counted as 100 %.",
    )
    next_queries = (
        (
            "How often the model still names the answer among all tokens, by run:",
            "SELECT step, spec, eval_kind, avg((best_token = answer_token)::INT) AS accuracy FROM value_code_runs JOIN "
            "events USING (run, probe, event) WHERE run = $run AND eval_kind <> 'clean' GROUP BY ALL ORDER BY ALL",
        ),
        (
            "How alike the target's directions are to those of the step before:",
            "SELECT step, spec, list_transform(list_zip(directions, lag(directions) OVER (PARTITION BY spec ORDER BY "
            "step)), lambda p: round(abs_cosine(p[1], p[2]), 3)) AS cosines FROM value_code_bases WHERE run = $run AND "
            "basis_role = 'target_value_identity' ORDER BY spec, step",
        ),
    )
    place: ClassVar[tuple[int, int]] = (9, 3)
    example: ClassVar[str] = (
        "lakebed query value-code-transfer-rescue --lake demo.lake --run demo --source-stage layer_0_post_mlp "
        "--target-stage layer_1_post_mlp --source-position-role support_value --target-position-role prediction "
        "--group-by answer_value --basis-rank 4 --control shuffled_answer_value --control random_subspace --out rescue"
    )
    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "checkpoints"
    demo_options: ClassVar[Mapping[str, Any]] = {
        "source_stage": "layer_0_post_mlp",
        "target_stage": "layer_1_post_mlp",
        "source_position_role": "support_value",
        "target_position_role": "prediction",
        "group_by": ANSWER_VALUE,
        "basis_rank": (8,),
        "control": ("shuffled_answer_value", "random_subspace"),
        "context_stage": "layer_0_post_mlp",
        "context_position_role": "prediction",
        "context_rank": 8,
        "split": ("validation_iid",),
    }

    @model_validator(mode="after")
    def _whole_context(self) -> ValueCodeTransferRescue:
        given = (self.context_stage, self.context_position_role, self.context_rank)
        if any(of is None for of in given) and any(of is not None for of in given):
            raise ValueError(
                "--context-stage, --context-position-role and --context-rank go together: give all, or none"
            )
        return self

    @property
    def has_context(self) -> bool:
        """Whether a context was asked for."""
        return self.context_rank is not None

    def stages_read(self) -> tuple[str, ...]:
        """Adds the context's."""
        return (*super().stages_read(), *((self.context_stage,) if self.context_stage else ()))

    def roles_read(self) -> tuple[str, ...]:
        """Adds the context's."""
        context = (self.context_position_role,) if self.context_position_role else ()
        return (*super().roles_read(), *context)

    def needs(self) -> tuple[Need, ...]:
        """The reruns of every rank."""
        return tuple(Need(VALUE_CODE_RESCUES, of) for of in self._rescues())

    def _rescues(self) -> list[dict[str, Any]]:
        context = None
        if self.context_stage and self.context_position_role and self.context_rank:
            context = (self.context_stage, self.context_position_role, self.context_rank)
        return [
            value_code_rescue_parameters(
                source_stage=self.source_stage,
                target_stage=self.target_stage,
                source_position_role=self.source_position_role,
                target_position_role=self.target_position_role,
                group_by=self.group_by,
                basis_rank=rank,
                controls=self.control,
                fit_fraction=self.fit_fraction,
                ridge_lambda=self.ridge_lambda,
                random_seed=self.random_seed,
                context=context,
                probe=self.probe,
                split=self.split,
                max_records=self.max_records,
            )
            for rank in self.basis_rank
        ]

    def parameters(self) -> dict[str, Any]:
        """Adds `specs`, one per rank, `eval_kinds`, `controls` as rows name them, `scalars` and `basis_roles`, in order."""
        return {
            **super().parameters(),
            "specs": [spec_id(of) for of in self._rescues()],
            "eval_kinds": eval_kinds(self.control, self.has_context),
            "controls": list(self.control) or [""],
            "scalars": list(SCALARS),
            "basis_roles": list(BASES),
        }

    def warnings(self, results: Results) -> list[str]:
        """How often the shuffle changes nothing, and where there is nothing to rescue."""
        lines = self.shuffle_warning(results, "rescue_rows")
        small = results.rows(
            "SELECT checkpoint_step FROM headline WHERE eval_kind = 'true_transfer' AND basis_rank = $rank "
            f"QUALIFY mean_total_drop <= 0 OR mean_total_drop < {_SOME} * max(mean_total_drop) OVER () ORDER BY 1",
            rank=max(self.basis_rank),
        )
        if small:
            steps = ", ".join(str(row["checkpoint_step"]) for row in small)
            lines.append(
                f"At {'step' if len(small) == 1 else 'steps'} {steps} taking the code away lowers the margin by less than "
                f"{percent(_SOME)} of what it does at most, or raises it: rescue fractions there are noise."
            )
        return lines

    def findings(self, results: Results) -> list[str]:
        """Whether the code is causal, whether the transfer replaces it and beats its controls, and from which step on."""
        top = max(self.basis_rank)
        rows = results.rows(
            "FROM headline WHERE eval_kind = 'oracle_actual_projected' AND basis_rank = $rank ORDER BY checkpoint_step",
            rank=top,
        )
        lines = [self._causal(results, rows[-1], top)]
        if not _is_causal(rows[-1]):
            return [
                *lines,
                "So there is nothing to rescue: the fractions below say how far a run moved, not that a transfer suffices.",
            ]
        contests = results.rows("FROM against_controls ORDER BY basis_rank, checkpoint_step")
        for transfer in ("true_transfer", WITH_CONTEXT):
            of = [row for row in contests if row["transfer"] == transfer and row["basis_rank"] == top]
            if of:
                lines += [self._rescue(of[-1], rows[-1]), self._since(of, transfer, top)]
        return [*lines, *self._other_ranks(contests, top)]

    def _causal(self, results: Results, row: dict[str, Any], rank: int) -> str:
        accuracy = results.first(
            "FROM summary_rows WHERE scalar_name = 'value_accuracy' AND eval_kind = 'oracle_actual_projected' AND "
            "basis_rank = $rank AND checkpoint_step = $step",
            rank=rank,
            step=row["checkpoint_step"],
        )
        assert accuracy is not None
        verdict = "**is causal**" if _is_causal(row) else "is **not** shown to be causal"
        moved, drop = ("lowers" if row["mean_total_drop"] >= 0 else "raises"), abs(row["mean_total_drop"])
        return (
            f"At step {row['checkpoint_step']} the rank-{rank} code of {self.target_stage} / {self.target_position_role} "
            f"{verdict}: taking it away {moved} the margin over the clean run's competitor by **{number(drop)}** "
            f"({number(row['mean_clean_scalar'])} → {number(row['mean_target_subspace_removed_scalar'])}, lower in "
            f"{percent(row['dropped_fraction'])} of {row['num_rows']} held-out examples), and accuracy among values from "
            f"{percent(accuracy['mean_clean_scalar'])} to {percent(accuracy['mean_target_subspace_removed_scalar'])}."
        )

    def _rescue(self, contest: dict[str, Any], oracle: dict[str, Any]) -> str:
        if contest["fraction"] is None:
            return f"{contest['transfer']}: nothing was lost, so nothing can be rescued."
        patched = (
            oracle["mean_target_subspace_removed_scalar"] + contest["fraction"] * oracle["mean_total_drop"]
        )
        said = (
            f"{contest['transfer']} from {self.source_stage} / {self.source_position_role} gives back "
            f"**{percent(contest['fraction'])}** of that (margin {number(patched)})"
        )
        if contest["other"] is None:
            return (
                f"{said}. No --control was asked for, so nothing says how much of that any source would give."
            )
        verdict = "clearly more than every" if contest["is_ahead"] else "**not** clearly more than every"
        what = "control" if contest["transfer"] != WITH_CONTEXT else "control, or either alone"
        return f"{said}, {verdict} {what}: the best, {contest['other']}, gives {percent(contest['other_fraction'])}."

    def _since(self, rows: list[dict[str, Any]], transfer: str, rank: int) -> str:
        since = None
        for row in reversed(rows):
            if not row["is_ahead"] or row["fraction"] is None or row["fraction"] < 0.5:
                break
            since = row["checkpoint_step"]
        if since is None:
            return f"At rank {rank} {transfer} does not give back half, and clearly more than the others, at the last step."
        last = rows[-1]["checkpoint_step"]
        when = "at the last step" if since == last else f"from step **{since}** to the last"
        return (
            f"At rank {rank} {transfer} gives back at least half, and clearly more than the others, {when}."
        )

    def _other_ranks(self, contests: list[dict[str, Any]], top: int) -> list[str]:
        last = max(row["checkpoint_step"] for row in contests)
        rows = [
            row
            for row in contests
            if row["checkpoint_step"] == last
            and row["basis_rank"] != top
            and row["transfer"] == "true_transfer"
        ]
        if not rows:
            return []
        listed = "; ".join(
            f"rank {row['basis_rank']} {percent(row['fraction'])} (best control {percent(row['other_fraction'])})"
            for row in rows
        )
        return [f"true_transfer at the other ranks, last step: {listed}."]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The formulas in words."""
        return {
            "calculation": {
                "fit_split": "fit if the first 8 bytes of sha256('sample_id:query_index') / (2^64 - 1) < fit_fraction",
                "map": "W = (A'A + lambda I)^-1 A'Z on centred fit coordinates; zhat = (a - mean a) W + mean z",
                "target_removed": "h - B B'h at the target stage and position, h of the clean run",
                "patched": "h - B B'h + B zhat",
                "total_drop": "clean - removed",
                "rescue": "patched - removed",
                "rescue_fraction": "rescue / total_drop, null if |total_drop| <= 1e-12",
                "random_subspace": "Q of the QR of torch.randn, CPU generator, seed random_seed + 1009 step + 9176 rank",
            }
        }


def _is_causal(oracle: Mapping[str, Any]) -> bool:
    """Whether taking the code away lowers the margin, on average and in most examples."""
    return bool(oracle["mean_total_drop"] > 0 and oracle["dropped_fraction"] > 0.5)

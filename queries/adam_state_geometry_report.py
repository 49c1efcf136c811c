"""adam-state-geometry-report: spectra of Adam's state and of the terms of its updates (definitions: part 3, I)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from ..lake import Lake
from .chart import Heatmap, StackedBars, Trajectory
from .interval_options import IntervalOptions
from .markdown import number, percent
from .report import ReportFailed, RowFile, TextTable
from .results import Results
from .weight_targets import MATRIX_OF, Target, check_form, choose_targets, targets_of

SourceKind = Literal[
    "weight",
    "exp_avg",
    "bias_corrected_exp_avg",
    "sqrt_exp_avg_sq",
    "adam_denominator",
    "raw_sgd",
    "clipped_sgd",
    "adam_current_gradient",
    "adam_historical_momentum",
    "adam_preconditioned",
    "weight_decay",
    "reconstructed_adamw_update",
    "actual_parameter_delta",
    "reconstruction_error",
]
ALL_KINDS: tuple[SourceKind, ...] = get_args(SourceKind)


class AdamStateGeometryReport(IntervalOptions):
    """How concentrated Adam's moments, the terms of its updates and the updates are, and which term carries them."""

    target: tuple[str, ...] = Field(
        (), description="matrix to decompose, as L2H1.W_QK, L2H1.q_proj or L0MLP.fc_in; default all"
    )
    source_kind: tuple[SourceKind, ...] = Field(ALL_KINDS, min_length=1, description="field to decompose")
    top_k: PositiveInt = Field(8, description="write this many singular values per spectrum")
    top_vector_ranks: NonNegativeInt = Field(
        2, description="write singular vectors of the ranks up to this one"
    )
    markdown_top_k_rows: PositiveInt = Field(80, description="rows of a table in Markdown and JSON, at most")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "metric": RowFile("adam_state_geometry_metrics", "metric_rows"),
        "singular_value": RowFile("adam_state_geometry_singular_values", "singular_value_rows"),
        "singular_vector": RowFile("adam_state_geometry_singular_vectors", "singular_vector_rows"),
        "summary": RowFile("adam_state_geometry_summary", "summary_rows"),
    }
    tables = (
        TextTable(
            "field_means",
            "The fields",
            {
                "field": "source_kind",
                "effective rank / number of singular values": "effective_rank_share",
                "top-3 mass": "spectral_mass_top3",
                "‖F‖": "fro_norm",
                "cosine of top direction with the update's": "top_direction_update_cosine",
                "share of the update's top direction": "update_top_direction_share",
            },
            "Means over the intervals and matrices.",
        ),
        TextTable(
            "top_carriers",
            "What carries the top direction of each update",
            {
                "matrix": "target",
                "carried momentum": "momentum",
                "current gradient": "current_gradient",
                "weight decay": "weight_decay",
                "rounding": "rounding",
            },
            "Shares u₁·Fv₁ / σ₁ of the actual update's first singular triple, means over the intervals; they add up to 1.",
        ),
        TextTable(
            "top_concentrated",
            "The most concentrated spectra",
            {
                "matrix": "target",
                "field": "source_kind",
                "mode": "functional_matrix_mode",
                "mean effective rank": "mean_effective_rank",
                "of": "singular_value_count",
                "first": "first_effective_rank",
                "last": "last_effective_rank",
                "Δ": "delta_effective_rank",
                "top-3 mass": "mean_spectral_mass_top3",
                "σ₁ first": "first_top_singular_value",
                "σ₁ last": "last_top_singular_value",
            },
            "By mean effective rank as a share of the singular values there are; second moments come last.",
        ),
    )
    charts = (
        Trajectory(
            "update_effective_rank",
            "rank_chart",
            "How spread out the update of each matrix is",
            about="effective rank of the actual update as a share of its singular values; W_QK and W_OV to first order",
            y="effective_rank_share",
            y_title="effective rank / number of singular values",
            series="target",
            x_title="training step the update starts from",
        ),
        Trajectory(
            "field_effective_rank",
            "field_chart",
            "How spread out each field is",
            about="effective rank as a share of the singular values there are, mean over the matrices",
            y="effective_rank_share",
            y_title="effective rank / number of singular values",
            series="source_kind",
            x_title="training step the update starts from",
        ),
        StackedBars(
            "top_direction_parts",
            "part_chart",
            "What carries the top direction of an update",
            about="each term along the update's first singular vectors, as a share of that singular value; arithmetic",
            y="share",
            y_title="share of the update's top direction",
            y_format="%",
            x_title="training step the update starts from",
        ),
        Heatmap(
            "momentum_share",
            "momentum_chart",
            "How much of each update's top direction is carried momentum",
            about="the momentum term along the update's first singular vectors, as a share of that singular value",
            value="share",
            value_title="momentum's share",
            series="target",
            x_title="training step the update starts from",
        ),
    )
    how_to_read = (
        "Every row is one optimizer step t → t+1 and one matrix. State is that at t; the terms are those of the update to "
        "t+1, from the gradient recorded there. Nothing is recomputed, and everything is float64 over stored float32.",
        "The split is arithmetic, not a counterfactual: both Adam terms are divided by the same new denominator, which "
        "contains the current gradient, and momentum is made of gradients that earlier weights caused. `raw_sgd` and "
        "`clipped_sgd` reuse AdamW's learning rate and are no part of the sum.",
        "W_QK and W_OV: `weight` is the exact product W_QᵀW_K or W_VᵀW_Oᵀ (rank at most d_head); of every other field F it "
        "is the first-order effect dW_QᵀW_K + W_QᵀdW_K with dW = F (rank at most 2 d_head). Of the second moments that is "
        "a formal expression: nothing moves by them.",
        "`adam_denominator` is sqrt(v / (1 − β₂ᵗ)) + ε of the state before the update, eps alone at step 0; the terms are "
        "divided by the one after it. Entries of second moments are never negative, so their first direction is large "
        "whatever was learned.",
        "`update_top_direction_share` is u₁·Fv₁ / σ₁ with the actual update's first singular triple: current gradient, "
        "momentum and decay less `reconstruction_error` add up to 1. `top_direction_update_cosine` compares the first "
        "direction of a field, u vᵀ, with that of the update, and needs no signs.",
        "`clipped_sgd`, `bias_corrected_exp_avg` and decoupled `weight_decay` are multiples of `raw_sgd`, `exp_avg` and "
        "`weight`, so their spectra have the same shape. Effective rank is (Σσ)² / Σσ², over every singular value.",
    )
    next_queries = (
        (
            "The recorded gradient of one matrix, row by row, where its rows are largest:",
            "SELECT step, row, list_dot_product(values, values) AS squared FROM gradients WHERE run = $run AND parameter = "
            "'blocks.0.attn.q_proj.weight' AND step = 21 ORDER BY squared DESC LIMIT 8",
        ),
    )
    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "window"
    demo_options: ClassVar[Mapping[str, Any]] = {"checkpoint_stride": 8}
    place: ClassVar[tuple[int, int]] = (8, 2)
    example: ClassVar[str] = (
        "lakebed query adam-state-geometry-report --lake demo.lake --run demo --steps 20:24 --target L1H0.W_QK "
        "--target L1H0.W_OV --out geometry"
    )

    @field_validator("target")
    @classmethod
    def _has_form(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_form(names)
        return names

    def parameters(self) -> dict[str, Any]:
        """Adds `all_fields`, the order of the fields."""
        return {**super().parameters(), "all_fields": list(ALL_KINDS)}

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """The targets, and the spectra of every field of them."""
        slices = results.rows("FROM weight_slices")
        chosen = self._targets(slices, results.run)
        if name == "targets":
            return _target_columns(chosen)
        from .arrays.field_spectra import Asked, field_spectra
        from .arrays.recorded_updates import families, updates

        sources = self.sources(results.lake, results.run)
        # Anchors that no interval touches are held, and not what this report is about.
        results.steps = sorted({step for t in sources for step in (t, t + 1)})
        names = [target.name for target in chosen]
        parts = families(slices, {name: place for place, name in enumerate(names)})
        used = {parameter for family in parts for part in family.parts for parameter in part.parameters}
        of = updates(
            sources,
            results.rows("FROM recorded_steps"),
            results.rows("FROM update_counters"),
            {row["parameter"]: row["optimizer_group"] for row in slices if row["parameter"] in used},
        )
        kinds = tuple(kind for kind in ALL_KINDS if kind in self.source_kind)
        return field_spectra(
            results.lake, results.run, of, parts, Asked(kinds, self.top_k, self.top_vector_ranks, names)
        )

    def _targets(self, slices: list[dict[str, Any]], run: str) -> list[Target]:
        """The matrices to decompose; raises ReportFailed for one that the optimizer does not train."""
        trained = targets_of([row for row in slices if row["optimizer_group"] is not None])
        there = targets_of(slices)
        frozen = {target.name for target in there} - {target.name for target in trained}
        for name in self.target:
            if name in frozen:
                raise ReportFailed(
                    f"{self.report_name()}: {name} of run {run!r} is not in the optimizer, so nothing updates it; leave "
                    "that --target out"
                )
        return choose_targets(self.target, trained, run)

    def warnings(self, results: Results) -> list[str]:
        """Where the raw gradient is unknown, and what has no direction."""
        lines = []
        unknown = results.value(
            "SELECT count(DISTINCT target_step) FROM metric WHERE clip_coefficient IS NULL"
        )
        if unknown:
            lines.append(
                f"In {unknown:,} intervals no single factor took the raw gradient to the one the optimizer saw; what is "
                "recorded there is the latter, so `raw_sgd` is `clipped_sgd`."
            )
        zero = results.rows(
            "SELECT source_kind, count(*) AS count, min(source_step) AS first FROM measured "
            "WHERE top_singular_value = 0 GROUP BY source_kind ORDER BY min(field_position)"
        )
        if zero:
            listed = ", ".join(
                f"{row['source_kind']} ({row['count']:,}, first at step {row['first']})" for row in zero
            )
            lines.append(
                f"Fields that are zero, and have no effective rank and no direction: {listed}. Before the first update "
                "momentum is."
            )
        return lines

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """What a machine reader needs beside the rows."""
        return {
            "overview": results.first("FROM whole"),
            "largest_relative_reconstruction_error": results.first("FROM rounding"),
            "effective_rank": "(sum of singular values)^2 / sum of squares",
            "update_top_direction_share": "u1^T F v1 / sigma1 of the actual update",
            "terms": "arithmetic split of the update, not a counterfactual",
        }

    def findings(self, results: Results) -> list[str]:
        """Where spectra are most concentrated, what preconditioning does to them, and which term carries the updates."""
        return [line for line in (_concentrated(results), _spread(results), *_carried(results)) if line]


def _target_columns(targets: list[Target]) -> Mapping[str, Any]:
    from .arrays import as_columns

    return as_columns(
        [
            {
                "number": place,
                "target": target.name,
                "layer": target.layer,
                "head": target.head,
                "projection": target.projection,
                "matrix": MATRIX_OF[target.projection],
                "is_product": target.projection.startswith("W_"),
            }
            for place, target in enumerate(targets)
        ]
    )


def _concentrated(results: Results) -> str:
    whole = results.first("FROM whole")
    assert whole is not None
    text = (
        f"{whole['intervals']:,} one-step interval{'' if whole['intervals'] == 1 else 's'} between steps "
        f"{whole['first_step']} and {whole['last_step']}, {whole['targets']} matrices, {whole['fields']} fields"
    )
    top = results.first(
        "FROM top_concentrated WHERE NOT is_second_moment ORDER BY head IS NULL, effective_rank_share, target"
    )
    if top is None:
        return f"{text}."
    of_head = " of a head" if top["head"] is not None else ""
    return (
        f"{text}. The most concentrated spectrum{of_head} is **`{top['source_kind']}` of {top['target']}**: effective rank "
        f"{number(top['mean_effective_rank'])} of {top['singular_value_count']} singular values, top-3 mass "
        f"{percent(top['mean_spectral_mass_top3'])}, on average (second moments aside)."
    )


def _spread(results: Results) -> str:
    held = {row["source_kind"]: row["effective_rank_share"] for row in results.rows("FROM field_means")}
    raw, update = held.get("raw_sgd"), held.get("adam_preconditioned")
    if raw is None or update is None:
        return ""
    what = "spreads it out over more directions" if update > raw else "leaves it no more spread out"
    return (
        f"The raw gradient's effective rank is {percent(raw)} of what it can be, that of the preconditioned update "
        f"{percent(update)}: Adam {what}."
    )


def _carried(results: Results) -> list[str]:
    means = results.first(
        "SELECT list_avg(list(momentum ORDER BY target)) AS momentum, "
        "list_avg(list(current_gradient ORDER BY target)) AS current_gradient, "
        "list_avg(list(weight_decay ORDER BY target)) AS weight_decay FROM carriers"
    )
    if means is None or means["momentum"] is None or means["current_gradient"] is None:
        return []
    names = {
        "momentum": "carried momentum",
        "current_gradient": "the current gradient",
        "weight_decay": "weight decay",
    }
    held = {name: means[name] for name in names if means[name] is not None}
    first = max(held, key=lambda name: held[name])
    others = " and ".join(f"{percent(value)} {names[name]}" for name, value in held.items() if name != first)
    least, most = (
        results.first(f"SELECT target, {first} AS share FROM carriers ORDER BY {first} {way}, target LIMIT 1")
        for way in ("", "DESC")
    )
    assert least is not None
    assert most is not None
    lines = [
        f"The top direction of an update is **{percent(held[first])} {names[first]}**, {others} (u₁·Fv₁ / σ₁, mean over the "
        f"matrices): from {percent(least['share'])} in {least['target']} to {percent(most['share'])} in {most['target']}. "
        "The split is arithmetic, not a counterfactual: without one term the later gradients and the denominators would "
        "have been others."
    ]
    error = results.first("FROM rounding")
    if error is not None and error["relative_error"] is not None:
        lines.append(
            f"The terms give back the recorded update up to float32 rounding: at worst {percent(error['relative_error'])} "
            f"of its norm ({error['target']} at step {error['source_step']})."
        )
    return lines

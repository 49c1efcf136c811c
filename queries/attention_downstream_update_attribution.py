"""attention-downstream-update-attribution: which parameters moved what follows from a head's match (definitions 2, G)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from ..lake import Lake
from .attribution_report import ARITHMETIC, DecomposedReport
from .chart import Grid, Scatter, Trajectory
from .decomposed_charts import TOP_CONTRIBUTIONS
from .decomposed_sql import DECOMPOSED_SUMMARY, interval_facts
from .downstream_options import HOW_TO_READ, UNITS, DownstreamOptions
from .key_roles import check_key_rule
from .markdown import number, percent
from .pair_selection import RecordSide
from .report import ReportFailed, RowFile, TextTable
from .results import Results

_STEM = "attention_downstream_update_attribution"


class AttentionDownstreamUpdateAttribution(DecomposedReport, DownstreamOptions):
    """Between steps, which parameters moved a head's attention, what it writes, and the answer?

    The source's readout direction is held at both ends where a scalar has one.
    """

    more_views: ClassVar[str] = DECOMPOSED_SUMMARY

    record_side: tuple[RecordSide, ...] = Field(
        ("clean", "corrupted"),
        min_length=1,
        description="record of the pair that is measured; the first is the summary's",
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name)
        for name in ("scalar_rows", "metric_rows", "decomposition_rows", "group_rows", "pair_rows")
    }
    tables = (
        TextTable(
            "scalar_table",
            "What moved, and where in the model that was done",
            {
                "scalar": "label",
                "at the start": "first_value",
                "at the end": "last_value",
                "Σ actual change": "sum_actual_delta",
                "W_Q": "W_Q",
                "W_K": "W_K",
                "W_V": "W_V",
                "W_O": "W_O",
                "other attention": "other attention",
                "MLPs": "MLPs",
                "embeddings": "embeddings",
                "LayerNorms": "LayerNorms",
            },
            about="Means over all pairs of the first record side. W_Q to W_O are the head's own, biases of queries, keys "
            "and values in; the eight columns are disjoint and add up to gradient times update, integrated where that was "
            "asked for.",
        ),
        TextTable(
            "explained",
            "How well it is explained",
            {
                "scalar": "label",
                "intervals": "num_intervals",
                "of them in growth": "growing_intervals",
                "Σ actual change": "sum_actual_delta",
                "Σ first order": "sum_predicted_delta",
                "Σ integrated": "sum_integrated_delta",
                "Σ|error| / Σ|change|, first order": "error_over_change",
                "integrated": "integrated_error_over_change",
                "mean relative error, first order": "mean_relative_error",
                "signs that match": "sign_matches",
                "switches of competitor": "switches",
            },
            about="Where the best competitor switches between the ends of an interval (share of the pairs, mean over the "
            "intervals) the path bends: first order cannot see it, and integration takes more points.",
        ),
    )
    charts = (
        Trajectory(
            "scalars",
            "unit_ledger",
            "What moved, and when",
            about="running sums of the actual changes, mean over the pairs of the first record side",
            series="series",
            panel="unit",
            panel_titles={unit: f"Σ Δ {title}" for unit, title in UNITS.items()},
        ),
        Grid(
            "regions",
            "region_grid",
            "In which parameters was each scalar moved?",
            about="gradient · update, summed over the intervals, as a share of the sizes of all eight",
            value_title="signed share",
            domain=(-1, 1),
        ),
        Scatter(
            "actual_vs_predicted",
            "unit_scatter",
            "Does the first order explain the change?",
            about="a point is a scalar over an interval; on the diagonal gradient times update is the whole of it",
            label="interval",
            color="series",
            color_title="scalar",
            diagonal=True,
            highlight=3,
            panel="unit",
            panel_titles={
                unit: (f"first order, {title}", f"actual change, {title}") for unit, title in UNITS.items()
            },
        ),
        replace(TOP_CONTRIBUTIONS, title="Which groups of parameters carried the first scalar's change?"),
    )
    how_to_read = (
        *HOW_TO_READ,
        "A contribution is the source's gradient times the parameters' change, summed over a group. First order is exact "
        "only for small steps: with `--integrate N` the gradient is averaged along the straight path, and contributions add "
        "up to the actual change.",
        "The tied embedding is one tensor and counts once, as what is read and as the unembedding. "
        "`predicted_delta_counting_aliases` counts every name of it, as published numbers of the reference toolkit do.",
        "Groups of one kind add up to their whole; groups of different kinds overlap.",
        ARITHMETIC,
    )
    next_queries = (
        (
            "Through which heads were the head's scalars moved?",
            "SELECT scalar, format('L{}H{}', layer, head) AS of_head, sum(actual_update) AS contribution FROM "
            "attribution_slices WHERE run = $run AND slice_kind = 'head_projection' AND split = '__all__' AND pair_type = "
            "'__all__' AND point = 'source' GROUP BY ALL ORDER BY scalar, abs(contribution) DESC",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 8)
    example: ClassVar[str] = (
        "lakebed query attention-downstream-update-attribution --lake demo.lake --run demo --head L1H1 --score-query-role "
        "prediction --support-key-role support_key --distractor-key-role key_distractors --record-side clean --pair-type "
        "support_value --out downstream-updates"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "score_query_role": "prediction",
        "support_key_role": "support_key",
        "distractor_key_role": "key_distractors",
        "record_side": ("clean",),
        "pair_type": ("support_value",),
    }

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per record side and scalar."""
        return self.downstream_scalars(self.record_side)

    def check(self, results: Results) -> None:
        """At least one interval, and keys of both roles for every query."""
        super().check(results)
        if len(results.steps) < 2:
            raise ReportFailed(
                f"{self.report_name()}: at least two steps are needed, and --steps leaves {len(results.steps)}"
            )
        check_key_rule(results, self.score_query_role, self.support_key_role, self.distractor_key_role)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        return {
            **super().facts(lake, results),
            "head_label": self.head_label,
            "summary": {
                **interval_facts(results, self.top_k_groups),
                "final_metric_rows": results.rows(
                    "SELECT * FROM metric_rows WHERE split = '__all__' AND pair_type = '__all__' AND target_step = "
                    "(SELECT max(target_step) FROM intervals) ORDER BY record_side, scalar_name"
                ),
                "by_scalar": results.rows("FROM scalar_table"),
                "top_contributions": results.rows("FROM largest_contributions"),
            },
            "calculation": {
                "actual_delta": "mean over pairs of scalar(target) - scalar(source), each end's own best competitor",
                "predicted_delta": "gradient of the mean scalar at the source . (target - source weights)",
                "integrated_delta": "the same with the gradient averaged along the straight path",
                "head_margin_dla_fixed_readout": "head write . readout gradient of the source, held at both ends",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Which scalars moved, when the clearest did, in which parameters, and how well that is explained."""
        movers = results.rows("FROM movers")
        of_the_head = [of for of in movers if of["of_the_head"]] or movers
        return [
            _overview(self.head_label, movers, results.steps),
            *(_carried(self.head_label, of, results) for of in of_the_head[:3]),
            _explained(movers),
        ]


def _overview(head: str, movers: list[dict[str, Any]], steps: Sequence[int]) -> str:
    grew = sum(of["sum_actual_delta"] > 0 for of in movers)
    listed = ", ".join(
        f"`{of['label']}` {_signed(of['sum_actual_delta'])}{_in_deviations(of)}" for of in movers
    )
    return (
        f"**{grew} of {len(movers)} scalars of {head} grew between steps {steps[0]} and {steps[-1]}.** By the size of the "
        f"change in standard deviations (sd) over the pairs: {listed}."
    )


def _carried(head: str, of: dict[str, Any], results: Results) -> str:
    regions = results.rows(
        "SELECT region, place, contribution, share_of_actual FROM region_sums WHERE label = $label ORDER BY place",
        label=of["label"],
    )
    inside = sum(row["contribution"] for row in regions if row["place"] <= 4)
    outside = sum(row["contribution"] for row in regions if row["place"] > 4)
    largest = sorted(regions, key=lambda row: -abs(row["contribution"]))[:4]
    listed = ", ".join(
        f"{row['region']} {_signed(row['contribution'])} ({percent(row['share_of_actual'])})"
        for row in largest
    )
    verb = "grew" if of["sum_actual_delta"] > 0 else "fell"
    return (
        f"`{of['label']}` {verb} by {number(abs(of['sum_actual_delta']))}, fastest from {of['fastest_source_step']} to "
        f"{of['fastest_target_step']} ({_signed(of['fastest_delta'])}). {head}'s own W_Q, W_K, W_V and W_O account for "
        f"{_signed(inside)} of gradient times update, everything else for {_signed(outside)}; largest: {listed} (share of "
        "the actual change)."
    )


def _explained(movers: list[dict[str, Any]]) -> str:
    def spread(key: str) -> str:
        known = [of[key] for of in movers if of[key] is not None]
        if not known:
            return "an unknown share"
        low, high = percent(min(known)), percent(max(known))
        return low if low == high else f"{low} to {high}"

    text = f"Gradient times update at each source misses {spread('error_over_change')} of the change, interval by interval"
    if movers[0]["sum_integrated_delta"] is None:
        return f"{text}; `--integrate 4` would follow the path between the steps."
    return f"{text}; integrated along the path, {spread('integrated_error_over_change')}."


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value, 3)}"


def _in_deviations(of: dict[str, Any]) -> str:
    change = of["standardized_change"]
    return "" if change is None else f" ({number(change, 2)} sd)"

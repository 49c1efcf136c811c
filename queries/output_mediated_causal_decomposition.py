"""output-mediated-causal-decomposition: does a component act itself, or through later ones? (definitions 4 §H)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt, field_validator, model_validator

from ..lake.interventions import intervention, zero
from .chart import Bars
from .component_dlas import CAUSAL_SCALARS, DLA_IS_NO_SHARE, ComponentDLAReport
from .component_options import read_components, require_ablatable, require_downstream
from .markdown import number, percent
from .report import RowFile, TextTable
from .scalar_pairs import EndpointReport, ScalarName

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

_STEM = "output_mediated_causal_decomposition"


class OutputMediatedCausalDecomposition(ComponentDLAReport, EndpointReport):
    """What a zeroed component costs an answer: how much is its own DLA, how much what later components' DLAs lose?"""

    scalar: tuple[ScalarName, ...] = Field(
        CAUSAL_SCALARS,
        min_length=1,
        description="scalar of the answer; default four that keep their competitor",
    )
    source_component: tuple[str, ...] = Field(
        ..., min_length=1, description="component that is zeroed: L0H1, L0MLP"
    )
    downstream_component: tuple[str, ...] = Field(
        ..., min_length=1, description="component after every source, through which it may act: L1H0, L1MLP"
    )
    markdown_top_k_rows: PositiveInt = Field(48, description="summary rows in each table of the Markdown")
    plot_top_k_rows: PositiveInt = Field(24, description="summary rows drawn in each chart, largest first")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "source_rows": RowFile(f"{_STEM}_source_rows", "source_rows"),
        "downstream_rows": RowFile(f"{_STEM}_downstream_rows", "downstream_rows"),
        "source_summary_rows": RowFile(f"{_STEM}_source_summary_rows", "source_summary_rows"),
        "downstream_summary_rows": RowFile(f"{_STEM}_downstream_summary_rows", "downstream_summary_rows"),
        "pair_rows": RowFile(f"{_STEM}_pairs", "pair_rows"),
    }
    tables = (
        TextTable(
            "top_sources",
            "What a source's loss costs, and what its own and later DLAs say of it",
            {
                "scalar": "scalar_name",
                "end": "endpoint_kind",
                "source": "source_component",
                "total": "mean_total_causal_effect",
                "direct DLA": "mean_direct_source_dla",
                "mediated sum": "mean_mediated_downstream_sum",
                "residual": "mean_mediation_residual",
                "explained": "mean_explained_fraction",
                "same sign": "sign_match_fraction",
                "R²": "total_vs_direct_plus_mediated_r_squared",
                "correlation": "total_vs_direct_plus_mediated_correlation",
            },
            "Means over pairs and intervals. Explained = (direct + mediated) / total, of the means.",
        ),
        TextTable(
            "top_downstream",
            "Whose DLA falls with the source",
            {
                "scalar": "scalar_name",
                "end": "endpoint_kind",
                "source": "source_component",
                "downstream": "downstream_component",
                "DLA": "mean_baseline_downstream_dla",
                "without the source": "mean_ablated_downstream_dla",
                "mediated": "mean_mediated_effect",
                "|mediated|": "mean_abs_mediated_effect",
            },
        ),
    )
    charts = (
        Bars(
            "source_mediation",
            "source_chart",
            "What each source's loss costs, and how much of it DLA finds",
            about="means over pairs and intervals, logits or nats",
            value="value",
            value_title="effect on the scalar",
            label="source_component",
            panel="panel",
            color="quantity",
            rows=96,
        ),
        Bars(
            "downstream_mediation",
            "downstream_chart",
            "Through which later components does a source act?",
            about="mean fall of the later component's DLA when the source is zeroed",
            value="value",
            value_title="mediated effect",
            label="label",
            panel="panel",
            rows=48,
        ),
    )
    how_to_read = (
        "`total_causal_effect` = scalar of the untouched run − scalar with the source zeroed at every position; "
        "`direct_source_dla` is the source's DLA in the untouched run; `mediated_effect` of a later component is its DLA in "
        "the untouched run − its DLA without the source, each with that run's own write and own gradient.",
        DLA_IS_NO_SHARE
        + " The same holds in the run without the source. So over *all* other parts, earlier ones and biases too, mediated "
        "effects sum to about −direct: with every part listed, direct + mediated is about 0 whatever the total is. What is "
        "explained is a comparison, not an account.",
        "`mediation_residual` = total − (direct + mediated). It has what components that were not listed mediate, and how "
        "far the final LayerNorm is from linear over so large a change.",
        "Competitors are those of the untouched run and are not chosen again in the zeroed one.",
        "A head lies after heads and MLPs of earlier layers, an MLP also after the heads of its own layer. The reference "
        "toolkit takes any pair; components that the source cannot reach are refused here, since what their DLA loses is "
        "the final LayerNorm's doing alone.",
    )
    next_queries = (
        (
            "Every part's DLA of the answer's log-probability, untouched and with one component zeroed:",
            "SELECT component, intervention, avg(log_prob_dla) AS dla FROM intervention_components WHERE run = $run AND "
            "step = (SELECT max(step) FROM intervention_components) GROUP BY ALL ORDER BY component, intervention",
        ),
    )
    place: ClassVar[tuple[int, int]] = (11, 3)
    example: ClassVar[str] = (
        "lakebed query output-mediated-causal-decomposition --lake demo.lake --run demo --steps 0:1300:130 --pair-type "
        "support_value --source-component L0H1 --downstream-component L1H1 --downstream-component L1MLP --out mediated"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "pair_type": ("support_value",),
        "source_component": ("L0H0", "L0H1", "L0MLP"),
        "downstream_component": ("L1H0", "L1H1", "L1MLP"),
    }

    @field_validator("source_component", "downstream_component")
    @classmethod
    def _components_can_be_read(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return read_components(values)

    @model_validator(mode="after")
    def _downstream_lies_after(self) -> OutputMediatedCausalDecomposition:
        name = self.report_name()
        require_ablatable(f"{name}: --source-component", self.source_component)
        require_ablatable(f"{name}: --downstream-component", self.downstream_component)
        require_downstream(name, self.source_component, self.downstream_component)
        return self

    def components(self) -> tuple[str, ...]:
        """Sources and what lies after them."""
        return (*self.source_component, *self.downstream_component)

    def with_components(self) -> bool:
        """DLAs are compared between runs."""
        return True

    def interventions(self) -> Sequence[Mapping[str, Any]]:
        """Each source zeroed alone."""
        return [intervention(label, [zero(label)]) for label in self.source_component]

    def component_parameters(self) -> list[dict[str, Any]]:
        """Those of the runs themselves."""
        return self.answer_parameters()

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary rows."""
        return {
            **super().facts(lake, results),
            "source_summary_rows": results.rows("FROM source_summary_rows"),
            "downstream_summary_rows": results.rows("FROM downstream_summary_rows"),
            "calculation": {
                "total_causal_effect": "scalar of the untouched run - scalar with the source zeroed everywhere",
                "direct_source_dla": "DLA of the source in the untouched run",
                "mediated_effect": "DLA of the downstream component, untouched run - run with the source zeroed",
                "mediated_downstream_sum": "sum of mediated_effect over the downstream components",
                "mediation_residual": "total_causal_effect - (direct_source_dla + mediated_downstream_sum)",
                "mean_explained_fraction": "mean of direct plus mediated over mean total",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """The costliest source and what is found of it; through whom it acts; the other sources."""
        lead, end = self.scalar[0], results.value("FROM shown_end")
        rows = results.rows(
            "FROM source_summary_rows WHERE scalar_name = $scalar AND endpoint_kind = $end "
            "ORDER BY abs(mean_total_causal_effect) DESC, source_component",
            scalar=lead,
            end=end,
        )
        through = results.rows(
            "FROM downstream_summary_rows WHERE scalar_name = $scalar AND endpoint_kind = $end AND "
            "source_component = $source ORDER BY abs(mean_mediated_effect) DESC, downstream_component",
            scalar=lead,
            end=end,
            source=rows[0]["source_component"],
        )
        lines = [_total(rows[0], lead, end), _through(rows[0], through)]
        if len(rows) > 1:
            others = "; ".join(
                f"{row['source_component']} total {number(row['mean_total_causal_effect'], 3)}, direct + mediated "
                f"{number(row['mean_direct_plus_mediated'], 3)}"
                for row in rows[1:6]
            )
            lines.append(f"Other sources: {others}.")
        return lines


def _total(row: Mapping[str, Any], scalar: str, end: str) -> str:
    r_squared = row["total_vs_direct_plus_mediated_r_squared"]
    agreement = (
        "the total is the same everywhere"
        if r_squared is None
        else f"R² {number(r_squared, 3)} without a fit, the same sign in {percent(row['sign_match_fraction'])} of "
        f"{row['num_observations']:,} numbers"
    )
    explained = row["mean_explained_fraction"]
    found = "" if explained is None else f", **{percent(explained)} of it**"
    return (
        f"Zeroing **{row['source_component']}** takes {number(row['mean_total_causal_effect'], 3)} from `{scalar}` in the "
        f"mean; its own DLA and the later components' make {number(row['mean_direct_plus_mediated'], 3)}{found} "
        f"({agreement}; {end} ends)."
    )


def _through(row: Mapping[str, Any], through: Sequence[Mapping[str, Any]]) -> str:
    listed = ", ".join(
        f"{of['downstream_component']} {number(of['mean_mediated_effect'], 3)} (DLA "
        f"{number(of['mean_baseline_downstream_dla'], 3)}, without it {number(of['mean_ablated_downstream_dla'], 3)})"
        for of in through[:4]
    )
    return f"Direct: {number(row['mean_direct_source_dla'], 3)}. Mediated: {listed}."

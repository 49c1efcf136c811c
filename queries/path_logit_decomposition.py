"""path-logit-decomposition: what carries the answer's margin, and what is lost without it (definitions 2 §C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from ..lake.datasets import COMPONENT_LOGITS, INTERVENTIONS, READOUTS, Need
from ..lake.interventions import ZERO_EACH, intervention_parameters
from ..lake.names import spec_id
from ..lake.steps import step_option, summarize_steps
from .chart import Scatter, Trajectory
from .markdown import number, percent
from .probe_report import ProbeReport
from .report import InvalidOption, ReportFailed, RowFile, TextTable

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

CALCULATION = {
    "direct_margin_contribution": "component's write . gradient of (answer logit - best wrong logit) with respect to the "
    "last residual stage, final LayerNorm differentiated; component writes of one event sum to about 0",
    "frozen_margin_contribution": "the same with the final LayerNorm's scale held at the run's own; sums to the margin over "
    "all components",
    "readout_margin": "value margin of unembedding(final LayerNorm(stage)), with the stage's own best wrong token",
    "margin_drop": "mean margin of the untouched run minus mean margin with the component's output zeroed at every position",
}
_COMPONENTS = {
    "component": "component_id",
    "DLA (differentiated)": "direct_margin_contribution_mean",
    "events with DLA > 0": "direct_margin_contribution_positive_fraction",
    "frozen-scale contribution": "frozen_margin_contribution_mean",
}
# Largest |Σ frozen − margin| / (1 + Σ|frozen|) that float32 rounding explains.
_CLOSURE_TOLERANCE = 1e-4


class PathLogitDecomposition(ProbeReport):
    """Which heads and MLPs carry the answer's margin, from which stage it can be read, and what zeroing them does."""

    ablation_top_k: NonNegativeInt = Field(
        3,
        description="components zeroed: this many with the largest mean attribution and with the smallest; 0 for none",
    )
    ablation_step: tuple[NonNegativeInt, ...] = Field(
        (), description="step at which components are zeroed; default the last selected one"
    )
    top_k_plot_components: PositiveInt = Field(8, description="components in colour in the trajectory charts")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "component": RowFile("path_logit_component_rows", "component_rows"),
        "stage": RowFile("path_logit_stage_rows", "stage_rows"),
        "checkpoint": RowFile("path_logit_checkpoint_rows", "checkpoint_rows"),
        "ablation": RowFile("path_logit_ablation_rows", "ablation_rows"),
    }
    tables = (
        TextTable(
            "top_positive_components",
            "For the answer, at the last step",
            _COMPONENTS,
            "**DLA** differentiates the final LayerNorm: what a little more of the component's write would do. Over all "
            "components it adds up to about 0, never to the margin. The **frozen-scale contribution** holds the "
            "LayerNorm's scale fixed; with embedding, attention biases and the LayerNorm's bias it adds up to the margin.",
        ),
        TextTable("top_negative_components", "Against it", _COMPONENTS),
        TextTable(
            "final_stage_readout",
            "The answer read off each stage at the last step",
            {
                "stage": "stage",
                "mean margin": "readout_margin_mean",
                "accuracy": "readout_accuracy",
                "events": "num_query_events",
            },
        ),
        TextTable(
            "final_ablation",
            "Without a component, by margin drop",
            {
                "component": "component_id",
                "DLA": "direct_margin_contribution_mean",
                "frozen-scale contribution": "frozen_margin_contribution_mean",
                "margin": "baseline_margin_mean",
                "without it": "ablated_margin_mean",
                "margin drop": "margin_drop",
                "accuracy": "baseline_accuracy",
                "without it ": "ablated_accuracy",
                "step": "step",
            },
            "Its output is zeroed at every position of every record, one component at a time; later layers follow.",
        ),
    )
    charts = (
        Trajectory(
            "component_trajectory",
            "component_chart",
            "Direct logit attribution of heads and MLPs",
            about="mean over events of the component's write · gradient of the margin, final LayerNorm differentiated",
            y="direct_margin_contribution_mean",
            y_title="DLA (logits)",
            series="component_id",
            highlight="top_k_plot_components",
            rank_by="last_abs",
        ),
        Trajectory(
            "frozen_component_trajectory",
            "frozen_chart",
            "What the margin is the sum of",
            about="mean contribution with the final LayerNorm's scale frozen; over all components it adds up to the margin",
            y="frozen_margin_contribution_mean",
            y_title="contribution to the margin (logits)",
            series="component_id",
            highlight="top_k_plot_components",
            rank_by="last_abs",
        ),
        Trajectory(
            "stage_readout",
            "stage_chart",
            "Margin read off each stage",
            about="mean value margin if the stage were the last: final LayerNorm and unembedding on it",
            y="readout_margin_mean",
            y_title="mean margin (logits)",
            series="stage",
            rank_by="last",
        ),
        Scatter(
            "ablation_vs_dla",
            "ablation_chart",
            "Does zeroing a component do what its attribution says?",
            about="mean over events; each component zeroed alone, at every position",
            x="direct_margin_contribution_mean",
            x_title="direct logit attribution (logits)",
            y="margin_drop",
            y_title="margin lost without it (logits)",
            label="component_id",
            color="step",
            color_title="step",
        ),
    )
    how_to_read = (
        "The margin of an event is the answer's logit minus the largest logit among its competitors, the best wrong token "
        "of the untouched run. A head's write has its value bias in and the output bias out; an MLP's its "
        "output bias in.",
        "`direct_margin_contribution_*` is the usual DLA: write · gradient of the margin through the final LayerNorm, mean, "
        "variance and gain differentiated. LayerNorm does not see the length of its input, so these add up to about 0 over "
        "all components. It ranks what would help, and is not a share of the margin.",
        "`frozen_margin_contribution_*` divides by the run's own standard deviation instead of differentiating it. Summed "
        "over heads, MLPs, embedding, attention biases and the LayerNorm's bias it is the margin, event by event.",
        "Component types embedding, attention_bias and final_norm_bias complete that sum; they stand in the rows, and are "
        "left out of the top lists and of what is zeroed.",
        "A stage's readout uses the stage's own best wrong token. Stage margins are not differences of contributions.",
        "Zeroing is not attribution: later layers see the change and may make up for it, and all positions lose the "
        "component, not only the prediction. Rows of a split carry that split's own DLA; "
        "`direct_margin_contribution_mean_all_splits` repeats the one over all events, by which components were chosen.",
    )
    next_queries = (
        (
            "On which events does the strongest component work against the answer?",
            "SELECT event, component, margin_dla, margin_dla_frozen FROM component_logits WHERE run = $run AND step = "
            "(SELECT max(step) FROM component_logits) AND component = 'L0H0' ORDER BY margin_dla LIMIT 10",
        ),
        (
            "What each component is worth when zeroed, event by event:",
            "SELECT intervention, avg(baseline - intervened) AS drop, stddev_pop(baseline - intervened) AS spread FROM "
            "interventions WHERE run = $run AND scalar = 'value_margin' GROUP BY intervention ORDER BY drop DESC",
        ),
    )
    place: ClassVar[tuple[int, int]] = (1, 2)
    example: ClassVar[str] = (
        "lakebed query path-logit-decomposition --lake demo.lake --run demo --steps 250:5500 --ablation-top-k 8 "
        "--ablation-step 5250 --ablation-step 5500 --top-k-plot-components 16 --out logits"
    )

    def _ablations(self) -> Need:
        steps = step_option(self.ablation_step) if self.ablation_step else "last"
        return Need(INTERVENTIONS, intervention_parameters(ZERO_EACH, probe=self.probe), steps)

    def needs(self) -> tuple[Need, ...]:
        """Readouts and attributions; ablations at the ablation steps alone."""
        probe = {"probe": self.probe}
        ablations = (self._ablations(),) if self.ablation_top_k else ()
        return (Need(READOUTS, probe), Need(COMPONENT_LOGITS, probe), *ablations)

    def parameters(self) -> dict[str, Any]:
        """Adds which steps are ablated and the identity of the intervention."""
        return {
            **super().parameters(),
            "ablation_step": list(self.ablation_step) or [-1],
            "ablate_last": not self.ablation_step,
            "intervention_spec": spec_id(dict(self._ablations().parameters)),
        }

    def check(self, results: Results) -> None:
        """Ablation steps are selected steps, there are events, and the parts add up to the model."""
        name = self.report_name()
        absent = sorted(set(self.ablation_step) - set(results.steps))
        if absent and self.ablation_top_k:
            raise InvalidOption(
                f"{name}: --ablation-step {', '.join(map(str, absent))} is not among the selected steps "
                f"{summarize_steps(results.steps)}; widen --steps, or extract it first: lakebed extract --for {name} --lake "
                f"{results.lake.uri} --run {results.run} --steps {step_option(absent)}"
            )
        if not results.value("SELECT count(*) FROM component"):
            raise ReportFailed(f"{name}: no event of probe {self.probe!r} is left to measure")
        closure = results.first("FROM closure")
        assert closure is not None
        if not closure["largest_relative_difference"] <= _CLOSURE_TOLERANCE:
            raise ReportFailed(
                f"{name}: the components of an event do not add up to its margin (off by "
                f"{number(closure['largest_difference'])}, largest at step and event {closure['at']}): extract "
                "component_logits and readouts from the same weights"
            )

    def warnings(self, results: Results) -> list[str]:
        """Ablations that the selected components lack."""
        chosen = results.value("SELECT count(*) FROM chosen_components")
        measured = results.value("SELECT count(*) FROM ablation WHERE split = '__all__'")
        if measured < chosen:
            return [f"{chosen - measured} of {chosen} chosen components have no ablation in the lake."]
        return []

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The reference's summary, and how well the frozen column adds up."""
        return {
            "calculation": CALCULATION,
            "frozen_sum_largest_difference": results.value("SELECT largest_difference FROM closure"),
            "summary": {
                "final_step": results.value("SELECT max(step) FROM checkpoint"),
                "ablation_agreement": results.first("FROM ablation_agreement"),
            },
        }

    def findings(self, results: Results) -> list[str]:
        """What carries the margin, where it becomes readable, and whether zeroing agrees with attribution."""
        return [
            line
            for line in (_carrier(results), _marginal(results), _stages(results), _ablated(results))
            if line
        ]


def _carrier(results: Results) -> str:
    last = results.first("FROM checkpoint WHERE split = '__all__' ORDER BY step DESC")
    assert last is not None
    text = (
        f"At step {last['step']} the mean margin is **{number(last['baseline_margin_mean'], 3)}** logits (accuracy "
        f"{percent(last['baseline_accuracy'])} of {last['num_query_events']:,} query events)"
    )
    parts = results.rows("FROM final_components WHERE component_type IN ('attention_head', 'mlp_block')")
    top, bottom = parts[0], parts[-1]
    rest = results.value(
        "SELECT sum(frozen_margin_contribution_mean) FROM final_components "
        "WHERE component_type NOT IN ('attention_head', 'mlp_block')"
    )
    text += (
        f". With the LayerNorm's scale frozen it is a sum: **{top['component_id']}** gives most, "
        f"{_signed(top['frozen_margin_contribution_mean'])}"
    )
    if len(parts) > 1:
        text += (
            f", then {parts[1]['component_id']} {_signed(parts[1]['frozen_margin_contribution_mean'])}; least "
            f"{bottom['component_id']} {_signed(bottom['frozen_margin_contribution_mean'])}"
        )
    return f"{text}; embedding and biases give {_signed(rest or 0.0)}."


def _marginal(results: Results) -> str:
    up, down = results.first("FROM top_positive_components"), results.first("FROM top_negative_components")
    said = [
        f"{way} in **{row['component_id']}** ({_signed(row['direct_margin_contribution_mean'])}, positive on "
        f"{percent(row['direct_margin_contribution_positive_fraction'])} of events)"
        for way, row in (("largest", up), ("smallest", down))
        if row
    ]
    return f"DLA, what a little more of a write would do, is {' and '.join(said)}." if said else ""


def _stages(results: Results) -> str:
    rise = results.first(
        "SELECT stage, lag(stage) OVER place AS before, readout_margin_mean AS margin, "
        "readout_margin_mean - lag(readout_margin_mean) OVER place AS gain FROM stage WHERE split = '__all__' AND "
        "step = (SELECT max(step) FROM checkpoint) WINDOW place AS (ORDER BY stage_position, stage) "
        "QUALIFY gain IS NOT NULL ORDER BY gain DESC LIMIT 1"
    )
    if rise is None:
        return ""
    first = results.value(
        "SELECT stage FROM stage WHERE split = '__all__' AND step = (SELECT max(step) FROM checkpoint) AND "
        "readout_margin_mean > 0 ORDER BY stage_position, stage LIMIT 1"
    )
    readable = (
        f"the first stage with a positive mean margin is `{first}`"
        if first
        else "no stage has a positive mean margin"
    )
    return (
        f"Read off the residual stream, the margin rises most at `{rise['stage']}` ({_signed(rise['gain'])} over "
        f"`{rise['before']}`, to {number(rise['margin'], 3)}); {readable}."
    )


def _ablated(results: Results) -> str:
    rows = results.rows("FROM final_ablation")
    if not rows:
        return (
            "Nothing was zeroed (`--ablation-top-k 0`)." if not results.parameters["ablation_top_k"] else ""
        )
    agreement = results.first("FROM ablation_agreement")
    assert agreement is not None
    top = rows[0]
    correlation = (
        f", correlation {number(agreement['correlation'], 2)}" if agreement["correlation"] is not None else ""
    )
    text = (
        f"Zeroing **{top['component_id']}** at step {top['step']} costs most: margin "
        f"{number(top['baseline_margin_mean'], 3)} → {number(top['ablated_margin_mean'], 3)}, "
        f"accuracy {percent(top['baseline_accuracy'])} → "
        f"{percent(top['ablated_accuracy'])}. Ablation and DLA have the same sign in {agreement['same_sign']} of "
        f"{agreement['components']} components{correlation}"
    )
    opposed = [row for row in rows if row["margin_drop"] * row["direct_margin_contribution_mean"] < 0]
    if opposed:
        worst = max(opposed, key=lambda row: abs(row["margin_drop"]))
        text += (
            f"; they part most in {worst['component_id']} (DLA {_signed(worst['direct_margin_contribution_mean'])}, margin "
            f"drop {_signed(worst['margin_drop'])}), which acts through later layers or other positions"
        )
    return f"{text}."


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{number(abs(value), 3)}"

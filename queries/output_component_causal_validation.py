"""output-component-causal-validation: does zeroing a component do what its attribution says? (definitions 4 §G)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt, PrivateAttr, field_validator, model_validator

from ..lake.interventions import intervention, zero
from .chart import Bars, Scatter
from .coefficient_rows import require_origin, top_components
from .component_dlas import CAUSAL_SCALARS, DLA_IS_NO_SHARE, ComponentDLAReport
from .component_options import read_components, require_ablatable
from .markdown import number, percent
from .report import InvalidOption, RowFile, TextTable
from .scalar_pairs import SCALAR_VALUES, EndpointReport, ScalarName, SwitchBucket

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

_STEM = "output_component_causal_validation"


class NoComponents(InvalidOption):
    """Neither components nor a file that ranks them."""


class OutputComponentCausalValidation(ComponentDLAReport, EndpointReport):
    """Does an answer lose, when a component is zeroed, what the component's DLA says it contributes?"""

    scalar: tuple[ScalarName, ...] = Field(
        CAUSAL_SCALARS,
        min_length=1,
        description="scalar of the answer; default four that keep their competitor",
    )
    component: tuple[str, ...] = Field(
        (), description="component to zero: L0H1, L0MLP; takes precedence over a file"
    )
    coefficient_rows: str | None = Field(
        None,
        description="output-route-closure's coefficient rows, JSONL or Parquet: zero the components it puts first",
    )
    coefficient_switch_bucket: tuple[SwitchBucket, ...] = Field(
        ("all",), min_length=1, description="switch bucket of the coefficient rows that count"
    )
    top_k_components: PositiveInt = Field(
        8, description="components taken from the coefficient rows, by size of their contribution"
    )
    markdown_top_k_rows: PositiveInt = Field(48, description="summary rows in the Markdown")

    _chosen: tuple[str, ...] = PrivateAttr(())

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "validation_rows": RowFile(f"{_STEM}_rows", "validation_rows"),
        "summary_rows": RowFile(f"{_STEM}_summary_rows", "summary_rows"),
        "pair_rows": RowFile(f"{_STEM}_pairs", "pair_rows"),
    }
    tables = (
        TextTable(
            "agreement",
            "Attribution against zeroing, all components together",
            {
                "scalar": "scalar_name",
                "pairs of numbers": "num_observations",
                "same sign": "sign_match_fraction",
                "R² without a fit": "r_squared",
                "correlation": "correlation",
            },
            "At the target ends, unless only source ends were asked for.",
        ),
        TextTable(
            "top_summary",
            "Components by what is lost without them",
            {
                "scalar": "scalar_name",
                "end": "endpoint_kind",
                "component": "component",
                "scalar's mean": "mean_baseline_scalar",
                "zeroed": "mean_ablated_scalar",
                "lost": "mean_causal_effect",
                "DLA": "mean_dla_contribution",
                "|lost|": "mean_abs_causal_effect",
                "same sign": "sign_match_fraction",
                "R²": "causal_vs_dla_r_squared",
                "correlation": "causal_vs_dla_correlation",
            },
            "Means over pairs and intervals.",
        ),
    )
    charts = (
        Scatter(
            "causal_vs_dla",
            "causal_vs_dla_chart",
            "Does zeroing a component take away what its DLA says?",
            about="a point is a component at a step, means over pairs; on the dashed line both say the same",
            color="component",
            color_title="component",
            panel="panel",
            panel_titles={
                name.replace("_", " "): ("DLA", f"lost of {name.replace('_', ' ')}") for name in SCALAR_VALUES
            },
            highlight=0,
            diagonal=True,
        ),
        Bars(
            "top_effects",
            "top_effects_chart",
            "What is lost without each component, and what its DLA says",
            about="means over pairs and intervals, logits or nats; largest effect first",
            value="value",
            value_title="effect on the scalar",
            label="component",
            panel="panel",
            color="quantity",
            rows=32,
        ),
    )
    how_to_read = (
        "`causal_effect` = scalar of the untouched run − scalar with the component's output zeroed at every position; an "
        "output bias of attention stays, an MLP's own goes. Everything after it is computed anew, so its effects through "
        "later components are in.",
        DLA_IS_NO_SHARE
        + " It is the direct path alone, for a small change, so it need not equal the effect of taking a whole write away.",
        "Competitors are those of the untouched run and are not chosen again in the zeroed one.",
        "`causal_vs_dla_r_squared` compares the numbers as they are, nothing fitted: below 0 it says that the mean effect "
        "is a better guess than DLA, and correlation says whether they go together at all.",
        "`sign_match`: both positive, both negative, or both 0.",
    )
    next_queries = (
        (
            "What each zeroed component costs, step by step:",
            "SELECT step, intervention, avg(baseline - intervened) AS lost FROM interventions WHERE run = $run AND scalar = "
            "'answer_log_prob' GROUP BY ALL ORDER BY step, lost DESC",
        ),
    )
    place: ClassVar[tuple[int, int]] = (11, 2)
    example: ClassVar[str] = (
        "lakebed query output-component-causal-validation --lake demo.lake --run demo --steps 0:1300:130 --pair-type "
        "support_value --component L1H1 --component L1MLP --component L0MLP --out validation"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "pair_type": ("support_value",),
        "component": ("L0H0", "L0H1", "L0MLP", "L1H0", "L1H1", "L1MLP"),
    }

    @field_validator("component")
    @classmethod
    def _components_can_be_read(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return read_components(values)

    @field_validator("coefficient_switch_bucket")
    @classmethod
    def _each_bucket_once(cls, values: tuple[SwitchBucket, ...]) -> tuple[SwitchBucket, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _choose(self) -> OutputComponentCausalValidation:
        name = self.report_name()
        if self.component:
            self._chosen = self.component
            require_ablatable(f"{name}: --component", self._chosen)
        elif self.coefficient_rows is None:
            raise NoComponents(
                f"{name}: name the components to zero, --component L1H1, or a file that ranks them, --coefficient-rows "
                "output_route_closure_coefficients.parquet"
            )
        else:
            found = top_components(
                self.coefficient_rows,
                self.scalar,
                self.coefficient_switch_bucket,
                self.top_k_components,
                name,
            )
            self._chosen = read_components(found)
            require_ablatable(
                f"{name}: {self.coefficient_rows} has among its first {self.top_k_components}",
                self._chosen,
                f"name the others: {' '.join(f'--component {of}' for of in found if of != 'embedding')}",
            )
        return self

    def components(self) -> tuple[str, ...]:
        """Those of `--component`, or the first of the coefficient rows."""
        return self._chosen

    def interventions(self) -> Sequence[Mapping[str, Any]]:
        """Each component zeroed alone."""
        return [intervention(label, [zero(label)]) for label in self._chosen]

    def parameters(self) -> dict[str, Any]:
        """Lists that SQL can read."""
        return {**super().parameters(), "component": list(self._chosen)}

    def require(self, lake: Lake, run: str) -> None:
        """Coefficients must be of this run."""
        super().require(lake, run)
        if self.coefficient_rows is not None and not self.component:
            require_origin(self.coefficient_rows, self.report_name(), lake, run, self.probe)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary rows."""
        return {
            **super().facts(lake, results),
            "components": list(self._chosen),
            "coefficient_rows_path": self.coefficient_rows,
            "summary_rows": results.rows("FROM summary_rows"),
            "calculation": {
                "causal_effect": "scalar of the untouched run - scalar with the component's output zeroed everywhere",
                "dla_contribution": "write of the component at the prediction . gradient of the scalar with respect to the "
                "last residual stage, final LayerNorm differentiated, in the untouched run",
                "causal_minus_dla": "causal_effect - dla_contribution",
                "sign_match": "both positive, both negative or both zero",
                "causal_vs_dla_r_squared": "1 - sum (causal - dla)^2 / sum (causal - mean causal)^2, nothing fitted",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Whether the two agree; the costliest component; the one they disagree most about."""
        end = results.value("FROM shown_end")
        lead = self.scalar[0]
        agreement = results.first("FROM agreement WHERE scalar_name = $scalar", scalar=lead)
        assert agreement is not None
        rows = results.rows(
            "FROM summary_rows WHERE scalar_name = $scalar AND endpoint_kind = $end ORDER BY mean_causal_effect DESC",
            scalar=lead,
            end=end,
        )
        return [
            _agreement(agreement, len(rows), end),
            _costliest(rows, lead),
            *_disagreement(rows),
        ]


def _agreement(row: Mapping[str, Any], count: int, end: str) -> str:
    r_squared = row["r_squared"]
    many = "one component" if count == 1 else f"{count} components"
    if r_squared is None:
        return f"Zeroing {many} changed `{row['scalar_name']}` by the same everywhere: there is nothing to compare."
    verdict = (
        "says what zeroing does"
        if r_squared >= _GOOD
        else "says something about what zeroing does"
        if r_squared > 0
        else "does not say what zeroing does"
    )
    return (
        f"**DLA {verdict}** to `{row['scalar_name']}`: R² {number(r_squared, 3)} without a fit, correlation "
        f"{number(row['correlation'], 3)}, the same sign in {percent(row['sign_match_fraction'])}, over "
        f"{row['num_observations']:,} numbers of {many} ({end} ends)."
    )


# Two thirds of the variance: a scatter around the diagonal that a reader sees as one.
_GOOD = 0.67


def _costliest(rows: list[dict[str, Any]], scalar: str) -> str:
    top = rows[0]
    lost = number(top["mean_causal_effect"], 3)
    text = (
        f"`{scalar}` loses most without **{top['component']}**: {lost} in the mean, from "
        f"{number(top['mean_baseline_scalar'], 3)} to {number(top['mean_ablated_scalar'], 3)}; its DLA is "
        f"{number(top['mean_dla_contribution'], 3)}"
    )
    if top["mean_causal_effect"] <= 0:
        text = f"No component's loss costs `{scalar}` anything: nearest is **{top['component']}**, {lost}"
    helped = [row for row in rows[1:] if row["mean_causal_effect"] < 0]
    if helped:
        text += f". It gains most without {helped[-1]['component']}: {number(-helped[-1]['mean_causal_effect'], 3)}"
    return f"{text}."


def _disagreement(rows: list[dict[str, Any]]) -> list[str]:
    opposed = [row for row in rows if row["mean_causal_effect"] * row["mean_dla_contribution"] < 0]
    if not opposed:
        return []
    worst = max(opposed, key=lambda row: abs(row["mean_causal_minus_dla"]))
    return [
        f"They have opposite signs in the mean for {len(opposed)} of {len(rows)}, most of all {worst['component']}: lost "
        f"{number(worst['mean_causal_effect'], 3)}, DLA {number(worst['mean_dla_contribution'], 3)}."
    ]

"""output-route-closure: which components' attributions changed along with a scalar of the answer? (definitions 4 §F)"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from .chart import Bars, Scatter
from .component_dlas import DLA_IS_NO_SHARE, ComponentDLAReport
from .component_options import read_components
from .markdown import number
from .report import RowFile, TextTable
from .scalar_closure import ScalarClosureReport
from .scalar_pairs import SCALAR_VALUES

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

_STEM = "output_route_closure"


class OutputRouteClosure(ScalarClosureReport, ComponentDLAReport):
    """Between steps, how much of the change of an answer's scalar do the changes of components' DLAs account for?

    One least-squares fit per scalar and switch bucket, over all intervals and pairs.
    """

    component: tuple[str, ...] = Field(
        (), description="component to fit with: embedding, L0H1, L0MLP; default all of them"
    )
    top_k_components: PositiveInt = Field(
        8, description="components listed and drawn, by size of their contribution"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "closure_rows": RowFile(f"{_STEM}_rows", "closure_rows"),
        "endpoint_component_rows": RowFile(f"{_STEM}_endpoint_component_rows", "endpoint_component_rows"),
        "coefficient_rows": RowFile(f"{_STEM}_coefficients", "coefficient_rows"),
        "pair_rows": RowFile(f"{_STEM}_pairs", "pair_rows"),
    }
    tables = (
        TextTable(
            "summary",
            "How close the fits come",
            {
                "scalar": "scalar_name",
                "bucket": "switch_bucket",
                "rows": "num_observations",
                "switch": "competitor_switch_fraction",
                "R²": "r_squared",
                "mean change": "mean_actual_delta",
                "predicted": "mean_predicted_delta",
                "mean |residual|": "mean_abs_residual",
                "condition": "condition_number",
            },
            "A fit each, over all intervals and pairs of the bucket. `condition` is that of the components' columns at unit "
            "length: beyond 30 coefficients trade off against each other.",
        ),
        TextTable(
            "contribution_table",
            "Which components carry the mean change",
            {
                "scalar": "scalar_name",
                "component": "component",
                "coefficient": "coefficient",
                "mean Δ DLA": "mean_component_delta",
                "mean contribution": "mean_contribution",
            },
            "Of the first two scalars. Contribution = coefficient × mean Δ DLA.",
        ),
    )
    charts = (
        Scatter(
            "actual_vs_predicted",
            "scatter_chart",
            "How much of the scalar's change do components account for?",
            about="a point is a pair over an interval; on the dashed line the fit is right",
            color="competitor",
            color_title="best wrong token",
            panel="panel",
            panel_titles={
                name.replace("_", " "): ("predicted change", f"change of {name.replace('_', ' ')}")
                for name in SCALAR_VALUES
            },
            highlight=0,
            diagonal=True,
        ),
        Bars(
            "r_squared",
            "r_squared_chart",
            "How close does each fit come?",
            about="R² about the mean; 1 is exact, below 0 the mean does better",
            value="r_squared",
            value_title="R²",
            label="scalar",
            color="bucket",
        ),
        Bars(
            "component_contributions",
            "contribution_chart",
            "Which components carry the mean change of each scalar?",
            about="coefficient × mean change of the component's DLA",
            value="mean_contribution",
            value_title="mean contribution",
            label="component",
            panel="panel",
        ),
    )
    how_to_read = (
        "A closure is a fit, not a cause: it says which components' attributions moved along with the scalar over these "
        "pairs and intervals. `output-component-causal-validation` zeroes the components that stand out.",
        DLA_IS_NO_SHARE
        + " So coefficients of 1 throughout would predict next to no change, and the columns are nearly dependent where the "
        "biases' share hardly changes: read the condition number before a coefficient.",
        "Δ DLA = DLA at the target − DLA at the source, each at its own weights and its own state; a moving margin is held "
        "against w_S at the source and against w_T at the target. Least squares in float64, without weights.",
        "Bucket `same_competitor` has the pairs whose best wrong token is the same at both ends, `competitor_switch` the "
        "others, `all` both; `closure_rows` repeats a pair in each bucket it is in.",
        "R² is about the mean, with or without `--fit-intercept`, and may be negative.",
    )
    next_queries = (
        (
            "Do the parts of the last residual stage add up to nothing, as LayerNorm says they must?",
            "SELECT step, max(abs(total)) AS largest_sum, avg(size) AS mean_size FROM (SELECT step, event, "
            "sum(log_prob_dla) AS total, sum(abs(log_prob_dla)) AS size FROM intervention_components WHERE run = $run AND "
            "intervention = 'clean' GROUP BY spec, probe, step, event) GROUP BY step ORDER BY step",
        ),
    )
    place: ClassVar[tuple[int, int]] = (11, 1)
    example: ClassVar[str] = (
        "lakebed query output-route-closure --lake demo.lake --run demo --steps 0:1300:130 --pair-type support_value "
        "--scalar fixed_source_competitor_margin --scalar negative_answer_loss --switch-bucket all --out closure"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {"pair_type": ("support_value",)}

    @field_validator("component")
    @classmethod
    def _components_can_be_read(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return read_components(values)

    def components(self) -> tuple[str, ...]:
        """`--component`."""
        return self.component

    def with_components(self) -> bool:
        """The untouched run is all there is."""
        return True

    def parameters(self) -> dict[str, Any]:
        """The components."""
        return {**super().parameters(), "component": list(self.component)}

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """The fits."""
        from .arrays.closures import fit_columns

        self.require_interval(results)
        return fit_columns(self._fits(results))

    def _fits(self, results: Results) -> Iterator[tuple[dict[str, Any], Any, Any]]:
        """Key, fit and observations of each. Raises EmptyBucket and Underdetermined."""
        from .arrays.closures import read_design

        held = results.arrow(
            "SELECT scalar_name, competitor_switched, target_scalar - source_scalar AS delta FROM changes "
            "ORDER BY observation"
        )
        features = results.arrow(
            "SELECT observation, label, target_dla - source_dla AS value FROM components"
        )
        design = read_design(features, held.num_rows, self.report_name())
        for key, fit, rows in self.bucket_fits(held, design):
            yield {**key, "lake_id": results.lake.id}, fit, rows

    def warnings(self, results: Results) -> list[str]:
        """Buckets that were left out; coefficients that are not determined, or trade off."""
        return [*_left_out(self, results), *_doubtful(results)]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        return {
            **super().facts(lake, results),
            "switch_buckets": list(self.buckets),
            "summary": {
                "scalar_summary_rows": results.rows("FROM summary"),
                "top_component_contributions": results.rows("FROM top_contributions"),
                "fits": {
                    f"{row['scalar_name']}::{row['switch_bucket']}": json.loads(row["fit"])
                    for row in results.rows("SELECT scalar_name, switch_bucket, fit FROM fits")
                },
            },
            "calculation": {
                "component_value": "write of the component at the prediction . gradient of the scalar with respect to the "
                "last residual stage, final LayerNorm differentiated, at that step's weights and state",
                "component_delta": "component_value(target) - component_value(source)",
                "actual_scalar_delta": "scalar(target) - scalar(source) of the untouched run",
                "fit": "least squares of actual_scalar_delta on the component_deltas, all intervals and pairs of a bucket",
                "mean_contribution": "coefficient times mean component_delta",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """How much of the first scalar is accounted for, by what; the other scalars; what switching competitors does."""
        bucket = self.buckets[0]
        lead = results.first(
            "FROM summary WHERE scalar_name = $scalar AND switch_bucket = $bucket",
            scalar=self.scalar[0],
            bucket=bucket,
        )
        assert lead is not None
        count = lead["num_parameters"] - self.fit_intercept
        who = "one component's DLA" if count == 1 else f"the DLAs of {count} components"
        r_squared = number(lead["r_squared"], 3)
        said = (
            f"**Changes of {who} account for R² = {r_squared} of how `{lead['scalar_name']}` changed**"
            if (lead["r_squared"] or 0) >= 0
            else f"**Changes of {who} do not account for how `{lead['scalar_name']}` changed** (R² = {r_squared}: the mean "
            "alone does better)"
        )
        where = "" if bucket == "all" else f" in bucket {bucket}"
        lines = [
            f"{said} from step {results.steps[0]} to {results.steps[-1]}{where}: {lead['num_observations']:,} "
            f"changes of a pair over an interval, {number(lead['mean_actual_delta'], 3)} in the mean, predicted "
            f"{number(lead['mean_predicted_delta'], 3)}, mean |residual| {number(lead['mean_abs_residual'], 3)}. It is a "
            "fit, not a cause.",
            _carriers(results, lead),
        ]
        others = results.rows(
            "FROM summary WHERE switch_bucket = $bucket AND r_squared IS NOT NULL ORDER BY r_squared DESC",
            bucket=bucket,
        )
        if len(others) > 1:
            best, worst = others[0], others[-1]
            lines.append(
                f"Of {len(others)} scalars `{best['scalar_name']}` is met best (R² {number(best['r_squared'], 3)}), "
                f"`{worst['scalar_name']}` worst ({number(worst['r_squared'], 3)})."
            )
        return lines + _switching(results, self.scalar[0])


def _carriers(results: Results, lead: Mapping[str, Any]) -> str:
    rows = results.rows(
        "FROM top_contributions WHERE scalar_name = $scalar AND switch_bucket = $bucket",
        scalar=lead["scalar_name"],
        bucket=lead["switch_bucket"],
    )
    listed = ", ".join(
        f"`{row['component']}` {number(row['mean_contribution'], 3)} (coefficient {number(row['coefficient'], 3)})"
        for row in rows[:4]
    )
    constant = f"; the constant {number(lead['intercept'], 3)}" if lead["intercept"] else ""
    return f"Of the mean change they carry: {listed}{constant}."


def _switching(results: Results, scalar: str) -> list[str]:
    found = {
        row["switch_bucket"]: row
        for row in results.rows("FROM summary WHERE scalar_name = $scalar", scalar=scalar)
    }
    same, switch = found.get("same_competitor"), found.get("competitor_switch")
    if same is None or switch is None:
        return []
    return [
        f"Fitted apart, pairs that keep their best wrong token have R² {number(same['r_squared'], 3)} "
        f"({same['num_observations']:,} changes), those that change it {number(switch['r_squared'], 3)} "
        f"({switch['num_observations']:,})."
    ]


def _left_out(report: OutputRouteClosure, results: Results) -> list[str]:
    fitted = {row["switch_bucket"] for row in results.rows("SELECT DISTINCT switch_bucket FROM fits")}
    counts = results.first(
        "SELECT count(*) FILTER (competitor_switched) AS competitor_switch, "
        "count(*) FILTER (NOT competitor_switched) AS same_competitor FROM changes WHERE scalar_name = $scalar",
        scalar=report.scalar[0],
    )
    assert counts is not None
    parameters = results.value("SELECT any_value(num_parameters) FROM fits")
    return [
        f"Bucket {bucket} is left out: "
        + (
            f"{counts[bucket]} changes are too few for {parameters} parameters."
            if counts[bucket]
            else "no rows."
        )
        for bucket in report.buckets
        if bucket not in fitted
    ]


def _doubtful(results: Results) -> list[str]:
    """What to know of coefficients before reading them."""
    from .arrays.least_squares import COLLINEAR

    rows = results.rows("FROM fits")
    lines = []
    lacking = [row for row in rows if row["rank_deficient"]]
    if lacking:
        worst = min(lacking, key=lambda row: row["matrix_rank"])
        lines.append(
            f"{len(lacking)} of {len(rows)} fits do not determine their coefficients (rank {worst['matrix_rank']} for "
            f"{worst['num_parameters']} parameters): others fit as well, these are the smallest. Predictions and R² hold."
        )
    together = [row for row in rows if not row["rank_deficient"] and row["condition_number"] > COLLINEAR]
    if together:
        largest = max(row["condition_number"] for row in together)
        lines.append(
            f"In {len(together)} of {len(rows)} fits components move together (condition number up to "
            f"{number(largest, 3)} of unit columns, above {COLLINEAR:g}): coefficients trade off against each other. Leave "
            "some out with --component to read the others one by one."
        )
    return lines

"""route-family-closure-report: which family of routes accounts for the margin's change best? (definitions 4 §E)"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from .chart import Bars, Scatter
from .closure_rows import ClosureRowsOptions, parse_families
from .markdown import number
from .pair_selection import RecordSide
from .report import RowFile, TextTable
from .results import Results
from .route_closure import NOT_A_CAUSE, TargetScalar, accounted, doubtful
from .route_to_margin_closure import RouteToMarginClosure as _MarginClosure

if TYPE_CHECKING:
    from ..lake import Lake

_STEM = "route_family_closure"


class RouteFamilyClosureReport(ClosureRowsOptions):
    """Do the OV routes account for changes of the answer margin that the QK routes do not? One fit per family of routes.

    Families are fitted to the same observations: rows of route-to-margin-closure, or --route straight from the lake.
    """

    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "checkpoints"

    family: tuple[str, ...] = Field(
        ..., min_length=1, description="label=…,route=…,route=…: a name and the labels of its routes"
    )
    target_scalar: TargetScalar | None = Field(
        None,
        description="margin that is explained; of a file, rows of others are left out [--route: answer_margin]",
    )
    record_side: RecordSide | None = Field(
        None, description="record whose margin it is; of a file, rows of others are left out [--route: clean]"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "closure_rows": RowFile(f"{_STEM}_rows", "closure_rows"),
        "coefficient_rows": RowFile(f"{_STEM}_coefficients", "coefficient_rows"),
        "family_summary_rows": RowFile(f"{_STEM}_family_summary", "family_summary_rows"),
    }
    tables = (
        TextTable(
            "families_by_r_squared",
            "The families, by what they account for",
            {
                "family": "family_label",
                "routes": "num_routes",
                "R²": "r_squared",
                "mean |residual|": "mean_abs_residual",
                "mean actual": "mean_actual_margin_delta",
                "mean predicted": "mean_predicted_margin_delta",
                "rank": "matrix_rank",
                "parameters": "num_parameters",
                "condition number": "condition_number",
            },
        ),
        TextTable(
            "additions",
            "What more routes add",
            {
                "family": "family_label",
                "beyond": "within",
                "more routes": "more_routes",
                "R² gained": "r_squared_gain",
                "mean |residual| less by": "residual_drop",
            },
            about="Of families one of which has all routes of the other. R² cannot fall with more routes.",
        ),
    )
    charts = (
        Bars(
            "r_squared",
            "r_squared_bars",
            "Which family of routes accounts for the margin's change?",
            about="R² of one least-squares fit per family, of the same observations; more routes never lower it",
            value="r_squared",
            value_title="R²",
            label="family_label",
        ),
        Bars(
            "abs_residual",
            "families_by_residual",
            "How far off is each family?",
            value="mean_abs_residual",
            value_title="mean |actual − predicted| change of the margin, logits",
            label="family_label",
        ),
        Scatter(
            "actual_vs_predicted",
            "actual_vs_predicted",
            "Does a family account for each pair's change?",
            about="a point is a pair over an interval; on the diagonal the fit is exact",
            x_title="predicted change of the margin",
            y_title="actual change of the margin",
            color="series",
            color_title="pair type",
            panel="family",
            diagonal=True,
        ),
    )
    how_to_read = (
        NOT_A_CAUSE,
        "Every family is fitted to the same observations, and predictions that rows of a file hold are not read. There is "
        "no penalty for the size of a family: compare families of one size, or see what the larger one adds.",
        "R² is about the mean, with or without `--fit-intercept`, and may be negative.",
    )
    next_queries = (
        (
            "How do the scores of the routes move, interval by interval?",
            "SELECT s.parameters->>'$.parameters.subspace' AS subspace, s.parameters->>'$.parameters.head' AS head, "
            "c.source_step, c.target_step, avg(c.target_value - c.source_value) AS mean_delta FROM scalar_changes AS c JOIN "
            "specs AS s USING (run, spec) WHERE c.run = $run AND s.dataset = 'scalar_changes' AND c.quantity = 'value' "
            "GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (10, 3)
    example: ClassVar[str] = (
        "lakebed query route-family-closure-report --lake demo.lake --run demo --route-closure-rows "
        "margin-closure/route_to_margin_closure_rows.jsonl --family label=qk,route=L1H1_qk_query --family "
        "label=qk_plus_ov,route=L1H1_qk_query,route=L1H1_ov_input --out families"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        **_MarginClosure.demo_options,
        "family": (
            "label=qk,route=L1H1_qk_query",
            "label=ov,route=L1H1_ov_input,route=L1H1_ov_output",
            "label=qk_plus_ov,route=L1H1_qk_query,route=L1H1_ov_input,route=L1H1_ov_output",
            "label=residual,route=full_layer1",
            "label=all,route=L1H1_qk_query,route=L1H1_ov_input,route=L1H1_ov_output,route=full_layer1",
        ),
    }

    @field_validator("family")
    @classmethod
    def _are_families(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        parse_families(texts)
        return texts

    def response(self) -> TargetScalar:
        """`--target-scalar`."""
        return self.target_scalar or "answer_margin"

    def side(self) -> RecordSide:
        """`--record-side`."""
        return self.record_side or "clean"

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Pair types, splits, scalar and side."""
        return (
            super().keeps(row)
            and self.target_scalar in (None, row["target_scalar"])
            and self.record_side in (None, row["record_side"])
        )

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """A fit per family."""
        if name != "fits":
            return super().arrays(name, results)
        from .arrays.closures import fit_columns, read_design

        actual = results.arrow("SELECT actual_margin_delta FROM closures ORDER BY observation")
        features = results.arrow("FROM features")
        held = set(features["label"].to_pylist())
        design = read_design(features, actual.num_rows, self.report_name())
        fits = []
        for position, (family, routes) in enumerate(parse_families(self.family).items()):
            self.require_labels(routes, held, f"family {family!r}")
            what = f"{self.report_name()}: family {family!r}"
            fit = design.fit(
                actual["actual_margin_delta"].to_numpy(),
                fit_intercept=self.fit_intercept,
                what=what,
                labels=routes,
            )
            fits.append(({"position": position, "family_label": family}, fit, None))
        return fit_columns(fits)

    def warnings(self, results: Results) -> list[str]:
        """That there is more than one response, and whose coefficients are not determined or trade off."""
        mixed = results.first(
            "SELECT list_sort(list(DISTINCT target_scalar || ' of the ' || record_side || ' record')) AS held FROM closures"
        )
        lines = doubtful(
            results.rows("SELECT 'Family ' || family_label AS name, * FROM fits ORDER BY position")
        )
        if mixed and len(mixed["held"]) > 1:
            lines.insert(
                0,
                f"The rows mix {' and '.join(mixed['held'])}: name one with --target-scalar, --record-side.",
            )
        return lines

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        rows = results.rows("FROM family_summary_rows")
        for row in rows:
            row["fit"] = json.loads(row["fit"])
        by_residual = [row["family_label"] for row in results.rows("FROM families_by_residual")]
        by_r_squared = [row["family_label"] for row in results.rows("FROM families_by_r_squared")]
        of = {row["family_label"]: row for row in rows}
        return {
            **super().facts(lake, results),
            "families": {label: list(routes) for label, routes in parse_families(self.family).items()},
            "available_route_labels": [
                row["label"] for row in results.rows("SELECT DISTINCT label FROM features ORDER BY label")
            ],
            "family_summary_rows": rows,
            "ranked_by_r_squared": [of[label] for label in by_r_squared],
            "ranked_by_mean_abs_residual": [of[label] for label in by_residual],
            "calculation": {
                "fit": "least squares of actual_margin_delta on the family's route_score_deltas, all observations pooled",
                "mean_contribution": "coefficient times mean route_score_delta",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Which family accounts for most, the others, and what more routes add."""
        rows = results.rows("FROM families_by_r_squared ORDER BY r_squared DESC NULLS LAST, family_label")
        first, others = rows[0], rows[1:]
        count = results.value("SELECT count(*) FROM closures")
        who = f"`{first['family_label']}`, {_routes(first['num_routes'])},"
        lines = [
            f"{accounted(who, 1, first['r_squared'], 'the margin')}, most of all, over {count:,} changes of a pair over an "
            "interval. It is a fit, not a cause."
        ]
        if others:
            listed = ", ".join(
                f"`{row['family_label']}` {number(row['r_squared'], 3)} ({_routes(row['num_routes'])})"
                for row in others
            )
            lines.append(f"The others: {listed}.")
        added = results.rows(
            "FROM additions ORDER BY r_squared_gain DESC NULLS LAST, family_label, within LIMIT 3"
        )
        lines += [
            f"`{row['family_label']}` has {_routes(row['more_routes'])} more than `{row['within']}`, and R² gains "
            f"{number(row['r_squared_gain'], 3)}."
            for row in added
        ]
        return lines


def _routes(count: int) -> str:
    return "one route" if count == 1 else f"{count} routes"

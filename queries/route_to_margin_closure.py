"""route-to-margin-closure: which routes' scores moved along with the answer margin? (definitions 4 §D1)"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .chart import Bars, Scatter, Trajectory
from .markdown import number, percent
from .pair_selection import RecordSide
from .report import RowFile, TextTable
from .results import Results
from .route_closure import (
    NOT_A_CAUSE,
    ROUTE_DESCRIPTION,
    RouteClosure,
    TargetScalar,
    accounted,
    doubtful,
    require_every_pair,
)
from .route_options import last_bases

if TYPE_CHECKING:
    from ..lake import Lake

_STEM = "route_to_margin_closure"


class RouteToMarginClosure(RouteClosure):
    """Between steps, how much of the answer margin's change do the changes of several routes' scores account for?

    One least-squares fit over all intervals and pairs. A route's subspace is that of each interval's source, frozen there.
    """

    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "checkpoints"

    route: tuple[str, ...] = Field(..., min_length=1, description=ROUTE_DESCRIPTION)
    route_pair_type: str = Field(..., description="type of the pairs that enter; __all__ for all of them")
    target_scalar: TargetScalar = Field(
        "answer_margin",
        description="what is explained: answer_margin, or clean_vs_corrupted_contrast (clean token less corrupted one)",
    )
    margin_side: RecordSide = Field("clean", description="record of the pair whose margin it is")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "closure_rows": RowFile(f"{_STEM}_rows", "closure_rows"),
        "coefficient_rows": RowFile(f"{_STEM}_coefficients", "coefficient_rows"),
        "pair_rows": RowFile(f"{_STEM}_pairs", "pair_rows"),
    }
    tables = (
        TextTable(
            "route_contributions",
            "The routes, by what they carry",
            {
                "route": "route_label",
                "coefficient": "coefficient",
                "mean change of the score": "mean_route_score_delta",
                "mean contribution": "mean_contribution",
                "share of mean change": "share_of_mean_change",
                "stage": "stage",
                "subspace": "subspace_name",
                "rank": "rank",
                "head": "head_label",
                "role": "position_role",
            },
            about="Contribution is coefficient times mean change; with the intercept they add up to the mean prediction.",
        ),
        TextTable(
            "interval_rows",
            "Interval by interval",
            {
                "from step": "source_step",
                "to step": "target_step",
                "pairs": "num_observations",
                "mean actual": "actual_margin_delta_mean",
                "mean predicted": "predicted_margin_delta_mean",
                "mean residual": "closure_residual_mean",
                "mean |residual|": "closure_abs_residual_mean",
                "R²": "r_squared",
            },
            about="All with the same coefficients. R² within an interval is about that interval's own mean, so it may be "
            "negative where the fit over all of them is good.",
        ),
    )
    charts = (
        Scatter(
            "actual_vs_predicted",
            "actual_vs_predicted",
            "Do the routes account for the margin's change?",
            about="a point is a pair over an interval; on the diagonal the fit is exact",
            x_title="predicted change of the margin",
            y_title="actual change of the margin",
            color="series",
            color_title="pair type",
            diagonal=True,
        ),
        Trajectory(
            "interval_trajectory",
            "interval_trajectory",
            "When do the routes account for it?",
            about="means over the pairs of an interval, at its target step",
            y_title="change of the margin, logits",
            series="series",
        ),
        Bars(
            "route_contributions",
            "route_contributions",
            "Which routes carry the margin's change?",
            about="coefficient × mean change of the route's score",
            value="mean_contribution",
            value_title="mean contribution to the margin's change, logits",
            label="route_label",
        ),
    )
    how_to_read = (
        NOT_A_CAUSE,
        "A route's score is what the corrupted run's transfer margin (clean token less corrupted one) gains when the clean "
        "record's state is put into one subspace, at one stage and role. Its change is taken between the two ends of an "
        "interval, with the subspace of the source at both; so an inner step stands twice in `route_rows`, told apart by "
        "`basis_step`.",
        "Plain least squares in float64, all intervals and pairs together, without weights. R² is about the mean, with or "
        "without `--fit-intercept`, and may be negative.",
        "Scores are in logits and not normalised: a coefficient of 1 says that the margin moves as far as the score does.",
        "A head's subspace has at most as many directions as the head is wide; the reference toolkit lists d_model of them, "
        "and those beyond are arbitrary.",
    )
    next_queries = (
        (
            "How far does each route's score alone go with the margin's change?",
            "SELECT s.parameters->>'$.parameters.subspace' AS subspace, s.parameters->>'$.parameters.head' AS head, "
            "regr_slope(t.value_margin - f.value_margin, c.target_value - c.source_value) AS slope, "
            "regr_r2(t.value_margin - f.value_margin, c.target_value - c.source_value) AS r_squared FROM scalar_changes AS "
            "c JOIN specs AS s USING (run, spec) JOIN pairs AS p ON p.run = c.run AND p.pair_id = c.pair_id JOIN readouts "
            "AS f ON f.run = c.run AND f.probe = p.probe AND f.event = p.clean_event AND f.step = c.source_step AND f.stage "
            "= 'logits' JOIN readouts AS t ON t.run = c.run AND t.probe = p.probe AND t.event = p.clean_event AND t.step = "
            "c.target_step AND t.stage = 'logits' WHERE c.run = $run AND s.dataset = 'scalar_changes' AND c.quantity = "
            "'value' AND s.parameters->>'$.probe' = p.probe GROUP BY ALL ORDER BY r_squared DESC",
        ),
    )
    place: ClassVar[tuple[int, int]] = (10, 2)
    example: ClassVar[str] = (
        "lakebed query route-to-margin-closure --lake demo.lake --run demo --route "
        "label=L1H1_qk_query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head=L1H1,position_role=query_key --route "
        "label=L1H1_ov_input,stage=layer_0_post_mlp,subspace=head_ov_input,rank=4,head=L1H1,position_role=support_value "
        "--route-pair-type __all__ --pair-type query_key --pair-type support_value --out margin-closure"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "route": (
            "label=L1H1_qk_query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=8,head=L1H1,position_role=query_key",
            "label=L1H1_ov_input,stage=layer_0_post_mlp,subspace=head_ov_input,rank=8,head=L1H1,position_role=support_value",
            "label=L1H1_ov_output,stage=layer_1_post_attn,subspace=head_ov_output,rank=8,head=L1H1,position_role=prediction",
            "label=full_layer1,stage=layer_1_post_attn,subspace=full_residual,position_role=prediction",
        ),
        "route_pair_type": "__all__",
        "pair_type": ("query_key", "support_value"),
    }

    @model_validator(mode="after")
    def _route_pairs_are_built(self) -> RouteToMarginClosure:
        self.require_route_pair_type()
        return self

    def response(self) -> TargetScalar:
        """`--target-scalar`."""
        return self.target_scalar

    def side(self) -> RecordSide:
        """`--margin-side`."""
        return self.margin_side

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """The one fit."""
        from .arrays.closures import fit_columns, read_design

        held = results.arrow("FROM lake_observations ORDER BY observation")
        require_every_pair(results, held.num_rows)
        design = read_design(results.arrow("FROM lake_features"), held.num_rows, self.report_name())
        actual = held["actual_margin_delta"].to_numpy()
        fit = design.fit(actual, fit_intercept=self.fit_intercept, what=self.report_name())
        return fit_columns([({"lake_id": results.lake.id}, fit, None)])

    def warnings(self, results: Results) -> list[str]:
        """That coefficients are not determined, or trade off."""
        return doubtful(results.rows("SELECT 'The fit' AS name, * FROM fits"))

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        fit = _fit(results)
        intervals = results.rows("FROM interval_rows")
        return {
            **super().facts(lake, results),
            "target_scalar": self.target_scalar,
            "margin_side": self.margin_side,
            "basis_mode": "source_checkpoint_per_interval",
            "subspaces": {of["label"]: of for of in last_bases(results)},
            "summary": {
                "num_observations": fit["num_observations"],
                "num_intervals": len(intervals),
                "route_labels": fit["route_labels"],
                "fit": fit,
                "actual_margin_delta_mean": fit["mean_actual_margin_delta"],
                "predicted_margin_delta_mean": fit["mean_predicted_margin_delta"],
                "closure_residual_mean": fit["mean_residual"],
                "closure_abs_residual_mean": fit["mean_abs_residual"],
                "r_squared": fit["r_squared"],
                "interval_rows": intervals,
                "route_contributions": results.rows("FROM route_contributions"),
            },
            "calculation": {
                "route_score": "transfer margin of the corrupted run with the clean state in the subspace - without it",
                "route_score_delta": "route_score(target; source basis) - route_score(source; source basis)",
                "actual_margin_delta": f"{self.target_scalar} of the {self.margin_side} record, target - source",
                "fit": "least squares of actual_margin_delta on the route_score_deltas, all intervals and pairs pooled",
                "mean_contribution": "coefficient times mean route_score_delta",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """How much is accounted for, by which routes, and where it is not."""
        fit = _fit(results)
        what = f"the {self.margin_side} record's {self.target_scalar.replace('_', ' ')}"
        count = len(fit["route_labels"])
        who = "One route" if count == 1 else f"{count} routes"
        actual, predicted, residual = (
            number(fit[name], 3)
            for name in ("mean_actual_margin_delta", "mean_predicted_margin_delta", "mean_abs_residual")
        )
        lines = [
            f"{accounted(who, count, fit['r_squared'], what)} from step {results.steps[0]} to {results.steps[-1]}: "
            f"{fit['num_observations']:,} changes of a pair over an interval, {actual} in the mean, "
            f"predicted {predicted}, mean |residual| {residual}. It is a fit, not a cause.",
            _carriers(results.rows("FROM route_contributions"), fit["intercept"]),
        ]
        intervals = results.rows("FROM interval_rows ORDER BY closure_abs_residual_mean DESC, source_step")
        if len(intervals) > 1:
            worst = intervals[0]
            lines.append(
                f"It is farthest off from step {worst['source_step']} to {worst['target_step']}: the margin changed by "
                f"{number(worst['actual_margin_delta_mean'], 3)} in the mean, predicted "
                f"{number(worst['predicted_margin_delta_mean'], 3)}, mean |residual| "
                f"{number(worst['closure_abs_residual_mean'], 3)}."
            )
        return lines


def _fit(results: Results) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(results.value("SELECT fit FROM fits"))
    return found


def _carriers(rows: list[dict[str, Any]], intercept: float) -> str:
    listed = [
        f"`{row['route_label']}` {number(row['mean_contribution'], 3)} ({percent(row['share_of_mean_change'])}; coefficient "
        f"{number(row['coefficient'], 3)})"
        for row in rows[:4]
    ]
    more = f" and {len(rows) - 4} smaller ones" if len(rows) > 4 else ""
    constant = f"; the constant {number(intercept, 3)}" if intercept else ""
    return f"Of the mean change they carry, in logits: {', '.join(listed)}{more}{constant}."

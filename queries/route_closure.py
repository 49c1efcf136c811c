"""What closure reports share: routes scored at both ends of an interval, and the margin whose change they are to explain.

The SQL begins, after the pairs', with `intervals`, `listed_pairs`, `labels`, `route_bases`, and the views below
(definitions 4 §D1). `lake_observations` has a row per interval and pair, `lake_features` one per observation and route:
what is fitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ..lake.datasets import READOUTS, SCALAR_CHANGES, Need, scalar_change_parameters
from ..lake.names import canonical_json, spec_id
from ..lake.subspaces import ROUTE_SCORE
from .attribution_sql import INTERVALS, LISTED_PAIRS
from .markdown import number
from .pair_selection import PairReport, RecordSide
from .probe_report import ProbeReport
from .report import ReportFailed
from .results import Results
from .route_options import ROUTE_BASES, ROUTE_LABELS, Route, parse_routes, require_routes

if TYPE_CHECKING:
    from ..lake import Lake

TargetScalar = Literal["answer_margin", "clean_vs_corrupted_contrast"]
ALL = "__all__"

ROUTE_DESCRIPTION = (
    "label=…,stage=…,subspace=…,position_role=… and, as the subspace needs, rank=…,head_layer=…,head=…; a head's subspace "
    "has at most as many directions as the head is wide"
)
NOT_A_CAUSE = (
    "A closure is a fit, not a cause: it says which changes of route scores go along with the change of the margin over "
    "these pairs and intervals, and a route may carry what another one does. Interventions say what causes what."
)

ROUTE_VALUES = """\
-- Scores and margins of every route: at both ends of an interval, with the basis of its source.
-- view: route_values
SELECT
  l.position, l.label AS route_label, c.source_step, c.target_step, c.pair_id,
  any_value(c.source_value) FILTER (c.quantity = 'value') AS source_route_score,
  any_value(c.target_value) FILTER (c.quantity = 'value') AS target_route_score,
  any_value(c.source_value) FILTER (c.quantity = 'transfer_margin_clean') AS source_clean,
  any_value(c.target_value) FILTER (c.quantity = 'transfer_margin_clean') AS target_clean,
  any_value(c.source_value) FILTER (c.quantity = 'transfer_margin_corrupted') AS source_corrupted,
  any_value(c.target_value) FILTER (c.quantity = 'transfer_margin_corrupted') AS target_corrupted,
  any_value(c.source_value) FILTER (c.quantity = 'transfer_margin_patched') AS source_patched,
  any_value(c.target_value) FILTER (c.quantity = 'transfer_margin_patched') AS target_patched
FROM scalar_changes AS c
JOIN labels AS l USING (spec)
JOIN intervals AS i USING (source_step, target_step)
WHERE c.run = $run
GROUP BY ALL
"""
_MARGINS = """\
-- The pairs that enter, with the record whose margin is explained.
-- view: entering_pairs
SELECT p.*, e.answer_token AS answer_target_id, row_number() OVER (
    ORDER BY p.clean_event, list_position($pair_type, p.pair_type)
  ) AS scan_order
FROM pair_sides AS p
JOIN events AS e ON e.run = $run AND e.probe = p.side_probe AND e.event = p.side_event
WHERE p.record_side = $margin_side AND $route_pair_type IN ('__all__', p.pair_type)

-- The transfer margins of both records, which no basis changes: those of the first route.
-- view: contrasts
SELECT source_step AS step, pair_id, source_clean AS clean, source_corrupted AS corrupted
FROM route_values
WHERE position = 1
UNION ALL
SELECT target_step, pair_id, target_clean, target_corrupted
FROM route_values
WHERE position = 1 AND target_step = (SELECT max(target_step) FROM intervals)

-- view: margins
SELECT
  r.step, p.pair_id, p.split, p.pair_type, p.record_side, p.source_sample_id, p.source_query_index,
  p.clean_transfer_token, p.corrupted_transfer_token, p.answer_target_id, r.best_token AS answer_prediction_id,
  r.correct AS answer_correct, r.value_margin::DOUBLE AS answer_margin, -r.answer_log_prob::DOUBLE AS answer_loss,
  CASE p.record_side WHEN 'clean' THEN c.clean ELSE c.corrupted END AS clean_vs_corrupted_contrast,
  CASE $response WHEN 'answer_margin' THEN answer_margin ELSE clean_vs_corrupted_contrast END AS value,
  p.scan_order
FROM entering_pairs AS p
JOIN readouts AS r ON r.run = $run AND r.probe = p.side_probe AND r.event = p.side_event AND r.stage = 'logits'
  AND list_contains($steps, r.step)
JOIN contrasts AS c ON c.step = r.step AND c.pair_id = p.pair_id

-- view: lake_observations
SELECT
  row_number() OVER (ORDER BY i.source_step, s.scan_order) - 1 AS observation,
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint,
  s.pair_id, s.split, s.pair_type, s.record_side, $response AS target_scalar,
  s.value AS source_margin, t.value AS target_margin, t.value - s.value AS actual_margin_delta
FROM intervals AS i
JOIN margins AS s ON s.step = i.source_step
JOIN margins AS t ON t.step = i.target_step AND t.pair_id = s.pair_id
ORDER BY observation

-- view: lake_features
SELECT o.observation, v.route_label AS label, v.target_route_score - v.source_route_score AS value
FROM lake_observations AS o
JOIN route_values AS v USING (source_step, target_step, pair_id)
ORDER BY o.observation, label
"""


class PairsChanged(ReportFailed):
    """An interval does not have the pairs that were built, or a route not those of the others."""


class RouteOptions(PairReport):
    """Options of reports on routes whose scores are taken at both ends of an interval; views `labels` and `route_values`."""

    route: tuple[str, ...] = Field((), description=ROUTE_DESCRIPTION)
    fit_intercept: bool = Field(False, description="add a constant to the fit")

    @field_validator("route")
    @classmethod
    def _parsed(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        parse_routes(texts)
        return texts

    @property
    def routes(self) -> tuple[Route, ...]:
        """Those of `--route`."""
        return parse_routes(self.route)

    def entering_types(self) -> tuple[str, ...]:
        """Types of the pairs that routes are scored on."""
        return self.pair_type

    def changes(self) -> list[dict[str, Any]]:
        """Parameters of dataset scalar_changes, one for each route: of the pairs that enter, and no others."""
        return [
            scalar_change_parameters(
                ROUTE_SCORE,
                route.parameters(),
                pair_type=self.entering_types(),
                probe=self.probe,
                split=self.split,
                max_pairs_per_type=self.max_pairs_per_type,
            )
            for route in self.routes
        ]

    def route_needs(self) -> tuple[Need, ...]:
        """Every route's scores."""
        return tuple(Need(SCALAR_CHANGES, of) for of in self.changes())

    def parameters(self) -> dict[str, Any]:
        """Adds what the views of routes read; without routes they are empty."""
        held, routes = self.changes(), self.routes
        return {
            **super().parameters(),
            "pair_type": list(self.pair_type) or [""],
            "spec": [spec_id(of) for of in held] or [""],
            "spec_parameters": [canonical_json({"scalar": of["scalar"], **of["parameters"]}) for of in held]
            or ["{}"],
            "route_label": [route.label for route in routes] or [""],
            "route_domain": ["eval"] * (len(routes) or 1),
            "record_side": [self.measured_sides()[0]],
        }

    def require(self, lake: Lake, run: str) -> None:
        """Stages, roles and heads must be there, and ranks within a head's width."""
        super().require(lake, run)
        require_routes(lake, run, self.report_name(), self.probe, self.routes)


class RouteClosure(RouteOptions):
    """Base of reports on closures of a margin."""

    route_pair_type: str = Field(ALL, description="type of the pairs that enter; __all__ for all of them")

    def response(self) -> TargetScalar:
        """The margin that is explained."""
        raise NotImplementedError

    def side(self) -> RecordSide:
        """The record it is taken of."""
        raise NotImplementedError

    def require_route_pair_type(self) -> None:
        """Raises ValueError for a type that is not built."""
        if self.route_pair_type not in (ALL, *self.pair_type):
            raise ValueError(
                f"--route-pair-type {self.route_pair_type} is none of --pair-type, {', '.join(self.pair_type)}, and not "
                f"{ALL}: only pairs of that type enter"
            )

    def measured_sides(self) -> tuple[RecordSide, ...]:
        """Both: a route puts the state of one into the other."""
        return ("clean", "corrupted")

    def entering_types(self) -> tuple[str, ...]:
        """Those of `--route-pair-type`."""
        return self.pair_type if self.route_pair_type == ALL else (self.route_pair_type,)

    def needs(self) -> tuple[Need, ...]:
        """Every route's scores, and the answers of the record whose margin is explained."""
        probe = self.probe if self.side() == "clean" else f"{self.probe}.corrupted"
        return (*self.route_needs(), Need(READOUTS, {"probe": probe}))

    def parameters(self) -> dict[str, Any]:
        """Adds what the views of margins read."""
        return {
            **super().parameters(),
            "record_side": [self.side()],
            "margin_side": self.side(),
            "response": self.response(),
        }

    @classmethod
    def sql_text(cls) -> str:
        """The pairs' views, the shared ones, then those of the report."""
        own = super(ProbeReport, cls).sql_text()
        before = super().sql_text().removesuffix(own)
        views = (LISTED_PAIRS, ROUTE_LABELS, ROUTE_BASES, ROUTE_VALUES, _MARGINS)
        return "\n".join([f"{before}{INTERVALS}", *views, own])


def accounted(who: str, count: int, r_squared: float | None, what: str) -> str:
    """The first words of findings: whether `who`, one thing or several (`count`), account for how `what` changed."""
    if r_squared is None:
        return f"**{who}: there is nothing to account for**, {what} did not change differently anywhere"
    if r_squared < 0:
        do = "does" if count == 1 else "do"
        return f"**{who} {do} not account for how {what} changed** (R² = {number(r_squared, 3)}: the mean alone does better)"
    return (
        f"**{who} account{'s' if count == 1 else ''} for R² = {number(r_squared, 3)} of how {what} changed**"
    )


def doubtful(fits: list[dict[str, Any]], collinear: float = 30.0) -> list[str]:
    """What to know of coefficients before reading them: rows of a table of fits, with a `name` each."""
    lines = []
    for fit in fits:
        if fit["rank_deficient"]:
            lines.append(
                f"{fit['name']}: the design has rank {fit['matrix_rank']} for {fit['num_parameters']} parameters, so other "
                "coefficients fit as well; these are the smallest, and none of them means anything by itself. Predictions "
                "and R² hold."
            )
        elif fit["condition_number"] > collinear:
            lines.append(
                f"{fit['name']}: routes move together (condition number {number(fit['condition_number'], 3)} of unit "
                f"columns, above {collinear:g}): coefficients trade off against each other, so read their sum, not each."
            )
    return lines


def require_every_pair(results: Results, observations: int) -> None:
    """Every interval must have every pair that enters, of every route."""
    expected = results.first(
        "SELECT (SELECT count(*) FROM intervals) AS intervals, (SELECT count(*) FROM entering_pairs) AS pairs, "
        "(SELECT count(*) FROM labels) AS routes, (SELECT count(*) FROM route_values) AS held, "
        "(SELECT count(*) FROM lake_features) AS entered"
    )
    assert expected is not None
    wanted = expected["intervals"] * expected["pairs"]
    if observations != wanted or not expected["held"] == expected["entered"] == wanted * expected["routes"]:
        raise PairsChanged(
            f"{results.report.report_name()}: pair ids change between intervals or routes: {expected['intervals']} "
            f"intervals of {expected['pairs']} pairs and {expected['routes']} routes have {observations} margins and "
            f"{expected['held']} scores ({expected['entered']} of pairs that enter), not {wanted} and "
            f"{wanted * expected['routes']}"
        )

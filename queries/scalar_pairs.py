"""What reports on scalars of answers share: pairs over intervals of checkpoints, fixed and moving competitors, their values
in the untouched run and in any intervention (definitions 4 §0.10, §0.11).

An interval leads from a selected step S to the next one T. With y the answer, and w_S, w_T the best wrong tokens of the
*untouched* record at S and at T, a scalar is read off the logits l of a run at either endpoint; tokens are not chosen anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..lake.datasets import INTERVENTIONS, READOUTS, Need
from ..lake.interventions import CLEAN, intervention_parameters
from ..lake.names import spec_id
from .pair_selection import PairReport, RecordSide
from .probe_report import ProbeReport
from .report import ReportFailed

if TYPE_CHECKING:
    from .results import Results

ScalarName = Literal[
    "moving_answer_margin",
    "fixed_source_competitor_margin",
    "fixed_target_competitor_margin",
    "correct_value_logit",
    "source_best_wrong_logit",
    "target_best_wrong_logit",
    "negative_answer_loss",
]
SwitchBucket = Literal["all", "same_competitor", "competitor_switch"]
EndpointKind = Literal["source", "target"]
BUCKETS: tuple[SwitchBucket, ...] = ("all", "same_competitor", "competitor_switch")

# Each scalar from a, the answer's value, c, those of the competitors, and p, the answer's log-probability; own, s and t are
# places among the competitors. Linear in (a, c, p): what holds for logits holds for their gradients.
SCALAR_VALUES: Mapping[ScalarName, str] = {
    "moving_answer_margin": "a - c[own]",
    "fixed_source_competitor_margin": "a - c[s]",
    "fixed_target_competitor_margin": "a - c[t]",
    "correct_value_logit": "a",
    "source_best_wrong_logit": "c[s]",
    "target_best_wrong_logit": "c[t]",
    "negative_answer_loss": "p",
}
SCALAR_NAMES_SQL = ", ".join(f"'{name}'" for name in SCALAR_VALUES)
SCALAR_VALUES_SQL = ", ".join(SCALAR_VALUES.values())

_PRELUDE = f"""\
-- What the records of pairs answer, run by run.
-- view: run_answers
SELECT
  p.record_side AS margin_side, p.pair_id, r.step, r.intervention,
  r.answer_logit::DOUBLE AS a, r.competitor_logits::DOUBLE[] AS c, r.answer_log_prob::DOUBLE AS p,
  r.best_wrong_token, r.best_token, r.correct
FROM intervention_runs AS r
JOIN pair_sides AS p ON p.side_probe = r.probe AND p.side_event = r.event
WHERE r.run = $run AND list_contains($answer_spec, r.spec) AND list_contains($steps, r.step)

-- view: intervals
SELECT * FROM (
  SELECT step AS source_step, lead(step) OVER (ORDER BY step) AS target_step FROM (SELECT unnest($steps) AS step)
) WHERE target_step IS NOT NULL ORDER BY source_step

-- A pair's record over an interval, and which competitors are fixed.
-- view: scalar_pairs
SELECT
  i.source_step, i.target_step, p.pair_id, p.record_side AS margin_side, p.split, p.pair_type, p.source_sample_id,
  p.source_query_index, p.clean_transfer_token, p.corrupted_transfer_token, e.answer_token, e.competitors,
  source.best_wrong_token AS source_wrong, target.best_wrong_token AS target_wrong,
  list_position(e.competitors, source.best_wrong_token) AS s, list_position(e.competitors, target.best_wrong_token) AS t,
  source.best_wrong_token <> target.best_wrong_token AS competitor_switched
FROM intervals AS i
CROSS JOIN pair_sides AS p
JOIN events AS e ON e.run = $run AND e.probe = p.side_probe AND e.event = p.side_event
JOIN run_answers AS source
  ON source.step = i.source_step AND source.pair_id = p.pair_id AND source.margin_side = p.record_side
    AND source.intervention = '{CLEAN}'
JOIN run_answers AS target
  ON target.step = i.target_step AND target.pair_id = p.pair_id AND target.margin_side = p.record_side
    AND target.intervention = '{CLEAN}'
ORDER BY i.source_step, p.pair_id, p.record_side

-- view: endpoints
SELECT
  *, kind AS endpoint_kind,
  CASE kind WHEN 'source' THEN source_step ELSE target_step END AS step,
  CASE kind WHEN 'source' THEN s ELSE t END AS own
FROM scalar_pairs, (SELECT unnest($endpoint_kinds) AS kind)

-- Every asked scalar of every run at both ends of an interval.
-- view: endpoint_values
SELECT * FROM (
  SELECT
    e.source_step, e.target_step, e.pair_id, e.margin_side, e.split, e.pair_type, e.endpoint_kind, e.step, e.answer_token,
    e.source_wrong, e.target_wrong, e.competitor_switched, r.intervention,
    unnest([{SCALAR_NAMES_SQL}]) AS scalar_name, unnest([{SCALAR_VALUES_SQL}]) AS value
  FROM endpoints AS e
  JOIN run_answers AS r USING (step, pair_id, margin_side)
) WHERE list_contains($scalar, scalar_name)

"""
_CHANGES = """\
-- Each pair over an interval, in every asked scalar: what is to be explained.
-- view: changes
SELECT
  row_number() OVER (ORDER BY list_position($scalar, scalar_name), source_step, pair_id, margin_side) - 1 AS observation,
  source_step, target_step, pair_id, margin_side, scalar_name, any_value(split) AS split, any_value(pair_type) AS pair_type,
  any_value(competitor_switched) AS competitor_switched,
  any_value(value) FILTER (endpoint_kind = 'source') AS source_scalar,
  any_value(value) FILTER (endpoint_kind = 'target') AS target_scalar
FROM endpoint_values
GROUP BY source_step, target_step, pair_id, margin_side, scalar_name
ORDER BY observation

"""
_CHECK_PRELUDE = f"""\
-- The untouched run against what the readouts say of the same record.
-- view: recomputed
SELECT
  a.step, a.pair_id, a.margin_side,
  unnest(['correct_value_logit', 'moving_answer_margin', 'negative_answer_loss']) AS scalar_name,
  unnest([a.a, a.a - list_max(a.c), a.p]) AS recomputed,
  unnest([o.answer_logit::DOUBLE, o.value_margin::DOUBLE, o.answer_log_prob::DOUBLE]) AS stored
FROM run_answers AS a
JOIN pair_sides AS p ON p.pair_id = a.pair_id AND p.record_side = a.margin_side
JOIN readouts AS o ON o.run = $run AND o.probe = p.side_probe AND o.event = p.side_event AND o.step = a.step
WHERE o.stage = 'logits' AND a.intervention = '{CLEAN}'

"""


class ScalarMismatch(ReportFailed):
    """The untouched run of an intervention is not the one the readouts are of."""


class ScalarPairReport(PairReport):
    """Base of reports on scalars of answers over intervals of checkpoints.

    Its SQL begins with views `run_answers`, `intervals`, `scalar_pairs`, `endpoints` and `endpoint_values`.
    """

    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "checkpoints"

    scalar: tuple[ScalarName, ...] = Field(
        tuple(SCALAR_VALUES), min_length=1, description="scalar of the answer; default all seven"
    )
    margin_side: tuple[RecordSide, ...] = Field(
        ("clean",), min_length=1, description="record of the pair that is measured"
    )

    @field_validator("scalar", "margin_side")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def measured_sides(self) -> tuple[RecordSide, ...]:
        """`--margin-side`."""
        return self.margin_side

    def interventions(self) -> Sequence[Mapping[str, Any]]:
        """What is changed, beside the untouched run."""
        return ()

    def with_components(self) -> bool:
        """Whether the components' contributions are needed, in every run."""
        return False

    def endpoint_kinds(self) -> tuple[EndpointKind, ...]:
        """Ends of an interval that view `endpoints` has."""
        return ("source", "target")

    def run_parameters(
        self, interventions: Sequence[Mapping[str, Any]], components: bool
    ) -> list[dict[str, Any]]:
        """Parameters of dataset interventions, one for each record side."""
        return [
            intervention_parameters(
                interventions,
                probe=self.probe,
                record_side=side,
                pair_type=self.pair_type,
                split=self.split,
                max_pairs_per_type=self.max_pairs_per_type,
                components=components,
            )
            for side in self.margin_side
        ]

    def answer_parameters(self) -> list[dict[str, Any]]:
        """Of the runs whose answers are compared."""
        return self.run_parameters(self.interventions(), self.with_components())

    def needs(self) -> tuple[Need, ...]:
        """The runs."""
        return tuple(Need(INTERVENTIONS, of) for of in self.answer_parameters())

    def parameters(self) -> dict[str, Any]:
        """Adds the specs of the runs, and the ends that are looked at."""
        return {
            **super().parameters(),
            "answer_spec": [spec_id(of) for of in self.answer_parameters()],
            "endpoint_kinds": list(self.endpoint_kinds()),
        }

    @classmethod
    def more_views(cls) -> str:
        """Views between the shared ones and the report's own."""
        return ""

    @classmethod
    def sql_text(cls) -> str:
        """The pairs' views, the shared ones, then those of the report."""
        own = super(ProbeReport, cls).sql_text()
        return f"{super().sql_text().removesuffix(own)}{_PRELUDE}{cls.more_views()}{own}"

    def check(self, results: Results) -> None:
        """There must be an interval."""
        super().check(results)
        self.require_interval(results)

    def require_interval(self, results: Results) -> None:
        """Raises ReportFailed for a single step; a report that fits something asks before it does."""
        if len(results.steps) < 2:
            raise ReportFailed(
                f"{self.report_name()}: a change lies between two steps, and --steps {self.steps or 'all'} leaves "
                f"{results.steps} of run {results.run!r}"
            )


class ScalarChangeReport(ScalarPairReport):
    """Base of those on changes of scalars: its SQL has view `changes` too, with a number for every observation."""

    @classmethod
    def more_views(cls) -> str:
        """The changes."""
        return super().more_views() + _CHANGES


class CheckedScalarReport(ScalarPairReport):
    """Base of those that hold the untouched run against the readouts. Their SQL has view `recomputed` too."""

    scalar_value_tolerance: float = Field(
        1e-4, ge=0, description="how far the untouched run may be from the readouts of the same record"
    )

    def needs(self) -> tuple[Need, ...]:
        """Adds the readouts that the untouched run is held against."""
        return (*super().needs(), *(Need(READOUTS, {"probe": probe}) for probe in self.side_probes()))

    @classmethod
    def more_views(cls) -> str:
        """The check."""
        return super().more_views() + _CHECK_PRELUDE

    def check(self, results: Results) -> None:
        """The untouched run must be the one that the readouts are of. Raises ScalarMismatch naming the first pair."""
        super().check(results)
        worst = results.first(
            "SELECT *, abs(recomputed - stored) AS difference FROM recomputed "
            "WHERE NOT abs(recomputed - stored) <= $scalar_value_tolerance "
            "ORDER BY difference DESC, step, pair_id, scalar_name",
            scalar_value_tolerance=self.scalar_value_tolerance,
        )
        if worst is not None:
            raise ScalarMismatch(
                f"Scalar recomputation mismatch: {worst['scalar_name']} of the {worst['margin_side']} record of pair "
                f"{worst['pair_id']} at step {worst['step']} is {worst['recomputed']:.6g} in the untouched run of the "
                f"interventions and {worst['stored']:.6g} in readouts; --scalar-value-tolerance is "
                f"{self.scalar_value_tolerance:g}. Extract both from the same weights: lakebed extract --for "
                f"{self.report_name()}"
            )


class EndpointReport(CheckedScalarReport):
    """Base of reports that change something in the run of an endpoint, and compare scalars there."""

    endpoint_role: tuple[EndpointKind, ...] = Field(
        ("source", "target"), min_length=1, description="end of the interval that is looked at; default both"
    )

    @field_validator("endpoint_role")
    @classmethod
    def _each_end_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def endpoint_kinds(self) -> tuple[EndpointKind, ...]:
        """`--endpoint-role`."""
        return self.endpoint_role


__all__ = [
    "BUCKETS",
    "SCALAR_VALUES",
    "CheckedScalarReport",
    "EndpointKind",
    "EndpointReport",
    "ScalarChangeReport",
    "ScalarMismatch",
    "ScalarName",
    "ScalarPairReport",
    "SwitchBucket",
]

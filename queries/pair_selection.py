"""What reports over causal patch pairs share: which pairs, which of their two records, and the checks on both.

The SQL of such a report begins with the views `chosen_pairs` (a pair per row), `skipped_pairs` (why queries have none)
and `pair_sides` (a pair and record side per row, with the probe and event whose facts are that side's).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..lake.errors import MissingData
from ..lake.pairs import ASKED, CHOSEN
from .probe_report import ProbeReport
from .report import ReportFailed
from .results import Results

if TYPE_CHECKING:
    from ..lake import Lake

PairType = Literal["query_key", "support_value", "recency", "distractor"]
RecordSide = Literal["clean", "corrupted"]

# A type is scanned until it has its pairs, and no event is scanned once every type has.
_SKIPPED = f"""\
SELECT pair_type, skip_reason, count(*) AS count
FROM (
  SELECT *, count(pair_id) OVER (PARTITION BY pair_type ORDER BY clean_event) AS found {ASKED}
)
WHERE skip_reason IS NOT NULL AND found < $max_pairs_per_type
GROUP BY ALL
ORDER BY ALL"""

_SCANNED = f"""\
SELECT count(DISTINCT clean_event) AS queries, count(DISTINCT source_sample_id) AS records
FROM (
  SELECT *, count(pair_id) OVER (
    PARTITION BY pair_type ORDER BY clean_event ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
  ) AS found_before
  {ASKED}
)
WHERE found_before < $max_pairs_per_type"""

_PRELUDE = f"""\
-- The first pairs of each type in scan order.
-- view: chosen_pairs
{CHOSEN}

-- Why a scanned query has no pair.
-- view: skipped_pairs
{_SKIPPED}

-- Queries and records looked at until every type had its pairs.
-- view: scanned_pairs
{_SCANNED}

-- The two records of a pair are events of two probes.
-- view: pair_sides
SELECT
  sides.record_side,
  CASE sides.record_side WHEN 'clean' THEN probe ELSE probe || '.corrupted' END AS side_probe,
  CASE sides.record_side WHEN 'clean' THEN clean_event ELSE corrupted_event END AS side_event,
  chosen_pairs.*
FROM chosen_pairs, (SELECT unnest($measured_sides) AS record_side) AS sides
ORDER BY list_position($measured_sides, sides.record_side), clean_event, list_position($pair_type, pair_type)

"""


class TooFewPairs(ReportFailed):
    """Fewer causal patch pairs of some type than the report asks for."""


class PairReport(ProbeReport):
    """Base of reports over causal patch pairs; `PairOptions` adds `--record-side`."""

    pair_type: tuple[PairType, ...] = Field(..., min_length=1, description="type of causal patch pair")
    max_pairs_per_type: int = Field(64, ge=1, description="most pairs of each type, the first in scan order")
    min_pairs_per_type: int = Field(1, ge=1, description="fewest pairs of each type; fewer is an error")

    @field_validator("pair_type")
    @classmethod
    def _each_type_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _minimum_is_possible(self) -> PairReport:
        if self.min_pairs_per_type > self.max_pairs_per_type:
            raise ValueError(
                f"--min-pairs-per-type {self.min_pairs_per_type} exceeds --max-pairs-per-type {self.max_pairs_per_type}"
            )
        return self

    @classmethod
    def sql_text(cls) -> str:
        """The shared views before those of the report."""
        return _PRELUDE + super().sql_text()

    def measured_sides(self) -> tuple[RecordSide, ...]:
        """Record sides whose records must be there; they are the rows of `pair_sides`."""
        raise NotImplementedError

    def side_probes(self) -> tuple[str, ...]:
        """The probes whose forward passes the measured sides need, for the report's `needs`."""
        return tuple(
            self.probe if side == "clean" else f"{self.probe}.corrupted" for side in self.measured_sides()
        )

    def parameters(self) -> dict[str, Any]:
        """Adds `measured_sides`."""
        return {**super().parameters(), "measured_sides": list(self.measured_sides())}

    def require(self, lake: Lake, run: str) -> None:
        """There must be enough pairs of each type, and a corrupted record for each where that side is asked for."""
        super().require(lake, run)
        _require_pairs(lake, run, self)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """Adds `pair_construction`, as definitions 1 §F: what was asked, scanned, constructed and skipped."""
        scanned = results.first("FROM scanned_pairs") or {}
        counts = {row["pair_type"]: row["n"] for row in results.rows(_COUNT.format(source="chosen_pairs"))}
        skips: dict[str, dict[str, int]] = {pair_type: {} for pair_type in self.pair_type}
        for row in results.rows("FROM skipped_pairs"):
            skips[row["pair_type"]][row["skip_reason"]] = row["count"]
        construction = {
            "requested_pair_types": list(self.pair_type),
            "max_pairs_per_type": self.max_pairs_per_type,
            "min_pairs_per_type": self.min_pairs_per_type,
            "scanned_records": scanned.get("records"),
            "scanned_queries": scanned.get("queries"),
            "constructed_counts": {pair_type: counts.get(pair_type, 0) for pair_type in self.pair_type},
            "skip_reasons": skips,
        }
        return {**super().facts(lake, results), "pair_construction": construction}


class PairOptions(PairReport):
    """Base of those with `--record-side`. Together with a head: `class Chain(PairOptions, HeadReport)`."""

    record_side: tuple[RecordSide, ...] = Field(
        ("clean",), min_length=1, description="record of the pair that is measured"
    )

    @field_validator("record_side")
    @classmethod
    def _each_side_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def measured_sides(self) -> tuple[RecordSide, ...]:
        """`--record-side`."""
        return self.record_side


_COUNT = "SELECT pair_type, count(*) AS n, count(corrupted_event) AS corrupted FROM {source} GROUP BY ALL"


def _require_pairs(lake: Lake, run: str, report: PairReport) -> None:
    source, kept, metadata = lake.session.execute(
        "SELECT source, max_pairs_per_type, metadata FROM probes WHERE run = ? AND probe = ?",
        [run, report.probe],
        tables={"probes"},
    ).fetchall()[0]
    if kept is None:
        raise MissingData(
            f"probe {report.probe!r} of run {run!r} has no causal patch pairs (source {source}): only probes of the "
            f"symbolic-KV task have. Run: lakebed probe build --lake {lake.uri} --run {run} --probe NAME"
        )
    asked = {**report.parameters(), "run": run}
    counts = {
        pair_type: (n, corrupted)
        for pair_type, n, corrupted in _ask(lake, _COUNT.format(source=f"({CHOSEN})"), asked)
    }
    short: dict[str, int] = {
        pair_type: counts.get(pair_type, (0, 0))[0]
        for pair_type in report.pair_type
        if counts.get(pair_type, (0, 0))[0] < report.min_pairs_per_type
    }
    if short:
        raise TooFewPairs(_too_few(report, short, _ask(lake, _SKIPPED, asked)))
    if "corrupted" in report.measured_sides() and any(n > corrupted for n, corrupted in counts.values()):
        largest = max(n for n, _ in counts.values())
        raise MissingData(
            f"probe {report.probe!r} of run {run!r} keeps the corrupted records of {kept} pairs per type and split, and up "
            f"to {largest} per type are asked for: lower --max-pairs-per-type to {kept}, or make another probe. Run: "
            + _rebuild(lake, run, f"{report.probe}-{report.max_pairs_per_type}", report, json.loads(metadata))
        )


def _ask(lake: Lake, query: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    used = {name: value for name, value in parameters.items() if f"${name}" in query}
    rows: list[tuple[Any, ...]] = lake.session.execute(query, used, tables={"pairs"}).fetchall()
    return rows


def _too_few(report: PairReport, short: Mapping[str, int], skips: list[tuple[Any, ...]]) -> str:
    counted = ", ".join(f"{pair_type} {n}" for pair_type, n in short.items())
    reasons = ", ".join(
        f"{pair_type} {reason} {count}"
        for wanted in short
        for pair_type, reason, count in skips
        if pair_type == wanted
    )
    where = f" of split {', '.join(report.split)}" if report.split else ""
    return (
        f"Failed to construct the requested minimum causal patch pairs: {counted}, and at least {report.min_pairs_per_type} "
        f"are asked for (skipped: {reasons or 'none'}) in probe {report.probe!r}{where}: check --pair-type and --split, "
        "lower --min-pairs-per-type, or build a probe with more --examples-per-split"
    )


def _rebuild(lake: Lake, run: str, name: str, report: PairReport, metadata: dict[str, Any]) -> str:
    """The command that makes the same probe under another name with enough corrupted records."""
    splits = " ".join(f"--split {split}" for split in metadata["splits"])
    return (
        f"lakebed probe build --lake {lake.uri} --run {run} --probe {name} --examples-per-split "
        f"{metadata['examples_per_split']} --seed {metadata['seed']} {splits} --max-pairs-per-type "
        f"{report.max_pairs_per_type}"
    )

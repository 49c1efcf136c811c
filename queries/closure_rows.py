"""`--route-closure-rows`: closure rows that route-to-margin-closure wrote, for reports that fit them in another way.

Without a file the same rows come straight from the lake, by `--route`. Section `closures` has them either way: the columns
of `lake_observations`, and lists `labels` and `deltas` of the routes; view `features` has a row per observation and route.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..lake.imports import leave_pandas_alone
from .pair_selection import PairType
from .probe_report import ProbeReport
from .report import ReportFailed, option_name
from .results import Results
from .route_closure import RouteClosure, RouteOptions, require_every_pair

if TYPE_CHECKING:
    from ..lake import Lake
    from ..lake.datasets import Need

_WRITER = "lakebed query route-to-margin-closure"
_STEPS = ("source_step", "target_step", "step_gap")
_TEXTS = (
    "source_checkpoint",
    "target_checkpoint",
    "pair_id",
    "split",
    "pair_type",
    "record_side",
    "target_scalar",
)
_NUMBERS = ("source_margin", "target_margin", "actual_margin_delta")
_OF_LAKE = ("steps", "route_pair_type", "max_pairs_per_type", "min_pairs_per_type")

CLOSURES = """\
-- arrays: closures

-- view: features
SELECT observation, unnest(labels) AS label, unnest(deltas) AS value FROM closures ORDER BY observation, label
"""


class UnreadableClosureRows(ReportFailed):
    """A file of closure rows that is not there, or is not JSONL or Parquet of rows."""


class NoClosureRows(ReportFailed):
    """A file of closure rows without rows, or with none that the filters leave."""


class IncompleteClosureRow(ReportFailed):
    """A closure row without the margin's change, the routes' changes, or what says which observation it is."""


class ForeignClosureRows(ReportFailed):
    """Closure rows of another lake, run or probe."""


class UnknownRouteLabel(ReportFailed):
    """A route that is asked for and that the closure rows do not have."""


class ClosureOrigin(RouteOptions):
    """Where closures of routes come from: a file of rows, or the lake by `--route`."""

    route_closure_rows: str | None = Field(
        None, description="rows that route-to-margin-closure wrote, JSONL or Parquet; instead of --route"
    )

    @model_validator(mode="after")
    def _has_one_origin(self) -> ClosureOrigin:
        if self.from_file == bool(self.route):
            raise ValueError("--route-closure-rows or --route is required, and not both")
        return self

    @property
    def from_file(self) -> bool:
        """Whether the rows are those of a file."""
        return self.route_closure_rows is not None

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a file passes the filters."""
        return True

    def file_rows(self, results: Results) -> list[dict[str, Any]]:
        """Rows of the file that pass the filters. Raises NoClosureRows, and what `read_closure_rows` raises."""
        path = Path(self.route_closure_rows or "")
        rows = list(read_closure_rows(path, results.lake.id, results.run, self.probe))
        kept = [row for row in rows if self.keeps(row)]
        if not kept:
            what = "is empty" if not rows else f"has {len(rows)} rows, and the filters leave none of them"
            raise NoClosureRows(f"{self.report_name()}: --route-closure-rows {path} {what}")
        return kept

    def require_labels(self, wanted: Sequence[str], held: Iterable[str], what: str) -> None:
        """Raises UnknownRouteLabel, listing the labels there are; `what` wants them."""
        there = set(held)
        for label in wanted:
            if label not in there:
                raise UnknownRouteLabel(
                    f"{self.report_name()}: {what} has a route {label!r}; there are {', '.join(sorted(there))}"
                )

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """Where the rows come from."""
        return {**super().facts(lake, results), "route_closure_rows_path": self.route_closure_rows}


class ClosureRowsOptions(ClosureOrigin, RouteClosure):
    """Base of reports on closure rows as they are."""

    pair_type: tuple[PairType, ...] = Field(
        (), description="type of causal patch pair; rows of a file that are of others are left out"
    )

    @model_validator(mode="after")
    def _selects_pairs(self) -> ClosureRowsOptions:
        if self.from_file:
            given = [option_name(name) for name in _OF_LAKE if name in self.model_fields_set]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: rows of --route-closure-rows have their own steps and pairs; give it with --route"
                )
        elif not self.pair_type:
            raise ValueError("--pair-type is required with --route")
        else:
            self.require_route_pair_type()
        return self

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a file passes the filters."""
        return (not self.pair_type or row["pair_type"] in self.pair_type) and (
            not self.split or row["split"] in self.split
        )

    def needs(self) -> tuple[Need, ...]:
        """Nothing, with a file."""
        return () if self.from_file else super().needs()

    @classmethod
    def sql_text(cls) -> str:
        """The closures before the report's own sections."""
        own = super(ProbeReport, cls).sql_text()
        return f"{super().sql_text().removesuffix(own)}\n{CLOSURES}\n{own}"

    def require(self, lake: Lake, run: str) -> None:
        """Of a file's probe the splits alone."""
        if self.from_file:
            ProbeReport.require(self, lake, run)
        else:
            super().require(lake, run)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """Where the rows come from, and how their pairs were built if that is known."""
        if self.from_file:
            return {"route_closure_rows_path": self.route_closure_rows}
        return super().facts(lake, results)

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Section `closures`."""
        if name != "closures":
            return super().arrays(name, results)
        if not self.from_file:
            held = results.arrow(
                "SELECT o.*, list(f.label ORDER BY f.label) AS labels, list(f.value ORDER BY f.label) AS deltas "
                "FROM lake_observations AS o JOIN lake_features AS f USING (observation) GROUP BY ALL ORDER BY observation"
            )
            require_every_pair(results, held.num_rows)
            return dict(zip(held.column_names, held.columns, strict=True))
        return _columns(self.file_rows(results))


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import pyarrow as pa

    leave_pandas_alone()
    kinds = {
        **dict.fromkeys(_STEPS, pa.int64()),
        **dict.fromkeys(_TEXTS, pa.string()),
        **dict.fromkeys(_NUMBERS, pa.float64()),
    }
    return {
        "observation": pa.array(range(len(rows)), pa.int64()),
        **{name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()},
        "labels": pa.array([sorted(row["route_score_deltas"]) for row in rows], pa.list_(pa.string())),
        "deltas": pa.array(
            [[value for _, value in sorted(row["route_score_deltas"].items())] for row in rows],
            pa.list_(pa.float64()),
        ),
    }


def read_closure_rows(path: Path, lake_id: str, run: str, probe: str) -> Iterator[dict[str, Any]]:
    """Rows of a file, checked one by one. Raises UnreadableClosureRows, IncompleteClosureRow, ForeignClosureRows.

    A row must say that it is of this lake, run and probe: the same pairs and steps in another run are other margins.
    """
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    mine = {"lake_id": lake_id, "run": run, "probe": probe}
    for number, row in enumerate(rows, 1):
        where = f"--route-closure-rows {path}, row {number}"
        for name, value in mine.items():
            if name not in row:
                raise IncompleteClosureRow(f"{where}: no {name!r}; write the rows with {_WRITER}")
            if row[name] != value:
                raise ForeignClosureRows(
                    f"{where}: it is of {name.removesuffix('_id')} {row[name]!r}, this is {value!r}: a fit takes rows of "
                    f"one run and probe. Write them with {_WRITER} --run {run} --probe {probe}"
                )
        yield _checked(where, row)


def _checked(where: str, row: dict[str, Any]) -> dict[str, Any]:
    for name in (*_STEPS, *_TEXTS, *_NUMBERS, "route_score_deltas"):
        if row.get(name) is None:
            raise IncompleteClosureRow(f"{where}: no {name!r}; the row has {', '.join(sorted(row))}")
    deltas = row["route_score_deltas"]
    if not isinstance(deltas, dict) or not deltas:
        raise IncompleteClosureRow(f"{where}: 'route_score_deltas' is no object of numbers by route")
    numbers = {**{name: row[name] for name in _NUMBERS}, **deltas}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise IncompleteClosureRow(f"{where}: {name!r} is no finite number: {value!r}")
    return row


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableClosureRows(f"--route-closure-rows {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        where = f"--route-closure-rows {path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            what = f"no JSON ({error})" if line.strip() else "blank"
            raise UnreadableClosureRows(f"{where}: {what}") from error
        if not isinstance(row, dict):
            raise UnreadableClosureRows(f"{where}: no JSON object")
        yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    leave_pandas_alone()
    try:
        rows = pq.read_table(path, partitioning=None).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UnreadableClosureRows(f"--route-closure-rows {path} cannot be read: {reason}") from error
    for row in rows:
        # A map comes as pairs.
        deltas = row.get("route_score_deltas")
        yield {**row, "route_score_deltas": dict(deltas) if isinstance(deltas, list) else deltas}


def parse_families(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Routes by family label, from `label=…,route=…,route=…`. Raises ValueError, saying what is wrong."""
    families: dict[str, tuple[str, ...]] = {}
    for text in texts:
        labels: list[str] = []
        routes: list[str] = []
        for item in text.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or key not in ("label", "route"):
                raise ValueError(f"family {text!r}: {item.strip()!r} is no label=… and no route=…")
            if not value:
                raise ValueError(f"family {text!r}: {key} has no value")
            (labels if key == "label" else routes).append(value)
        if len(labels) != 1:
            raise ValueError(f"family {text!r}: it has {len(labels)} labels; it takes one label=…")
        if not routes:
            raise ValueError(f"family {text!r}: it has no route=…")
        twice = next((route for route in routes if routes.count(route) > 1), None)
        if twice is not None:
            raise ValueError(f"family {text!r}: route {twice!r} stands twice")
        if labels[0] in families:
            raise ValueError(f"label {labels[0]!r} stands for two families")
        families[labels[0]] = tuple(routes)
    return families


__all__ = [
    "ClosureOrigin",
    "ClosureRowsOptions",
    "ForeignClosureRows",
    "IncompleteClosureRow",
    "NoClosureRows",
    "UnknownRouteLabel",
    "UnreadableClosureRows",
    "parse_families",
    "read_closure_rows",
]

"""Tensors as DuckDB tables that stream: DuckDB hands over columns and filters, and pulls one chunk at a time.

DuckDB pushes projections and filters into a `pyarrow.dataset.Dataset`, and its subclasses may bring their own scanner.
(A Polars lazy frame gets them too, but DuckDB collects it whole before the first row, so a query over a long trace
would need the trace in memory, and LIMIT would read everything.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from .errors import LakebedError
from .imports import without_pandas
from .sources import Scan

with without_pandas():
    import pyarrow.dataset


class TensorDataset(pyarrow.dataset.Dataset):  # type: ignore[misc]
    """A Scan behind the part of pyarrow's Dataset that DuckDB uses: `schema` and `scanner(columns=, filter=)`."""

    def __init__(self, scan: Scan, failures: list[LakebedError]) -> None:
        """`failures` takes what stops a scan: DuckDB reports it as text only, with a traceback in it."""
        self._scan = scan
        self._failures = failures
        self._schema = pl.DataFrame(schema=scan.schema).to_arrow().schema

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the table."""
        return self._schema

    def scanner(
        self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None, **_: Any
    ) -> TensorScanner:
        """A scan of some columns and of the rows where `filter` is true."""
        names = self._schema.names if columns is None else list(columns)
        return TensorScanner(self._scan, self._schema, names, filter, self._failures)


class TensorScanner:
    """One scan; `to_reader` starts it."""

    def __init__(
        self,
        scan: Scan,
        schema: pa.Schema,
        columns: list[str],
        condition: pc.Expression | None,
        failures: list[LakebedError],
    ) -> None:
        self._scan = scan
        self._columns = columns
        self._condition = condition
        self._schema = schema
        self._failures = failures
        self.projected_schema = pa.schema([schema.field(name) for name in columns])

    def to_reader(self) -> pa.RecordBatchReader:
        """Batches, made as they are pulled."""
        return pa.RecordBatchReader.from_batches(self.projected_schema, self._noting_failures())

    def _noting_failures(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._batches()
        except LakebedError as error:
            self._failures.append(error)
            raise

    def _batches(self) -> Iterator[pa.RecordBatch]:
        index = self._scan.index()
        used = self._used()
        decided = used <= set(index.columns)
        if decided and self._condition is not None:
            index = _filtered(index, self._condition)
        needed = [name for name in self._schema.names if name in {*self._columns, *used}]
        for (run, name), group in index.group_by(["run", "array"], maintain_order=True):
            steps = group["step"].to_numpy()
            if not decided and "values" in needed and "values" not in used:
                steps = self._steps_left(str(run), str(name), steps, used)
            for frame in self._scan.rows(str(run), str(name), steps, needed):
                kept = frame if decided or self._condition is None else _filtered(frame, self._condition)
                yield from self._projected(kept)

    def _used(self) -> set[str]:
        """Columns that the condition reads: those it cannot be bound without. An expression does not tell otherwise."""
        if self._condition is None:
            return set()
        empty = self._schema.empty_table()
        found = set()
        for name in self._schema.names:
            try:
                empty.drop_columns([name]).filter(self._condition)
            except pa.ArrowInvalid:
                found.add(name)
        return found

    def _steps_left(
        self, run: str, name: str, steps: np.ndarray[Any, Any], used: set[str]
    ) -> np.ndarray[Any, Any]:
        """Steps with a row that fulfils the condition, decided before any chunk is opened."""
        assert self._condition is not None
        frames = self._scan.rows(run, name, steps, [*used, "step"])
        left = [_filtered(frame, self._condition)["step"].unique() for frame in frames]
        return np.unique(np.concatenate(left)) if left else steps[:0]

    def _projected(self, frame: pl.DataFrame) -> Iterator[pa.RecordBatch]:
        """Batches of the wanted columns; with none wanted they still count rows."""
        if not len(frame):
            return
        yield from frame.to_arrow().select(self._columns).to_batches()


def _filtered(frame: pl.DataFrame, condition: pc.Expression) -> pl.DataFrame:
    kept = pl.from_arrow(frame.to_arrow().filter(condition))
    assert isinstance(kept, pl.DataFrame)
    return kept

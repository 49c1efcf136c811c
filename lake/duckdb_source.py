"""Tensors as DuckDB tables that stream: DuckDB hands over columns and filters, and pulls one chunk at a time.

DuckDB pushes projections and filters into a `pyarrow.dataset.Dataset`, and its subclasses may bring their own scanner.
(A Polars lazy frame gets them too, but DuckDB collects it whole before the first row, so a query over a long trace
would need the trace in memory, and LIMIT would read everything.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
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
        self._schema = scan.schema

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
        table, used = index.table, self._used()
        decided = used <= set(table.column_names)
        if decided and self._condition is not None:
            table = table.filter(self._condition)
        needed = [name for name in self._schema.names if name in {*self._columns, *used}]
        for run, name, steps in index.groups(table["array"].to_numpy(), table["step"].to_numpy()):
            left = steps
            if not decided and "values" in needed and "values" not in used:
                left = self._steps_left(run, name, steps, used)
            for batch in self._scan.rows(run, name, left, needed):
                kept = batch if decided or self._condition is None else batch.filter(self._condition)
                # With no column wanted a batch still counts rows.
                if kept.num_rows:
                    yield kept.select(self._columns)

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
        batches = self._scan.rows(run, name, steps, [*used, "step"])
        left = [batch.filter(self._condition)["step"].to_numpy() for batch in batches]
        return np.unique(np.concatenate(left)) if left else steps[:0]

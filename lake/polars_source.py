"""Tensors as Polars lazy frames: an IO source over a scan, which Polars hands columns, predicate and row count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source

from .sources import tensor_scan

if TYPE_CHECKING:
    from .lake import Lake


def tensor_source(lake: Lake, quantity: str, view: str) -> pl.LazyFrame:
    """The lazy table of one quantity, for Polars."""
    plan = tensor_scan(lake, quantity, view)
    schema = _frame(plan.schema.empty_table()).schema

    def scan(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = plan.schema.names if with_columns is None else with_columns
        needed = list(dict.fromkeys([*wanted, *([] if predicate is None else predicate.meta.root_names())]))
        index, left = plan.index(), n_rows
        table = _frame(index.table)
        # `n_rows` counts rows before the predicate: head(n).filter(p). Then nothing may be left out beforehand.
        for part in _conjuncts(predicate, set(table.columns)) if n_rows is None else []:
            table = table.filter(part)
        for run, name, steps in index.groups(table["array"].to_numpy(), table["step"].to_numpy()):
            for batch in plan.rows(run, name, steps, needed):
                whole = _frame(batch)
                frame = whole if left is None else whole.head(left)
                yield (frame if predicate is None else frame.filter(predicate)).select(wanted)
                if left is not None:
                    left -= len(frame)
                    if left == 0:
                        return

    return register_io_source(scan, schema=schema, validate_schema=False, is_pure=True)


def _conjuncts(predicate: pl.Expr | None, columns: set[str]) -> list[pl.Expr]:
    """Those parts of a conjunction that read only `columns`: they may be decided before any chunk is opened."""
    if predicate is None:
        return []
    names = set(predicate.meta.root_names())
    if names and names <= columns:
        return [predicate]
    parts = predicate.meta.pop()
    if len(parts) == 2 and any((a & b).meta.eq(predicate) for a, b in (parts, parts[::-1])):
        return [kept for part in parts for kept in _conjuncts(part, columns)]
    return []


def _frame(data: pa.Table | pa.RecordBatch) -> pl.DataFrame:
    frame = pl.from_arrow(data)
    assert isinstance(frame, pl.DataFrame)
    return frame

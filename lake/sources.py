"""Tensors as SQL tables: a scan per quantity, and the Polars IO source over it.

DuckDB hands a query's projection and filters to the source. What concerns only the index columns (run, step,
parameter, …) decides which chunks are opened; the rest is applied to the rows as they stream by, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source

if TYPE_CHECKING:
    from .lake import Lake
    from .tensors import Tensor

PARAMETER_SCHEMA = {
    "run": pl.String,
    "step": pl.Int64,
    "parameter": pl.String,
    "row": pl.Int64,
    "values": pl.List(pl.Float32),
}
VECTOR_SCHEMA = {
    "run": pl.String,
    "step": pl.Int64,
    "matrix": pl.String,
    "layer": pl.Int32,
    "head": pl.Int32,
    "rank": pl.Int32,
    "side": pl.String,
    "values": pl.List(pl.Float32),
}
_BYTES_AT_ONCE = 2 << 20
_ROWS_AT_ONCE = 1 << 20
# The vectors of U stand in rows of the stored array, like those of Vᵀ.
SIDES = {"U": "left", "Vh": "right"}

Rows = Callable[[str, str, np.ndarray[Any, Any], list[str]], Iterator[pl.DataFrame]]


@dataclass(frozen=True)
class Scan:
    """A tensor's table before anything is read: its columns, what is stored, and the rows of some steps of an array.

    `index` gives (run, array, step) and every column that follows from them, one row per step of each array.
    `rows` yields frames with at least the columns asked; no chunk is opened unless `values` is among them.
    """

    schema: dict[str, Any]
    index: Callable[[], pl.DataFrame]
    rows: Rows


def tensor_scan(lake: Lake, quantity: str, view: str) -> Scan:
    """How to scan the table of one quantity."""
    if view == "singular_vectors":
        return Scan(VECTOR_SCHEMA, lambda: _vector_index(lake, quantity), _vector_rows(lake, quantity))
    return Scan(PARAMETER_SCHEMA, lambda: _parameter_index(lake, quantity), _parameter_rows(lake, quantity))


def tensor_source(lake: Lake, quantity: str, view: str) -> pl.LazyFrame:
    """The lazy table of one quantity, for Polars."""
    plan = tensor_scan(lake, quantity, view)

    def scan(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = list(plan.schema) if with_columns is None else with_columns
        needed = list(dict.fromkeys([*wanted, *([] if predicate is None else predicate.meta.root_names())]))
        index, left = plan.index(), n_rows
        # `n_rows` counts rows before the predicate: head(n).filter(p). Then nothing may be left out beforehand.
        for part in _conjuncts(predicate, set(index.columns)) if n_rows is None else []:
            index = index.filter(part)
        for (run, name), group in index.group_by(["run", "array"], maintain_order=True):
            for whole in plan.rows(str(run), str(name), group["step"].to_numpy(), needed):
                frame = whole if left is None else whole.head(left)
                yield (frame if predicate is None else frame.filter(predicate)).select(wanted)
                if left is not None:
                    left -= len(frame)
                    if left == 0:
                        return

    return register_io_source(scan, schema=plan.schema, validate_schema=False, is_pure=True)


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


def _array_index(lake: Lake, quantity: str) -> pl.DataFrame:
    """(run, array, step) of everything stored of a quantity; no chunk is opened for it."""
    entries = [
        (run, name, axis.steps)
        for run, of in lake.axes.quantities()
        if of == quantity
        for names, axis in lake.axes.groups(run, of).items()
        for name in names
    ]
    counts = [len(steps) for *_, steps in entries]
    runs = pl.Series(
        "run", np.repeat(np.array([run for run, *_ in entries], object), counts), dtype=pl.String
    )
    names = pl.Series(
        "array", np.repeat(np.array([name for _, name, _ in entries], object), counts), dtype=pl.String
    )
    steps = np.concatenate([steps for *_, steps in entries]) if entries else np.empty(0, np.int64)
    return pl.DataFrame([runs, names, pl.Series("step", steps, dtype=pl.Int64)])


def _parameter_index(lake: Lake, quantity: str) -> pl.DataFrame:
    return _array_index(lake, quantity).with_columns(parameter="array")


def _vector_index(lake: Lake, quantity: str) -> pl.DataFrame:
    part = pl.col("array").str.extract(r"\.(\w+)$")
    return _array_index(lake, quantity).with_columns(
        matrix=pl.col("array").str.replace(r"\.\w+$", ""),
        side=part.replace_strict(SIDES, return_dtype=pl.String),
    )


def _parameter_rows(lake: Lake, quantity: str) -> Rows:
    def rows(run: str, name: str, steps: np.ndarray[Any, Any], needed: list[str]) -> Iterator[pl.DataFrame]:
        tensor = lake.tensor(quantity, name, run)
        per_step = int(np.prod(tensor.layout.row_shape[:-1])) if len(tensor.layout.row_shape) > 1 else 1
        for found, cells in _blocks(tensor, steps, "values" in needed, per_step):
            data: dict[str, Any] = {}
            count = len(found) * per_step
            if "run" in needed:
                data["run"] = _repeated(run, count, pl.String)
            if "step" in needed:
                data["step"] = np.repeat(found, per_step)
            if "parameter" in needed:
                data["parameter"] = _repeated(name, count, pl.String)
            if "row" in needed:
                data["row"] = np.tile(np.arange(per_step, dtype=np.int64), len(found))
            if cells is not None:
                data["values"] = _lists(cells, count)
            yield pl.DataFrame(data) if data else pl.DataFrame({"step": np.repeat(found, per_step)})

    return rows


def _vector_rows(lake: Lake, quantity: str) -> Rows:
    def rows(run: str, name: str, steps: np.ndarray[Any, Any], needed: list[str]) -> Iterator[pl.DataFrame]:
        tensor = lake.tensor(quantity, name, run)
        matrix, part = name.rsplit(".", 1)
        *outer, ranks, _ = tensor.layout.row_shape
        layers, heads = outer[0], outer[1] if len(outer) > 1 else None
        per_step = layers * (heads or 1) * ranks
        grid = np.indices((layers, heads or 1, ranks)).reshape(3, -1)
        layer, head, rank = grid[0], grid[1], grid[2] + 1
        for found, cells in _blocks(tensor, steps, "values" in needed, per_step):
            count = len(found) * per_step
            data: dict[str, Any] = {
                "run": _repeated(run, count, pl.String),
                "step": np.repeat(found, per_step),
                "matrix": _repeated(matrix, count, pl.String),
                "layer": pl.Series(np.tile(layer, len(found)), dtype=pl.Int32),
                "head": pl.Series(np.tile(head, len(found)), dtype=pl.Int32)
                if heads is not None
                else _repeated(None, count, pl.Int32),
                "rank": pl.Series(np.tile(rank, len(found)), dtype=pl.Int32),
                "side": _repeated(SIDES[part], count, pl.String),
            }
            if cells is not None:
                data["values"] = _lists(cells, count)
            yield pl.DataFrame(data)

    return rows


def _blocks(
    tensor: Tensor, steps: np.ndarray[Any, Any], read: bool, per_step: int
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]]:
    """(steps, cells or None) in pieces that fit in memory, whether the cells are read or not."""
    if read:
        yield from _joined(tensor.blocks(np.isin(tensor.steps, steps)))
        return
    count = max(1, _ROWS_AT_ONCE // max(1, per_step))
    for start in range(0, len(steps), count):
        yield steps[start : start + count], None


def _joined(
    blocks: Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Blocks put together until they are worth a frame; the first comes alone, so that LIMIT reads one chunk."""
    held: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    size, enough = 0, 1
    for steps, cells in blocks:
        held.append((steps, cells))
        size += cells.nbytes
        if size >= enough:
            yield _concatenated(held)
            held, size, enough = [], 0, _BYTES_AT_ONCE
    if held:
        yield _concatenated(held)


def _concatenated(
    held: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if len(held) == 1:
        return held[0]
    return np.concatenate([steps for steps, _ in held]), np.concatenate([cells for _, cells in held])


def _repeated(value: str | None, count: int, dtype: Any) -> pl.Series:
    # pl.repeat would plan and run a lazy query for each column of each chunk.
    return pl.Series([value], dtype=dtype).new_from_index(0, count)


def _lists(cells: np.ndarray[Any, Any], count: int) -> pl.Series:
    """Rows of `cells` as a list column, without copying them."""
    flat = np.ascontiguousarray(cells, np.float32).reshape(-1)
    width = flat.size // count if count else 0
    offsets = pa.array(np.arange(count + 1, dtype=np.int64) * width)
    return pl.Series("values", pl.from_arrow(pa.LargeListArray.from_arrays(offsets, pa.array(flat))))

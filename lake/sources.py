"""Tensors as SQL tables: a scan per quantity, for DuckDB (`duckdb_source`) and for Polars (`polars_source`).

Both hand a query's projection and filters to the scan. What concerns only the index columns (run, step, parameter, …)
decides which chunks are opened; the rest is applied to the rows as they stream by, a chunk at a time. Rows are Arrow
batches, so that a report over tensors need not import Polars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from .lake import Lake
    from .tensors import Tensor

PARAMETER_SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "step": pa.int64(),
        "parameter": pa.string(),
        "row": pa.int64(),
        "values": pa.large_list(pa.float32()),
    }
)
GRADIENT_SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "step": pa.int64(),
        "spec": pa.string(),
        "parameter": pa.string(),
        "row": pa.int64(),
        "values": pa.large_list(pa.float32()),
    }
)
VECTOR_SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "step": pa.int64(),
        "matrix": pa.string(),
        "layer": pa.int32(),
        "head": pa.int32(),
        "rank": pa.int32(),
        "side": pa.string(),
        "values": pa.large_list(pa.float32()),
    }
)
ACTIVATION_SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "step": pa.int64(),
        "probe": pa.string(),
        "layout": pa.string(),
        "stage": pa.string(),
        "row": pa.int64(),
        "values": pa.large_list(pa.float32()),
    }
)
_BYTES_AT_ONCE = 2 << 20
_ROWS_AT_ONCE = 1 << 20
# The vectors of U stand in rows of the stored array, like those of Vᵀ.
SIDES = {"U": "left", "Vh": "right"}

Rows = Callable[[str, str, np.ndarray[Any, Any], Sequence[str]], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Index:
    """What is stored of a quantity, a row per array and step; no chunk is opened for it.

    `arrays` are (run, name) pairs; `table` has the position of a row's array among them as `array`, its `step`, and
    every other column that follows from those.
    """

    arrays: list[tuple[str, str]]
    table: pa.Table

    def groups(
        self, at: np.ndarray[Any, Any], steps: np.ndarray[Any, Any]
    ) -> Iterator[tuple[str, str, np.ndarray[Any, Any]]]:
        """(run, name, its steps) of every array in those rows of `table` that are left, given two of their columns."""
        edges = np.flatnonzero(np.diff(at)) + 1
        for part in np.split(np.arange(len(at)), edges) if len(at) else []:
            yield (*self.arrays[at[part[0]]], steps[part])


@dataclass(frozen=True)
class Scan:
    """A tensor's table before anything is read: its columns, what is stored, and the rows of some steps of an array.

    `rows` yields batches with at least the columns asked; no chunk is opened unless `values` is among them.
    """

    schema: pa.Schema
    index: Callable[[], Index]
    rows: Rows


def tensor_scan(lake: Lake, quantity: str, view: str) -> Scan:
    """How to scan the table of one quantity."""
    if view == "singular_vectors":
        return Scan(VECTOR_SCHEMA, lambda: _vector_index(lake, quantity), _vector_rows(lake, quantity))
    if view == "activation_values":
        return Scan(
            ACTIVATION_SCHEMA,
            lambda: _index(lake, quantity, activation_columns),
            _row_rows(lake, quantity, ACTIVATION_SCHEMA, activation_columns),
        )
    if view == "scalar_gradients":
        return Scan(
            GRADIENT_SCHEMA,
            lambda: _index(lake, quantity, gradient_columns),
            _row_rows(lake, quantity, GRADIENT_SCHEMA, gradient_columns),
        )
    return Scan(
        PARAMETER_SCHEMA,
        lambda: _index(lake, quantity, _parameter_columns),
        _row_rows(lake, quantity, PARAMETER_SCHEMA, _parameter_columns),
    )


def _parameter_columns(name: str) -> dict[str, str]:
    return {"parameter": name}


def gradient_columns(name: str) -> dict[str, str]:
    """What the name SPEC/PARAMETER of an array of scalar gradients says."""
    spec, _, parameter = name.partition("/")
    return {"spec": spec, "parameter": parameter}


def activation_columns(name: str) -> dict[str, str]:
    """What the name PROBE/LAYOUT/STAGE of an array of activations says."""
    return dict(zip(("probe", "layout", "stage"), (*name.rsplit("/", 2), "", "")[:3], strict=True))


def _index(lake: Lake, quantity: str, columns: Callable[[str], Mapping[str, str]]) -> Index:
    """The index of a quantity; `columns` gives what follows from an array's name."""
    entries = [
        (run, name, axis.steps)
        for run, of in lake.axes.quantities()
        if of == quantity
        for names, axis in lake.axes.groups(run, of).items()
        for name in names
    ]
    at = np.repeat(np.arange(len(entries), dtype=np.int32), [len(steps) for *_, steps in entries])
    steps = np.concatenate([steps for *_, steps in entries]) if entries else np.empty(0, np.int64)
    named = [{"run": run, **columns(name)} for run, name, _ in entries]
    texts = {
        column: pa.array([of[column] for of in named], pa.string()).take(pa.array(at))
        for column in ("run", *columns("."))
    }
    table = pa.table({"array": at, "step": pa.array(steps, pa.int64()), **texts})
    return Index([(run, name) for run, name, _ in entries], table)


def _vector_index(lake: Lake, quantity: str) -> Index:
    def columns(name: str) -> dict[str, str]:
        matrix, _, part = name.rpartition(".")
        return {"matrix": matrix, "side": SIDES.get(part, part)}

    return _index(lake, quantity, columns)


def _row_rows(
    lake: Lake, quantity: str, schema: pa.Schema, columns: Callable[[str], Mapping[str, str]]
) -> Rows:
    """Arrays of Float[row, column], or of one row: a SQL row is a row."""

    def rows(
        run: str, name: str, steps: np.ndarray[Any, Any], needed: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        tensor = lake.tensor(quantity, name, run)
        per_step = int(np.prod(tensor.layout.row_shape[:-1])) if len(tensor.layout.row_shape) > 1 else 1
        row = np.arange(per_step, dtype=np.int64)
        for found, cells in _blocks(tensor, steps, "values" in needed, per_step):
            texts = {"run": run, **columns(name)}
            yield _batch(schema, needed, texts, found, {"row": row}, per_step, cells)

    return rows


def _vector_rows(lake: Lake, quantity: str) -> Rows:
    def rows(
        run: str, name: str, steps: np.ndarray[Any, Any], needed: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        tensor = lake.tensor(quantity, name, run)
        matrix, part = name.rsplit(".", 1)
        *outer, ranks, _ = tensor.layout.row_shape
        layers, heads = outer[0], outer[1] if len(outer) > 1 else None
        per_step = layers * (heads or 1) * ranks
        layer, head, rank = np.indices((layers, heads or 1, ranks), np.int32).reshape(3, -1)
        grid = {"layer": layer, "head": None if heads is None else head, "rank": rank + 1}
        for found, cells in _blocks(tensor, steps, "values" in needed, per_step):
            texts = {"run": run, "matrix": matrix, "side": SIDES[part]}
            yield _batch(VECTOR_SCHEMA, needed, texts, found, grid, per_step, cells)

    return rows


def _batch(
    schema: pa.Schema,
    needed: Sequence[str],
    texts: Mapping[str, str],
    steps: np.ndarray[Any, Any],
    grid: Mapping[str, np.ndarray[Any, Any] | None],
    per_step: int,
    cells: np.ndarray[Any, Any] | None,
) -> pa.RecordBatch:
    """The columns needed of `per_step` rows for each of `steps`; `grid` is what repeats from step to step.

    With none needed the steps, since a batch without columns has no length.
    """
    fields = [field for field in schema if field.name in needed] or [schema.field("step")]
    count = len(steps) * per_step
    columns = []
    for field in fields:
        if field.name == "values":
            assert cells is not None
            columns.append(_lists(cells, count))
        elif field.name == "step":
            columns.append(pa.array(np.repeat(steps, per_step), field.type))
        elif field.name in texts:
            columns.append(pa.repeat(pa.scalar(texts[field.name], field.type), count))
        else:
            values = grid[field.name]
            same = pa.nulls(count, field.type) if values is None else np.tile(values, len(steps))
            columns.append(pa.array(same, field.type))
    return pa.record_batch(columns, schema=pa.schema(fields))


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


def _lists(cells: np.ndarray[Any, Any], count: int) -> pa.LargeListArray:
    """Rows of `cells` as a list column, without copying them."""
    flat = np.ascontiguousarray(cells, np.float32).reshape(-1)
    width = flat.size // count if count else 0
    offsets = pa.array(np.arange(count + 1, dtype=np.int64) * width)
    return pa.LargeListArray.from_arrays(offsets, pa.array(flat))

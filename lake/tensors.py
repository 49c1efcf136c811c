"""Reading tensors: which step lies in which row, and the rows themselves."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import codec
from .errors import CorruptFile, MissingData
from .names import encode_name
from .object_store import CONNECTIONS
from .receipts import Receipt
from .steps import summarize_steps

if TYPE_CHECKING:
    from .lake import Lake

_READERS = min(4, os.cpu_count() or 1)
# Handing a thread a chunk costs as much as decoding 50 KB.
_BYTES_AT_ONCE = 512 << 10

_T = TypeVar("_T")


@dataclass(frozen=True)
class Axis:
    """The step axis of some arrays: `steps` ascending, and the row each lies in."""

    steps: np.ndarray[Any, np.dtype[np.int64]]
    rows: np.ndarray[Any, np.dtype[np.int64]]


class AxisIndex:
    """Step axes of every (run, quantity, name), gathered from receipts."""

    def __init__(self, receipts: Iterable[Receipt]) -> None:
        # Arrays written by the same units share one axis, so units are grouped by the tuple of names they wrote.
        self._groups: dict[tuple[str, str], dict[tuple[str, ...], list[tuple[int, tuple[int, ...]]]]] = {}
        for receipt in receipts:
            for entry in receipt.tensors:
                groups = self._groups.setdefault((receipt.run, entry.quantity), {})
                groups.setdefault(entry.names, []).append((entry.first_row, entry.steps))
        self._axes: dict[tuple[str, str], dict[tuple[str, ...], Axis]] = {}

    def quantities(self) -> list[tuple[str, str]]:
        """(run, quantity) pairs that hold anything."""
        return sorted(self._groups)

    def names(self, run: str, quantity: str) -> list[str]:
        """Names of the arrays of a quantity, in the order they were written."""
        groups = self._groups.get((run, quantity), {})
        return list(dict.fromkeys(name for names in groups for name in names))

    def groups(self, run: str, quantity: str) -> dict[tuple[str, ...], Axis]:
        """Arrays with a common axis, and that axis."""
        if (run, quantity) not in self._axes:
            groups = self._groups.get((run, quantity), {})
            self._axes[run, quantity] = {names: _axis(blocks) for names, blocks in groups.items()}
        return self._axes[run, quantity]

    def axis(self, run: str, quantity: str, name: str) -> Axis:
        """Axis of one array; empty if it holds nothing."""
        found = [axis for names, axis in self.groups(run, quantity).items() if name in names]
        if len(found) == 1:
            return found[0]
        if not found:
            return _axis([])
        steps = np.concatenate([axis.steps for axis in found])
        rows = np.concatenate([axis.rows for axis in found])
        order = np.argsort(steps, kind="stable")
        return Axis(steps[order], rows[order])


def _axis(blocks: list[tuple[int, tuple[int, ...]]]) -> Axis:
    steps = np.array([step for _, of in blocks for step in of], np.int64)
    rows = np.array([first + i for first, of in blocks for i in range(len(of))], np.int64)
    order = np.argsort(steps, kind="stable")
    return Axis(steps[order], rows[order])


class Tensor:
    """One array of the lake: `shape` of a step's cells, `steps` it holds, `read` them."""

    def __init__(self, lake: Lake, run: str, quantity: str, name: str, axis: Axis) -> None:
        self.run = run
        self.quantity = quantity
        self.name = name
        self._lake = lake
        self._axis = axis
        self._folder = f"tensors/{run}/{quantity}/{encode_name(name)}"
        self._readers = _READERS if lake.storage.local else CONNECTIONS

    @cached_property
    def layout(self) -> codec.Layout:
        """Shape, dtype and chunks."""
        layout = self._lake.array_layout(self.run, self.quantity, self.name)
        if layout is None:
            raise CorruptFile(
                f"{self._folder}/zarr.json is missing: run `lakebed verify` to list every damaged file"
            )
        return layout

    @property
    def steps(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Int[step]: steps stored, ascending."""
        return self._axis.steps

    @property
    def shape(self) -> tuple[int, ...]:
        """(number of steps, *shape of one step)."""
        return (len(self.steps), *self.layout.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype."""
        return self.layout.dtype

    def __repr__(self) -> str:
        span = f"steps {self.steps[0]}…{self.steps[-1]}" if len(self.steps) else "no steps"
        return f"<Tensor {self.quantity}/{self.name} of run {self.run!r}: {self.shape}, {self.dtype}, {span}>"

    def read(self, steps: int | Iterable[int] | slice | None = None) -> np.ndarray[Any, Any]:
        """Float[step, *shape] in the order asked; None reads all. A single int drops the axis.

        A slice selects by step value, stop included like SQL's BETWEEN. Raises MissingData for a step not stored.
        """
        if isinstance(steps, int | np.integer):
            result: np.ndarray[Any, Any] = self.read([int(steps)])[0]
            return result
        wanted = self._wanted(steps)
        rows = self._rows_of(wanted)
        order = np.argsort(rows, kind="stable")
        chunks = rows[order] // self.layout.chunk_rows
        places = [self._whole_chunk(rows, order[start:stop]) for start, stop in _runs(chunks)]
        parts = list(_runs(chunks))
        if len(parts) == 1 and places[0] is not None:
            return self.read_block(int(chunks[0]))
        out = np.empty((len(rows), *self.layout.row_shape), self.layout.dtype)
        targets = [None if place is None else out[place] for place in places]
        jobs = [
            partial(self.read_block, int(chunks[start]), target)
            for (start, _), target in zip(parts, targets, strict=True)
        ]
        for (start, stop), target, block in zip(parts, targets, _ahead(jobs, self._readers), strict=True):
            if target is None:
                selected = order[start:stop]
                out[selected] = block[rows[selected] % self.layout.chunk_rows]
        return out

    def _whole_chunk(self, rows: np.ndarray[Any, Any], selected: np.ndarray[Any, Any]) -> slice | None:
        """Where in the output a chunk can be decoded in place: all of its rows are asked for, in their order."""
        count, first = self.layout.chunk_rows, int(selected[0])
        if len(selected) != count or self.layout.chunk_cells != tuple(
            max(1, n) for n in self.layout.row_shape
        ):
            return None
        inside = rows[first : first + count] % count
        in_order = len(inside) == count and bool((inside == np.arange(count)).all())
        return slice(first, first + count) if in_order and bool((np.diff(selected) == 1).all()) else None

    def blocks(
        self, keep: np.ndarray[Any, np.dtype[np.bool_]]
    ) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """(steps, Float[step, *shape]) for the steps where `keep` holds: Bool[step]; a chunk or some small ones at once."""
        steps, rows = self._axis.steps[keep], self._axis.rows[keep]
        count = self.layout.chunk_rows
        parts = list(_runs(rows // count))
        pieces = [parts[start:stop] for start, stop in self._pieces(len(parts))]
        jobs = [partial(self._read_piece, [int(rows[start]) // count for start, _ in of]) for of in pieces]
        for of, block in zip(pieces, _ahead(jobs, self._readers), strict=True):
            within = [rows[start:stop] % count + at * count for at, (start, stop) in enumerate(of)]
            inside = np.concatenate(within)
            whole = len(inside) == len(block) and bool((inside == np.arange(len(block))).all())
            yield steps[of[0][0] : of[-1][1]], block if whole else block[inside]

    def _pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """Start and stop of the chunks that are read at once, of `count`; the first alone, as `_ahead` promises."""
        layout = self.layout
        size = layout.chunk_rows * math.prod(layout.row_shape) * layout.dtype.itemsize
        # Only a chunk of whole rows can be decoded into its place among others.
        at_once = max(1, _BYTES_AT_ONCE // size) if size and layout.chunk_cells == layout.row_shape else 1
        yield from ((0, 1),) if count else ()
        yield from ((start, min(start + at_once, count)) for start in range(1, count, at_once))

    def _read_piece(self, row_chunks: Sequence[int]) -> np.ndarray[Any, Any]:
        """Float[rows, *shape]: these chunks of rows, one after the other."""
        if len(row_chunks) == 1:
            return self.read_block(row_chunks[0])
        count = self.layout.chunk_rows
        out = np.empty((len(row_chunks) * count, *self.layout.row_shape), self.layout.dtype)
        for at, row_chunk in enumerate(row_chunks):
            self.read_block(row_chunk, out[at * count : (at + 1) * count])
        return out

    def read_block(self, row_chunk: int, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """Float[chunk_rows, *shape]: one chunk of rows, every cell chunk of it put together.

        `out`, if given, is decoded into; only where a row is one chunk.
        """
        layout, keys = self.layout, self.layout.keys(row_chunk)
        shape = (layout.chunk_rows, *layout.chunk_cells)
        if len(keys) == 1:
            return self._read_chunk(keys[0][0], shape, out).reshape(layout.chunk_rows, *layout.row_shape)
        out = np.empty((layout.chunk_rows, *layout.row_shape), layout.dtype)
        for key, cells in keys:
            chunk = self._read_chunk(key, shape)
            out[(slice(None), *cells)] = chunk[
                (slice(None), *(slice(part.stop - part.start) for part in cells))
            ]
        return out

    def _read_chunk(
        self, key: str, shape: tuple[int, ...], out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        path = f"{self._folder}/{key}"
        self._lake.count_chunk()
        try:
            data = self._lake.storage.read_chunk(path)
        except FileNotFoundError as error:
            raise CorruptFile(
                f"{path} is missing: run `lakebed verify` to list every damaged file"
            ) from error
        return codec.decode(data, shape, self.layout.dtype, path, out)

    def _wanted(self, steps: Iterable[int] | slice | None) -> np.ndarray[Any, np.dtype[np.int64]]:
        if steps is None:
            return self.steps
        if isinstance(steps, slice):
            low = self.steps[0] if steps.start is None else steps.start
            high = self.steps[-1] if steps.stop is None else steps.stop
            inside: np.ndarray[Any, np.dtype[np.int64]] = self.steps[
                (self.steps >= low) & (self.steps <= high)
            ]
            return inside[:: steps.step or 1]
        return np.fromiter((int(step) for step in steps), np.int64)

    def _rows_of(self, wanted: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not len(self.steps):
            raise MissingData(f"run {self.run!r} holds no step of {self.quantity} {self.name!r}")
        at = np.minimum(np.searchsorted(self.steps, wanted), len(self.steps) - 1)
        absent = wanted[self.steps[at] != wanted]
        if len(absent):
            raise MissingData(missing_steps_message(self.run, self.quantity, self.name, absent, self.steps))
        rows: np.ndarray[Any, np.dtype[np.int64]] = self._axis.rows[at]
        return rows


def missing_steps_message(
    run: str,
    quantity: str,
    name: str,
    absent: Sequence[int] | np.ndarray[Any, Any],
    stored: np.ndarray[Any, Any],
) -> str:
    """Names the steps that are missing, those that exist, and what to run."""
    remedy = ""
    if quantity in ("weights", "exp_avg", "exp_avg_sq"):
        remedy = f"; a recorded step is replayed by `lakebed extract weights --run {run} --steps {absent[0]}`"
    return (
        f"run {run!r} stores no {quantity} {name!r} at step {summarize_steps(absent)}; "
        f"stored are {summarize_steps(stored)}{remedy}"
    )


def _ahead(jobs: Sequence[Callable[[], _T]], readers: int) -> Iterator[_T]:
    """What each job returns, in order: a few are done ahead, by threads.

    The first is done alone, so that a reader who stops after it has cost one.
    """
    yield from (job() for job in jobs[:1])
    if len(jobs) < 2:
        return
    # A pool of its own: a shared one would not survive a fork.
    pool = ThreadPoolExecutor(readers)
    try:
        waiting = deque(pool.submit(job) for job in jobs[1 : 1 + 2 * readers])
        for at in range(1 + 2 * readers, len(jobs) + 2 * readers):
            done = waiting.popleft().result()
            if at < len(jobs):
                waiting.append(pool.submit(jobs[at]))
            yield done
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _runs(values: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of equal neighbours."""
    if not len(values):
        return
    edges = np.flatnonzero(np.diff(values)) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True)

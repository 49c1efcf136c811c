"""Reading tensors: which step lies in which row, and the rows themselves."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import codec
from .errors import CorruptFile, MissingData
from .names import encode_name
from .receipts import Receipt
from .steps import summarize_steps

if TYPE_CHECKING:
    from .lake import Lake

_READERS = min(4, os.cpu_count() or 1)


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
        out = np.empty((len(rows), *self.layout.row_shape), self.layout.dtype)
        order = np.argsort(rows, kind="stable")
        chunks = rows[order] // self.layout.chunk_rows
        places = [self._whole_chunk(rows, order[start:stop]) for start, stop in _runs(chunks)]
        targets = [None if place is None else out[place] for place in places]
        for at, ((start, stop), block) in enumerate(self._read_ahead(chunks, targets)):
            if targets[at] is None:
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
        """(steps, Float[step, *shape]) chunk by chunk for the steps where `keep` holds: Bool[step]."""
        steps, rows = self._axis.steps[keep], self._axis.rows[keep]
        chunks = rows // self.layout.chunk_rows
        for (start, stop), block in self._read_ahead(chunks):
            inside = rows[start:stop] % self.layout.chunk_rows
            whole = len(inside) == len(block) and bool((inside == np.arange(len(block))).all())
            yield steps[start:stop], block if whole else block[inside]

    def _read_ahead(
        self, chunks: np.ndarray[Any, Any], targets: Sequence[np.ndarray[Any, Any] | None] | None = None
    ) -> Iterator[tuple[tuple[int, int], np.ndarray[Any, Any]]]:
        """Start and stop of each run of equal `chunks`, with that chunk: a few are read ahead, by threads.

        `targets` names for each of these runs an array to decode into, or None.

        The first is read alone, so that a reader who stops after it has cost one chunk.
        """
        parts = list(_runs(chunks))
        places = targets or [None] * len(parts)
        wanted = [(int(chunks[start]), place) for (start, _), place in zip(parts, places, strict=True)]
        for part, first in zip(parts[:1], wanted[:1], strict=True):
            yield part, self.read_block(*first)
        if len(parts) < 2:
            return
        # A pool of its own: a shared one would not survive a fork.
        pool = ThreadPoolExecutor(_READERS)
        try:
            waiting = deque(pool.submit(self.read_block, *chunk) for chunk in wanted[1 : 1 + 2 * _READERS])
            for at, part in enumerate(parts[1:], 1 + 2 * _READERS):
                block = waiting.popleft().result()
                if at < len(wanted):
                    waiting.append(pool.submit(self.read_block, *wanted[at]))
                yield part, block
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

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
            data = self._lake.storage.read(path)
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


def _runs(values: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of equal neighbours."""
    if not len(values):
        return
    edges = np.flatnonzero(np.diff(values)) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True)

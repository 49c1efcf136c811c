"""Checking Zarr metadata: every zarr.json against the format, the receipts' chunks and the step axis."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from . import codec
from .axis import axis_end
from .errors import LakebedError
from .names import encode_name

if TYPE_CHECKING:
    from .lake import Lake
    from .receipts import Receipt, TensorEntry
    from .verify import Damage

_FROM_COPY = "restore the file from a copy of the lake; the chunks beside it are checked on their own"
_PUBLISH = "run `lakebed catalog`: it writes the coordinate again from the receipts"


def verify_arrays(lake: Lake, receipts: list[Receipt]) -> list[Damage]:
    """Findings on every array that a receipt names, ordered by path."""
    by_quantity: dict[tuple[str, str], list[tuple[Receipt, TensorEntry]]] = {}
    for receipt in receipts:
        for entry in receipt.tensors:
            by_quantity.setdefault((receipt.run, entry.quantity), []).append((receipt, entry))
    found: list[Damage] = []
    for (run, quantity), entries in sorted(by_quantity.items()):
        found += _verify_quantity(lake, run, quantity, entries)
    return found


def _verify_quantity(
    lake: Lake, run: str, quantity: str, entries: list[tuple[Receipt, TensorEntry]]
) -> Iterator[Damage]:
    from .verify import Damage

    folder = f"tensors/{run}/{quantity}"
    try:
        if lake.block_rows(run, quantity) is None:
            yield Damage(f"{folder}/zarr.json", "missing", _FROM_COPY, run)
    except LakebedError as error:
        yield Damage(f"{folder}/zarr.json", str(error), _FROM_COPY, run)
    try:
        end = axis_end(lake.storage, run, quantity)
    except LakebedError as error:
        yield Damage(f"rows/{run}/{quantity}", str(error), _FROM_COPY, run)
        end = None
    yield from _verify_axis(run, quantity, entries, end)
    layouts: dict[str, codec.Layout] = {}
    for name in dict.fromkeys(name for _, entry in entries for name in entry.names):
        key = f"{folder}/{encode_name(name)}"
        try:
            metadata = lake.storage.read(f"{key}/zarr.json")
            layouts[name] = codec.layout_of(metadata, key)[0]
            reason = _misfit(json.loads(metadata), name, end)
        except FileNotFoundError:
            reason = "missing"
        except LakebedError as error:
            reason = str(error)
        if reason:
            yield Damage(f"{key}/zarr.json", reason, _FROM_COPY, run)
    yield from _verify_chunks(folder, entries, layouts)
    yield from _verify_coordinate(lake, folder, run, entries)


def _misfit(metadata: dict[str, object], name: str, end: int | None) -> str | None:
    """Why an array's metadata does not belong to array `name` on an axis of `end` rows."""
    attributes, shape, dimensions = (metadata.get(key) for key in ("attributes", "shape", "dimension_names"))
    assert isinstance(shape, list)
    if not isinstance(attributes, dict) or attributes.get("name") != name:
        return f"its attributes do not name {name!r}"
    if not isinstance(dimensions, list) or len(dimensions) != len(shape) or dimensions[0] != "step":
        return "its dimensions do not begin with step, or are not as many as its shape has"
    if end is not None and shape[0] > end:
        return f"its step axis has {shape[0]:,} rows, of which only {end:,} were ever claimed"
    return None


def _verify_axis(
    run: str, quantity: str, entries: Iterable[tuple[Receipt, TensorEntry]], end: int | None
) -> Iterator[Damage]:
    """Rows that two units hold, steps that an array holds twice, rows beyond what was claimed."""
    from .verify import damage

    row_owner: dict[int, str] = {}
    step_owner: dict[tuple[str, int], str] = {}
    for receipt, entry in entries:
        rows = range(entry.first_row, entry.first_row + len(entry.steps))
        if end is not None and rows.stop > end:
            yield damage(
                receipt, receipt.key, f"its rows of {quantity} end at {rows.stop}, claimed are {end}"
            )
        shared = {row_owner[row] for row in rows if row in row_owner}
        if shared:
            yield damage(
                receipt, receipt.key, f"rows of {quantity} are held by {', '.join(sorted(shared))} too"
            )
        row_owner.update(dict.fromkeys(rows, receipt.unit))
        held = set()
        for name in entry.names:
            held |= {step for step in entry.steps if (name, step) in step_owner}
            step_owner.update({(name, step): receipt.unit for step in entry.steps})
        if held or len(set(entry.steps)) < len(entry.steps):
            step = min(held) if held else min(s for s in entry.steps if entry.steps.count(s) > 1)
            yield damage(receipt, receipt.key, f"{quantity} at step {step} of run {run} is held twice")


def _verify_chunks(
    folder: str, entries: Iterable[tuple[Receipt, TensorEntry]], layouts: dict[str, codec.Layout]
) -> Iterator[Damage]:
    """Chunks that the layout asks for and the receipt does not list: zarr.json is of another chunking or shape."""
    from .verify import Damage

    reported: set[str] = set()
    for receipt, entry in entries:
        listed = {file.path for file in receipt.files}
        for name in entry.names:
            layout = layouts.get(name)
            if layout is None or name in reported:
                continue
            key = f"{folder}/{encode_name(name)}"
            last = entry.first_row + len(entry.steps) - 1
            blocks = range(entry.first_row // layout.chunk_rows, last // layout.chunk_rows + 1)
            absent = [
                f"{key}/{chunk}"
                for block in blocks
                for chunk, _ in layout.keys(block)
                if f"{key}/{chunk}" not in listed
            ]
            if absent:
                reported.add(name)
                reason = f"its shape and chunks ask for {absent[0]}, which the receipt of {receipt.unit} does not list"
                yield Damage(
                    f"{key}/zarr.json", reason, _FROM_COPY, receipt.run, receipt.unit, receipt.dataset
                )


def _verify_coordinate(
    lake: Lake, folder: str, run: str, entries: Iterable[tuple[Receipt, TensorEntry]]
) -> Iterator[Damage]:
    """The published `step` array: it may be older than the receipts, but it must not contradict them."""
    from .verify import Damage

    try:
        metadata = lake.storage.read(f"{folder}/step/zarr.json")
    except FileNotFoundError:
        return  # never published
    path = f"{folder}/step/zarr.json"
    try:
        layout, _ = codec.layout_of(metadata, f"{folder}/step")
        rows = int(json.loads(metadata)["shape"][0])
        steps = np.full(rows, -1, np.int64)
        for start in range(0, rows, layout.chunk_rows):
            path = f"{folder}/step/c/{start // layout.chunk_rows}"
            part = codec.decode(lake.storage.read(path), (layout.chunk_rows,), layout.dtype, path)
            steps[start : start + len(part)] = part[: rows - start]
    except FileNotFoundError:
        yield Damage(path, "missing", _PUBLISH, run)
        return
    except LakebedError as error:
        yield Damage(path, str(error), _PUBLISH, run)
        return
    held = np.full(rows, -1, np.int64)
    for _, entry in entries:
        part = np.asarray(entry.steps, np.int64)[: max(0, rows - entry.first_row)]
        held[entry.first_row : entry.first_row + len(part)] = part
    wrong = np.flatnonzero((steps >= 0) & (steps != held))
    if len(wrong):
        row = int(wrong[0])
        said = f"step {held[row]}" if held[row] >= 0 else "nothing"
        yield Damage(path, f"row {row} says step {steps[row]}, the receipts say {said}", _PUBLISH, run)

"""The step axis of a quantity: who may write which rows, and what plain Zarr readers see of it.

A writer claims rows by creating a small file named after the first of them; exactly one of two writers who want the
same rows succeeds, the other takes the next. Rows claimed and never committed hold no step. `publish` writes the
arrays' lengths and the `step` coordinate for readers that know Zarr but not receipts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from . import codec
from .errors import CorruptFile
from .storage import Storage

if TYPE_CHECKING:
    from .lake import Lake

_COORDINATE_CHUNK = 65536
# Where this process found the axis to end, so that a long recording does not list its claims again and again; by
# lake id, since another lake may come to stand at the same path.
_ENDS: dict[tuple[str, str, str], int] = {}


def claim_rows(storage: Storage, lake_id: str, run: str, quantity: str, count: int, block_rows: int) -> int:
    """Reserves `count` rows, rounded up to whole blocks; returns the first row, a multiple of `block_rows`."""
    size = -(-count // block_rows) * block_rows
    folder = f"rows/{run}/{quantity}"
    first = _ENDS.get((lake_id, run, quantity))
    if first is None:
        first = axis_end(storage, run, quantity)
    while not storage.create(f"{folder}/{first:012d}", json.dumps({"rows": size}).encode()):
        first = max(axis_end(storage, run, quantity), first + block_rows)
    _ENDS[lake_id, run, quantity] = first + size
    return first


def axis_end(storage: Storage, run: str, quantity: str) -> int:
    """One past the last claimed row."""
    folder = f"rows/{run}/{quantity}"
    claims = storage.names(folder)
    if not claims:
        return 0
    try:
        return int(claims[-1]) + int(json.loads(storage.read(f"{folder}/{claims[-1]}"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(
            f'{folder}/{claims[-1]} is damaged: a claim is named after its first row and holds {{"rows": N}}; restore '
            "it from a copy of the lake"
        ) from error


def publish(lake: Lake, run: str | None = None) -> None:
    """Writes array lengths and `step` coordinates so that plain Zarr readers see every committed step.

    A row without a step (padding, or a unit that was never finished) has a negative, unique step and NaN cells.
    """
    lake.refresh()
    for of_run, quantity in lake.axes.quantities():
        if run in (None, of_run):
            _publish_quantity(lake, of_run, quantity)


def _publish_quantity(lake: Lake, run: str, quantity: str) -> None:
    folder = f"tensors/{run}/{quantity}"
    rows = axis_end(lake.storage, run, quantity)
    steps = -1 - np.arange(rows, dtype=np.int64)
    for axis in lake.axes.groups(run, quantity).values():
        steps[axis.rows] = axis.steps
    layout = codec.Layout((), np.dtype(np.int64), _COORDINATE_CHUNK, ())
    for start in range(0, rows, _COORDINATE_CHUNK):
        part = steps[start : start + _COORDINATE_CHUNK]
        padded = np.zeros(_COORDINATE_CHUNK, np.int64)
        padded[: len(part)] = part
        lake.storage.write(f"{folder}/step/c/{start // _COORDINATE_CHUNK}", codec.encode(padded))
    for name in lake.storage.names(folder):
        if name in ("zarr.json", "step"):
            continue
        _set_rows(lake, f"{folder}/{name}/zarr.json", rows)
    about = {"about": "training step of each row; negative: the row holds nothing"}
    lake.storage.write(f"{folder}/step/zarr.json", codec.array_metadata(layout, rows, ["step"], about, 0))


def _set_rows(lake: Lake, key: str, rows: int) -> None:
    try:
        metadata = lake.storage.read(key)
    except FileNotFoundError:
        return  # the folder of an array whose writer was killed before it wrote anything
    codec.layout_of(metadata, key.removesuffix("/zarr.json"))
    value = json.loads(metadata)
    # Coordinates other than step (layer, head, rank) have no step axis.
    if value["dimension_names"][0] == "step" and value["shape"][0] != rows:
        lake.storage.write(key, codec.with_rows(metadata, rows))

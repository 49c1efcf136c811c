"""Whether two lakes hold the same: content hashes, rows, and the bytes of every chunk and Parquet file, wherever they lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lakebed.lake import Lake
from lakebed.lake.schema import TABLES
from lakebed.lake.verify import verify

# What says when and how fast something was made.
TIMES = {"extractions"}


def contents(path: Path | str) -> dict[str, Any]:
    """By unit, what it was made from and the checksum of every file, chunks by their place within the unit; and all rows."""
    with Lake.open(path) as lake:
        checked = verify(lake)
        assert checked.ok, checked.damaged
        lake.refresh()
        units: dict[str, Any] = {}
        for receipt in lake.receipts.all():
            files = sorted(_placed(of, receipt) for of in receipt.files)
            units[f"{receipt.run}/{receipt.unit}"] = (receipt.content_hash, receipt.rows, tuple(files))
        rows = {
            name: lake.sql(f"SELECT * FROM {name} ORDER BY ALL").fetchall()
            for name in TABLES
            if name not in TIMES
        }
        tensors = {
            (run, quantity, name, step): lake.tensor(quantity, name, run).read(step).tobytes()
            for run, quantity in lake.axes.quantities()
            for names, axis in lake.axes.groups(run, quantity).items()
            for name in names
            for step in axis.steps
        }
    return {"units": units, "rows": rows, "tensors": tensors}


def assert_same(one: Path | str, other: Path | str) -> None:
    """Fails naming the first thing that differs."""
    ours, theirs = contents(one), contents(other)
    for kind, held in ours.items():
        assert held.keys() == theirs[kind].keys(), kind
        for name, value in held.items():
            assert value == theirs[kind][name], (kind, name)


def assert_part(whole: Path | str, part: Path | str) -> None:
    """Fails unless every unit and every step of a tensor in `part` is in `whole`, the same."""
    ours, theirs = contents(whole), contents(part)
    for kind in ("units", "tensors"):
        assert theirs[kind].items() <= ours[kind].items(), kind


def _placed(of: Any, receipt: Any) -> tuple[str, int, int]:
    """(place, bytes, checksum): rows of a step axis counted from the unit's first, files without their attempt's name."""
    for entry in receipt.tensors:
        folder = f"tensors/{receipt.run}/{entry.quantity}/"
        if of.path.startswith(folder):
            array, _, chunk = of.path.removeprefix(folder).partition("/c/")
            row, *cells = re.split(r"[/.]", chunk)
            return (
                "/".join([entry.quantity, array, str(int(row) - entry.first_row), *cells]),
                of.bytes,
                of.crc32c,
            )
    table = of.path.split("/")[1]
    return table, of.bytes, of.crc32c

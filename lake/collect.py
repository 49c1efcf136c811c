"""Collecting garbage: files that no receipt names, once it is certain that nobody is about to name or read them.

Three kinds stand in a lake. Superseded: receipts and files that a compaction took the place of; readers that listed them
before may still be at work. Unfinished: files of units without a receipt; their writer was killed, lost against another,
or is still at work. Temporary: what an interrupted write left. Each is removed when it is older than an age that no reader
and no pause of a writer reaches: counted from the compaction for what is superseded, else from when the file was written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .catalog import VIEWS_FILE, write_catalog
from .compactions import Compaction, compaction_key, compaction_numbers, compactions_folder
from .receipts import FOLDER, Receipt, receipt_key

if TYPE_CHECKING:
    from .lake import Lake

SUPERSEDED, UNFINISHED, TEMPORARY = "superseded", "unfinished", "temporary"
# Called after each file.
Progress = Callable[[], None]
# Seconds: the default age.
AN_HOUR = 3600.0


@dataclass(frozen=True)
class Garbage:
    """A file to remove, its bytes, and of which kind it is."""

    key: str
    bytes: int
    kind: str


def plan_collection(lake: Lake, older_than: float = AN_HOUR) -> list[Garbage]:
    """Files that may go, receipts first: those without a receipt that are older than `older_than` seconds.

    Raises CorruptFile where a receipt cannot be read: what it names could not be told from garbage.
    """
    # Files before receipts: what is committed meanwhile is named by a receipt read afterwards.
    standing = dict(lake.storage.listing(""))
    latest = time.time() - older_than
    with lake.pinned():
        receipts = lake.receipts.all()
        superseded, fresh = _superseded(lake, latest)
    kept = {entry.path for receipt in receipts for entry in receipt.files}
    kept |= {receipt.key for receipt in receipts} | fresh
    left = [(key, kind) for key in standing if key not in kept and (kind := _kind(key, superseded))]
    found = [(Garbage(key, standing[key][0], kind), standing[key][1]) for key, kind in left]
    # A unit writes its chunks one after another: while the run gets new ones, its older ones are at work too.
    busy = {_run(of.key) for of, written in found if of.key.startswith("tensors/") and written > latest}
    garbage = [
        of
        for of, written in found
        if written <= latest and not (of.key.startswith("tensors/") and _run(of.key) in busy)
    ]
    return sorted(garbage, key=lambda of: (not of.key.startswith(FOLDER), of.key))


def collect(lake: Lake, garbage: Iterable[Garbage], progress: Progress | None = None) -> None:
    """Removes the files. A catalog that names them is written again first.

    Receipts go first, so that none names a file that is gone. Whoever is killed here leaves fewer files, no other harm.
    """
    listed = list(garbage)
    if any(of.kind == SUPERSEDED for of in listed) and lake.storage.exists(VIEWS_FILE):
        write_catalog(lake)
    receipts = [of.key for of in listed if of.key.startswith(FOLDER)]
    for keys in (receipts, [of.key for of in listed if not of.key.startswith(FOLDER)]):
        for _ in lake.storage.remove_all(keys):
            if progress is not None:
                progress()


def totals(garbage: Iterable[Garbage]) -> dict[str, dict[str, int]]:
    """Files and bytes by kind."""
    files, size = Counter[str](), Counter[str]()
    for of in garbage:
        files[of.kind] += 1
        size[of.kind] += of.bytes
    return {kind: {"files": files[kind], "bytes": size[kind]} for kind in (SUPERSEDED, UNFINISHED, TEMPORARY)}


def _superseded(lake: Lake, latest: float) -> tuple[set[str], set[str]]:
    """Receipts that a compaction took the place of, with the files they name: all, and those replaced after `latest`."""
    made = {key: lake.storage.modified(key) for key in {of.kept_in for of in lake.receipts.all()} if key}
    every: set[str] = set()
    fresh: set[str] = set()
    for run in lake.runs():
        standing = {of.unit: made[of.kept_in] for of in lake.receipts.all(run) if of.kept_in}
        for key, receipts in _superseded_receipts(lake, run, standing.keys(), made.keys()):
            found = {key, *(entry.path for receipt in receipts for entry in receipt.files)}
            every |= found
            if any(standing.get(receipt.unit, 0.0) > latest for receipt in receipts):
                fresh |= found
    return every, fresh


def _superseded_receipts(
    lake: Lake, run: str, compacted: Collection[str], standing: Collection[str]
) -> Iterator[tuple[str, tuple[Receipt, ...]]]:
    """(key, what it holds) of receipts of compacted units, and of compactions that do not count any more."""
    units = (name.removesuffix(".parquet") for name in lake.storage.names(f"{FOLDER}/run={run}"))
    for path in [receipt_key(run, unit) for unit in units if unit in compacted]:
        with suppress(FileNotFoundError):
            yield path, (Receipt.from_parquet(run, lake.storage.read(path), path),)
    for number in compaction_numbers(lake.storage.names(compactions_folder(run))):
        path = compaction_key(run, number)
        if path not in standing:
            with suppress(FileNotFoundError):
                yield path, Compaction.from_parquet(run, number, lake.storage.read(path)).receipts


def _kind(key: str, superseded: Collection[str]) -> str | None:
    """What a file that is not named is; None for what is never garbage: metadata, claims, and what is not of the lake."""
    folder, *parts = key.split("/")
    name = parts[-1] if parts else folder
    if key in superseded:
        return SUPERSEDED
    if name.startswith(".") and name.removesuffix(".wal").endswith(".tmp"):
        return TEMPORARY
    if folder == "tensors":
        return UNFINISHED if len(parts) > 4 and parts[3] == "c" and parts[2] != "step" else None
    is_rows = (
        folder == "tables" and len(parts) == 3 and parts[0] != "extractions" and name.endswith(".parquet")
    )
    return UNFINISHED if is_rows else None


def _run(key: str) -> str:
    """The run of a file below tables/ or tensors/."""
    parts = key.split("/")
    return parts[1] if parts[0] == "tensors" else parts[2].removeprefix("run=")

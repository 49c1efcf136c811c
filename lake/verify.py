"""Checking a whole lake: every file against its receipt, every array against the step axis, every key for duplicates.

Nothing here repairs. Each finding names a path, what is wrong with it, whose unit it is and what mends it. Files
that no receipt names are counted but are no damage: a writer that was killed, or is still at work, left them, or they
were compacted.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from . import codec
from .compactions import (
    Compaction,
    compaction_key,
    compaction_numbers,
    compactions_folder,
    counted,
)
from .datasets import CROSS_SEED, CROSS_SEED_UPDATES, PROBE, RECORDED
from .errors import LakebedError
from .names import content_hash
from .receipts import FOLDER, FileEntry, Receipt, receipt_key, receipts_from_parquet
from .schema import TABLES
from .verify_arrays import verify_arrays

if TYPE_CHECKING:
    from .lake import Lake

# Called after each file with (files done, files in all, bytes done, bytes in all).
Progress = Callable[[int, int, int, int], None]
_THREADS = 8
# Files handed to the threads ahead of the results taken back, so that memory does not grow with the lake.
_AHEAD = 64


@dataclass(frozen=True)
class Damage:
    """One damaged path: why, which unit of which run it belongs to (None if of no single one), and the remedy."""

    path: str
    reason: str
    remedy: str
    run: str | None = None
    unit: str | None = None
    dataset: str | None = None


@dataclass
class VerifyResult:
    """What `verify` found: files and bytes compared with receipts, damage, and files that no receipt names."""

    files: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    unreferenced_files: int = 0
    unreferenced_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged

    def to_json(self) -> dict[str, Any]:
        """The object `lakebed verify` prints."""
        return {
            "ok": self.ok,
            "files": self.files,
            "bytes": self.bytes,
            "damaged": [asdict(damage) for damage in self.damaged],
            "unreferenced": {"files": self.unreferenced_files, "bytes": self.unreferenced_bytes},
        }


def verify(lake: Lake, run: str | None = None, progress: Progress | None = None) -> VerifyResult:
    """Checks every file of `lake`, or of one run; raises UnknownName for a run that the lake does not have.

    Files are read in pieces by a few threads, so memory stays flat however large they are.
    """
    result = VerifyResult()
    runs = [name.removeprefix("run=") for name in lake.storage.names(FOLDER)]
    if run is not None and run not in runs:
        lake.require_run(run)
    receipts = list(_receipts(lake, runs if run is None else [run], result))
    broken = _verify_files(lake, receipts, result, progress)
    result.damaged += verify_arrays(lake, receipts)
    result.damaged += _verify_keys(lake, receipts, broken)
    _count_unreferenced(lake, receipts, result, run)
    return result


def remedy_for(receipt: Receipt) -> str:
    """What makes a damaged unit whole again."""
    if receipt.dataset in RECORDED:
        return (
            "restore the file from a copy of the lake; what was recorded while training cannot be made anew, only "
            "recorded again under another run name"
        )
    if receipt.dataset == PROBE:
        name = json.loads(receipt.parameters).get("probe")
        return (
            f"remove {receipt.key}, then give again the `lakebed probe build` or `lakebed probe import` that made probe "
            f"{name!r} of run {receipt.run!r}"
        )
    if receipt.dataset in (CROSS_SEED, CROSS_SEED_UPDATES):
        return (
            f"remove {receipt.key}, then give again the `lakebed pipeline cross-seed` that made it: it makes what is "
            "missing"
        )
    return (
        f"remove {receipt.key}, then run `lakebed extract {receipt.dataset} --run {receipt.run}` again: "
        "it makes what is missing"
    )


def damage(receipt: Receipt, path: str, reason: str, remedy: str | None = None) -> Damage:
    """A finding that belongs to one unit, or to all those whose rows lie in one compacted file."""
    unit = None if receipt.kept_in and path.startswith("tables/") else receipt.unit
    return Damage(path, reason, remedy or remedy_for(receipt), receipt.run, unit, receipt.dataset)


def _receipts(lake: Lake, runs: Iterable[str], result: VerifyResult) -> Iterator[Receipt]:
    """The receipts that count and can be believed; the others become findings."""
    for run in runs:
        # Units first, as ReceiptIndex lists them.
        names = lake.storage.names(f"{FOLDER}/run={run}")
        compactions = counted(_compactions(lake, run, result))
        held = {unit for compaction in compactions for unit in compaction.units}
        for compaction in compactions:
            yield from compaction.receipts
        for unit in (name.removesuffix(".parquet") for name in names if name.endswith(".parquet")):
            if unit not in held:
                path = receipt_key(run, unit)
                yield from _read(lake, run, path, partial(_single, run, path), result, unit)


def _compactions(lake: Lake, run: str, result: VerifyResult) -> Iterator[Compaction]:
    for number in compaction_numbers(lake.storage.names(compactions_folder(run))):
        path = compaction_key(run, number)
        receipts = _read(lake, run, path, partial(_many, run, path), result)
        yield Compaction(run, number, tuple(receipts))


def _single(run: str, path: str, data: bytes, pages: bool) -> Sequence[Receipt]:
    return (Receipt.from_parquet(run, data, path, pages),)


def _many(run: str, path: str, data: bytes, pages: bool) -> Sequence[Receipt]:
    return receipts_from_parquet(run, data, path, pages)


def _read(
    lake: Lake,
    run: str,
    path: str,
    parse: Callable[[bytes, bool], Sequence[Receipt]],
    result: VerifyResult,
    unit: str | None = None,
) -> Sequence[Receipt]:
    """The receipts that a file holds, of `unit` if it is named; none, and a finding, where they cannot be read."""
    try:
        data = lake.storage.read(path)
        receipts, columns = parse(data, False), parse(data, True)
    except FileNotFoundError:
        return ()  # removed since it was listed
    except LakebedError as error:
        remedy = f"remove {path} and run the same again"
        result.damaged.append(Damage(path, str(error), remedy, run, unit))
        return ()
    result.files += 1
    result.bytes += len(data)
    for receipt, same in zip_longest(receipts, columns):
        reason = _doubt(receipt or same, same, unit or (receipt or same).unit)
        if reason:
            result.damaged.append(damage(receipt or same, path, reason))
    return receipts


def _doubt(receipt: Receipt, columns: Receipt | None, unit: str) -> str | None:
    if receipt != columns:
        return "the receipt's columns say something else than its footer"
    if receipt.unit != unit:
        return f"the receipt is of unit {receipt.unit!r}: it was renamed or copied"
    made_from = {
        "dataset": receipt.dataset,
        "version": receipt.version,
        "parameters": json.loads(receipt.parameters),
        "inputs": json.loads(receipt.inputs),
        "steps": list(receipt.steps),
    }
    if content_hash(made_from) != receipt.content_hash:
        return "the receipt's content hash is not that of its own fields"
    return None


def _verify_files(
    lake: Lake, receipts: list[Receipt], result: VerifyResult, progress: Progress | None
) -> set[str]:
    """Compares every file with its receipt; returns the paths that failed."""
    owners = {entry.path: (receipt, entry) for receipt in reversed(receipts) for entry in receipt.files}
    total = len(owners)
    total_bytes = sum(entry.bytes for _, entry in owners.values())
    done = done_bytes = 0
    broken: set[str] = set()
    for receipt, entry, reason in _compared(lake, owners.values()):
        done, done_bytes = done + 1, done_bytes + entry.bytes
        if reason:
            broken.add(entry.path)
            result.damaged.append(damage(receipt, entry.path, reason))
        if progress is not None:
            progress(done, total, done_bytes, total_bytes)
    result.files += done
    result.bytes += done_bytes
    return broken


def _compared(
    lake: Lake, files: Iterable[tuple[Receipt, FileEntry]]
) -> Iterator[tuple[Receipt, FileEntry, str | None]]:
    waiting: deque[tuple[Receipt, FileEntry, Future[str | None]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for receipt, entry in files:
            waiting.append((receipt, entry, pool.submit(difference, lake, entry)))
            if len(waiting) >= _AHEAD:
                oldest = waiting.popleft()
                yield oldest[0], oldest[1], oldest[2].result()
        for receipt, entry, future in waiting:
            yield receipt, entry, future.result()


def difference(lake: Lake, entry: FileEntry) -> str | None:
    """How a file differs from its receipt, or None."""
    try:
        length, checksum, end = lake.storage.checksum(entry.path, entry.bytes)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if length != entry.bytes:
        return f"{length:,} bytes, its receipt says {entry.bytes:,}"
    if entry.path.startswith("tensors/"):
        # A chunk ends in its own checksum, and the receipt holds that one: see codec.chunk_checksum.
        if checksum != codec.WHOLE:
            return "its checksum is not its own"
        checksum = codec.chunk_checksum(end)
    return None if checksum == entry.crc32c else "its checksum is not the receipt's"


def _verify_keys(lake: Lake, receipts: list[Receipt], broken: set[str]) -> list[Damage]:
    """Rows of a table that share their key."""
    import duckdb

    from .session import select_from

    found: list[Damage] = []
    session = lake.session
    for name, table in TABLES.items():
        prefix = f"tables/{name}/"
        # A compacted file is one of many units, all of them in one compaction.
        keys = {
            (receipt.kept_in or number, entry.path)
            for number, receipt in enumerate(receipts)
            for entry in receipt.files
            if entry.path.startswith(prefix) and entry.path not in broken
        }
        paths = sorted(lake.storage.path(path) for _, path in keys)
        if not paths or name == "extractions":
            continue
        key = ", ".join(dict.fromkeys(["run", *table.key]))
        query = f"SELECT {key}, count(*) AS n FROM ({select_from(name, paths)}) GROUP BY ALL HAVING n > 1 ORDER BY ALL"
        try:
            rows = session.connection.execute(f"SELECT *, count(*) OVER () FROM ({query}) LIMIT 1").fetchall()
        except duckdb.Error as error:
            reason = f"cannot be read as table {name}: {' '.join(str(error).split())}"
            found.append(
                Damage(f"tables/{name}", reason, "restore the table's files from a copy of the lake")
            )
            continue
        if rows:
            *first, count, many = rows[0]
            named = ", ".join(
                f"{label} {value!r}" for label, value in zip(key.split(", "), first, strict=True)
            )
            reason = f"{many:,} keys stand more than once, the first of them ({named}) {count} times"
            remedy = f"find the units in `extractions`, and remove the receipt of one of those that wrote {name} twice"
            found.append(Damage(f"tables/{name}", reason, remedy, str(first[0])))
    return found


def _count_unreferenced(lake: Lake, receipts: list[Receipt], result: VerifyResult, run: str | None) -> None:
    """Counts files below tables/ and tensors/ that belong to nothing."""
    named = {entry.path for receipt in receipts for entry in receipt.files}
    named.update(receipt.key for receipt in receipts)
    named.update(found.path for found in result.damaged)
    for folder in ("tables", "tensors"):
        for key, (size, _) in lake.storage.listing(folder):
            if key in named or _is_metadata(key) or (run is not None and not _of_run(key, run)):
                continue
            result.unreferenced_files += 1
            result.unreferenced_bytes += size


def _is_metadata(key: str) -> bool:
    """zarr.json of groups and arrays, and the published step coordinate."""
    parts = key.split("/")
    return parts[0] == "tensors" and (
        parts[-1] == "zarr.json" or (len(parts) == 6 and parts[3:5] == ["step", "c"])
    )


def _of_run(key: str, run: str) -> bool:
    parts = key.split("/")
    return parts[1] == run if parts[0] == "tensors" else parts[2] == f"run={run}"

"""Compacting: the small files of many units become one file per table, and their receipts one object.

Nothing that stands is touched. Merged files are written under new names, and then one compaction (see compactions.py)
is created, which makes them count and what they were made of superseded. Superseded files stay for readers at work, until
`collect.py` removes them. Killed at any point before, a compaction leaves files that no receipt names.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from .compactions import compaction_key
from .errors import CorruptFile, LakebedError, SchemaMismatch, UnknownName
from .receipts import FileEntry, Receipt, parquet_bytes, read_checked, receipts_to_parquet
from .schema import TABLES

if TYPE_CHECKING:
    from .lake import Lake

# Called with the number of files of a group that were merged.
Progress = Callable[[int], None]
Started = Callable[[int], Progress]
# What one compaction holds at most: bytes of Parquet, which are merged in memory; entries of files and units, all of which
# every reader parses.
_BYTES, _ENTRIES, _UNITS = 32 << 20, 20_000, 4_000
# So that a filter on steps skips most of a file: some 50 intervals of attributions, one checkpoint of readouts.
_ROW_GROUP = 32_768
# Objects that a query opens in a fifth of a second.
_MANY = 128


@dataclass(frozen=True)
class Group:
    """Units of one dataset of a run to be compacted together; `tables` are those whose files are merged."""

    run: str
    dataset: str
    receipts: tuple[Receipt, ...]
    tables: tuple[str, ...]

    @cached_property
    def sources(self) -> dict[str, list[FileEntry]]:
        """Files to merge, by table."""
        found = {table: _files(self.receipts, table) for table in self.tables}
        return {table: files for table, files in found.items() if files}

    @cached_property
    def receipt_keys(self) -> list[str]:
        """The objects that hold the receipts now."""
        return list(dict.fromkeys(receipt.key for receipt in self.receipts))

    @property
    def files(self) -> int:
        """Files a reader of these tables opens now."""
        return sum(len(files) for files in self.sources.values())

    @property
    def bytes(self) -> int:
        """Their bytes."""
        return sum(entry.bytes for files in self.sources.values() for entry in files)

    @property
    def saved(self) -> int:
        """How many objects fewer there are to open afterwards."""
        return self.files + len(self.receipt_keys) - len(self.sources) - 1


@dataclass(frozen=True)
class Compacted:
    """What became of a group: False if what it was planned on changed meanwhile; bytes of its files and its receipts."""

    group: Group
    committed: bool
    bytes: int = 0


def plan_compaction(
    lake: Lake,
    run: str | None = None,
    tables: Collection[str] = (),
    datasets: Collection[str] | None = None,
    least: int = 1,
) -> list[Group]:
    """What there is to compact in a run, or in all: groups that save `least` objects, by run and dataset.

    `tables` limits it to the files of these tables, and to the units that have some; `extractions` are the receipts, which
    are always merged. Raises UnknownName for a table or run that is not there.
    """
    for name in tables:
        if name not in TABLES:
            raise UnknownName(f"no table {name!r}; there are {', '.join(sorted(TABLES))}")
    if run is not None:
        lake.require_run(run)
    lake.refresh()
    chosen = tuple(sorted(set(tables) or TABLES))
    found = []
    for name in lake.runs() if run is None else [run]:
        for dataset in sorted({receipt.dataset for receipt in lake.receipts.all(name)}):
            if datasets is None or dataset in datasets:
                found += [
                    Group(name, dataset, receipts, tuple(table for table in chosen if table != "extractions"))
                    for receipts in _bins(lake.receipts.all(name, dataset), chosen)
                ]
    return [group for group in found if group.saved >= least]


def compact(lake: Lake, groups: Iterable[Group], progress: Progress | None = None) -> Iterator[Compacted]:
    """Compacts one group after another. Raises CorruptFile for a file that is not what its receipt says."""
    for group in groups:
        yield _compact(lake, group, progress or (lambda _: None))


def compact_many(lake: Lake, run: str, datasets: Collection[str], started: Started | None = None) -> None:
    """Compacts datasets of a run that have become so many small files that a query is slow: what `extract` ends with.

    `started` is called with the number of files, if there are any, and returns what to call as they are merged. What
    cannot be compacted is left as it is: everything was finished before, and `lakebed verify` tells what is wrong.
    """
    with suppress(LakebedError):
        groups = plan_compaction(lake, run, datasets=datasets, least=_MANY)
        progress = started(sum(group.files for group in groups)) if groups and started else None
        for _ in compact(lake, groups, progress):
            pass


def _files(receipts: Iterable[Receipt], table: str) -> list[FileEntry]:
    """Distinct files of a table."""
    prefix = f"tables/{table}/"
    found = {of.path: of for receipt in receipts for of in receipt.files if of.path.startswith(prefix)}
    return list(found.values())


def _bins(receipts: Sequence[Receipt], tables: Sequence[str]) -> Iterator[tuple[Receipt, ...]]:
    """Receipts of a dataset in portions that one compaction may hold, those of neighbouring steps together.

    What an earlier compaction holds stays together: the later one supersedes it as a whole.
    """
    items: dict[str, list[Receipt]] = {}
    for receipt in sorted(receipts, key=lambda of: (of.spec, of.steps, of.unit)):
        items.setdefault(receipt.key, []).append(receipt)
    portion: list[Receipt] = []
    filled = 0.0
    for item in items.values():
        files = [entry for table in tables for entry in _files(item, table)]
        if not files and "extractions" not in tables:
            continue
        size = sum(entry.bytes for entry in files) / _BYTES + len(item) / _UNITS
        size += sum(len(receipt.files) for receipt in item) / _ENTRIES
        if portion and filled + size > 1:
            yield tuple(portion)
            portion, filled = [], 0.0
        portion += item
        filled += size
    if portion:
        yield tuple(portion)


def _compact(lake: Lake, group: Group, progress: Progress) -> Compacted:
    merged: dict[str, FileEntry] = {}
    committed = False
    try:
        for table, files in group.sources.items():
            if len(files) > 1:
                merged[table] = _merge(lake, group, table, files)
            progress(len(files))
        receipts = [replace(receipt, files=_files_now(receipt, merged)) for receipt in group.receipts]
        data = receipts_to_parquet(receipts)
        committed = _commit(lake, group, receipts, data)
    except FileNotFoundError as error:
        if not _is_outdated(lake, group):
            raise CorruptFile(
                f"a file of {group.dataset} of run {group.run!r} is missing: run `lakebed verify` to list every damaged file"
            ) from error
    finally:
        if not committed:
            _discard(lake, group, merged)
    if not committed:
        return Compacted(group, False)
    left = [entry for table in group.sources for entry in _files(receipts, table)]
    return Compacted(group, True, sum(entry.bytes for entry in left) + len(data))


def _merge(lake: Lake, group: Group, table: str, files: Sequence[FileEntry]) -> FileEntry:
    """One file of the rows of `files`, in the order of the table's key."""
    schema = TABLES[table].arrow_schema()
    parts = []
    for entry, data in zip(files, _read(lake, files), strict=True):
        # Small files, one after another: read_table would set up a scan for each.
        part = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        if not part.schema.equals(schema):
            raise SchemaMismatch(
                f"{entry.path} has columns {', '.join(part.schema.names)}, and table {table!r} has "
                f"{', '.join(schema.names)}: it was written by another version of lakebed, which must compact it"
            )
        parts.append(part)
    whole = pa.concat_tables(parts)
    keys = [(name, "ascending") for name in TABLES[table].key if name != "run"]
    data = parquet_bytes(whole.sort_by(keys) if keys and len(whole) else whole, _ROW_GROUP)
    key = f"tables/{table}/run={group.run}/{group.dataset}-compacted-{uuid.uuid4().hex[:12]}.parquet"
    lake.storage.write(key, data)
    return FileEntry(key, len(data), int(google_crc32c.value(data)))


def _read(lake: Lake, files: Sequence[FileEntry]) -> list[bytes]:
    """The bytes of files, checked; side by side where every one is a journey."""
    if lake.storage.local:
        return [read_checked(lake.storage, entry) for entry in files]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(partial(read_checked, lake.storage), files))


def _files_now(receipt: Receipt, merged: dict[str, FileEntry]) -> tuple[FileEntry, ...]:
    """Files of a unit after its group was merged."""
    found: dict[str, FileEntry] = {}
    for entry in receipt.files:
        folder, table = entry.path.split("/")[:2]
        now = merged.get(table, entry) if folder == "tables" else entry
        found[now.path] = now
    return tuple(found.values())


def _is_outdated(lake: Lake, group: Group) -> bool:
    """Whether a unit of the group is gone, or lies elsewhere, since the group was planned."""
    lake.receipts.refresh(group.run)
    standing = (lake.receipts.get(group.run, receipt.unit) for receipt in group.receipts)
    return any(
        of is None or (of.files, of.key) != (receipt.files, receipt.key)
        for of, receipt in zip(standing, group.receipts, strict=True)
    )


def _commit(lake: Lake, group: Group, receipts: Sequence[Receipt], data: bytes) -> bool:
    """Creates the compaction under the number after the last one that can be seen; whether it counts.

    Another that was committed meanwhile takes the number. Either it has none of our units, and ours goes after it, or what
    we merged is no longer what counts.
    """
    while not _is_outdated(lake, group):
        numbers = lake.receipts.compaction_numbers(group.run)
        created = lake.storage.create(compaction_key(group.run, max(numbers, default=0) + 1), data)
        lake.receipts.refresh(group.run)
        if created:
            break
    # A store may have lost the answer to a creation that succeeded, and then it is our files that count.
    standing = lake.receipts.get(group.run, receipts[0].unit)
    return standing is not None and standing.kept_in is not None and standing.files == receipts[0].files


def _discard(lake: Lake, group: Group, merged: dict[str, FileEntry]) -> None:
    """Removes merged files, unless it cannot be told that nothing names them."""
    with suppress(Exception):
        lake.receipts.refresh(group.run)
        named = {entry.path for receipt in lake.receipts.all(group.run) for entry in receipt.files}
        for entry in merged.values():
            if entry.path not in named:
                lake.storage.remove(entry.path)

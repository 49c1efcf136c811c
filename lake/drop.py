"""Dropping what a run no longer needs: units of some of its datasets, with their rows and their chunks.

Receipts go first: from then on no reader sees the unit, and whoever is killed here leaves files that `lakebed gc` removes.
A unit whose receipt lies in a compaction may still have the one that the compaction superseded, which would count again;
so those go before. What a compaction holds beside the dropped units is kept, in a new one. A reader that listed the files
before may find them gone: nothing is dropped but on request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from .axis import publish
from .catalog import VIEWS_FILE, write_catalog
from .compactions import Compaction, compaction_key, compaction_numbers, compactions_folder
from .lake import Lake
from .receipts import Receipt, receipt_key, receipts_to_parquet


@dataclass(frozen=True)
class Dropped:
    """What a drop is about: units of a run, the files that only they name, superseded ones too, and bytes."""

    run: str
    units: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


def plan_drop(lake: Lake, run: str, datasets: Collection[str]) -> Dropped:
    """Units of these datasets; none where there are none. Raises UnknownName for a run that is not there."""
    lake.require_run(run)
    receipts = lake.receipts.all(run)
    going = [receipt for receipt in receipts if receipt.dataset in datasets]
    kept = {entry.path for receipt in receipts if receipt.dataset not in datasets for entry in receipt.files}
    named = [*going, *_superseded(lake, run, frozenset(receipt.unit for receipt in going))]
    files = {entry.path: entry.bytes for receipt in named for entry in receipt.files}
    left = {path: size for path, size in files.items() if path not in kept}
    return Dropped(run, tuple(receipt.unit for receipt in going), tuple(left), sum(left.values()))


def drop(lake: Lake, what: Dropped) -> None:
    """Removes the units: their receipts, then their files. A catalog that names them is written again."""
    if not what.units:
        return
    run, units = what.run, frozenset(what.units)
    compactions = _compactions(lake, run)
    touched = [of.key for of in compactions if units & of.units]
    compacted = frozenset(unit for of in compactions for unit in of.units & units)
    kept = _kept(lake, run, units)
    for unit in sorted(compacted):
        lake.storage.remove(receipt_key(run, unit))
    # The last of them counts, so those before it go while it stands.
    for key in touched[:-1]:
        lake.storage.remove(key)
    if touched:
        # Written even if it holds nothing: a reader that knows a compaction by its number must not meet another under it.
        _create(lake, run, max(of.number for of in compactions) + 1, kept)
        lake.storage.remove(touched[-1])
    for unit in sorted(units - compacted):
        lake.storage.remove(receipt_key(run, unit))
    lake.receipts.refresh(run)
    for path in what.files:
        lake.storage.remove(path)
    publish(lake, run)
    if lake.storage.exists(VIEWS_FILE):
        write_catalog(lake)


def _create(lake: Lake, run: str, number: int, receipts: list[Receipt]) -> None:
    data = receipts_to_parquet(receipts)
    while not lake.storage.create(compaction_key(run, number), data):
        number += 1


def _kept(lake: Lake, run: str, units: Collection[str]) -> list[Receipt]:
    """Receipts that lie in one object with those of dropped units."""
    receipts = lake.receipts.all(run)
    keys = {receipt.key for receipt in receipts if receipt.unit in units and receipt.kept_in}
    return [receipt for receipt in receipts if receipt.key in keys and receipt.unit not in units]


def _superseded(lake: Lake, run: str, units: frozenset[str]) -> Iterator[Receipt]:
    """Receipts of these units that compactions took the place of."""
    for compaction in _compactions(lake, run):
        yield from (receipt for receipt in compaction.receipts if receipt.unit in units)
        for unit in sorted(compaction.units & units):
            path = receipt_key(run, unit)
            with suppress(FileNotFoundError):
                yield Receipt.from_parquet(run, lake.storage.read(path), path)


def _compactions(lake: Lake, run: str) -> list[Compaction]:
    """Every compaction of a run, superseded ones too."""
    numbers = compaction_numbers(lake.storage.names(compactions_folder(run)))
    found = []
    for number in numbers:
        data = lake.storage.read(compaction_key(run, number))
        found.append(Compaction.from_parquet(run, number, data))
    return found

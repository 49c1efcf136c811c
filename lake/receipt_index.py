"""Which receipts a lake has: those of units, and those in compactions, which take the place of the units' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .compactions import (
    COMPACTED,
    Compaction,
    compaction_key,
    compaction_numbers,
    compactions_folder,
    counted,
)
from .receipts import FOLDER, Receipt, receipt_key
from .storage import Storage

Item = TypeVar("Item")
Found = TypeVar("Found")


class ReceiptIndex:
    """All receipts of a lake. They never change once written, so each is read once per process."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, dict[str, Receipt]] = {}
        self._compactions: dict[str, dict[int, Compaction]] = {}
        self._sorted: tuple[int, list[Receipt]] = (-1, [])
        # Grows with every change, so that whatever is derived from the receipts knows when it is out of date.
        self.version = 0

    def refresh(self, run: str | None = None) -> None:
        """Reads the receipts written since the last call, of one run or of all."""
        if run is not None:
            self._refresh_run(run)
            return
        runs = [folder.removeprefix("run=") for folder in self._storage.names(FOLDER)]
        for name in {*runs, *self._known}:
            self._refresh_run(name)

    def _refresh_run(self, run: str) -> None:
        known, gone = self._known.get(run, {}), set[str]()
        while True:
            # Units first: what a compaction listed afterwards does not hold had its own receipt all the time.
            names = self._storage.names(f"{FOLDER}/run={run}")
            # No compaction when the units were listed is as good as none now: each had its own receipt then.
            compactions = self._read_compactions(run) if COMPACTED in names else []
            if compactions is None:
                continue
            found = {receipt.unit: receipt for of in counted(compactions) for receipt in of.receipts}
            units = (name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
            alone = [unit for unit in units if unit not in found and unit not in gone]
            missing = [unit for unit in alone if unit not in known or known[unit].kept_in]
            read = dict(zip(missing, self._map(lambda unit: self._read(run, unit), missing), strict=True))
            vanished = {unit for unit, receipt in read.items() if receipt is None}
            if not vanished:
                break
            # Removed since they were listed: by hand, or because a compaction holds them that was not there yet.
            gone |= vanished
        found.update({unit: read.get(unit) or known[unit] for unit in alone})
        if found != known or any(found[unit] is not known[unit] for unit in found):
            self._known[run] = found
            self.version += 1

    def _read_compactions(self, run: str) -> list[Compaction] | None:
        """Every compaction of a run; None when one of them was removed while they were read."""
        known = self._compactions.setdefault(run, {})
        numbers = compaction_numbers(self._storage.names(compactions_folder(run)))
        missing = [number for number in numbers if number not in known]
        read = self._map(lambda number: self._read_compaction(run, number), missing)
        for compaction in read:
            if compaction is None:
                return None
            known[compaction.number] = compaction
        return [known[number] for number in numbers]

    def _map(self, read: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """`read` of each; side by side where every one is a journey."""
        if len(items) > 8 and not self._storage.local:
            with ThreadPoolExecutor(16) as pool:
                return list(pool.map(read, items))
        return [read(item) for item in items]

    def _read(self, run: str, unit: str) -> Receipt | None:
        path = receipt_key(run, unit)
        try:
            return Receipt.from_parquet(run, self._storage.read(path), path)
        except FileNotFoundError:
            return None

    def _read_compaction(self, run: str, number: int) -> Compaction | None:
        try:
            return Compaction.from_parquet(run, number, self._storage.read(compaction_key(run, number)))
        except FileNotFoundError:
            return None

    def get(self, run: str, unit: str) -> Receipt | None:
        """The receipt of one unit, read from storage if need be."""
        known = self._known.get(run, {})
        if unit not in known:
            receipt = self._read(run, unit)
            if receipt is None:
                return self.compacted(run, unit)
            self.add(receipt)
            return receipt
        return known[unit]

    def compacted(self, run: str, unit: str) -> Receipt | None:
        """The receipt of a unit if a compaction holds it, whatever was known before."""
        compactions = self._read_compactions(run)
        if compactions is None or any(unit in of.units for of in compactions):
            self._refresh_run(run)
        receipt = self._known.get(run, {}).get(unit)
        return receipt if receipt is not None and receipt.kept_in else None

    def create(self, receipt: Receipt) -> bool:
        """Commits the receipt of a unit: of several writers one succeeds, and none if a compaction holds the unit."""
        if self.compacted(receipt.run, receipt.unit) is not None:
            return False
        return self._storage.create(receipt.key, receipt.to_parquet())

    def compaction_numbers(self, run: str) -> list[int]:
        """Numbers of the compactions of a run that were seen, superseded ones too."""
        return sorted(self._compactions.get(run, {}))

    def all(self, run: str | None = None, dataset: str | None = None) -> list[Receipt]:
        """Receipts known so far, by run and unit name."""
        if self._sorted[0] != self.version:
            ordered = [
                self._known[name][unit] for name in sorted(self._known) for unit in sorted(self._known[name])
            ]
            self._sorted = (self.version, ordered)
        return [
            receipt
            for receipt in self._sorted[1]
            if run in (None, receipt.run) and dataset in (None, receipt.dataset)
        ]

    def add(self, receipt: Receipt) -> None:
        """Notes a receipt."""
        self._known.setdefault(receipt.run, {})[receipt.unit] = receipt
        self.version += 1

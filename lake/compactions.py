"""Compactions: one object that holds the receipts of many units, and stands in for their own.

`tables/extractions/run=<run>/~compacted/<number>.parquet` has a row per unit, as the unit's own receipt has it, but for
`files`: those that hold its rows now. A compaction is created exclusively under the number after the last, so of two
that were made at once one sees the other before it counts. Whoever sees a compaction reads its rows in place of the
receipts of the same units, and its files in place of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .receipts import FOLDER, Receipt, receipts_from_parquet

# Sorts after the receipts of units: of several rows of a unit the last in the order of paths counts, for plain readers too.
COMPACTED = "~compacted"


@dataclass(frozen=True)
class Compaction:
    """The receipts of many units of a run."""

    run: str
    number: int
    receipts: tuple[Receipt, ...]

    @cached_property
    def units(self) -> frozenset[str]:
        """Names of its units."""
        return frozenset(receipt.unit for receipt in self.receipts)

    @property
    def key(self) -> str:
        """Where it lies."""
        return compaction_key(self.run, self.number)

    @classmethod
    def from_parquet(cls, run: str, number: int, data: bytes, pages: bool = False) -> Compaction:
        """Reads a compaction back; raises CorruptFile naming its path."""
        return cls(run, number, receipts_from_parquet(run, data, compaction_key(run, number), pages))


def compactions_folder(run: str) -> str:
    """Where the compactions of a run lie."""
    return f"{FOLDER}/run={run}/{COMPACTED}"


def compaction_key(run: str, number: int) -> str:
    """Where a compaction lies."""
    return f"{compactions_folder(run)}/{number:08d}.parquet"


def compaction_numbers(names: Iterable[str]) -> list[int]:
    """Numbers of the compactions among the names in their folder, ascending."""
    stems = (name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def counted(compactions: Iterable[Compaction]) -> list[Compaction]:
    """Those that count, the latest first: one that shares a unit with a later one is superseded as a whole.

    A compaction takes in all units of every earlier one of which it takes in any, so nothing is lost with it.
    """
    found: list[Compaction] = []
    held: set[str] = set()
    for compaction in sorted(compactions, key=lambda of: of.number, reverse=True):
        if held.isdisjoint(compaction.units):
            found.append(compaction)
            held |= compaction.units
    return found

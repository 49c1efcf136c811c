"""Causal patch pairs of a probe as batches of records: which pairs, the cells they form, and what goes through the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine.scalars import Pairs, Records
from ..engine.scalars.measure import PairBatch
from ..lake.datasets import CORRUPTED, PAIR_TYPES
from ..lake.errors import MissingData, UnknownName
from ..lake.pairs import CHOSEN
from .probe_batches import Integers, ProbeData, event_choices

if TYPE_CHECKING:
    from .dataset import Context

ALL = "__all__"
_TOKENS = 8192


@dataclass(frozen=True)
class PairSelection:
    """The first pairs of each type in scan order."""

    probe: str
    pair_type: tuple[str, ...]
    split: tuple[str, ...]
    max_pairs_per_type: int


def select_pairs(
    probe: str, pair_type: Sequence[str], split: Sequence[str], max_pairs_per_type: int
) -> PairSelection:
    """A selection in canonical order; raises UnknownName, naming the types there are."""
    if not pair_type:
        raise UnknownName(f"attributions are of causal patch pairs: name a type, of {', '.join(PAIR_TYPES)}")
    for wanted in pair_type:
        if wanted not in PAIR_TYPES:
            raise UnknownName(f"no pair type {wanted!r}; there are {', '.join(PAIR_TYPES)}")
    return PairSelection(probe, tuple(sorted(set(pair_type))), tuple(sorted(set(split))), max_pairs_per_type)


@dataclass(frozen=True)
class Cell:
    """Pairs that are averaged together."""

    split: str
    pair_type: str
    finest: tuple[int, ...]
    """The finest cells it is put together from."""


class PairSet:
    """Pairs in the order they go through the model: finest cell by finest cell (split, pair type)."""

    def __init__(
        self,
        selection: PairSelection,
        rows: list[dict[str, Any]],
        vocabulary: list[str],
        token_classes: Mapping[str, Tensor],
    ) -> None:
        self.selection = selection
        self.token_classes = token_classes
        finest = sorted({(row["split"], row["pair_type"]) for row in rows})
        place = {of: at for at, of in enumerate(finest)}
        rows = sorted(rows, key=lambda row: (place[row["split"], row["pair_type"]], row["clean_event"]))
        self.rows = rows
        self.pair_id = [str(row["pair_id"]) for row in rows]
        self.split = [str(row["split"]) for row in rows]
        self.pair_type = [str(row["pair_type"]) for row in rows]
        self.finest = np.array([place[row["split"], row["pair_type"]] for row in rows])
        self.events = {
            side: np.array([-1 if row[f"{side}_event"] is None else row[f"{side}_event"] for row in rows])
            for side in ("clean", "corrupted")
        }
        token = {text: index for index, text in enumerate(vocabulary)}
        self.transfer = torch.tensor(
            [[token[row[f"{side}_transfer_token"]] for side in ("clean", "corrupted")] for row in rows]
        )
        self.cells = _cells(finest)

    @property
    def count(self) -> int:
        """Number of pairs."""
        return len(self.pair_id)

    def members(self) -> Tensor:
        """`Float[cell, finest]`: 1 where a cell holds a finest one."""
        out = torch.zeros(len(self.cells), int(self.finest.max()) + 1)
        for at, cell in enumerate(self.cells):
            out[at, list(cell.finest)] = 1
        return out

    def batches(
        self, probes: dict[str, ProbeData], device: str, cells: Integers | None = None
    ) -> list[PairBatch]:
        """Batches of about 8,192 tokens, each of one finest cell, with the records of the sides in `probes`.

        `cells` is `Int[pair]`, from 0 and without gaps: other cells than the finest ones of the set.
        """
        made = []
        of_pair = self.finest if cells is None else cells
        classes = {name: tokens.to(device) for name, tokens in self.token_classes.items()}
        for cell in range(int(of_pair.max()) + 1):
            held = np.flatnonzero(of_pair == cell)
            longest = max(
                int(data.lengths[data.example[self.events[side][held]]].max())
                for side, data in probes.items()
            )
            size = max(1, _TOKENS // longest)
            for start in range(0, len(held), size):
                part = held[start : start + size]
                sides = {
                    side: event_records(data, self.events[side][part], device)
                    for side, data in probes.items()
                }
                made.append(PairBatch(Pairs(sides, self.transfer[part].to(device), classes), cell))
        return made


def load_pairs(context: Context, selection: PairSelection, sides: Iterable[str]) -> PairSet:
    """Reads a selection. Raises MissingData where there are no such pairs, or no corrupted record for one."""
    asked = {
        "run": context.run,
        "probe": selection.probe,
        "pair_type": list(selection.pair_type),
        "split": list(selection.split) or [""],
        "all_splits": not selection.split,
        "max_pairs_per_type": selection.max_pairs_per_type,
    }
    session = context.lake.session
    found = session.execute(CHOSEN, asked, tables={"pairs"})
    names = [column[0] for column in found.description or ()]
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    if not rows:
        raise MissingData(
            f"probe {selection.probe!r} of run {context.run!r} has no causal patch pairs of type "
            f"{', '.join(selection.pair_type)}"
            + (f" in split {', '.join(selection.split)}" if selection.split else "")
            + f": build one with pairs. Run: lakebed probe build --lake {context.lake.uri} --run {context.run} --probe NAME"
        )
    lost = sum(row["corrupted_event"] is None for row in rows)
    if lost and "corrupted" in sides:
        raise MissingData(
            f"probe {selection.probe!r} of run {context.run!r} keeps no corrupted record for {lost} of {len(rows)} pairs: "
            "lower --max-pairs-per-type, or build a probe with a larger one"
        )
    (vocabulary,) = session.execute(
        "SELECT vocabulary FROM probes WHERE run = ? AND probe = ?",
        [context.run, selection.probe],
        tables={"probes"},
    ).fetchall()[0]
    return PairSet(selection, rows, list(vocabulary or ()), token_classes(context, selection.probe))


def token_classes(context: Context, probe: str) -> dict[str, Tensor]:
    """`Int[token]` ids of the task's tokens by class, key and value; without those the probe does not name."""
    keys, values = context.lake.session.execute(
        "SELECT key_tokens, value_tokens FROM probes WHERE run = ? AND probe = ?",
        [context.run, probe],
        tables={"probes"},
    ).fetchall()[0]
    return {name: torch.tensor(of) for name, of in (("key", keys), ("value", values)) if of}


def side_probe(probe: str, side: str) -> str:
    """The probe that holds the records of a side."""
    return probe if side == "clean" else f"{probe}{CORRUPTED}"


def _cells(finest: list[tuple[str, str]]) -> list[Cell]:
    """Every distinct pooling by split and type: where there is but one split or type, it is `__all__` alone."""
    splits = sorted({split for split, _ in finest})
    types = sorted({pair_type for _, pair_type in finest})
    cells = []
    for split in [ALL, *(splits if len(splits) > 1 else [])]:
        for pair_type in [ALL, *(types if len(types) > 1 else [])]:
            held = tuple(
                at
                for at, (of_split, of_type) in enumerate(finest)
                if split in (ALL, of_split) and pair_type in (ALL, of_type)
            )
            if held:
                cells.append(Cell(split, pair_type, held))
    return cells


def event_records(data: ProbeData, events: Integers, device: str) -> Records:
    """The records of some events, in their order."""
    examples = data.example[events]
    distinct, row = np.unique(examples, return_inverse=True)
    lengths = data.lengths[examples]
    longest = int(lengths.max())
    place = np.full(data.events, -1)
    place[events] = np.arange(len(events))
    roles = {}
    for role, (event, position) in data.roles.items():
        held = np.zeros((len(events), longest), bool)
        mine = place[event] >= 0
        held[place[event[mine]], position[mine]] = True
        roles[role] = torch.from_numpy(held).to(device)
    return Records(
        torch.from_numpy(data.tokens[examples, :longest]).to(device),
        torch.from_numpy(data.tokens[distinct, :longest]).to(device),
        torch.from_numpy(row).to(device),
        torch.from_numpy(lengths).to(device),
        torch.from_numpy(data.prediction[events]).to(device),
        event_choices(data, events, device),
        roles,
    )

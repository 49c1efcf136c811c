"""A probe as the batches that go through the model: padded records, their events, and the positions that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ..engine.attention import Queries
from ..engine.capture import Batch, CaptureError
from ..engine.forward import Model
from ..engine.readout import Choices
from ..lake import Lake
from ..lake.datasets import CORRUPTED
from ..lake.errors import MissingData, UnknownName

Integers = np.ndarray[Any, np.dtype[np.int64]]

PREDICTION = "prediction"
# What a head would write if it attended to one role alone is asked of the roles a symbolic-KV answer is copied from.
SUPPORT_ROLES = ("support_key", "support_op", "support_value", "support_write")
# Sorting records by length is worth it when padding them in order would cost more than this.
_PADDING = 1 / 8
# Logits of a batch, all positions: 64 million, 256 MB.
_MOST_LOGITS = 1 << 26


class ProbeMismatch(CaptureError):
    """A probe that the model cannot read, or an event that lacks what was asked of it."""


@dataclass(frozen=True)
class ProbeData:
    """One probe of a run, as parallel arrays."""

    name: str
    sha256: str
    source: str
    sample_ids: list[str]
    lengths: Integers
    """`Int[example]`."""
    tokens: Integers
    """`Int[example, position]`, padded with 0."""
    example: Integers
    """`Int[event]`."""
    prediction: Integers
    """`Int[event]`."""
    answer: Integers
    """`Int[event]`."""
    competitors: Integers
    """Competitors of all events, one after the other."""
    competitor_event: Integers
    """The event of each."""
    roles: Mapping[str, tuple[Integers, Integers]]
    """Role to (event, position), by event, then position."""
    layouts: Mapping[str, tuple[Integers, Integers]]
    """Layout to (example, position), in row order."""

    @property
    def events(self) -> int:
        """Number of events."""
        return len(self.example)

    @cached_property
    def candidates(self) -> Integers:
        """Every token that answers or competes in some event, ascending."""
        return np.union1d(self.answer, self.competitors)

    def query_positions(self, role: str) -> Integers:
        """`Int[event]`: the one position of a query role. Raises UnknownName, or ProbeMismatch naming the event."""
        if role not in self.roles:
            raise UnknownName(
                f"no role {role!r}; the events of probe {self.name!r} have {', '.join(sorted(self.roles))}"
            )
        event, position = self.roles[role]
        counts = np.bincount(event, minlength=self.events)
        for wrong, what in ((counts == 0, "no position"), (counts > 1, "several positions")):
            if wrong.any():
                first = int(np.flatnonzero(wrong)[0])
                alone = sorted(name for name, of in self.roles.items() if _once_per_event(of[0], self.events))
                raise ProbeMismatch(
                    f"query role {role!r} has {what} in {int(wrong.sum())} of {self.events} events of probe {self.name!r}, "
                    f"first in event {first}, record {self.sample_ids[self.example[first]]!r}; one in each have "
                    f"{', '.join(alone)}"
                )
        return position

    def write_roles(self, query_role: str) -> tuple[str, ...]:
        """Roles a head's value vectors are averaged over, in alphabetical order."""
        if self.source in ("symbolic_kv", "corrupted"):
            return tuple(role for role in SUPPORT_ROLES if role in self.roles)
        return tuple(sorted(role for role in self.roles if role not in (PREDICTION, query_role)))

    def require_fit(self, model: Model) -> None:
        """Raises ProbeMismatch for a record the model cannot read."""
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > model.max_positions:
            raise ProbeMismatch(
                f"record {self.sample_ids[longest]!r} of probe {self.name!r} has {self.lengths[longest]} tokens, and the "
                f"model reads at most {model.max_positions}"
            )
        largest = max(int(self.tokens.max()), int(self.candidates[-1]))
        if largest >= model.vocabulary_size:
            raise ProbeMismatch(
                f"probe {self.name!r} has token {largest}, and the model's vocabulary ends at {model.vocabulary_size - 1}: "
                "the probe was made for another vocabulary"
            )


def _once_per_event(event: Integers, events: int) -> bool:
    return len(event) == events and bool((event == np.arange(events)).all())


def load_probe(lake: Lake, run: str, name: str) -> ProbeData:
    """Reads a probe. Raises MissingData naming the command that makes it, or ProbeMismatch for one without events."""
    probes = lake.table("probes", run).select("probe", "sha256", "source").collect().rows_by_key("probe")
    if name not in probes:
        held = f"it has {', '.join(sorted(probes))}" if probes else "it has none yet"
        clean = name.removesuffix(CORRUPTED)
        if clean != name and clean in probes and probes[clean][0][1] != "symbolic_kv":
            raise MissingData(
                f"probe {clean!r} of run {run!r} has no causal patch pairs, and so no corrupted records: only probes of the "
                "symbolic-KV task have (lakebed probe build)"
            )
        raise MissingData(
            f"Probe-set not found: run {run!r} has no probe {name!r}; {held}. Run: lakebed probe build --lake {lake.uri} "
            f"--run {run} --probe {name}, or lakebed probe import FILE.jsonl"
        )
    sha256, source = probes[name][0]

    def read(table: str, *columns: str) -> pl.DataFrame:
        return lake.table(table, run).filter(pl.col("probe") == name).select(columns).collect()

    examples = read("probe_examples", "example", "sample_id", "tokens").sort("example")
    events = read("events", "event", "example", "prediction_position", "answer_token", "competitors").sort(
        "event"
    )
    if not len(events):
        raise ProbeMismatch(f"probe {name!r} of run {run!r} has no events: there is nothing to measure")
    lonely = events.filter(pl.col("competitors").list.len().fill_null(0) == 0)
    if len(lonely):
        raise ProbeMismatch(
            f"event {lonely['event'][0]} of probe {name!r} has no competitors: a margin needs at least one wrong token"
        )
    roles = (
        lake.table("positions", run)
        .filter((pl.col("probe") == name) & (pl.col("kind") == "role"))
        .select("role", "event", "position")
        .collect()
        .sort("role", "event", "position")
    )
    layouts = read("activation_rows", "layout", "row", "example", "position").sort("layout", "row")
    lengths = _integers(examples["tokens"].list.len())
    tokens = np.zeros((len(examples), int(lengths.max())), np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = _integers(examples["tokens"].explode())
    per_event = _integers(events["competitors"].list.len())
    return ProbeData(
        name,
        str(sha256),
        str(source),
        examples["sample_id"].to_list(),
        lengths,
        tokens,
        _integers(events["example"]),
        _integers(events["prediction_position"]),
        _integers(events["answer_token"]),
        _integers(events["competitors"].explode()),
        np.repeat(np.arange(len(events)), per_event),
        _pairs_by(roles, "role", "event"),
        _pairs_by(layouts, "layout", "example"),
    )


def _integers(column: pl.Series) -> Integers:
    return column.to_numpy().astype(np.int64)


def _pairs_by(frame: pl.DataFrame, key: str, first: str) -> dict[str, tuple[Integers, Integers]]:
    parts = frame.partition_by(key, as_dict=True, maintain_order=True)
    return {
        str(name): (_integers(part[first]), _integers(part["position"])) for (name,), part in parts.items()
    }


@dataclass
class ProbeBatches:
    """A probe cut into batches on a device, and how what they give is put back into the probe's order."""

    data: ProbeData
    batches: list[Batch]
    event_order: Tensor | None
    """Place of each event in what the batches give, one after the other; None where that is the probe's order."""
    place_order: dict[str, Tensor | None] = field(default_factory=dict)
    """The same for the places of a layout."""
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Query role to the roles its heads' value vectors are averaged over."""
    has_role: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = field(default_factory=dict)
    """Query role to `Bool[event, role]`: whether a role has a position up to the query; by event, in the probe's order."""


def make_batches(
    data: ProbeData,
    model: Model,
    query_roles: Sequence[str],
    layouts: Sequence[str],
    device: str = "cpu",
    batch_size: int | None = None,
) -> ProbeBatches:
    """Cuts a probe into batches of about `batch_size` tokens, in record order or, where lengths differ much, by length; each
    ends with the last position that an event, a query role or a layout needs."""
    wanted = batch_size or DEFAULT_BATCH_SIZE
    size = max(1, min(wanted, _MOST_LOGITS // model.vocabulary_size))
    groups = _groups(data.lengths, size)
    order = np.concatenate(groups)
    event_counts = np.bincount(data.example, minlength=len(data.lengths))
    made = ProbeBatches(data, [], _order(data.example, event_counts, order))
    roles = {role: _RoleTable.of(data, role) for role in query_roles}
    for role, table in roles.items():
        made.roles[role], made.has_role[role] = table.names, table.has_role
    for layout in layouts:
        counts = np.bincount(data.layouts[layout][0], minlength=len(data.lengths))
        made.place_order[layout] = _order(data.layouts[layout][0], counts, order)
    for examples in groups:
        made.batches.append(_batch(data, examples, roles, layouts, device))
    return made


# Tokens in a batch: a layer's activations stay in cache, and every core has batches of its own.
DEFAULT_BATCH_SIZE = 2048


def _groups(lengths: Integers, size: int) -> list[Integers]:
    """Examples of each batch."""
    in_order = _cut(np.arange(len(lengths)), lengths, size)
    padded = sum(len(group) * int(lengths[group].max()) for group in in_order)
    if padded <= (1 + _PADDING) * int(lengths.sum()):
        return in_order
    return _cut(np.argsort(lengths, kind="stable"), lengths, size)


def _cut(order: Integers, lengths: Integers, size: int) -> list[Integers]:
    groups: list[list[int]] = []
    longest = 0
    for example in order.tolist():
        longest = max(longest, int(lengths[example]))
        if not groups or (len(groups[-1]) + 1) * longest > size:
            groups.append([])
            longest = int(lengths[example])
        groups[-1].append(example)
    return [np.array(group) for group in groups]


def _order(example: Integers, counts: Integers, order: Integers) -> Tensor | None:
    """Where each item of an example, given in example order, stands once examples come in another order."""
    if (order == np.arange(len(order))).all():
        return None
    start = np.zeros(len(order), np.int64)
    start[order] = np.cumsum(counts[order]) - counts[order]
    within = np.arange(len(example)) - (np.cumsum(counts) - counts)[example]
    return torch.from_numpy(start[example] + within)


@dataclass(frozen=True)
class _RoleTable:
    """A query role: its position per event, and the roles to average over."""

    names: tuple[str, ...]
    position: Integers
    held: list[tuple[Integers, Integers]]
    """Per role (event, position), up to the query."""
    has_role: np.ndarray[Any, np.dtype[np.bool_]]

    @classmethod
    def of(cls, data: ProbeData, role: str) -> _RoleTable:
        position = data.query_positions(role)
        names = data.write_roles(role)
        held = []
        has_role = np.zeros((data.events, len(names)), bool)
        for column, name in enumerate(names):
            event, at = data.roles[name]
            keep = at <= position[event]
            held.append((event[keep], at[keep]))
            has_role[event[keep], column] = True
        return cls(names, position, held, has_role)

    def queries(self, events: Integers, row: Tensor, batch: int, length: int) -> Queries:
        """Of some events, in the order of their rows."""
        weights = np.zeros((len(events), len(self.names), length), np.float32)
        place = np.full(len(self.position), -1)
        place[events] = np.arange(len(events))
        for column, (event, position) in enumerate(self.held):
            keep = place[event] >= 0
            weights[place[event[keep]], column, position[keep]] = 1
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1)
        device = row.device
        return Queries(
            row,
            torch.from_numpy(self.position[events]).to(device),
            torch.from_numpy(weights).to(device),
            batch,
        )


def _batch(
    data: ProbeData,
    examples: Integers,
    roles: Mapping[str, _RoleTable],
    layouts: Sequence[str],
    device: str,
) -> Batch:
    place = np.full(len(data.lengths), -1)
    place[examples] = np.arange(len(examples))
    events = np.flatnonzero(place[data.example] >= 0)
    events = events[np.argsort(place[data.example[events]], kind="stable")]
    row = torch.from_numpy(place[data.example[events]]).to(device)

    def held(layout: str) -> tuple[Integers, Integers]:
        example, position = data.layouts[layout]
        kept = np.flatnonzero(place[example] >= 0)
        kept = kept[np.argsort(place[example[kept]], kind="stable")]
        return place[example[kept]], position[kept]

    kept = {layout: held(layout) for layout in layouts}
    asked = [
        data.prediction[events],
        *(table.position[events] for table in roles.values()),
        *(position for _, position in kept.values()),
    ]
    # Nothing before the last position that is asked for sees what stands after it.
    length = 1 + max(int(positions.max(initial=0)) for positions in asked)

    return Batch(
        torch.from_numpy(data.tokens[examples, :length]).to(device),
        row,
        torch.from_numpy(data.prediction[events]).to(device),
        event_choices(data, events, device),
        {name: table.queries(events, row, len(examples), length) for name, table in roles.items()},
        {
            layout: torch.from_numpy(at * length + position).to(device)
            for layout, (at, position) in kept.items()
        },
    )


def event_choices(data: ProbeData, events: Integers, device: str) -> Choices:
    """Answers and competitors of some events, each once, in their order."""
    place = np.full(data.events, -1)
    place[events] = np.arange(len(events))
    wrong = np.full((len(events), len(data.candidates)), -np.inf, np.float32)
    mine = place[data.competitor_event] >= 0
    columns = np.searchsorted(data.candidates, data.competitors[mine])
    wrong[place[data.competitor_event[mine]], columns] = 0
    return Choices(
        torch.from_numpy(data.candidates).to(device),
        torch.from_numpy(np.searchsorted(data.candidates, data.answer[events])).to(device),
        torch.from_numpy(wrong).to(device),
    )

"""Query events as examples of a transfer of value codes: which ones, which of them fit, where their roles stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import LakebedError
from ..lake.errors import UnknownName
from ..lake.value_codes import ANSWER_VALUE, CAUSAL_PREFIX, MEASURED_EVENTS, POSITION_TOKEN
from .forward import probe_of
from .probe_batches import Integers, ProbeData

if TYPE_CHECKING:
    from .dataset import Context

_TOKENS = 2048


class ExampleError(LakebedError, ValueError):
    """Query events that lack what a transfer of value codes asks of them."""


class NoExamples(ExampleError):
    """Records without a query event."""


class PositionsMissing(ExampleError):
    """A role without a position in some event, or a grouping without a token."""


class BeyondThePrediction(ExampleError):
    """A role with a position after the prediction, which cannot change it."""


class SeveralPositions(ExampleError):
    """A target role with several positions in some event: one is edited."""


@dataclass(frozen=True)
class Places:
    """The positions of a role, example by example."""

    example: Integers
    """`Int[place]`, ascending."""
    position: Integers
    """`Int[place]`: in the record."""
    counts: Integers
    """`Int[example]`: at least one each."""

    @cached_property
    def first(self) -> Integers:
        """`Int[example]`: the lowest position."""
        lowest: Integers = self.position[np.cumsum(self.counts) - self.counts]
        return lowest


@dataclass(frozen=True)
class Records:
    """Some records, as they go through the model at once."""

    tokens: Integers
    """`Int[record, position]`, padded with 0."""
    row: Integers
    """`Int[record of the probe]`: row in this batch, or -1."""


class Examples:
    """The query events of the first records of some splits, in the probe's order."""

    def __init__(self, data: ProbeData, event: Integers, fit: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        self.data, self.event, self.fit = data, event, fit
        self.record, self.prediction, self.answer = (
            of[event] for of in (data.example, data.prediction, data.answer)
        )

    def places(self, role: str, up_to_prediction: bool = False) -> Places:
        """Where a role stands; `up_to_prediction` leaves out what comes later, else that is refused. Raises ExampleError."""
        example, position = self._of_role(role)
        beyond = position > self.prediction[example]
        if up_to_prediction:
            example, position = example[~beyond], position[~beyond]
        elif beyond.any():
            raise BeyondThePrediction(
                f"Intervention positions must be in the causal prefix: role {role!r} has positions after the prediction in "
                f"{len(np.unique(example[beyond]))} of {len(self.event)} events, such as "
                f"{self._named(int(example[beyond][0]))}; choose a role that lies before it"
            )
        counts = np.bincount(example, minlength=len(self.event))
        if not counts.all():
            where = " up to the prediction" if up_to_prediction else ""
            raise PositionsMissing(
                f"role {role!r} resolves to no position{where} in {int((counts == 0).sum())} of {len(self.event)} events, "
                f"such as {self._named(int(counts.argmin()))}; choose another role or --split"
            )
        return Places(example, position, counts)

    def target(self, role: str) -> Places:
        """As `places`, of a role that must have one position in every event."""
        found = self.places(role)
        if found.counts.max() > 1:
            several = found.counts > 1
            raise SeveralPositions(
                f"target role {role!r} has several positions in {int(several.sum())} of {len(self.event)} events, such as "
                f"{self._named(int(several.argmax()))}, and one is edited; choose a role with one, such as prediction"
            )
        return found

    def tokens(self, grouping: str, places: Places) -> Integers:
        """`Int[example]`: the token that groups a vector; position_token is that of the lowest of its own `places`."""
        if grouping == ANSWER_VALUE:
            return self.answer
        if grouping == POSITION_TOKEN:
            return self.data.tokens[self.record, places.first]
        example, position = self._of_role(grouping)
        held, first = np.unique(example, return_index=True)
        if len(held) < len(self.event):
            raise PositionsMissing(
                f"{len(self.event) - len(held)} of {len(self.event)} events have no role {grouping!r} to group by; choose "
                "another --group-by"
            )
        return self.data.tokens[self.record, position[first]]

    def _of_role(self, role: str) -> tuple[Integers, Integers]:
        """(example, position), by example, then position."""
        if role == CAUSAL_PREFIX:
            counts = self.prediction + 1
            example = np.repeat(np.arange(len(counts)), counts)
            return example, np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)
        if role not in self.data.roles:
            there = ", ".join([*sorted(self.data.roles), CAUSAL_PREFIX])
            raise UnknownName(f"no role {role!r}; the events of probe {self.data.name!r} have {there}")
        event, position = self.data.roles[role]
        place = np.full(self.data.events, -1)
        place[self.event] = np.arange(len(self.event))
        mine = place[event] >= 0
        return place[event[mine]], position[mine]

    def _named(self, example: int) -> str:
        return f"event {self.event[example]} of record {self.data.sample_ids[self.record[example]]!r}"

    def batches(self, last: Integers) -> Iterator[Records]:
        """The records, by length, about 2,048 tokens at a time; `last` is `Int[record of the probe]`: the last position that
        is needed of it."""
        records = np.unique(self.record)
        records = records[np.argsort(last[records], kind="stable")]
        lengths = last[records] + 1
        start = 0
        while start < len(records):
            # Lengths ascend: as many as fit, each as long as the last of them.
            stop = start + 1
            while stop < len(records) and (stop + 1 - start) * lengths[stop] <= _TOKENS:
                stop += 1
            chosen = records[start:stop]
            row = np.full(len(self.data.lengths), -1)
            row[chosen] = np.arange(len(chosen))
            yield Records(self.data.tokens[chosen, : int(lengths[stop - 1])], row)
            start = stop


def load_examples(context: Context, parameters: Mapping[str, Any]) -> Examples:
    """The examples of dataset value_code_rescues with these parameters. Raises MissingData, UnknownName or NoExamples."""
    data = probe_of(context, parameters["probe"])
    split: Sequence[str] = parameters["split"]
    asked = {
        "run": context.run,
        "probe": data.name,
        "split": list(split) or [""],
        "all_splits": not split,
        "max_records": parameters["max_records"],
        "fit_fraction": parameters["fit_fraction"],
    }
    query = (
        f"SELECT event, split_number(sample_id, query_index) < $fit_fraction AS fit FROM ({MEASURED_EVENTS}) "
        "ORDER BY place"
    )
    session = context.lake.session
    with session.errors():
        found = session.execute(query, asked, tables={"probe_examples", "events"}).fetchnumpy()
    if not len(found["event"]):
        raise NoExamples(
            f"probe {data.name!r} of run {context.run!r} has no query event in "
            + (f"split {', '.join(split)}" if split else "its first records")
            + "; choose another --split"
        )
    return Examples(data, np.asarray(found["event"], np.int64), np.asarray(found["fit"], bool))

"""The untouched model on the examples of a transfer of value codes: what is read of it, and where its codes are edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .. import LakebedError
from ..engine.forward import Model
from ..engine.value_code_rescue import Edited, Outcome, is_pointwise, read_outcome, rerun
from .probe_batches import Integers, event_choices
from .value_code_examples import Examples, Places, Records


class NonFiniteStates(LakebedError, ValueError):
    """A run that diverged."""


@dataclass(frozen=True)
class Reading:
    """Vectors to read: the mean of a stage over a role's positions."""

    stage: str
    places: Places


@dataclass
class CleanRun:
    """What the untouched model gives."""

    vectors: dict[str, Tensor]
    """Reading to `Float64[example, d_model]`."""
    final: Tensor
    """The final stage at the predictions, `Float[example, d_model]`."""
    edited: list[tuple[Integers, Edited]] = field(default_factory=list)
    """`Int[event]`, which of the examples that judge, and the records in which they are edited together."""


@torch.no_grad()
def run_clean(model: Model, examples: Examples, readings: Mapping[str, Reading], device: str) -> CleanRun:
    """One pass over the records. Of the readings, "target" is what will be edited. Raises NonFiniteStates."""
    target = readings["target"]
    pointwise = is_pointwise(model, target.stage)
    prediction = Places(
        np.arange(len(examples.event)), examples.prediction, np.ones(len(examples.event), np.int64)
    )
    read = {**readings, "prediction": Reading(target.stage, prediction)} if pointwise else dict(readings)
    count = len(examples.event)
    clean = CleanRun(
        {name: torch.zeros(count, model.d_model, dtype=torch.float64) for name in read},
        torch.zeros(count, model.d_model),
    )
    last = np.zeros(len(examples.data.lengths), np.int64)
    for of in (prediction, *(reading.places for reading in read.values())):
        np.maximum.at(last, examples.record[of.example], of.position)
    for records in examples.batches(last):
        _read_batch(model, examples, records, read, prediction, clean, device, pointwise)
    for name, reading in read.items():
        clean.vectors[name] /= torch.from_numpy(reading.places.counts)[:, None]
        if not clean.vectors[name].isfinite().all():
            raise NonFiniteStates(f"{reading.stage} holds NaN or infinite values; leave it out with --steps")
    if pointwise:
        clean.edited = _edited_at_predictions(clean, examples)
    return clean


def _read_batch(
    model: Model,
    examples: Examples,
    records: Records,
    read: Mapping[str, Reading],
    prediction: Places,
    clean: CleanRun,
    device: str,
    pointwise: bool,
) -> None:
    length = records.tokens.shape[1]
    found = {}
    for name, places in {"": prediction, **{name: reading.places for name, reading in read.items()}}.items():
        row = records.row[examples.record[places.example]]
        mine = row >= 0
        found[name] = (places.example[mine], row[mine] * length + places.position[mine])
    flat = np.unique(np.concatenate([at for _, at in found.values()]))
    tokens = torch.from_numpy(records.tokens).to(device)
    # What is edited before the last attention is needed whole.
    kept = torch.from_numpy(flat) if pointwise else None
    passed = model.forward(tokens, capture={"stages"}, places=kept)

    def gather(stage: Tensor, at: Integers) -> Tensor:
        index = torch.from_numpy(np.searchsorted(flat, at) if pointwise else at).to(device)
        return stage.reshape(-1, model.d_model).index_select(0, index).cpu()

    example, at = found[""]
    clean.final[example] = gather(passed.final, at)
    for name, reading in read.items():
        example, at = found[name]
        values = gather(passed.stages[reading.stage], at).double()
        clean.vectors[name].index_add_(0, torch.from_numpy(example), values)
    if not pointwise:
        clean.edited += _edited_together(examples, records, read["target"], tokens, passed.stages)


def _edited_together(
    examples: Examples, records: Records, target: Reading, tokens: Tensor, stages: Mapping[str, Tensor]
) -> list[tuple[Integers, Edited]]:
    """The judging examples of a batch. Those of a record are edited together, unless they share the position that is: then
    each of them takes a copy of the record."""
    judges = np.flatnonzero(~examples.fit)
    row = records.row[examples.record[judges]]
    order, row, position = (
        of[row >= 0] for of in (np.arange(len(judges)), row, target.places.position[judges])
    )
    turn = _turns(row * tokens.shape[1] + position)
    found = []
    for number in range(int(turn.max(initial=-1)) + 1):
        chosen = turn == number
        held, of_event = np.unique(row[chosen], return_inverse=True)
        kept = torch.from_numpy(held).to(tokens.device)
        edited = Edited(
            tokens.index_select(0, kept),
            stages[target.stage].index_select(0, kept),
            *(
                torch.from_numpy(of).to(tokens.device)
                for of in (of_event, position[chosen], examples.prediction[judges[order[chosen]]])
            ),
        )
        found.append((order[chosen], edited))
    return found


def _turns(places: Integers) -> Integers:
    """How many of the same were before: `Int[event]` to `Int[event]`."""
    order = np.argsort(places, kind="stable")
    ranked = places[order]
    first = np.searchsorted(ranked, ranked)
    turn = np.empty_like(places)
    turn[order] = np.arange(len(places)) - first
    return turn


def _edited_at_predictions(clean: CleanRun, examples: Examples) -> list[tuple[Integers, Edited]]:
    """After the last attention a prediction is a record of its own, of one position."""
    judges = torch.from_numpy(~examples.fit)
    stage = clean.vectors["prediction"][judges].float()[:, None]
    zeros = torch.zeros(len(stage), dtype=torch.long)
    edited = Edited(zeros[:, None], stage, torch.arange(len(stage)), zeros, zeros)
    return [(np.arange(len(stage)), edited)]


def rerun_all(
    model: Model,
    stage: str,
    clean: CleanRun,
    changes: Tensor,
    examples: Examples,
    target: Places,
    device: str,
) -> Outcome:
    """Outcomes of the examples that judge, `[event, run]`; `changes` is `Float64[run, event, d_model]`."""
    judges = np.flatnonzero(~examples.fit)
    if is_pointwise(model, stage):
        # What is edited elsewhere no prediction sees.
        seen = torch.from_numpy(target.position[judges] == examples.prediction[judges])
        changes = changes * seen[:, None]
    final = torch.zeros(changes.shape, dtype=torch.float32, device=device)
    for order, edited in clean.edited:
        at = torch.from_numpy(order)
        final[:, at] = rerun(model, stage, edited, changes[:, at])
    return read_outcome(model, final, event_choices(examples.data, examples.event[judges], device)).cpu()


def read_clean(model: Model, clean: CleanRun, examples: Examples, device: str) -> Outcome:
    """Outcomes of every example in the untouched run, `[event, 1]`."""
    choices = event_choices(examples.data, examples.event, device)
    return read_outcome(model, clean.final[None].to(device), choices).cpu()

"""Weights and moments of any step of a run: stored ones read, recorded ones replayed, in step order and one pass."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ..engine.optimizer import AdamGroup, AdamReplay
from ..lake import Lake
from ..lake.codec import Layout
from ..lake.errors import MissingData
from ..lake.steps import summarize_steps
from .runs import RecordingError, ReplayMismatch, run_row
from .trace_block import MOMENTS

_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class RecordedUpdate:
    """What the optimizer did in one recorded step, after which the run stands at `step`."""

    step: int
    gradients: dict[str, Tensor | None]
    """Raw gradient by parameter; None where the optimizer skipped it."""
    clip_coefficient: float | None
    """What the raw gradient was multiplied by; None if no single factor did it: then `gradients` are the applied ones."""
    groups: list[AdamGroup]
    group_of: dict[str, int]


@dataclass(frozen=True)
class State:
    """The run after `step` updates. Tensors are float32 as stored, or of the parameter's own dtype, by parameter name.

    `exp_avg` and `exp_avg_sq` are empty before a parameter's first update and when `has_moments` is false (then they
    are unknown). `identity` is the state's content hash.
    """

    step: int
    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step_counts: dict[str, int]
    has_moments: bool
    identity: str
    update: RecordedUpdate | None = None
    """The step that led here, where the state was replayed; None for a stored one, see `StateReader.updates`."""


class StateReader:
    """Reads the states of one run. Steps between anchors are replayed with torch's own update, bit for bit on the machine
    type that recorded them; every anchor passed on the way is compared, and ReplayMismatch is raised if it differs."""

    def __init__(self, lake: Lake, run: str) -> None:
        self.lake, self.run = lake, run
        self.info = run_row(lake, run)
        rows = lake.table("steps", run).sort("step").collect()
        self._steps: dict[int, dict[str, Any]] = {row["step"]: row for row in rows.to_dicts()}
        parameters = lake.table("parameters", run).sort("position").collect().to_dicts()
        self._anchors = [step for step, row in self._steps.items() if row["state"] == "stored"]
        self._dtypes = {row["parameter"]: getattr(torch, row["dtype"]) for row in parameters}
        self._group_of = {
            row["parameter"]: row["optimizer_group"]
            for row in parameters
            if row["optimizer_group"] is not None
        }

    @property
    def steps(self) -> list[int]:
        """Every step whose weights can be had, ascending."""
        return list(self._steps)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters, in the model's order."""
        return list(self._dtypes)

    def require(self, steps: Iterable[int]) -> None:
        """Raises MissingData, naming the steps there are, unless every step can be had."""
        absent = [step for step in steps if step not in self._steps]
        if absent:
            raise MissingData(
                f"run {self.run!r} has no step {summarize_steps(absent)}; it has {summarize_steps(self.steps)}: record "
                f"more with `lakebed trace --run {self.run} --from-step {self.steps[-1] if self.steps else 0} --num-steps N`"
            )

    def is_replayed(self, step: int) -> bool:
        """Whether a step's state is computed from the trace rather than stored."""
        return bool(self._steps[step]["state"] == "replayed")

    def is_recorded(self, start: int, stop: int) -> bool:
        """Whether every step from `start` (exclusive) to `stop` was recorded with its gradients."""
        return self._settings.keys() >= set(range(start + 1, stop + 1))

    @cached_property
    def _settings(self) -> dict[int, tuple[float | None, list[AdamGroup]]]:
        """Clip coefficient and hyperparameters of every recorded step."""
        rows = self.lake.table("training_steps", self.run).select(
            "step", "clip_coefficient", "optimizer_groups"
        )
        groups: list[AdamGroup] = []
        found: dict[int, tuple[float | None, list[AdamGroup]]] = {}
        for step, coefficient, text in rows.sort("step").collect().iter_rows():
            # Unchanged hyperparameters are written once a block.
            groups = groups if text is None else [AdamGroup.from_json(group) for group in json.loads(text)]
            found[step] = coefficient, groups
        return found

    @cached_property
    def _skipped(self) -> set[tuple[int, str]]:
        """(step, parameter) without a gradient."""
        rows = self.lake.table("parameter_updates", self.run).filter(~pl.col("has_gradient"))
        return set(rows.select("step", "parameter").collect().iter_rows())

    def identity(self, step: int) -> str:
        """Content hash of the state at `step`."""
        self.require([step])
        return str(self._steps[step]["sha256"])

    def loop_state(self, step: int) -> tuple[dict[str, Any] | None, Tensor | None]:
        """What the training loop logged of itself after `step`, and torch's CPU generator then; None where unknown."""
        self.require([step])
        text = self._steps[step]["loop_state"]
        if text is None:
            return None, None
        # The generator is written when it changed, and at the start of every block.
        held = next(
            (self._steps[at]["rng_state"] for at in range(step, -1, -1) if self._rng_at(at) is not None), None
        )
        rng = None if held is None else torch.frombuffer(bytearray(held), dtype=torch.uint8)
        return json.loads(text), rng

    def _rng_at(self, step: int) -> bytes | None:
        row = self._steps.get(step)
        return None if row is None else row["rng_state"]

    def read(self, step: int) -> State:
        """The state at one step."""
        return next(self.iterate([step]))

    def iterate(self, steps: Iterable[int], moments: bool = True) -> Iterator[State]:
        """States at `steps`, ascending; a replay runs on from one to the next. The tensors of a replayed state change
        when the next one is asked for. `moments=False` reads weights alone where they are stored."""
        wanted = sorted(set(steps))
        self.require(wanted)
        for anchor, group in groupby(wanted, key=self.anchor):
            inside = list(group)
            start = self._stored(anchor, moments or inside[-1] != anchor)
            if inside[0] == anchor:
                yield start
            if inside[-1] == anchor:
                continue
            replay = AdamReplay(start.weights, start.exp_avg, start.exp_avg_sq, start.step_counts)
            for update in self._replay(replay, anchor, inside[-1]):
                if update.step in inside:
                    yield self._replayed(update, replay)

    def _replayed(self, update: RecordedUpdate, replay: AdamReplay) -> State:
        return State(
            update.step,
            replay.weights,
            replay.exp_avg,
            replay.exp_avg_sq,
            dict(replay.step_counts),
            True,
            self.identity(update.step),
            update,
        )

    def updates(self, steps: Iterable[int]) -> Iterator[RecordedUpdate]:
        """The recorded updates that led to `steps`, ascending; a block of gradients is decoded once."""
        wanted = sorted(set(steps))
        for _, run in groupby(enumerate(wanted), key=lambda item: item[1] - item[0]):
            inside = [step for _, step in run]
            yield from self._recorded(inside[0], inside[-1])

    def verify_replay(self, start: int, stop: int) -> int:
        """Replays from the anchor at `start` to the one at `stop` and compares; returns the steps replayed."""
        first, last = self._stored(start, True), self._stored(stop, True)
        replay = AdamReplay(first.weights, first.exp_avg, first.exp_avg_sq, first.step_counts)
        count = sum(1 for _ in self._replay(replay, start, stop))
        differing = replay.mismatches(last.weights, last.exp_avg, last.exp_avg_sq, last.step_counts)
        if differing:
            raise ReplayMismatch(
                f"run {self.run!r}: replaying steps {start} to {stop} gives another {differing[0]} than is stored; it was "
                f"recorded on {self.info['machine']} with torch {self.info['torch_version']}, where it is exact"
            )
        return count

    def anchors(self) -> list[int]:
        """Steps whose state is stored, ascending."""
        return list(self._anchors)

    def anchor(self, step: int) -> int:
        """The stored step at or before `step`."""
        at = bisect_right(self._anchors, step)
        if not at:
            raise RecordingError(f"run {self.run!r} has no stored state before step {step} to replay from")
        return self._anchors[at - 1]

    def _stored(self, step: int, moments: bool) -> State:
        row = self._steps[step]
        loaded: dict[str, dict[str, Tensor]] = {"weights": self._read("weights", step)}
        for name in MOMENTS:
            loaded[name] = self._read(name, step) if moments and row["has_moments"] else {}
        counts = json.loads(row["optimizer_steps"] or '{"*":0}')
        common = counts.pop("*", 0)
        return State(
            step,
            loaded["weights"],
            loaded["exp_avg"],
            loaded["exp_avg_sq"],
            {name: counts.get(name, common) for name in self._group_of or self._dtypes},
            bool(row["has_moments"]),
            str(row["sha256"]),
        )

    def _read(self, quantity: str, step: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for names, axis in self.lake.axes.groups(self.run, quantity).items():
            if step in axis.steps:
                for name in names:
                    array = self.lake.tensor(quantity, name, self.run).read(step)
                    found[name] = torch.from_numpy(array).to(self._dtypes[name])
        return found

    def _replay(self, replay: AdamReplay, start: int, stop: int) -> Iterator[RecordedUpdate]:
        """Applies steps start+1 … stop."""
        for update in self._recorded(start + 1, stop):
            present = {name: of for name, of in update.gradients.items() if name in self._group_of}
            replay.step(present, update.clip_coefficient, update.groups, self._group_of)
            yield update

    def _recorded(self, start: int, stop: int) -> Iterator[RecordedUpdate]:
        if not self.is_recorded(start - 1, stop):
            raise MissingData(
                f"run {self.run!r} lacks recorded steps between {start} and {stop}: run `lakebed verify`"
            )
        tensors = {
            name: self.lake.tensor("gradients", name, self.run)
            for name in self.lake.axes.names(self.run, "gradients")
        }
        # A block of steps at a time: what a chunk holds is decoded once, and memory stays flat.
        size = _steps_at_once([tensor.layout for tensor in tensors.values()])
        for first in range(start, stop + 1, size):
            part = list(range(first, min(first + size, stop + 1)))
            arrays = {name: self._rows(tensor, part) for name, tensor in tensors.items()}
            for offset, step in enumerate(part):
                gradients = {
                    name: None if (step, name) in self._skipped else self._tensor(name, array[offset])
                    for name, array in arrays.items()
                }
                yield RecordedUpdate(step, gradients, *self._settings[step], self._group_of)

    def _rows(self, tensor: Any, steps: list[int]) -> np.ndarray[Any, Any]:
        held = np.isin(steps, tensor.steps)
        if held.all():
            array: np.ndarray[Any, Any] = tensor.read(steps)
            return array
        # A parameter frozen for a whole block was not written there.
        out = np.full((len(steps), *tensor.layout.row_shape), np.nan, tensor.dtype)
        out[held] = tensor.read([step for step, there in zip(steps, held, strict=True) if there])
        return out

    def _tensor(self, name: str, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._dtypes[name])


def _steps_at_once(layouts: Sequence[Layout]) -> int:
    """Steps of gradients to decode together: those of the longest chunk, halved while they are more than 64 MB."""
    rows = max((layout.chunk_rows for layout in layouts), default=1)
    step_bytes = sum(math.prod(layout.row_shape) * layout.dtype.itemsize for layout in layouts)
    while rows > 1 and rows * step_bytes > _BYTES_AT_ONCE:
        rows //= 2
    return rows


def optimizer_state(state: State, names: Iterable[str], groups: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A state dict for torch.optim.Adam or AdamW over parameters `names` in the order the optimizer holds them."""
    entries = {}
    for index, name in enumerate(names):
        if state.step_counts.get(name, 0) and name in state.exp_avg:
            entries[index] = {
                "step": torch.tensor(float(state.step_counts[name])),
                "exp_avg": state.exp_avg[name].clone(),
                "exp_avg_sq": state.exp_avg_sq[name].clone(),
            }
    return {"state": entries, "param_groups": [dict(group) for group in groups]}

"""One interval between two steps: the update, its terms where it was recorded, and what it did to scalars.

A dataset of intervals is a short file with an `IntervalExtractor`; the loop over intervals (`intervals.py`) goes through the
steps once, in order, and hands each extractor the intervals it lacks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..engine.scalars import Passes
from ..engine.scalars.measure import Task
from ..engine.slices import SliceSums
from ..engine.update_terms import UpdateTerms, split_update
from ..lake import UnitWriter
from ..lake.errors import LakebedError
from ..lake.schema_attributions import UPDATE_FIELDS
from . import dataset
from .states import RecordedUpdate, State

if TYPE_CHECKING:
    from .pair_sets import PairSelection, PairSet
    from .scalar_changes import Change


class NonFiniteUpdate(LakebedError):
    """Weights or gradients that are NaN or infinite: their products mean nothing."""


@dataclass
class Source:
    """A step as the source of intervals. Its tensors are its own: a replay may go on."""

    step: int
    weights: dict[str, Tensor]
    """float32; they require gradients where an interval begins."""
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step_counts: dict[str, int]
    tasks: dict[str, Task] = field(default_factory=dict)
    """Scalars with the basis of this step, by extractor key."""
    targets: dict[tuple[int, str], Task] = field(default_factory=dict)
    """Scalars with the basis of an earlier step, by that step and extractor key."""
    observed: dict[str, list[Any]] = field(default_factory=dict)
    """What extractors saw of this step, batch after batch, by extractor key."""
    taken: dict[str, Any] = field(default_factory=dict)
    """What extractors took when an interval began here, by extractor key."""


@dataclass
class Interval:
    """From a source step to a target step."""

    source: Source
    target_step: int
    target_weights: Mapping[str, Tensor]
    update: RecordedUpdate | None
    """Of the one recorded step between them; None over a longer interval, or where nothing was recorded."""
    sums: SliceSums
    changes: dict[str, Change] = field(default_factory=dict)
    """What happened to each scalar, by extractor key."""
    observed: dict[str, Observed] = field(default_factory=dict)
    """What extractors saw at both ends, by extractor key."""

    @property
    def source_step(self) -> int:
        """Step before."""
        return self.source.step

    @property
    def field_names(self) -> Sequence[str]:
        """Of `fields`: `actual_update` alone where no step was recorded."""
        return UPDATE_FIELDS if self.update is not None else UPDATE_FIELDS[:1]

    @cached_property
    def terms(self) -> dict[str, UpdateTerms]:
        """The split of a recorded update by parameter, float64."""
        assert self.update is not None
        return {name: self._split(name) for name in self.source.weights}

    @cached_property
    def fields(self) -> dict[str, Tensor]:
        """`Float64[field, *parameter]` by name. Raises NonFiniteUpdate."""
        found = {}
        for name, before in self.source.weights.items():
            before = before.detach()
            actual = self.target_weights[name].to(before).double() - before.double()
            if not bool(torch.isfinite(actual).all()):
                raise NonFiniteUpdate(
                    f"the update of {name} from step {self.source_step} to {self.target_step} is not finite: "
                    "there is nothing to attribute"
                )
            if self.update is None:
                found[name] = actual[None]
                continue
            of = self.terms[name]
            assert of.residual is not None
            terms = (of.raw_sgd, of.clipped_sgd, of.adam_current_gradient, of.adam_historical_momentum)
            found[name] = torch.stack([actual, *terms, of.weight_decay, of.residual])
        return found

    def _split(self, name: str) -> UpdateTerms:
        update, source = self.update, self.source
        assert update is not None
        weight, gradient = source.weights[name].detach(), update.gradients.get(name)
        actual = self.target_weights[name].to(weight).double() - weight.double()
        if gradient is None or name not in update.group_of:
            zero = torch.zeros_like(actual)
            return UpdateTerms(zero, zero, zero, zero, zero, zero, zero, actual)
        group = update.groups[update.group_of[name]]
        applied = update.clip_coefficient is None
        return split_update(
            weight,
            torch.full_like(weight, torch.nan) if applied else gradient.to(weight),
            source.exp_avg.get(name),
            source.exp_avg_sq.get(name),
            step=source.step_counts.get(name, 0) + 1,
            learning_rate=group.learning_rate,
            beta1=group.beta1,
            beta2=group.beta2,
            eps=group.eps,
            weight_decay=group.weight_decay,
            clip_coefficient=update.clip_coefficient or 1.0,
            applied_gradient=gradient.to(weight) if applied else None,
            decoupled=group.decoupled,
            maximize=group.maximize,
            actual=actual,
        )


class IntervalExtractor(dataset.Extractor):
    """A dataset with a unit per interval."""

    needs_moments: ClassVar[bool] = True

    def open(self, context: dataset.Context, source: Source, device: str) -> None:
        """Takes what is needed of a source, once, before its intervals are written; keeps it in `Source.taken`."""

    @abstractmethod
    def write(self, context: dataset.Context, writer: UnitWriter, *, interval: Interval) -> None:
        """Writes one interval."""

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Of a step alone there is nothing."""
        raise TypeError(f"{self.name} is made of intervals, not of steps")


@dataclass(frozen=True)
class Observed:
    """What an extractor saw at the two ends of an interval, batch of pairs after batch."""

    pairs: PairSet
    source: Sequence[Any]
    target: Sequence[Any]


class ObservingExtractor(IntervalExtractor):
    """A dataset of intervals that looks into the forward passes over causal patch pairs, at both ends."""

    selection: PairSelection

    @property
    @abstractmethod
    def key(self) -> str:
        """Identity of what is looked at."""

    @property
    @abstractmethod
    def sides(self) -> Sequence[str]:
        """Records that must go through the model."""

    @abstractmethod
    def observe(self, passes: Passes) -> Any:
        """What to keep of one batch; it is asked for without gradients, and found again in `Interval.observed`."""


def known(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns without those that are None: the table fills them with nulls."""
    return {name: column for name, column in columns.items() if column is not None}


def part_columns(sums: SliceSums, order: Sequence[int], repeat: int) -> dict[str, Any]:
    """Columns that name the parts, in `order`, `repeat` times."""
    import numpy as np
    import pyarrow as pa

    from .columns import texts

    parts = [sums.parts[at] for at in order]
    index = np.tile(np.arange(len(parts)), repeat)
    place = pa.array(index)
    columns: dict[str, Any] = {
        name: texts([getattr(part, name) for part in parts], index) for name in ("slice_kind", "slice")
    }
    for name in ("layer", "head", "neuron"):
        columns[name] = pa.array([getattr(part, name) for part in parts], pa.int32()).take(place)
    columns["numel"] = np.array([part.numel for part in parts])[index]
    return columns


def part_order(sums: SliceSums) -> list[int]:
    """Parts in the order of their key."""
    return sorted(range(len(sums.parts)), key=lambda at: (sums.parts[at].slice_kind, sums.parts[at].slice))

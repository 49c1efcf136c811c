"""Dataset scalar_changes: what a scalar was on every pair, and what it became with the source's basis: forward passes alone.

(definitions 4 §D: what route closures are fitted from)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..engine.scalars import Scalar, build_scalar
from ..engine.scalars.measure import Task
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, SCALAR_CHANGES, scalar_change_parameters
from ..lake.names import spec_id
from . import dataset
from .columns import constant
from .forward import probe_of
from .interval import Interval, IntervalExtractor
from .pair_sets import PairSelection, PairSet, select_pairs, side_probe


@dataclass
class Change:
    """One scalar over one interval."""

    pairs: PairSet
    source: Task
    """At the source; its gradients, if there are any, are sums over the finest cells."""
    target: Task
    """At the target, with what was frozen at the source."""
    gradients: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Point (source, path) to name to `Float[cell, *parameter]`: the gradient of every cell's mean."""


class ScalarChangesExtractor(IntervalExtractor):
    """Tables scalar_changes and scalar_bases."""

    name = SCALAR_CHANGES
    version = 1
    needs_moments = False
    differentiates: ClassVar[bool] = False
    """Whether the scalar's gradient is taken too."""
    integrate: int = 0
    """Points on the path from source to target at which it is."""

    def __init__(self, selection: PairSelection, scalar: Scalar) -> None:
        self.selection, self.scalar = selection, scalar

    def selected(self) -> dict[str, Any]:
        """The pairs, as parameters of a dataset."""
        selection = self.selection
        return {
            "pair_type": selection.pair_type,
            "probe": selection.probe,
            "split": selection.split,
            "max_pairs_per_type": selection.max_pairs_per_type,
        }

    def parameters(self) -> Mapping[str, Any]:
        """Scalar and pairs."""
        return scalar_change_parameters(self.scalar.name, self.scalar.model_dump(), **self.selected())

    @property
    def key(self) -> str:
        """Identity of the scalar and its pairs."""
        return spec_id(dict(self.parameters()))

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """Identities of the probes whose records are read."""
        probe = self.selection.probe
        return {side: probe_of(context, side_probe(probe, side)).sha256 for side in self.scalar.sides}

    def write(self, context: dataset.Context, writer: UnitWriter, *, interval: Interval) -> None:
        """Writes one interval."""
        change = interval.changes[self.key]
        self._write_pairs(writer, interval, change)
        assert change.source.frozen is not None
        spectrum = change.source.frozen.basis.singular_values
        if spectrum is not None:
            row = {"spec": self.key, **_steps(interval), "singular_values": spectrum.tolist()}
            writer.rows("scalar_bases", [row])

    def scalar_columns(self, interval: Interval, count: int) -> dict[str, Any]:
        """What every row of an interval says of the scalar."""
        head = self.scalar.head_of
        side = self.scalar.sides[0] if len(self.scalar.sides) == 1 else None
        named = {
            "spec": self.key,
            "scalar": self.scalar.name,
            "scalar_head": None if head is None else f"L{head[0]}H{head[1]}",
            "record_side": side,
        }
        return {
            **{name: constant(text, count) for name, text in named.items() if text is not None},
            **{name: np.full(count, step) for name, step in _steps(interval).items()},
        }

    def _write_pairs(self, writer: UnitWriter, interval: Interval, change: Change) -> None:
        pairs = change.pairs
        named = {
            "value": (change.source.value, change.target.value),
            **{name: (of, change.target.quantities[name]) for name, of in change.source.quantities.items()},
        }
        quantities = len(named)
        count = pairs.count * quantities
        pair = np.repeat(np.arange(pairs.count), quantities)
        ends = [torch.stack([of[end] for of in named.values()], 1).reshape(-1) for end in (0, 1)]
        writer.rows(
            "scalar_changes",
            {
                **self.scalar_columns(interval, count),
                "split": np.array(pairs.split, object)[pair],
                "pair_type": np.array(pairs.pair_type, object)[pair],
                "pair_id": np.array(pairs.pair_id, object)[pair],
                "quantity": np.tile(np.array(list(named), object), pairs.count),
                "source_value": ends[0].numpy(),
                "target_value": ends[1].numpy(),
                "weight": change.source.weight.numpy()[pair],
            },
        )


def _steps(interval: Interval) -> dict[str, int]:
    return {"source_step": interval.source_step, "target_step": interval.target_step}


def build(
    scalar: str = "",
    parameters: Mapping[str, Any] | None = None,
    probe: str = DEFAULT_PROBE,
    pair_type: Sequence[str] = (),
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
    gradient: bool = False,
) -> ScalarChangesExtractor:
    """The extractor, for the registry. Raises ScalarError or UnknownName, naming what there is.

    `gradient` is always false; it stands in the parameters so that no dataset that has gradients has the same ones.
    """
    selection = select_pairs(probe, pair_type, split, max_pairs_per_type)
    return ScalarChangesExtractor(selection, build_scalar(scalar, parameters or {}))

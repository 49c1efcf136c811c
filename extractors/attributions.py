"""Dataset attributions: what an update did to a scalar, pair by pair and part by part (definitions 2 §E, 3 §B, §D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.scalars import Scalar, ScalarError, build_scalar
from ..engine.scalars.measure import Task
from ..lake import UnitWriter
from ..lake.datasets import ATTRIBUTIONS, DEFAULT_PROBE, attribution_parameters
from ..lake.names import spec_id
from ..lake.schema_attributions import UPDATE_FIELDS
from . import dataset
from .columns import constant
from .forward import probe_of
from .interval import Interval, IntervalExtractor, known, part_columns, part_order
from .pair_sets import PairSelection, PairSet, select_pairs, side_probe


@dataclass
class Change:
    """One scalar over one interval."""

    pairs: PairSet
    source: Task
    """At the source; its gradients are sums over the finest cells."""
    target: Task
    """At the target, with what was frozen at the source."""
    gradients: Mapping[str, Mapping[str, Tensor]]
    """Point (source, path) to name to `Float[cell, *parameter]`: the gradient of every cell's mean."""


class AttributionsExtractor(IntervalExtractor):
    """Tables scalar_changes, scalar_bases and attribution_slices."""

    name = ATTRIBUTIONS
    version = 1

    def __init__(self, selection: PairSelection, integrate: int, scalar: Scalar) -> None:
        self.selection, self.integrate, self.scalar = selection, integrate, scalar

    def parameters(self) -> Mapping[str, Any]:
        """Scalar and pairs."""
        return attribution_parameters(
            self.scalar.name,
            self.scalar.model_dump(),
            pair_type=self.selection.pair_type,
            probe=self.selection.probe,
            split=self.selection.split,
            max_pairs_per_type=self.selection.max_pairs_per_type,
            integrate=self.integrate,
        )

    @property
    def key(self) -> str:
        """Identity of the scalar and its pairs."""
        return spec_id(self.parameters())

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
        self._write_parts(writer, interval, change)

    def _scalar_columns(self, interval: Interval, count: int) -> dict[str, Any]:
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
                **self._scalar_columns(interval, count),
                "split": np.array(pairs.split, object)[pair],
                "pair_type": np.array(pairs.pair_type, object)[pair],
                "pair_id": np.array(pairs.pair_id, object)[pair],
                "quantity": np.tile(np.array(list(named), object), pairs.count),
                "source_value": ends[0].numpy(),
                "target_value": ends[1].numpy(),
                "weight": change.source.weight.numpy()[pair],
            },
        )

    def _write_parts(self, writer: UnitWriter, interval: Interval, change: Change) -> None:
        sums, order = interval.sums, part_order(interval.sums)
        cells = sorted(
            range(len(change.pairs.cells)),
            key=lambda at: (change.pairs.cells[at].split, change.pairs.cells[at].pair_type),
        )
        points = sorted(change.gradients)
        products = torch.stack([sums.products(change.gradients[at], interval.fields) for at in points])
        squares = torch.stack([sums.squares(change.gradients[at]) for at in points])
        # [cell, point, field or nothing, part]
        products = products[:, cells][..., order].transpose(0, 1)
        squares = squares[:, cells][..., order].transpose(0, 1)
        count, parts = squares.numel(), len(order)
        held = [change.pairs.cells[at] for at in cells]
        sizes = [int(np.isin(change.pairs.finest, cell.finest).sum()) for cell in held]
        each = len(points) * parts
        values = dict(zip(interval.field_names, products.unbind(2), strict=True))
        writer.rows(
            "attribution_slices",
            {
                **self._scalar_columns(interval, count),
                "split": np.repeat(np.array([cell.split for cell in held], object), each),
                "pair_type": np.repeat(np.array([cell.pair_type for cell in held], object), each),
                "num_pairs": np.repeat(np.array(sizes), each),
                "point": np.tile(np.repeat(np.array(points, object), parts), len(cells)),
                **part_columns(sums, order, len(cells) * len(points)),
                "gradient_squared": squares.reshape(-1).numpy(),
                **known({name: _column(values.get(name)) for name in UPDATE_FIELDS}),
            },
            in_order=True,
        )


def _column(values: Tensor | None) -> np.ndarray[Any, Any] | None:
    """Cells of a tensor; None where the term is not known."""
    if values is None:
        return None
    cells: np.ndarray[Any, Any] = values.reshape(-1).numpy()
    return None if np.isnan(cells).all() else cells


def _steps(interval: Interval) -> dict[str, int]:
    return {"source_step": interval.source_step, "target_step": interval.target_step}


def build(
    scalar: str = "",
    parameters: Mapping[str, Any] | None = None,
    probe: str = DEFAULT_PROBE,
    pair_type: Sequence[str] = (),
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
    integrate: int = 0,
) -> AttributionsExtractor:
    """The extractor, for the registry. Raises ScalarError or UnknownName, naming what there is."""
    if integrate < 0:
        raise ScalarError(f"--integrate {integrate}: the number of points on the path is at least 0")
    selection = select_pairs(probe, pair_type, split, max_pairs_per_type)
    return AttributionsExtractor(selection, integrate, build_scalar(scalar, parameters or {}))

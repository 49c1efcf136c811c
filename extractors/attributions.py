"""Dataset attributions: what an update did to a scalar, pair by pair and part by part (definitions 2 §E, 3 §B, §D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.scalars import Scalar, ScalarError, build_scalar
from ..lake import UnitWriter
from ..lake.datasets import ATTRIBUTIONS, DEFAULT_PROBE, attribution_parameters
from ..lake.schema_attributions import UPDATE_FIELDS
from . import dataset
from .interval import Interval, known, part_columns, part_order
from .pair_sets import PairSelection, select_pairs
from .scalar_changes import Change, ScalarChangesExtractor


class AttributionsExtractor(ScalarChangesExtractor):
    """Tables scalar_changes, scalar_bases and attribution_slices."""

    name = ATTRIBUTIONS
    needs_moments = True
    differentiates = True

    def __init__(self, selection: PairSelection, integrate: int, scalar: Scalar) -> None:
        super().__init__(selection, scalar)
        self.integrate = integrate

    def parameters(self) -> Mapping[str, Any]:
        """Scalar and pairs, and the points on the path."""
        return attribution_parameters(
            self.scalar.name, self.scalar.model_dump(), integrate=self.integrate, **self.selected()
        )

    def write(self, context: dataset.Context, writer: UnitWriter, *, interval: Interval) -> None:
        """Writes one interval."""
        super().write(context, writer, interval=interval)
        self._write_parts(writer, interval, interval.changes[self.key])

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
                **self.scalar_columns(interval, count),
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

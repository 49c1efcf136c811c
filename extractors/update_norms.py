"""Dataset update_norms: squared norms of an update and of its terms, by part of the model."""

from __future__ import annotations

import numpy as np
import torch

from ..lake import UnitWriter
from ..lake.datasets import UPDATE_NORMS
from ..lake.schema_attributions import UPDATE_SUMS
from . import dataset
from .interval import Interval, IntervalExtractor, part_columns, part_order


class UpdateNormsExtractor(IntervalExtractor):
    """Table update_slices: a row per part."""

    name = UPDATE_NORMS
    version = 1

    def write(self, context: dataset.Context, writer: UnitWriter, *, interval: Interval) -> None:
        """Writes one interval."""
        sums, order = interval.sums, part_order(interval.sums)
        names = list(interval.field_names)
        squares = [sums.squares(interval.fields)]
        if interval.update is not None:
            names += UPDATE_SUMS
            summed = {
                name: torch.stack([of.adam_preconditioned, of.reconstructed])
                for name, of in interval.terms.items()
            }
            squares.append(sums.squares(summed))
        squared = dict(zip(names, torch.cat(squares)[:, order].numpy(), strict=True))
        count = len(order)
        writer.rows(
            "update_slices",
            {
                "source_step": np.full(count, interval.source_step),
                "target_step": np.full(count, interval.target_step),
                **part_columns(sums, order, 1),
                **{f"{name}_squared": of for name, of in squared.items()},
            },
            in_order=True,
        )


def build() -> UpdateNormsExtractor:
    """The extractor, for the registry."""
    return UpdateNormsExtractor()

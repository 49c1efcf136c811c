"""Dataset weights: weights and moments of replayed steps as plain columns, for those who want them in SQL."""

from __future__ import annotations

from ..lake import UnitWriter
from ..lake.datasets import WEIGHTS
from . import dataset
from .states import State
from .trace_block import MOMENTS, stored_array


class WeightsExtractor(dataset.Extractor):
    """Writes quantities weights, exp_avg and exp_avg_sq at steps where only the trace is stored."""

    name = WEIGHTS
    version = 1
    needs_moments = True

    def wants(self, context: dataset.Context, step: int) -> bool:
        """An anchor is stored already."""
        return context.reader.is_replayed(step)

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes one step's tensors."""
        for quantity, tensors in zip(
            ("weights", *MOMENTS), (state.weights, state.exp_avg, state.exp_avg_sq), strict=True
        ):
            for name, tensor in tensors.items():
                context.write_tensor(writer, quantity, name, state.step, stored_array(tensor))


def build() -> dataset.Extractor:
    """The extractor, for the registry."""
    return WeightsExtractor()

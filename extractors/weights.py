"""Dataset weights: the weights of replayed steps as plain columns, for reports that read it and for SQL."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..lake import UnitWriter
from ..lake.datasets import WEIGHTS
from . import dataset
from .states import State
from .trace_block import stored_array


class WeightsExtractor(dataset.Extractor):
    """Writes quantity weights at steps where only the trace is stored."""

    name = WEIGHTS
    version = 1
    needs_moments = False

    def wants(self, context: dataset.Context, step: int) -> bool:
        """An anchor is stored already."""
        return context.reader.is_replayed(step)

    def quantities(self, state: State) -> Mapping[str, Mapping[str, Tensor]]:
        """What is written, by quantity and parameter."""
        return {"weights": state.weights}

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes one step's tensors."""
        for quantity, tensors in self.quantities(state).items():
            for name, tensor in tensors.items():
                context.write_tensor(writer, quantity, name, state.step, stored_array(tensor))


def build() -> dataset.Extractor:
    """The extractor, for the registry."""
    return WeightsExtractor()

"""Dataset moments: Adam's moments of replayed steps as plain columns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..lake.datasets import MOMENTS
from . import dataset
from .states import State
from .weights import WeightsExtractor


class MomentsExtractor(WeightsExtractor):
    """Writes quantities exp_avg and exp_avg_sq at steps where only the trace is stored."""

    name = MOMENTS
    version = 1
    needs_moments = True

    def quantities(self, state: State) -> Mapping[str, Mapping[str, Tensor]]:
        """What is written, by quantity and parameter."""
        return {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}


def build() -> dataset.Extractor:
    """The extractor, for the registry."""
    return MomentsExtractor()

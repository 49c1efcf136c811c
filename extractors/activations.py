"""Dataset activations: the residual stream at every stage, at the positions that have a role, or at all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from ..engine.capture import Captured, Request
from ..lake import UnitWriter
from ..lake.datasets import ACTIVATIONS, DEFAULT_PROBE
from ..lake.errors import UnknownName
from .forward import ForwardExtractor, Passed

LAYOUTS = ("roles", "all")


class ActivationsExtractor(ForwardExtractor):
    """Quantity activations: arrays PROBE/LAYOUT/STAGE, Float32[step, row, d_model]; table activation_rows tells the rows."""

    name = ACTIVATIONS
    version = 1

    def __init__(self, probe: str, layout: str) -> None:
        super().__init__(probe)
        self.layout = layout

    def parameters(self) -> Mapping[str, Any]:
        """Probe and layout."""
        return {"probe": self.probe, "layout": self.layout}

    def request(self) -> Request:
        """The residual stream at the layout's positions."""
        return Request(activations=frozenset({self.layout}))

    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step, an array per stage."""
        block = writer.tensor_rows(ACTIVATIONS, [step])
        order = made.batches.place_order[self.layout]

        def fill(out: np.ndarray[Any, Any], stage: str) -> None:
            captured.stage(self.layout, stage, order, torch.from_numpy(out))

        for stage in made.stages:
            block.fill(
                f"{self.probe}/{self.layout}/{stage}",
                captured.shape(self.layout, stage),
                partial(fill, stage=stage),
                dimension_names=[f"row_of_{self.layout}", "d_model"],
            )


def build(probe: str = DEFAULT_PROBE, layout: str = "roles") -> ActivationsExtractor:
    """The extractor, for the registry."""
    if layout not in LAYOUTS:
        raise UnknownName(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    return ActivationsExtractor(probe, layout)

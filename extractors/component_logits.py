"""Dataset component_logits: direct contribution of every additive part of the last residual stage to the value margin."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ..engine.capture import Captured, Request
from ..engine.writes import component_names
from ..lake import UnitWriter
from ..lake.datasets import COMPONENT_LOGITS, DEFAULT_PROBE
from .columns import constant, flat, grid, sorted_order, texts
from .forward import ForwardExtractor, Passed


class ComponentLogitsExtractor(ForwardExtractor):
    """Table component_logits: a row per event and component."""

    name = COMPONENT_LOGITS
    version = 1

    def request(self) -> Request:
        """Contributions of every component."""
        return Request(components=True)

    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step."""
        found = captured.components
        assert found is not None
        held = component_names(made.n_layers, made.n_heads)
        names, order = sorted_order([name for name, *_ in held])
        parts = [held[place] for place in order]
        event, component = grid(*found.shape[:2])
        place = pa.array(component)
        writer.rows(
            "component_logits",
            {
                "probe": constant(self.probe, len(event)),
                "step": np.full(len(event), step),
                "event": event,
                "component": texts(names, component),
                "component_type": texts([kind for _, kind, _, _ in parts], component),
                "layer": pa.array([layer for *_, layer, _ in parts], pa.int32()).take(place),
                "head": pa.array([head for *_, head in parts], pa.int32()).take(place),
                "margin_dla": flat(found[:, order, 0]),
                "margin_dla_frozen": flat(found[:, order, 1]),
            },
            in_order=True,
        )


def build(probe: str = DEFAULT_PROBE) -> ComponentLogitsExtractor:
    """The extractor, for the registry."""
    return ComponentLogitsExtractor(probe)

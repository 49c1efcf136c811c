"""Dataset interventions: the model without each head and each MLP in turn, one forward pass each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..engine.ablation import SCALARS, ablated_components
from ..engine.capture import Captured, Request
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, INTERVENTIONS
from ..lake.errors import UnknownName
from ..lake.names import spec_id
from .columns import constant, flat, grid, sorted_order, texts
from .forward import ForwardExtractor, Passed

OPERATIONS = ("zero",)


class InterventionsExtractor(ForwardExtractor):
    """Table interventions: a row per event, component and scalar, the component's output zeroed at every position."""

    name = INTERVENTIONS
    version = 1

    def __init__(self, probe: str, operation: str) -> None:
        super().__init__(probe)
        self.operation = operation

    def parameters(self) -> Mapping[str, Any]:
        """Probe and operation."""
        return {"probe": self.probe, "operation": self.operation}

    def request(self) -> Request:
        """A pass without each component."""
        return Request(ablations=True)

    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step."""
        baseline, ablated = captured.baseline, captured.ablated
        assert baseline is not None
        assert ablated is not None
        components, component_order = sorted_order(ablated_components(made.n_layers, made.n_heads))
        scalars, scalar_order = sorted_order(SCALARS)
        event, component, scalar = grid(*ablated.shape)
        untouched = baseline[:, None, scalar_order].expand(-1, len(components), -1)
        writer.rows(
            "interventions",
            {
                "probe": constant(self.probe, len(event)),
                "spec": constant(spec_id(self.parameters()), len(event)),
                "step": np.full(len(event), step),
                "event": event,
                "component": texts(components, component),
                "scalar": texts(scalars, scalar),
                "baseline": flat(untouched.double()),
                "intervened": flat(ablated[:, component_order][..., scalar_order].double()),
            },
            in_order=True,
        )


def build(probe: str = DEFAULT_PROBE, operation: str = "zero") -> InterventionsExtractor:
    """The extractor, for the registry."""
    if operation not in OPERATIONS:
        raise UnknownName(f"no operation {operation!r}; there is {', '.join(OPERATIONS)}")
    return InterventionsExtractor(probe, operation)

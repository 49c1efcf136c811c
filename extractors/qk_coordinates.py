"""Dataset qk_coordinates: residual vectors in the singular directions of one head's W_QK, at every position with a role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..engine.capture import Captured, Request
from ..engine.forward import Model, input_stage
from ..engine.qk_coordinates import LAYERNORM_MODES, QKForm
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, QK_COORDINATES
from ..lake.errors import UnknownName
from .columns import constant, flat, vectors
from .forward import ForwardExtractor, Passed, require_head, require_stage
from .probe_batches import ProbeData


class QKCoordinatesExtractor(ForwardExtractor):
    """Table qk_coordinates: a row per position that has a role in some event of its record."""

    name = QK_COORDINATES
    version = 1

    def __init__(self, probe: str, form: QKForm) -> None:
        super().__init__(probe)
        self.form = form

    def parameters(self) -> Mapping[str, Any]:
        """Probe, head, stage and mode."""
        form = self.form
        return {
            "probe": self.probe,
            "head": f"L{form.layer}H{form.head}",
            "stage": form.stage,
            "layernorm_mode": form.layernorm_mode,
        }

    def request(self) -> Request:
        """Coordinates of one form."""
        return Request(qk_coordinates=frozenset({self.form}))

    def check(self, model: Model, probe: ProbeData) -> None:
        """The head and the stage must be there."""
        require_head(self.form.layer, self.form.head, model)
        require_stage(self.form.stage, model)

    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step."""
        found, form = captured.qk_coordinates[self.form], self.form
        example, position = made.probe.layouts[form.layout]
        count = len(example)
        writer.rows(
            "qk_coordinates",
            {
                "probe": constant(self.probe, count),
                "step": np.full(count, step),
                "example": example,
                "position": position,
                "layer": np.full(count, form.layer),
                "head": np.full(count, form.head),
                "stage": constant(form.stage, count),
                "layernorm_mode": constant(form.layernorm_mode, count),
                "query": vectors(found.query),
                "key": vectors(found.key),
                "query_bias": flat(found.query_bias),
                "key_bias": flat(found.key_bias),
            },
            in_order=True,
        )


def build(
    probe: str = DEFAULT_PROBE,
    head: str | None = None,
    stage: str | None = None,
    layernorm_mode: str = "head_ln1",
) -> QKCoordinatesExtractor:
    """The extractor, for the registry; the stage is by default the one the head reads."""
    if head is None:
        raise UnknownName("qk_coordinates are those of one head: name it with --head, e.g. --head L2H1")
    try:
        layer, number = QKForm.parse_head(head)
    except ValueError as error:
        raise UnknownName(str(error)) from error
    if layernorm_mode not in LAYERNORM_MODES:
        raise UnknownName(f"no layernorm mode {layernorm_mode!r}; there are {', '.join(LAYERNORM_MODES)}")
    return QKCoordinatesExtractor(probe, QKForm(layer, number, stage or input_stage(layer), layernorm_mode))

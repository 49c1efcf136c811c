"""Dataset attention: scores and probabilities of every head from one query position per event."""

from __future__ import annotations

import numpy as np

from ..engine.capture import Captured, Request
from ..lake import UnitWriter
from ..lake.datasets import ATTENTION, DEFAULT_PROBE
from .columns import constant, flat, grid, lists
from .forward import Passed, QueryRoleExtractor
from .probe_batches import PREDICTION


class AttentionExtractor(QueryRoleExtractor):
    """Table attention_patterns: a row per event, layer and head."""

    name = ATTENTION
    version = 1

    def request(self) -> Request:
        """Attention from the query role."""
        return Request(attention=frozenset({self.query_role}))

    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step."""
        found = captured.attention[self.query_role]
        event, layer, head = grid(made.probe.events, made.n_layers, made.n_heads)
        query = made.probe.query_positions(self.query_role)[event]
        writer.rows(
            "attention_patterns",
            {
                "probe": constant(self.probe, len(event)),
                "step": np.full(len(event), step),
                "event": event,
                "layer": layer,
                "head": head,
                "query_role": constant(self.query_role, len(event)),
                "query_position": query,
                "scores": lists(flat(found.scores), query + 1),
                "probabilities": lists(flat(found.probabilities), query + 1),
            },
            in_order=True,
        )


def build(probe: str = DEFAULT_PROBE, query_role: str = PREDICTION) -> AttentionExtractor:
    """The extractor, for the registry."""
    return AttentionExtractor(probe, query_role)

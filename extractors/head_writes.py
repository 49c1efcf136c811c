"""Dataset head_writes: what every head writes at a query position, and would write if it attended to one role alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..engine.capture import Captured, Request
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, HEAD_WRITES
from .columns import constant, flat, grid, sorted_order, texts
from .forward import Passed, QueryRoleExtractor
from .probe_batches import PREDICTION


class HeadWritesExtractor(QueryRoleExtractor):
    """Table head_writes: a row per event, layer, head and role; none where a role has no position up to the query."""

    name = HEAD_WRITES
    version = 1

    def request(self) -> Request:
        """Writes at the query role."""
        return Request(head_writes=frozenset({self.query_role}))

    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step."""
        found = captured.head_writes[self.query_role]
        names, order = sorted_order([*made.batches.roles[self.query_role], "write"])
        event, layer, head, role = grid(*found.answer_logit.shape)
        has_role = np.ones((made.probe.events, len(names)), bool)
        has_role[:, :-1] = made.batches.has_role[self.query_role]
        kept = has_role[:, order][event, role]

        def column(values: Tensor) -> np.ndarray[Any, Any]:
            cells = flat(values[..., order])
            return cells if kept.all() else cells[kept]

        event, layer, head, role = (axis if kept.all() else axis[kept] for axis in (event, layer, head, role))
        writer.rows(
            "head_writes",
            {
                "probe": constant(self.probe, len(event)),
                "step": np.full(len(event), step),
                "event": event,
                "layer": layer,
                "head": head,
                "query_role": constant(self.query_role, len(event)),
                "role": texts(names, role),
                "answer_logit": column(found.answer_logit),
                "best_wrong_token": column(found.best_wrong_token.int()),
                "best_wrong_logit": column(found.best_wrong_logit),
                "value_margin": column(found.answer_logit - found.best_wrong_logit),
                "margin_dla": column(found.contributions[..., 0]),
                "margin_dla_frozen": column(found.contributions[..., 1]),
            },
            in_order=True,
        )


def build(probe: str = DEFAULT_PROBE, query_role: str = PREDICTION) -> HeadWritesExtractor:
    """The extractor, for the registry."""
    return HeadWritesExtractor(probe, query_role)

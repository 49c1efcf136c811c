"""Dataset readouts: every residual stage read by the unembedding at the prediction position, and the model's own logits."""

from __future__ import annotations

import numpy as np

from ..engine.capture import Captured, Request
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, READOUTS
from .columns import constant, flat, grid, sorted_order, texts
from .forward import ForwardExtractor, Passed


class ReadoutsExtractor(ForwardExtractor):
    """Table readouts: a row per event and stage."""

    name = READOUTS
    version = 1

    def request(self) -> Request:
        """Readouts of every stage."""
        return Request(readouts=True)

    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step."""
        found = captured.readouts
        assert found is not None
        names, order = sorted_order([*made.stages, "logits"])
        event, stage = grid(*found.answer_logit.shape)
        writer.rows(
            "readouts",
            {
                "probe": constant(self.probe, len(event)),
                "step": np.full(len(event), step),
                "event": event,
                "stage": texts(names, stage),
                "answer_logit": flat(found.answer_logit[:, order]),
                "best_wrong_token": flat(found.best_wrong_token[:, order].int()),
                "best_wrong_logit": flat(found.best_wrong_logit[:, order]),
                "value_margin": flat(found.value_margin[:, order]),
                "best_token": flat(found.best_token[:, order].int()),
                "answer_log_prob": flat(found.answer_log_prob[:, order]),
                "correct": flat(found.correct[:, order]),
            },
            in_order=True,
        )


def build(probe: str = DEFAULT_PROBE) -> ReadoutsExtractor:
    """The extractor, for the registry."""
    return ReadoutsExtractor(probe)

"""Runs read by the unembedding: the logits of the answer and of everything it competes with, and what parts add to each.

Every margin, moving or against a fixed competitor, follows from these. Source: definitions 4 §0.5, §0.10, §0.12.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..forward import Model
from ..readout import Choices, Readout, read_final
from .run import Runs


@dataclass(frozen=True)
class Answers:
    """What some runs answer."""

    names: list[str]
    readout: Readout
    """`[event, run]`."""
    logits: Tensor
    """`Float[run, event, candidate]`."""
    dla: Tensor | None
    """`Float[run, event, part, candidate]`: part · gradient of the candidate's logit with respect to the stage before
    the final LayerNorm, which is differentiated, at the run's own state; None unless the runs have parts."""
    log_prob_dla: Tensor | None
    """`Float[run, event, part]`: the same for the answer's log-probability over the whole vocabulary."""

    @staticmethod
    def join(parts: list[Answers]) -> Answers:
        """Batches of events, one after the other."""

        def joined(name: str) -> Tensor | None:
            held = [getattr(part, name) for part in parts]
            return None if held[0] is None else torch.cat(held, 1)

        logits = joined("logits")
        assert logits is not None
        readout = Readout.join([part.readout for part in parts])
        return Answers(parts[0].names, readout, logits, joined("dla"), joined("log_prob_dla"))


def read_answers(model: Model, runs: Runs, choices: Choices) -> Answers:
    """Reads runs; results are on the CPU."""
    readout = read_final(model, runs.final, choices).cpu()
    logits = runs.final @ model.unembedding[choices.candidates].mT
    dla = log_prob = None
    if runs.parts is not None:
        seen = _through_the_norm(model, runs.last, runs.parts)
        dla = (seen @ model.unembedding[choices.candidates].mT).cpu()
        expected = (runs.final @ model.unembedding.mT).softmax(-1) @ model.unembedding
        direction = model.unembedding[choices.answer_token] - expected
        log_prob = (seen * direction[:, :, None]).sum(-1).cpu()
    return Answers(list(runs.names), readout, logits.cpu(), dla, log_prob)


def _through_the_norm(model: Model, last: Tensor, parts: Tensor) -> Tensor:
    """`Float[run, event, part, d_model]` times the Jacobian of the final LayerNorm: what a part does to its output.

    With n = (z − mean z) / s and s = √(var z + ε) of the stage z = `last`: (w − mean w − n · mean(w ⊙ n)) / s ⊙ gain.
    """
    gain, _ = model.final_norm_parameters()
    centred = last - last.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + model.layer_norm_eps).sqrt()
    n = (centred / deviation)[:, :, None]
    own = parts - parts.mean(-1, keepdim=True)
    return (own - n * (parts * n).mean(-1, keepdim=True)) / deviation[:, :, None] * gain

"""Reading logits off the residual stream: margins, log-probabilities, and the direction a margin is read along.

Source: definitions 2 §C, §I; definitions 4 §0.5, §0.12. `event` and `candidate` as in `engine.capture`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from .forward import Model
from .parallel_columns import ParallelColumns

# Logits are made and reduced this many at a time: what stays in a core's cache, and never events × stages × vocabulary.
_BLOCK = 1 << 19


@dataclass(frozen=True)
class Choices:
    """The answer of each event, and the tokens it competes with."""

    candidates: Tensor
    """`Int[candidate]`: token ids, ascending; every answer and competitor is among them."""
    answer: Tensor
    """`Int[event]`: place of the answer among the candidates."""
    wrong: Tensor
    """`Float[event, candidate]`: 0 where the candidate competes, -inf elsewhere; something competes in every event."""

    @cached_property
    def answer_token(self) -> Tensor:
        """`Int[event]`."""
        return self.candidates[self.answer]

    @cached_property
    def _slice(self) -> slice | None:
        first, last = int(self.candidates[0]), int(self.candidates[-1])
        return slice(first, last + 1) if last - first + 1 == len(self.candidates) else None

    def of(self, vocabulary: Tensor) -> Tensor:
        """The candidates' part of `Float[…, vocabulary]`: `Float[…, candidate]`, a view where they are neighbours."""
        return (
            vocabulary.index_select(-1, self.candidates)
            if self._slice is None
            else vocabulary[..., self._slice]
        )

    def best_wrong_(self, scores: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """Largest competitor of `Float[…, candidate]` and its token, the first of equals. `scores` are overwritten."""
        scores += wrong
        value = scores.amax(-1)
        return value, self.candidates[first_of_(scores, value)]


@dataclass(frozen=True)
class Readout(ParallelColumns):
    """Logits at the prediction position, reduced: columns of the same shape, `[event]` or `[event, stage]`."""

    answer_logit: Tensor
    best_wrong_token: Tensor
    best_wrong_logit: Tensor
    best_token: Tensor
    answer_log_prob: Tensor
    correct: Tensor

    @property
    def value_margin(self) -> Tensor:
        """Answer less its best competitor."""
        return self.answer_logit - self.best_wrong_logit

    def append(self, other: Readout) -> Readout:
        """`[event, stage]` with `other`, `[event]`, as one stage more."""
        columns = [column.name for column in fields(self)]
        return Readout(
            *(torch.cat([getattr(self, name), getattr(other, name)[:, None]], 1) for name in columns)
        )


def first_of_(scores: Tensor, value: Tensor) -> Tensor:
    """Place along the last axis where `value` stands first; `scores` are overwritten.

    With `amax` before it this is what `max(-1)` gives, in a third of its time: torch finds the maximum of eight entries at
    once, but places one by one.
    """
    count = scores.shape[-1]
    places = torch.arange(count, 0, -1, device=scores.device, dtype=scores.dtype)
    found = scores.eq_(value[..., None]).mul_(places).amax(-1)
    # NaN equals nothing: the last place stands for it.
    return (count - found).long().clamp_(max=count - 1)


def read_logits(logits: Tensor, choices: Choices, event: slice) -> Readout:
    """Reduces `Float[…, event, vocabulary]`, which are overwritten; `event` says which events they are."""
    answer = choices.answer_token[event].expand(logits.shape[:-1])
    answer_logit = logits.gather(-1, answer[..., None])[..., 0]
    wrong_logit, wrong_token = choices.best_wrong_(choices.of(logits).clone(), choices.wrong[event])
    peak = logits.amax(-1)
    # Terms that float32 would lose anyway are kept clear of denormal numbers, which are slow.
    total = (logits - peak[..., None]).clamp_(min=-80).exp_().sum(-1).log_()
    best = first_of_(logits, peak)
    return Readout(answer_logit, wrong_token, wrong_logit, best, answer_logit - peak - total, best == answer)


def final_readout(model: Model, final: Tensor, choices: Choices) -> Readout:
    """Of the final stage, `Float[event, d_model]`, which the unembedding reads as it is: `[event]`."""
    return read_final(model, final[None], choices).apply(lambda column: column[:, 0])


def stage_readouts(model: Model, stages: Tensor, choices: Choices) -> Readout:
    """Every stage, `Float[stage, event, d_model]`, as if it were the last before the final LayerNorm: `[event, stage]`."""
    return read_final(model, model.final_norm(stages), choices)


def read_final(model: Model, rows: Tensor, choices: Choices) -> Readout:
    """Of several final stages, `Float[stage, event, d_model]`, read by the unembedding: `[event, stage]`."""
    stages, events, _ = rows.shape
    size = max(1, _BLOCK // (model.vocabulary_size * stages))
    parts = [slice(start, start + size) for start in range(0, events, size)]
    found = [read_logits(rows[:, part] @ model.unembedding.T, choices, part) for part in parts]
    return Readout.join([part.apply(lambda column: column.T) for part in found])


@dataclass(frozen=True)
class ReadoutGradient:
    """How the value margin reads the last residual stage z, per event; constant where it is used."""

    both: Tensor
    """`Float[2, event, d_model]`: d margin / d z, mean and variance of the LayerNorm differentiated too; and frozen, the
    same with the standard deviation held fixed: frozen · z + bias = margin."""
    bias: Tensor
    """`Float[event]`: what the LayerNorm's bias adds to the margin."""
    margin: Tensor
    """`Float[event]`: frozen · z + bias, the margin read off the last stage."""


def readout_gradient(model: Model, last: Tensor, choices: Choices, own: Readout) -> ReadoutGradient:
    """For z = `last`, `Float[event, d_model]`, and the model's own best wrong token w.

    With u = gain ⊙ (U_y − U_w), n = (z − mean z) / s and s = √(var z + ε) the margin is u·n + bias·(U_y − U_w), hence
    d margin / d z = (u − mean u − n · mean(u ⊙ n)) / s; s held fixed leaves (u − mean u) / s.
    """
    gain, shift = model.final_norm_parameters()
    direction = model.unembedding[choices.answer_token] - model.unembedding[own.best_wrong_token]
    u = gain * direction
    centred = last - last.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + model.layer_norm_eps).sqrt()
    n = centred / deviation
    frozen = (u - u.mean(-1, keepdim=True)) / deviation
    differentiated = frozen - n * (u * n).mean(-1, keepdim=True) / deviation
    bias = direction @ shift
    return ReadoutGradient(torch.stack([differentiated, frozen]), bias, (u * n).sum(-1) + bias)

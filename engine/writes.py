"""What heads and other components write into the residual stream, read by the unembedding.

A write is W_O z for a mix z of value vectors, so its logits are (U W_O) z: with U W_O made once per head, a write costs
d_head per token, not d_model. Source: definitions 2 §B, §C, §I.7-9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .forward import Model
from .parallel_columns import ParallelColumns
from .readout import Choices, ReadoutGradient, first_of_

_BLOCK = 1 << 19


@dataclass(frozen=True)
class HeadWrites(ParallelColumns):
    """Columns `[event, layer, head, role]`, the last role being what the head does write."""

    answer_logit: Tensor
    best_wrong_token: Tensor
    best_wrong_logit: Tensor
    contributions: Tensor
    """`[event, layer, head, role, 2]`: write · gradient of the margin, LayerNorm differentiated and scale frozen."""


class OVReader:
    """The unembedding of some tokens, seen through every head's output matrix."""

    def __init__(self, model: Model, candidates: Tensor) -> None:
        self.W_O = model.head_weights["W_O"]
        self._unembedding = model.unembedding[candidates]
        # [d_model, layer · head · d_head]
        self._directions = self.W_O.permute(2, 0, 1, 3).flatten(1)

    def logits(self, layer: int) -> Tensor:
        """`Float[head, d_head, candidate]`: what a value vector of each head of a layer does to each candidate's logit."""
        return (self._unembedding @ self.W_O[layer]).mT

    def directions(self, gradient: Tensor) -> Tensor:
        """`Float[2, event, d_model]` as every head sees it: `Float[2, event, layer, head, d_head]`."""
        layers, heads, _, width = self.W_O.shape
        return (gradient @ self._directions).view(2, -1, layers, heads, width)


def head_writes(
    reader: OVReader, mixes: Sequence[Tensor], choices: Choices, gradient: ReadoutGradient
) -> HeadWrites:
    """What every head writes of `Float[event, role, head, d_head]`, a layer each: of the mean value vector of a role, as if
    it attended to that alone, and last of what attention mixes."""
    layers = [_read(reader.logits(layer), mixed, choices) for layer, mixed in enumerate(mixes)]
    answer, place, logit = (torch.stack(column).permute(2, 0, 1, 3) for column in zip(*layers, strict=True))
    directions = reader.directions(gradient.both).unbind(2)
    # [event, role, head] of each gradient and layer.
    read = [[(z * of[:, None]).sum(-1) for of in seen] for z, seen in zip(mixes, directions, strict=True)]
    contributions = torch.stack([torch.stack(layer, -1) for layer in read], 1).transpose(2, 3)
    return HeadWrites(answer, choices.candidates[place], logit, contributions)


def _read(logits_of: Tensor, mixed: Tensor, choices: Choices) -> tuple[Tensor, Tensor, Tensor]:
    """Answer logit, place of the best wrong candidate and its logit of `Float[event, role, head, d_head]`:
    `[head, event, role]` each."""
    events, roles, heads, _ = mixed.shape
    candidates = logits_of.shape[-1]
    size = max(1, _BLOCK // (roles * candidates))
    answer_logit, wrong_logit = mixed.new_empty(2, heads, events, roles).unbind()
    place = choices.answer.new_empty(heads, events, roles)
    for start in range(0, events, size):
        part = slice(start, start + size)
        answer = choices.answer[part, None, None].expand(-1, roles, 1)
        wrong = choices.wrong[part, None]
        for head in range(heads):
            scores = (mixed[part, :, head].flatten(0, 1) @ logits_of[head]).view(-1, roles, candidates)
            torch.gather(scores, -1, answer, out=answer_logit[head, part, :, None])
            torch.amax(scores.add_(wrong), -1, out=wrong_logit[head, part])
            place[head, part] = first_of_(scores, wrong_logit[head, part])
    return answer_logit, place, wrong_logit


def component_names(n_layers: int, n_heads: int) -> list[tuple[str, str, int | None, int | None]]:
    """(component, type, layer, head) of every additive part of the last residual stage, and the final LayerNorm's bias."""
    found: list[tuple[str, str, int | None, int | None]] = [("embedding", "embedding", None, None)]
    for layer in range(n_layers):
        found += [(f"L{layer}H{head}", "attention_head", layer, head) for head in range(n_heads)]
        found.append((f"L{layer}.attention_bias", "attention_bias", layer, None))
        found.append((f"L{layer}MLP", "mlp_block", layer, None))
    return [*found, ("final_norm_bias", "final_norm_bias", None, None)]


def component_contributions(
    model: Model, residual: Tensor, heads: Tensor, gradient: ReadoutGradient
) -> Tensor:
    """`Float[event, component, 2]` in the order of `component_names`; the frozen ones add up to the value margin.

    `residual` is `Float[stage, event, d_model]` of every stage at the prediction positions; `heads` is
    `Float[event, layer, head, 2]`, what the heads' writes contribute.
    """
    # Stages are the embedding, then attention and MLP in turn.
    mlp = residual[2:-1:2] - residual[1:-1:2]
    parts = torch.cat([residual[:1], mlp])
    embedding, *mlps = torch.stack([(parts * of).sum(-1) for of in gradient.both], -1)
    biases = (gradient.both @ model.head_weights["b_O"].T).permute(2, 1, 0)
    found = [embedding[:, None]]
    for layer in range(model.n_layers):
        found += [heads[:, layer], biases[layer, :, None], mlps[layer][:, None]]
    # A constant has no gradient.
    bias = torch.stack([torch.zeros_like(gradient.bias), gradient.bias], -1)
    return torch.cat([*found, bias[:, None]], 1)

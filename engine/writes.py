"""What heads and other components write into the residual stream, read by the unembedding.

A write is W_O z for a mix z of value vectors, so its logits are (U W_O) z: with U W_O made once per head, a write costs
d_head per token, not d_model. Source: definitions 2 §B, §C, §I.7-9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Attended
from .forward import Model
from .parallel_columns import ParallelColumns
from .readout import Choices, ReadoutGradient

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

    def logits(self, layer: int) -> Tensor:
        """`Float[head, d_head, candidate]`: what a value vector of each head of a layer does to each candidate's logit."""
        return (self._unembedding @ self.W_O[layer]).mT

    def directions(self, layer: int, gradient: Tensor) -> Tensor:
        """`Float[event, d_model, 2]` as the heads of a layer see it: `Float[event, head, d_head, 2]`."""
        flat = self.W_O[layer].transpose(0, 1).flatten(1)
        seen = gradient.transpose(1, 2).reshape(-1, flat.shape[0]) @ flat
        return seen.reshape(len(gradient), 2, *self.W_O.shape[1::2]).movedim(1, -1)


def head_writes(
    reader: OVReader, attended: Sequence[Attended], choices: Choices, gradient: ReadoutGradient
) -> HeadWrites:
    """Every head's write at the query positions, and what it would write if it attended to a role alone."""
    both = gradient.both
    layers = []
    for layer, of in enumerate(attended):
        mixed = of.mixed
        contributions = mixed @ reader.directions(layer, both)
        layers.append((*_read(reader.logits(layer), mixed, choices), contributions))
    return HeadWrites(*(torch.stack(column, 1) for column in zip(*layers, strict=True)))


def _read(logits_of: Tensor, mixed: Tensor, choices: Choices) -> tuple[Tensor, Tensor, Tensor]:
    """Answer logit, best wrong token and its logit of `Float[event, head, role, d_head]`: `[event, head, role]` each."""
    events, heads, roles, width = mixed.shape
    candidates = logits_of.shape[-1]
    size = max(1, _BLOCK // (roles * candidates))
    columns = []
    for head in range(heads):
        parts = []
        for start in range(0, events, size):
            part = slice(start, start + size)
            scores = (mixed[part, head].reshape(-1, width) @ logits_of[head]).reshape(-1, roles, candidates)
            answer = scores.gather(-1, choices.answer[part, None, None].expand(-1, roles, 1))[..., 0]
            wrong_logit, wrong_token = choices.best_wrong_(scores, choices.wrong[part, None])
            parts.append((answer, wrong_token, wrong_logit))
        columns.append([torch.cat(column) for column in zip(*parts, strict=True)])
    answer_logit, token, logit = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return answer_logit, token, logit


def component_names(n_layers: int, n_heads: int) -> list[tuple[str, str, int | None, int | None]]:
    """(component, type, layer, head) of every additive part of the last residual stage, and the final LayerNorm's bias."""
    found: list[tuple[str, str, int | None, int | None]] = [("embedding", "embedding", None, None)]
    for layer in range(n_layers):
        found += [(f"L{layer}H{head}", "attention_head", layer, head) for head in range(n_heads)]
        found.append((f"L{layer}.attention_bias", "attention_bias", layer, None))
        found.append((f"L{layer}MLP", "mlp_block", layer, None))
    return [*found, ("final_norm_bias", "final_norm_bias", None, None)]


def component_contributions(
    model: Model, residual: Mapping[str, Tensor], heads: Tensor, gradient: ReadoutGradient
) -> Tensor:
    """`Float[event, component, 2]` in the order of `component_names`; the frozen ones add up to the value margin.

    `residual` holds every stage at the prediction positions, `Float[event, d_model]`; `heads` is
    `Float[event, layer, head, 2]`, what the heads' writes contribute.
    """
    both = gradient.both

    def of(part: Tensor) -> Tensor:
        return torch.einsum("...d,...dk->...k", part, both)

    found = [of(residual["embedding"])[:, None]]
    for layer in range(model.n_layers):
        mlp = residual[f"layer_{layer}_post_mlp"] - residual[f"layer_{layer}_post_attn"]
        found += [heads[:, layer], of(model.head_weights["b_O"][layer])[:, None], of(mlp)[:, None]]
    # A constant has no gradient.
    bias = torch.stack([torch.zeros_like(gradient.bias), gradient.bias], -1)
    return torch.cat([*found, bias[:, None]], 1)

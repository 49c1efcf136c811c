"""One head at the query position of each pair: its scores, its attention, what it writes, and how logits read that.

Only the query's row of attention is made, never the whole T × T matrix; everything is differentiable, and made when first
read. Source: definitions 3 §F (symbols), 2 §I.7-9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..forward import Model
from . import PairPass, Records, mean_over


@dataclass(frozen=True)
class Margin:
    """Answer less its best competitor."""

    value: Tensor
    """`Float[pair]`, differentiable: through the answer and the token that competes best now."""
    wrong: Tensor
    """`Int[pair]`: that token, the first of equals."""


@dataclass(frozen=True)
class Retrieval:
    """What a head finds and writes. S is the support, D the distractors, each up to the query."""

    model: Model
    records: Records
    passed: PairPass
    head: tuple[int, int]
    """Layer and head."""
    query: Tensor
    """`Int[pair]`."""
    support: Tensor
    """`Bool[pair, position]`."""
    distractors: Tensor
    """`Bool[pair, position]`."""

    @cached_property
    def scores(self) -> Tensor:
        """`Float[pair, position]`: q·k/√d_head, biases in, of every key; also of those that causality hides."""
        layer, head = self.head
        q = self.passed.distinct.queries[layer][self.records.row, head, self.query]
        return (self._head(self.passed.distinct.keys) @ q[..., None])[..., 0] / math.sqrt(self.model.d_head)

    @cached_property
    def attention(self) -> Tensor:
        """`Float[pair, position]`: softmax of the scores over the keys up to the query; 0 after it."""
        key = torch.arange(self.scores.shape[1], device=self.scores.device)
        return self.scores.masked_fill(key > self.query[:, None], -math.inf).softmax(-1)

    @cached_property
    def write(self) -> Tensor:
        """`Float[pair, d_model]`: W_O Σ a_j v_j, value bias in, output bias out."""
        return self._written(self.attention)

    @cached_property
    def write_of_support(self) -> Tensor:
        """`Float[pair, d_model]`: W_O · mean of v over S, what the head would write if it attended to the support alone."""
        return self._written(self.support / self.support.sum(-1, keepdim=True))

    def mean_separation(self, of: Tensor) -> Tensor:
        """`Float[pair, position]` over S less over D, means: `Float[pair]`."""
        return mean_over(self.support, of) - mean_over(self.distractors, of)

    def answer_logit(self, vector: Tensor) -> Tensor:
        """E_y · u of `Float[pair, d_model]`, the raw unembedding: `Float[pair]`."""
        return (vector * self.model.unembedding[self.records.choices.answer_token]).sum(-1)

    def value_margin(self, vector: Tensor) -> Margin:
        """E_y · u less the largest E_v · u of the competitors, chosen anew for this u; the raw unembedding."""
        choices, unembedding = self.records.choices, self.model.unembedding
        with torch.no_grad():
            logits = vector @ unembedding.index_select(0, choices.candidates).mT
            _, wrong = choices.best_wrong_(logits, choices.wrong)
        direction = unembedding[choices.answer_token] - unembedding[wrong]
        return Margin((vector * direction).sum(-1), wrong)

    def _written(self, weights: Tensor) -> Tensor:
        layer, head = self.head
        mixed = (weights[:, None] @ self._head(self.passed.distinct.values))[:, 0]
        return mixed @ self.model.head_weights["W_O"][layer, head].mT

    def _head(self, layers: Sequence[Tensor]) -> Tensor:
        """`Float[pair, position, d_head]`: of this head alone, so that no other is repeated for every pair."""
        layer, head = self.head
        return layers[layer][:, head].index_select(0, self.records.row)


def at_prediction(records: Records, x: Tensor) -> Tensor:
    """`Float[pair, d_model]` of `Float[record, position, d_model]`, where the answer is predicted."""
    return x[records.row, records.prediction]

"""Scalar attention_score_separation: a head's score of the support above that of the distractors, or one side's part of it.

s(i, j) = q_i · k_j / √d_head with biases in, before the softmax; LayerNorm and everything before it belong to q and k
(definitions 2 §F1). Between a source and a target, s moves by exactly (Δq·k_source + q_source·Δk + Δq·Δk) / √d_head:
component q_side holds the keys of the source, k_side its query, and `score` neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from . import Basis, Evaluation, Passes, mean_over
from .retrieval import Retrieval
from .roles import HeadScalar

Component = Literal["score", "q_side", "k_side"]
COMPONENTS: tuple[Component, ...] = ("score", "q_side", "k_side")


class AttentionScoreSeparation(HeadScalar):
    """Mean score over support keys minus mean score over distractor keys, both up to the query."""

    name = "attention_score_separation"
    component: Component = "score"

    def freeze(self, passes: Passes, basis: Basis) -> Mapping[str, Tensor]:
        """The side that does not move: keys `Float[pair, position, d_head]` or query `Float[pair, d_head]`."""
        if self.component == "score":
            return {}
        query, keys = self._query_and_keys(passes)
        return {"keys": keys} if self.component == "q_side" else {"query": query}

    def evaluate(self, passes: Passes, basis: Basis, frozen: Mapping[str, Tensor]) -> Evaluation:
        """Separations of the component, with its own support and distractor means; attention is that of the whole head."""
        records, passed = self.on(passes, self.record_side)
        place, support, distractors = self.positions(records)
        query, keys = self._query_and_keys(passes)
        query, keys = frozen.get("query", query), frozen.get("keys", keys)
        scores = (keys @ query[..., None])[..., 0] / math.sqrt(query.shape[-1])
        found = self.separation(scores, support, distractors, mean_over)
        with torch.no_grad():
            head = Retrieval(passes.model, records, passed, self.head_of, place, support, distractors)
            attention = {
                "support_attention_mean": mean_over(support, head.attention),
                "distractor_attention_mean": mean_over(distractors, head.attention),
            }
        return Evaluation(found.value, {**found.quantities, **attention})

    def _query_and_keys(self, passes: Passes) -> tuple[Tensor, Tensor]:
        records, _ = self.on(passes, self.record_side)
        place = records.query_positions(self.score_query_role)
        return query_and_keys(passes, self.record_side, self.head_of, place)


def query_and_keys(passes: Passes, side: str, head: tuple[int, int], place: Tensor) -> tuple[Tensor, Tensor]:
    """Of one head the query at `Int[pair]`, `Float[pair, d_head]`, and every key, `Float[pair, position, d_head]`."""
    records = passes.pairs.sides[side]
    layer, number = head
    distinct = passes.of[side].distinct
    query = distinct.queries[layer][records.row, number, place]
    return query, distinct.keys[layer][:, number].index_select(0, records.row)


SCALARS = {AttentionScoreSeparation.name: AttentionScoreSeparation}

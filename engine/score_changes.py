"""How one head's scores moved between two steps, key by key, split into what moved its query and what moved its keys.

With x the LayerNorm of the head's input and q = W_Q x + b_Q at the query position i, k = W_K x + b_K at key j:

    √d_head Δs = Δq·k⁰ + q⁰·Δk + Δq·Δk
    Δq = W_Q⁰ Δx + ΔW_Q x⁰ + Δb_Q + ΔW_Q Δx        (Δk alike)

so Δs is the sum of nine parts, four that move the query against the source's keys, four that move the keys against the
source's query, and Δq·Δk (definitions 2 §F1). That is arithmetic, not a counterfactual. Everything is float64, from the
float32 tensors of the passes; what the passes themselves rounded is the reconstruction error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .forward import input_stage
from .scalars import Passes
from .scalars.attention_scores import AttentionScoreSeparation, query_and_keys

PARTS = (
    "q_input_source_key",
    "q_weight_source_key",
    "q_bias_source_key",
    "q_weight_input_cross_source_key",
    "source_query_k_input",
    "source_query_k_weight",
    "source_query_k_bias",
    "source_query_k_weight_input_cross",
    "qk_vector_cross",
)


@dataclass(frozen=True)
class Projection:
    """One side of the head at some positions, all float64: x, W x + b as the pass computed it, and W and b."""

    x: Tensor
    """`Float64[place, d_model]`."""
    vector: Tensor
    """`Float64[place, d_head]`."""
    weight: Tensor
    """`Float64[d_head, d_model]`."""
    bias: Tensor
    """`Float64[d_head]`."""


@dataclass(frozen=True)
class HeadScores:
    """What one head did on some pairs at one step."""

    query: Projection
    """A place per pair."""
    key: Projection
    """A place per row: every key of the support role, then of the distractor role, pair by pair."""
    scores: Tensor
    """`Float64[pair, position]`: -inf after the query."""
    place: Tensor
    """`Int[pair]`: the query position."""
    rows: Tensor
    """`Int[row, 3]`: pair, role (0 support, 1 distractors) and position."""


def head_scores(passes: Passes, scalar: AttentionScoreSeparation) -> HeadScores:
    """Reads the head and the roles of `scalar` off some passes. Raises ScalarError for roles that the pairs lack."""
    model, side = passes.model, scalar.record_side
    records, passed = scalar.on(passes, side)
    layer, head = scalar.head_of
    place, support, distractors = scalar.positions(records)
    rows = torch.stack([support, distractors], 1).nonzero()
    query, keys = query_and_keys(passes, side, (layer, head), place)
    x = model.attention_norm(layer, passed.distinct.stages[input_stage(layer)])
    pair, position = rows[:, 0], rows[:, 2]
    after = torch.arange(keys.shape[1], device=keys.device) > place[:, None]
    scores = (keys.double() @ query.double()[..., None])[..., 0] / math.sqrt(query.shape[-1])
    weights = {name: model.head_weights[name][layer, head].double() for name in ("W_Q", "b_Q", "W_K", "b_K")}
    return HeadScores(
        Projection(x[records.row, place].double(), query.double(), weights["W_Q"], weights["b_Q"]),
        Projection(
            x[records.row[pair], position].double(),
            keys[pair, position].double(),
            weights["W_K"],
            weights["b_K"],
        ),
        scores.masked_fill(after, -math.inf),
        place,
        rows,
    )


def score_changes(source: HeadScores, target: HeadScores) -> Mapping[str, Tensor]:
    """Columns of table score_changes, `Float64[row]`, for the same pairs at two steps."""
    pair, position = source.rows[:, 0], source.rows[:, 2]
    scale = math.sqrt(source.query.weight.shape[0])
    moved_query, query_error = _moved(source.query, target.query)
    moved_key, key_error = _moved(source.key, target.key)
    query, delta_query = source.query.vector[pair], (target.query.vector - source.query.vector)[pair]
    delta_key = target.key.vector - source.key.vector
    of_query = [(part[pair] * source.key.vector).sum(-1) / scale for part in moved_query]
    of_key = [(query * part).sum(-1) / scale for part in moved_key]
    cross = (delta_query * delta_key).sum(-1) / scale
    parts = dict(zip(PARTS, [*of_query, *of_key, cross], strict=True))
    # Keys that causality hides have probability 0 at both ends, and a score that is no number.
    attention, moved_attention = source.scores.softmax(-1), target.scores.softmax(-1)
    change = (target.scores - source.scores).masked_fill(source.scores.isneginf(), 0)
    first_order = attention * (change - (attention * change).sum(-1, keepdim=True))
    return {
        "source_attention": attention[pair, position],
        "target_attention": moved_attention[pair, position],
        "softmax_first_order_attention_delta": first_order[pair, position],
        "source_score": source.scores[pair, position],
        "target_score": target.scores[pair, position],
        "q_vector_delta_source_key": (delta_query * source.key.vector).sum(-1) / scale,
        "source_query_k_vector_delta": (query * delta_key).sum(-1) / scale,
        **parts,
        "q_delta_reconstruction_error": query_error[pair],
        "k_delta_reconstruction_error": key_error,
        "score_reconstruction_error": sum(parts.values()) - change[pair, position],
    }


def _moved(source: Projection, target: Projection) -> tuple[list[Tensor], Tensor]:
    """The four parts of Δ(W x + b), `Float64[place, d_head]` each, and their sum's largest error, `Float64[place]`."""
    dx, dW = target.x - source.x, target.weight - source.weight
    bias = (target.bias - source.bias).expand(len(dx), -1)
    parts = [dx @ source.weight.mT, source.x @ dW.mT, bias, dx @ dW.mT]
    error = torch.stack(parts).sum(0) - (target.vector - source.vector)
    return parts, error.abs().amax(-1)

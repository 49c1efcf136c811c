"""What every head writes at the query of a causal patch pair, and would write with other attention or other values.

Symbols (definitions 3 §F, §G): q the query, S and D support and distractor keys up to it; s_j = q·k_j/√d_head with biases,
a_j their softmax over the keys up to q; o = Σ a_j v_j, c_S = Σ_S a_j v_j, A_S = Σ_S a_j, v̄ = mean_S v, and ṽ the v̄ of
another pair. The head's output z is, under the four conditions,

    attention \\ values    real    shuffled
    real                   o       o − c_S + A_S ṽ
    correct support        v̄       ṽ

and its write W_O z. These are substitutions at readout: no later layer is run again. The OV map of a condition is what the
head would write from the support alone, so it is the write of its `correct support` row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import require_margin
from .forward import Model
from .parallel_columns import ParallelColumns
from .readout import Choices, Readout, final_readout, readout_gradient
from .scalars import PairPass, Records, mean_over
from .scalars.retrieval import at_prediction
from .scalars.roles import SeparationRoles
from .writes import OVReader, head_writes

# Order of the axis `condition`: o, v̄, o − c_S + A_S ṽ, ṽ; and where in it the OV map of each stands.
_OV_MAP = [1, 1, 3, 3]


@dataclass(frozen=True)
class HeadsAtQuery(ParallelColumns):
    """Every head at the query of each pair. Columns `Float[pair, layer, head]` where not said."""

    query: Tensor
    """`Int[pair]`: position."""
    support_score: Tensor
    """Mean of s over S."""
    distractor_score: Tensor
    """Mean of s over D."""
    support_attention: Tensor
    """Mean of a over S."""
    distractor_attention: Tensor
    """Mean of a over D."""
    support_mass: Tensor
    """A_S."""
    distractor_mass: Tensor
    """Sum of a over D."""
    attended: Tensor
    """o, `Float[pair, layer, head, d_head]`."""
    attended_support: Tensor
    """c_S, as `attended`."""
    support: Tensor
    """v̄, as `attended`."""
    last: Tensor
    """Last residual stage at the prediction, `Float[pair, d_model]`."""
    final: Tensor
    """Stage final_norm there, `Float[pair, d_model]`."""


@torch.no_grad()
def heads_at_query(model: Model, records: Records, passed: PairPass, roles: SeparationRoles) -> HeadsAtQuery:
    """Of one batch of pairs; `passed` has captured stages and attention. Raises ScalarError for a role that has no place."""
    query, support, distractors = roles.positions(records)
    of_layers = [
        _layer(passed, layer, records.row, query, support[:, None], distractors[:, None])
        for layer in range(model.n_layers)
    ]
    distinct = passed.distinct
    return HeadsAtQuery(
        query=query,
        last=at_prediction(records, distinct.stages[model.stages[-2]]),
        final=at_prediction(records, distinct.final),
        **{name: torch.stack([of[name] for of in of_layers], 1) for name in of_layers[0]},
    )


def _layer(
    passed: PairPass, layer: int, row: Tensor, query: Tensor, support: Tensor, distractors: Tensor
) -> dict[str, Tensor]:
    """Columns of one layer, `[pair, head, …]`; the masks are `Bool[pair, 1, position]`."""
    keys, values = passed.keys[layer], passed.values[layer]
    q = passed.distinct.queries[layer][row, :, query]
    scores = (keys @ q[..., None])[..., 0] / math.sqrt(q.shape[-1])
    after = torch.arange(scores.shape[-1], device=scores.device) > query[:, None, None]
    attention = scores.masked_fill(after, -math.inf).softmax(-1)
    of_support = attention * support
    alone = support.to(attention) / support.sum(-1, keepdim=True)
    return {
        "support_score": mean_over(support, scores),
        "distractor_score": mean_over(distractors, scores),
        "support_attention": mean_over(support, attention),
        "distractor_attention": mean_over(distractors, attention),
        "support_mass": of_support.sum(-1),
        "distractor_mass": (attention * distractors).sum(-1),
        "attended": _mix(attention, values),
        "attended_support": _mix(of_support, values),
        "support": _mix(alone.expand_as(attention), values),
    }


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """`Float[pair, head, position]` and `Float[pair, head, position, d_head]`: `Float[pair, head, d_head]`."""
    return (weights[..., None, :] @ values)[..., 0, :]


@dataclass(frozen=True)
class ConditionWrites(ParallelColumns):
    """What heads write under the four conditions: columns `[pair, layer, head, condition]`."""

    ov_map_value_margin: Tensor
    head_value_margin_dla: Tensor
    head_best_wrong_token: Tensor
    head_answer_logit_dla: Tensor
    head_margin_dla: Tensor


@dataclass(frozen=True)
class Answers:
    """What the model answers."""

    readout: Readout
    """`[pair]`."""
    candidate_logits: Tensor
    """`Float[pair, candidate]`: of every token that answers or competes in some pair."""


@torch.no_grad()
def condition_writes(
    model: Model, heads: HeadsAtQuery, choices: Choices, partner: Tensor
) -> tuple[ConditionWrites, Answers]:
    """Reads all pairs at once; `partner` is `Int[pair]`, the pair whose v̄ is a pair's ṽ.

    Raises CaptureError where the margin read off the last residual stage is not the model's own.
    """
    own = final_readout(model, heads.final, choices)
    gradient = readout_gradient(model, heads.last, choices, own)
    require_margin(gradient, own)
    shuffled = heads.support.index_select(0, partner)
    mixed = heads.attended - heads.attended_support + heads.support_mass[..., None] * shuffled
    outputs = torch.stack([heads.attended, heads.support, mixed, shuffled], 2)
    written = head_writes(OVReader(model, choices.candidates), outputs.unbind(1), choices, gradient)
    margin = written.answer_logit - written.best_wrong_logit
    writes = ConditionWrites(
        margin[..., _OV_MAP],
        margin,
        written.best_wrong_token,
        written.answer_logit,
        written.contributions[..., 0],
    )
    return writes, Answers(own, heads.final @ model.unembedding[choices.candidates].mT)

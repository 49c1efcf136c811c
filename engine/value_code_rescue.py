"""The model with the value code of one position taken away or replaced, everything later recomputed.

Axes: `event` the query events that are edited, `run` what is put in the code's place, `record` rows of a batch.
Source: definitions 4 §C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .forward import Interventions, Model
from .parallel_columns import ParallelColumns
from .readout import Choices, read_logits

# Tokens that go through the model at once, and logits that are made and reduced at once: what stays in a core's cache.
_TOKENS = 2048
_LOGITS = 1 << 19


@dataclass(frozen=True)
class Outcome(ParallelColumns):
    """The logits at the prediction position, reduced; `[event, run]`."""

    answer_logit: Tensor
    candidate_logits: Tensor
    """`Float[event, run, candidate]`."""
    answer_log_prob: Tensor
    best_token: Tensor


@dataclass(frozen=True)
class Edited:
    """Events of some records of one batch, whose target stage is edited at one position each, all together."""

    tokens: Tensor
    """`Int[record, position]`."""
    stage: Tensor
    """`Float[record, position, d_model]`: the target stage of the untouched run."""
    row: Tensor
    """`Int[event]`: record."""
    target: Tensor
    """`Int[event]`: position that is edited; no two events of a record share one."""
    prediction: Tensor
    """`Int[event]`: position whose logits answer."""


def is_pointwise(model: Model, stage: str) -> bool:
    """Whether no position reads another after this stage: the last attention stands before it."""
    return model.stages.index(stage) >= len(model.stages) - 3


def code_changes(basis: Tensor, own: Tensor, coordinates: Tensor) -> Tensor:
    """B (ẑ − z): what is added to h, so that h − B Bᵀ h + B ẑ stands there; `Float64[run, event, d_model]`.

    `basis` is B, `Float64[d_model, rank]`, `own` z = Bᵀ h, `Float64[event, rank]`, and `coordinates` ẑ, `Float64[run, event,
    rank]`, of which zeros take the code away.
    """
    return (coordinates - own) @ basis.mT


@torch.no_grad()
def rerun(model: Model, stage: str, edited: Edited, changes: Tensor) -> Tensor:
    """Final stage at the predictions, `Float[run, event, d_model]`; nothing before `stage` is computed.

    `changes` is `Float64[run, event, d_model]`, added to the target position of each event.
    """
    records, length, _ = edited.stage.shape
    at_once = max(1, _TOKENS // (records * length))
    # The sum is float64, which not every device has.
    target = edited.stage[edited.row, edited.target].cpu().double()
    found = []
    for start in range(0, len(changes), at_once):
        part = changes[start : start + at_once]
        runs = len(part)
        states = edited.stage.repeat(runs, 1, 1, 1)
        states[:, edited.row, edited.target] = (target + part.cpu()).float().to(states.device)
        first = torch.arange(runs, device=states.device)[:, None] * records
        places = (first + edited.row) * length + edited.prediction
        patch = Interventions(residual_patches={stage: states.flatten(0, 1)})
        passed = model.forward(edited.tokens.repeat(runs, 1), interventions=patch, places=places.flatten())
        found.append(passed.final.reshape(*places.shape, -1))
    return torch.cat(found)


@torch.no_grad()
def read_outcome(model: Model, final: Tensor, choices: Choices) -> Outcome:
    """Of the final stage, `Float[run, event, d_model]`: `[event, run]`."""
    runs, events, _ = final.shape
    size = max(1, _LOGITS // (model.vocabulary_size * runs))
    parts = []
    for start in range(0, events, size):
        part = slice(start, start + size)
        logits = final[:, part] @ model.unembedding.T
        candidates = choices.of(logits).clone()
        read = read_logits(logits, choices, part)
        columns = (read.answer_logit, candidates, read.answer_log_prob, read.best_token)
        parts.append(Outcome(*(column.transpose(0, 1) for column in columns)))
    return Outcome.join(parts)

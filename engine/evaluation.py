"""Losses and the metrics of an evaluation.

Source: definitions A.7 (loss, answer metrics) and C (evaluation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .config import BirthThresholds, CheckpointingConfig, EvaluationConfig
from .decoder import SymbolicKVDecoder
from .symbolic_kv.batches import TOKEN_ROLES, Batch, EncodedSplit, QueryEvents

QUERY_AXES = ("writes_since_support", "tokens_since_support", "slot_after_write")
"""Properties of a query event that answer accuracy is sliced by, beside the axes of its record."""

Metrics = dict[str, Any]
"""Metrics of one split, plain JSON values (not-a-number stays a float NaN)."""


def language_model_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and accuracy over every next-token target that is not padding, as 0-d tensors.

    `logits` is `Float[batch, position, vocabulary]`; position `t` predicts token `t + 1`. `<eos>` and answers
    count as any other target.
    """
    targets = batch.targets()
    predictions = logits[:, :-1]
    loss = functional.cross_entropy(predictions.flatten(0, 1), targets.flatten(), ignore_index=-100)
    correct = predictions.detach().argmax(dim=-1) == targets
    return loss, correct.sum() / (targets != -100).sum()


def answer_logits(logits: Tensor, events: QueryEvents) -> Tensor:
    """Logits `Float[event, vocabulary]` that predict the answers, of `Float[batch, position, vocabulary]`."""
    return logits[events.row, events.prediction_position]


def value_margin(at_prediction: Tensor, events: QueryEvents, value_ids: range) -> Tensor:
    """Answer logit minus the best other value's, `Float[event]`; keys and specials do not compete.

    `at_prediction` is `Float[event, vocabulary]`.
    """
    values = at_prediction[:, value_ids.start : value_ids.stop]
    answer = (events.answer_token - value_ids.start)[:, None]
    best_other = values.scatter(1, answer, -math.inf).amax(dim=1)
    return values.gather(1, answer)[:, 0] - best_other


@dataclass
class _Tallies:
    """What one pass over a split adds up: a value per batch, a count per role, an outcome per event."""

    losses: list[Tensor]
    token_accuracies: list[Tensor]
    role_counts: Tensor
    role_correct: Tensor
    answer_correct: list[Tensor]
    event_columns: dict[str, list[Tensor]]
    num_examples: int = 0


@torch.no_grad()
def evaluate_split(
    model: SymbolicKVDecoder,
    split: EncodedSplit,
    settings: EvaluationConfig,
    value_ids: range,
    analyse: bool = False,
) -> Metrics:
    """Metrics of one split, in file order, over at most `max_eval_batches` batches.

    `loss` and `token_accuracy` are unweighted means over batches, `answer_accuracy` pools the events,
    `token_role_accuracy` and `_fraction` split the targets by what they are, and `slice_accuracy` the events
    by the value of each axis. With `analyse`, `q`, `r` and `w` are added (see `analyse_split`).
    """
    was_training = model.training
    model.eval()
    try:
        tallies = _tally(model, split, settings)
        metrics = _summarize(tallies)
        if analyse:
            metrics |= analyse_split(model, split, settings, value_ids)
        return metrics
    finally:
        model.train(was_training)


def _tally(model: SymbolicKVDecoder, split: EncodedSplit, settings: EvaluationConfig) -> _Tallies:
    zeros = torch.zeros(len(TOKEN_ROLES), dtype=torch.long)
    tallies = _Tallies([], [], zeros, zeros.clone(), [], {axis: [] for axis in (*split.axes, *QUERY_AXES)})
    for batch in split.batches(settings.batch_size, settings.max_eval_batches):
        logits = model(batch.token_ids, batch.attention_mask)
        loss, accuracy = language_model_loss(logits, batch)
        tallies.losses.append(loss.cpu())
        tallies.token_accuracies.append(accuracy.cpu())
        _tally_roles(tallies, logits, batch)
        at_prediction = answer_logits(logits, batch.events)
        tallies.answer_correct.append((at_prediction.argmax(dim=-1) == batch.events.answer_token).cpu())
        record = batch.record_index[batch.events.row.cpu()]
        for axis, values in split.axes.items():
            tallies.event_columns[axis].append(values[record])
        for axis in QUERY_AXES:
            tallies.event_columns[axis].append(getattr(batch.events, axis).cpu())
        tallies.num_examples += len(batch)
    return tallies


def _tally_roles(tallies: _Tallies, logits: Tensor, batch: Batch) -> None:
    targets, roles = batch.targets().cpu(), batch.token_role[:, 1:].cpu()
    kept = targets != -100
    correct = logits[:, :-1].argmax(dim=-1).cpu() == targets
    tallies.role_counts += torch.bincount(roles[kept], minlength=len(TOKEN_ROLES))
    tallies.role_correct += torch.bincount(roles[kept & correct], minlength=len(TOKEN_ROLES))


def _summarize(tallies: _Tallies) -> Metrics:
    correct = torch.cat(tallies.answer_correct)
    counts, total = tallies.role_counts, int(tallies.role_counts.sum())
    role_accuracy = {
        role: int(tallies.role_correct[place]) / int(counts[place]) if counts[place] else None
        for place, role in enumerate(TOKEN_ROLES)
    }
    return {
        "loss": torch.stack(tallies.losses).double().mean().item(),
        "token_accuracy": torch.stack(tallies.token_accuracies).double().mean().item(),
        "answer_accuracy": correct.double().mean().item(),
        "num_examples": tallies.num_examples,
        "token_role_accuracy": role_accuracy,
        "token_role_fraction": {role: int(counts[place]) / total for place, role in enumerate(TOKEN_ROLES)},
        "write_key_accuracy": role_accuracy["key_write"],
        "read_key_accuracy": role_accuracy["key_read"],
        "write_value_accuracy": role_accuracy["value_write"],
        "slice_accuracy": {
            axis: _accuracy_by_value(torch.cat(columns), correct)
            for axis, columns in tallies.event_columns.items()
        },
    }


def _accuracy_by_value(values: Tensor, correct: Tensor) -> dict[str, float]:
    present, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    hits = torch.bincount(group, weights=correct.double(), minlength=len(present))
    return dict(zip(map(str, present.tolist()), (hits / counts).tolist(), strict=True))


def analyse_split(
    model: SymbolicKVDecoder, split: EncodedSplit, settings: EvaluationConfig, value_ids: range
) -> dict[str, float]:
    """Means over at most `max_analysis_batches` batches of three means over a batch's query events.

    `q`: largest attention of any head from the prediction position to the read key (which is that position
    itself); `r`: the same to the support value; `w`: the value margin, in logits.
    """
    rows: list[Tensor] = []
    for batch in split.batches(settings.batch_size, settings.max_analysis_batches):
        output = model.run(batch.token_ids, batch.attention_mask, return_attention=True)
        assert output.attention is not None
        events = batch.events
        prediction = events.prediction_position
        # Index arrays around a slice move the event axis to the front: Float[event, layer, head].
        to_read_key = output.attention[:, events.row, :, prediction, prediction]
        to_support = output.attention[:, events.row, :, prediction, events.support_value_position]
        margin = value_margin(answer_logits(output.logits, events), events, value_ids)
        columns = (to_read_key.amax(dim=(1, 2)), to_support.amax(dim=(1, 2)), margin)
        rows.append(torch.stack([column.double().mean() for column in columns]).cpu())
    q, r, w = torch.stack(rows).mean(dim=0).tolist()
    return {"q": q, "r": r, "w": w}


def formation_births(
    history: Sequence[tuple[int, Mapping[str, Metrics]]], thresholds: BirthThresholds
) -> dict[str, dict[str, int | None]]:
    """Per split and metric, the first step at which the metric reached its threshold; None if it never did.

    `history` holds `(step, metrics by split)` in step order. Metrics a split does not have are left out.
    """
    births: dict[str, dict[str, int | None]] = {}
    for step, evaluated in history:
        for split, metrics in evaluated.items():
            for name, threshold in thresholds.model_dump().items():
                if name in metrics:
                    born = births.setdefault(split, {}).setdefault(name, None)
                    if born is None and metrics[name] >= threshold:
                        births[split][name] = step
    return births


def is_better_checkpoint(
    candidate: Mapping[str, Metrics], best: Mapping[str, Metrics] | None, rule: CheckpointingConfig
) -> bool:
    """Whether an evaluation beats the best so far: better metric; at a tie the lower loss; else the earlier.

    A candidate whose metric is not a number never wins, and a best that is not a number always loses.
    """
    sign = 1.0 if rule.best_checkpoint_maximize else -1.0

    def rank(metrics: Metrics) -> tuple[float, float]:
        return sign * metrics[rule.best_checkpoint_metric], -metrics["loss"]

    new = rank(candidate[rule.best_checkpoint_split])
    if math.isnan(new[0]):
        return False
    if best is None:
        return True
    old = rank(best[rule.best_checkpoint_split])
    return math.isnan(old[0]) or new > old

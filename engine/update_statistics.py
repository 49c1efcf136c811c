"""Norms, products and cosines of one optimizer step, parameter by parameter.

Every number is a float64 sum over the float32 tensors of the step. The split of the update is `update_terms`'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .optimizer import AdamGroup, split_update

# Temporaries below 128 KiB stay in cache and in the allocator's arena; those of a whole matrix fault in fresh pages
# for every operation, which costs more than the arithmetic.
_PIECE = 15_000


@dataclass(frozen=True)
class ParameterStep:
    """What one step did to one parameter; tensors share the parameter's shape.

    `gradient` is raw, `applied` what the optimizer used; both are None when the parameter had no gradient. Moments
    are None for an optimizer without them. `step_count` is the optimizer's counter after the step.
    """

    weight_before: Tensor
    weight_after: Tensor
    gradient: Tensor | None
    applied: Tensor | None
    exp_avg_before: Tensor | None = None
    exp_avg_after: Tensor | None = None
    exp_avg_sq_before: Tensor | None = None
    exp_avg_sq_after: Tensor | None = None
    group: AdamGroup | None = None
    step_count: int = 0


Statistics = dict[str, float | int | bool | None]


_LENGTHS = {
    "weight_l2_before": "weight_before",
    "weight_l2": "weight_after",
    "delta_l2": "update",
    "gradient_l2": "gradient",
    "clipped_gradient_l2": "applied",
    "exp_avg_l2": "exp_avg_after",
    "exp_avg_sq_l2": "exp_avg_sq_after",
    "current_gradient_l2": "current_gradient",
    "momentum_l2": "momentum",
    "weight_decay_l2": "weight_decay",
    "residual_l2": "residual",
}
_PRODUCTS = {
    "update_dot_weight": ("update", "weight_before", 1),
    "update_dot_negative_gradient": ("update", "gradient", -1),
    "update_dot_negative_clipped_gradient": ("update", "applied", -1),
    "gradient_dot_weight": ("gradient", "weight_before", 1),
    "gradient_dot_exp_avg_before": ("applied", "exp_avg_before", 1),
    "current_gradient_dot_update": ("current_gradient", "update", 1),
    "momentum_dot_update": ("momentum", "update", 1),
    "weight_decay_dot_update": ("weight_decay", "update", 1),
    "residual_dot_update": ("residual", "update", 1),
}
_SUMS: dict[str, tuple[str, str, int]] = {
    **{name: (source, source, 1) for name, source in _LENGTHS.items()},
    **_PRODUCTS,
    # Needed for cosines, not columns of their own.
    "_exp_avg_before_l2": ("exp_avg_before", "exp_avg_before", 1),
    "_update_dot_exp_avg": ("update", "exp_avg_after", -1),
}


def parameter_statistics(step: ParameterStep) -> Statistics:
    """One row of `parameter_updates`, without its keys. Norms of NaN are NaN: a broken step is reported as it is.

    Cosines are None where a vector is zero or absent; the terms are None without an Adam group.
    """
    flat = _flattened(step)
    count = step.weight_before.numel()
    sums: dict[str, float] = {}
    maxima = {"delta_max_abs": 0.0, "gradient_max_abs": 0.0}
    nonfinite = 0
    for start in range(0, max(count, 1), _PIECE):
        piece = {name: tensor[start : start + _PIECE].to(torch.float64) for name, tensor in flat.items()}
        _add_terms(piece, step)
        _accumulate(sums, maxima, piece)
        if "gradient" in piece and not math.isfinite(sums["gradient_l2"] + sums["clipped_gradient_l2"]):
            nonfinite += int((~(piece["gradient"].isfinite() & piece["applied"].isfinite())).sum())
    row: Statistics = {name: math.sqrt(sums[name]) for name in _LENGTHS if name in sums}
    row.update({name: sums[name] for name in _PRODUCTS if name in sums})
    row.update({name: value for name, value in maxima.items() if name.split("_")[0] in ("delta", *flat)})
    row.update(
        numel=count,
        has_gradient=step.gradient is not None,
        optimizer_step=step.step_count,
        nonfinite_gradient_entries=nonfinite,
    )
    if step.group is not None and step.gradient is not None:
        rate = abs(step.group.learning_rate)
        row.update(
            raw_sgd_l2=rate * _number(row["gradient_l2"]),
            clipped_sgd_l2=rate * _number(row["clipped_gradient_l2"]),
        )
    return row | _cosines(row, sums)


def _flattened(step: ParameterStep) -> dict[str, Tensor]:
    named = {
        "weight_before": step.weight_before,
        "weight_after": step.weight_after,
        "gradient": step.gradient,
        "applied": step.applied,
        "exp_avg_before": step.exp_avg_before,
        "exp_avg_after": step.exp_avg_after,
        "exp_avg_sq_before": step.exp_avg_sq_before,
        "exp_avg_sq_after": step.exp_avg_sq_after,
    }
    return {name: tensor.detach().reshape(-1) for name, tensor in named.items() if tensor is not None}


def _add_terms(piece: dict[str, Tensor], step: ParameterStep) -> None:
    piece["update"] = piece["weight_after"] - piece["weight_before"]
    group = step.group
    if group is None or "gradient" not in piece:
        return
    terms = split_update(
        piece["weight_before"],
        piece["gradient"],
        piece.get("exp_avg_before"),
        piece.get("exp_avg_sq_before"),
        step=step.step_count,
        learning_rate=group.learning_rate,
        beta1=group.beta1,
        beta2=group.beta2,
        eps=group.eps,
        weight_decay=group.weight_decay,
        applied_gradient=piece["applied"],
        decoupled=group.decoupled,
        maximize=group.maximize,
        actual=piece["update"],
    )
    assert terms.residual is not None
    piece["current_gradient"] = terms.adam_current_gradient
    piece["momentum"] = terms.adam_historical_momentum
    piece["weight_decay"] = terms.weight_decay
    piece["residual"] = terms.residual


def _accumulate(sums: dict[str, float], maxima: dict[str, float], piece: dict[str, Tensor]) -> None:
    for name, (left, right, sign) in _SUMS.items():
        if left in piece and right in piece:
            sums[name] = sums.get(name, 0.0) + sign * float(torch.dot(piece[left], piece[right]))
    for name, source in (("delta_max_abs", "update"), ("gradient_max_abs", "gradient")):
        if source in piece and piece[source].numel():
            low, high = (float(end) for end in torch.aminmax(piece[source]))
            peak = max(-low, high)
            maxima[name] = (
                math.nan if math.isnan(low) or math.isnan(maxima[name]) else max(maxima[name], peak)
            )


def _cosines(row: Statistics, sums: dict[str, float]) -> Statistics:
    def cosine(product: object, left: object, right: object) -> float | None:
        if product is None or left is None or right is None or _number(left) * _number(right) == 0:
            return None
        value = _number(product) / (_number(left) * _number(right))
        return value if math.isnan(value) else max(-1.0, min(1.0, value))

    before = sums.get("_exp_avg_before_l2")
    delta = row["delta_l2"]
    return {
        "update_weight_cosine": cosine(row["update_dot_weight"], delta, row["weight_l2_before"]),
        "update_gradient_cosine": cosine(
            row.get("update_dot_negative_gradient"), delta, row.get("gradient_l2")
        ),
        "gradient_momentum_cosine": cosine(
            row.get("gradient_dot_exp_avg_before"),
            row.get("clipped_gradient_l2"),
            None if before is None else math.sqrt(before),
        ),
        "update_momentum_cosine": cosine(sums.get("_update_dot_exp_avg"), delta, row.get("exp_avg_l2")),
    }


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)

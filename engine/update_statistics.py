"""Norms, products and cosines of one optimizer step, parameter by parameter.

Every number is a float64 sum over the float32 tensors of the step. The split of the update is `update_terms`'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .optimizer import AdamGroup, split_update

# As few calls as possible, each below the 32,768 elements at which torch starts a second thread: the recorder measures
# beside a training that has its own use for every core.
_PIECE = 32_000


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
Array = np.ndarray[Any, np.dtype[Any]]


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
_TERMS = ("current_gradient", "momentum", "weight_decay", "residual")
_PEAKS = {"delta_max_abs": "update", "gradient_max_abs": "gradient"}
_SUMS: dict[str, tuple[str, str, int]] = {
    **{name: (source, source, 1) for name, source in _LENGTHS.items()},
    **_PRODUCTS,
    # Needed for cosines, not columns of their own.
    "_exp_avg_before_l2": ("exp_avg_before", "exp_avg_before", 1),
    "_update_dot_exp_avg": ("update", "exp_avg_after", -1),
}


def parameter_statistics(step: ParameterStep) -> Statistics:
    """`step_statistics` of a single parameter."""
    return step_statistics([step])[0]


def step_statistics(steps: Sequence[ParameterStep]) -> list[Statistics]:
    """Rows of `parameter_updates` without their keys, one per parameter of a step, in the order given.

    Norms of NaN are NaN: a broken step is reported as it is. Cosines are None where a vector is zero or absent; the
    terms are None without an Adam group. Parameters that share hyperparameters are measured end to end in one flat
    buffer, because a small model has more parameters than work.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, step in enumerate(steps):
        dtypes = tuple((name, tensor.dtype, tensor.device) for name, tensor in _tensors(step).items())
        alike.setdefault((step.group, step.step_count, dtypes), []).append(index)
    rows: list[Statistics] = [{} for _ in steps]
    for indices in alike.values():
        members = [steps[index] for index in indices]
        for index, row in zip(indices, _measure(members), strict=True):
            rows[index] = row
    return rows


def _tensors(step: ParameterStep) -> dict[str, Tensor]:
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
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _measure(members: Sequence[ParameterStep]) -> list[Statistics]:
    named = [_tensors(step) for step in members]
    flat = {name: torch.cat([of[name].detach().reshape(-1) for of in named]) for name in named[0]}
    sizes = np.array([step.weight_before.numel() for step in members])
    ends = np.cumsum(sizes)
    totals = {name: np.zeros(len(members)) for name in (*_SUMS, *_PEAKS, "nonfinite")}
    for start in range(0, int(ends[-1]), _PIECE):
        piece = {name: tensor[start : start + _PIECE].to(torch.float64) for name, tensor in flat.items()}
        _add_terms(piece, members[0])
        stop = start + len(piece["update"])
        # Parameters that have an element in this piece, and where in it the first of each lies.
        first = int(np.searchsorted(ends, start, side="right"))
        inside = [i for i in range(first, int(np.searchsorted(ends, stop - 1, side="right")) + 1) if sizes[i]]
        starts = np.maximum(ends[inside] - sizes[inside] - start, 0)
        _accumulate(totals, piece, np.array(inside), starts)
    present = {*flat, "update", *(_TERMS if members[0].group is not None and "gradient" in flat else ())}
    return [
        _row(step, {name: float(total[i]) for name, total in totals.items()}, present)
        for i, step in enumerate(members)
    ]


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


def _accumulate(totals: dict[str, Array], piece: dict[str, Tensor], inside: Array, starts: Array) -> None:
    arrays = {name: tensor.numpy(force=True) for name, tensor in piece.items()}
    stops = np.append(starts[1:], len(arrays["update"]))
    # A dot is one pass; a product and its segment sums are two, but one call for many short parameters.
    spans = list(zip(starts.tolist(), stops.tolist(), strict=True)) if len(starts) <= 4 else []
    for name, (left, right, sign) in _SUMS.items():
        if left in arrays and right in arrays:
            if spans:
                # torch's dot: NumPy's wakes OpenBLAS threads, which then spin beside the training they measure.
                sums = np.array([float(torch.dot(piece[left][i:j], piece[right][i:j])) for i, j in spans])
            else:
                sums = np.add.reduceat(arrays[left] * arrays[right], starts)
            totals[name][inside] += sign * sums
    for name, source in _PEAKS.items():
        if source in arrays:
            peak = np.maximum.reduceat(np.abs(arrays[source]), starts)  # NaN wins, as it should
            totals[name][inside] = np.maximum(totals[name][inside], peak)
    if "gradient" in arrays and not np.isfinite(totals["gradient_l2"] + totals["clipped_gradient_l2"]).all():
        broken = ~(np.isfinite(arrays["gradient"]) & np.isfinite(arrays["applied"]))
        totals["nonfinite"][inside] += np.add.reduceat(broken.astype(np.float64), starts)


def _row(step: ParameterStep, sums: dict[str, float], present: set[str]) -> Statistics:
    def known(source: tuple[str, str, int] | str) -> bool:
        return source in present if isinstance(source, str) else {source[0], source[1]} <= present

    row: Statistics = {name: math.sqrt(sums[name]) for name, source in _LENGTHS.items() if known(source)}
    row.update({name: sums[name] for name, source in _PRODUCTS.items() if known(source)})
    row.update({name: sums[name] for name, source in _PEAKS.items() if known(source)})
    row.update(
        numel=step.weight_before.numel(),
        has_gradient=step.gradient is not None,
        optimizer_step=step.step_count,
        nonfinite_gradient_entries=int(sums["nonfinite"]),
    )
    if step.group is not None and step.gradient is not None:
        rate = abs(step.group.learning_rate)
        row.update(
            raw_sgd_l2=rate * _number(row["gradient_l2"]),
            clipped_sgd_l2=rate * _number(row["clipped_gradient_l2"]),
        )
    return row | _cosines(row, {name: sums[name] for name, source in _SUMS.items() if known(source)})


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

"""Norms, products and cosines of one optimizer step, parameter by parameter.

Every number is a float64 sum over the tensors of the step, taken by `step_sums`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .optimizer import AdamGroup
from .step_sums import INPUTS, PRODUCTS, SQUARES, Array, step_peaks, step_sums


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
_COSINES = {
    "update_weight_cosine": ("update", "weight_before", 1),
    "update_gradient_cosine": ("update", "gradient", -1),
    "gradient_momentum_cosine": ("applied", "exp_avg_before", 1),
    "update_momentum_cosine": ("update", "exp_avg_after", -1),
}
_TERMS = ("current_gradient", "momentum", "weight_decay", "residual")
Products = dict[tuple[str, str], float]


def parameter_statistics(step: ParameterStep) -> Statistics:
    """One row of `parameter_updates`, without its keys.

    Norms of NaN are NaN: a broken step is reported as it is. Cosines are None where a vector is zero or absent; the
    terms are left out without an Adam group.
    """
    tensors = _tensors(step)
    arrays = _arrays(tensors)
    group = step.group if "gradient" in tensors else None
    sums = step_sums(
        tuple(arrays[name] for name in INPUTS),
        step=max(1, step.step_count),
        # Without a group every term is zero, and none is reported.
        learning_rate=group.learning_rate if group else 0.0,
        beta1=group.beta1 if group else 0.0,
        beta2=group.beta2 if group else 0.0,
        eps=group.eps if group else 1.0,
        decay=group.weight_decay if group else 0.0,
        decoupled=group.decoupled if group else True,
        sign=-1.0 if group and group.maximize else 1.0,
    )
    present = {*tensors, "update", *(_TERMS if group else ())}
    products = {
        key: value
        for key, value in zip((*((name, name) for name in SQUARES), *PRODUCTS), sums, strict=True)
        if present.issuperset(key)
    }
    row: Statistics = {
        "numel": step.weight_before.numel(),
        "has_gradient": step.gradient is not None,
        "optimizer_step": step.step_count,
        "nonfinite_gradient_entries": _nonfinite(step, products),
    }
    row.update({n: math.sqrt(products[of, of]) for n, of in _LENGTHS.items() if of in present})
    row.update(
        {n: sign * products[of, to] for n, (of, to, sign) in _PRODUCTS.items() if (of, to) in products}
    )
    row.update({name: _cosine(products, *of) for name, of in _COSINES.items()})
    row["delta_max_abs"], largest = _peaks(arrays, products)
    if "gradient" in present:
        row["gradient_max_abs"] = largest
    if group:
        rate = abs(group.learning_rate)
        row["raw_sgd_l2"] = rate * math.sqrt(products["gradient", "gradient"])
        row["clipped_sgd_l2"] = rate * math.sqrt(products["applied", "applied"])
    return row


def _tensors(step: ParameterStep) -> dict[str, Tensor]:
    named = {name: getattr(step, name) for name in INPUTS}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Every input as Float[elements] of one dtype, so that the sums are compiled for two and no more; absent ones are 0."""
    single = all(tensor.dtype.itemsize <= 4 for tensor in tensors.values())
    dtype = torch.float32 if single else torch.float64
    arrays: dict[str, Array] = {
        name: tensor.detach().to(dtype).contiguous().reshape(-1).numpy(force=True)
        for name, tensor in tensors.items()
    }
    absent = [name for name in INPUTS if name not in arrays]
    if absent:
        arrays.update(dict.fromkeys(absent, np.zeros_like(arrays["weight_before"])))
    return arrays


def _peaks(arrays: Mapping[str, Array], products: Products) -> tuple[float, float]:
    whole = [arrays[name] for name in ("weight_before", "weight_after", "gradient")]
    if math.isfinite(products["update", "update"] + products.get(("gradient", "gradient"), 0.0)):
        update, gradient = step_peaks(*whole)
        return float(update), float(gradient)
    before, after, gradients = (array.astype(np.float64) for array in whole)
    # NaN wins, as it should.
    return float(np.abs(after - before).max()), float(np.abs(gradients).max())


def _nonfinite(step: ParameterStep, products: Products) -> int:
    if step.gradient is None or step.applied is None:
        return 0
    # A sum of squares is finite where every entry is, unless it overflowed: only then are they counted.
    if math.isfinite(products["gradient", "gradient"] + products["applied", "applied"]):
        return 0
    return int((~(step.gradient.isfinite() & step.applied.isfinite())).sum())


def _cosine(products: Products, left: str, right: str, sign: int) -> float | None:
    if (left, right) not in products:
        return None
    scale = math.sqrt(products[left, left]) * math.sqrt(products[right, right])
    if scale == 0:
        return None
    value = sign * products[left, right] / scale
    return value if math.isnan(value) else max(-1.0, min(1.0, value))

"""One Adam or AdamW update, split into the terms it is a sum of.

Sources: Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (AdamW, decoupled weight decay).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Scalar = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class UpdateTerms:
    """The terms of one update θ' − θ, each shaped like the parameter (or Float[step, *parameter]).

    ``adam_current_gradient + adam_historical_momentum = adam_preconditioned`` and ``adam_preconditioned +
    weight_decay = reconstructed``; ``residual = actual − reconstructed`` is the float32 rounding of the real
    update, None when no actual update was given. ``raw_sgd`` and ``clipped_sgd`` stand beside the sum, not
    in it: what plain SGD at the same learning rate would do.
    """

    raw_sgd: Tensor
    clipped_sgd: Tensor
    adam_current_gradient: Tensor
    adam_historical_momentum: Tensor
    adam_preconditioned: Tensor
    weight_decay: Tensor
    reconstructed: Tensor
    residual: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The terms by name, without the residual when there is none."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: term for name, term in named.items() if term is not None}


def split_update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    step: Scalar,
    learning_rate: Scalar,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    clip_coefficient: Scalar = 1.0,
    applied_gradient: Tensor | None = None,
    decoupled: bool = True,
    maximize: bool = False,
    actual: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> UpdateTerms:
    """Split one Adam(W) update exactly into its terms: arithmetic, not a counterfactual.

    The terms say what the update *is the sum of*, not what would have happened without one of them: both
    Adam terms are divided by the same new denominator, which contains the current gradient, and the momentum
    is made of gradients that earlier weights caused.

    ``weight``, ``exp_avg`` (m), ``exp_avg_sq`` (v) are the values before the update and ``gradient`` (g) the
    gradient before clipping: Float[*parameter], or Float[step, *parameter] for many steps at once, in which
    case a one-dimensional hyperparameter has one value per step. m = v = None before a parameter's first
    update. ``step`` (k) counts this update, from 1. ``applied_gradient`` replaces g·clip_coefficient where
    no scalar explains the clipping. Everything is computed in ``dtype``.

        gc = clip_coefficient · g          m' = β1 m + (1 − β1) gc       v' = β2 v + (1 − β2) gc²
        den = sqrt(v') / sqrt(1 − β2^k) + eps                            rate = learning_rate / (1 − β1^k)
        raw_sgd = −learning_rate g         clipped_sgd = −learning_rate gc
        adam_current_gradient = −rate (1 − β1) gc / den      adam_historical_momentum = −rate β1 m / den
        weight_decay = −learning_rate λ θ  (AdamW, decoupled)

    With Adam's coupled L2 decay (``decoupled=False``) λθ joins the gradient and so enters m' and v'. The
    first moment is linear in it, so its share of this step is split off: ``weight_decay = −rate (1 − β1) λθ
    / den``. The decay of earlier steps is inside m and stays with the historical momentum, and v' contains
    (gc + λθ)².

    Raises ValueError if shapes disagree, or a per-step hyperparameter does not have one value per step.
    """
    for name, tensor in {
        "gradient": gradient,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "actual": actual,
    }.items():
        if tensor is not None and tensor.shape != weight.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the weight {tuple(weight.shape)}")

    def wide(value: Scalar) -> float | Tensor:
        return _per_step(value, weight, dtype)

    k, rate, b1, b2, decay = wide(step), wide(learning_rate), wide(beta1), wide(beta2), wide(weight_decay)
    theta = weight.to(dtype)
    raw = gradient.to(dtype)
    clipped = raw * wide(clip_coefficient) if applied_gradient is None else applied_gradient.to(dtype)
    if maximize:
        raw, clipped = -raw, -clipped
    m = torch.zeros_like(theta) if exp_avg is None else exp_avg.to(dtype)
    v = torch.zeros_like(theta) if exp_avg_sq is None else exp_avg_sq.to(dtype)

    seen = clipped if decoupled else clipped + decay * theta
    second_moment = b2 * v + (1 - b2) * (seen * seen)
    denominator = second_moment.sqrt_().div_((1 - b2**k) ** 0.5).add_(wide(eps))
    scale = (-rate / (1 - b1**k)) / denominator
    current, historical = (scale * clipped).mul_(1 - b1), (scale * m).mul_(b1)
    preconditioned = current + historical
    decayed = (-rate * decay) * theta if decoupled else (scale * theta).mul_((1 - b1) * decay)
    reconstructed = preconditioned + decayed
    return UpdateTerms(
        raw_sgd=-rate * raw,
        clipped_sgd=-rate * clipped,
        adam_current_gradient=current,
        adam_historical_momentum=historical,
        adam_preconditioned=preconditioned,
        weight_decay=decayed,
        reconstructed=reconstructed,
        residual=None if actual is None else actual.to(dtype) - reconstructed,
    )


def _per_step(value: Scalar, weight: Tensor, dtype: torch.dtype) -> float | Tensor:
    """A scalar as it is; one value per step shaped to broadcast along the weight's leading step axis."""
    if isinstance(value, float | int):
        return float(value)
    tensor = torch.as_tensor(value, dtype=dtype, device=weight.device)
    if tensor.ndim == 0:
        return tensor
    if tensor.ndim != 1 or weight.ndim == 0 or tensor.shape[0] != weight.shape[0]:
        raise ValueError(
            f"expected one value or one per step of {tuple(weight.shape)}, got {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1, *(1,) * (weight.ndim - 1))

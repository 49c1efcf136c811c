"""The fields of one Adam(W) update: its state, the terms it is a sum of, and what it did (definitions 3, D and I).

The split is arithmetic, not a counterfactual. Sources: Kingma & Ba 2015, Loshchilov & Hutter 2019 (decoupled decay).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

STATE_FIELDS = ("weight", "exp_avg", "bias_corrected_exp_avg", "sqrt_exp_avg_sq", "adam_denominator")
UPDATE_FIELDS = (
    "raw_sgd",
    "clipped_sgd",
    "adam_current_gradient",
    "adam_historical_momentum",
    "adam_preconditioned",
    "weight_decay",
    "reconstructed_adamw_update",
    "actual_parameter_delta",
    "reconstruction_error",
)
FIELDS = (*STATE_FIELDS, *UPDATE_FIELDS)
ACTUAL = "actual_parameter_delta"


@dataclass(frozen=True)
class Hyperparameters:
    """Of n updates of one parameter each, Float64[n]: of its group, with the clip coefficient and its step counter.

    `step_count` counts this update, from 1. Where `stepped` is 0 the optimizer skipped the parameter.
    """

    # Fields of a parameter group, as table training_steps names them.
    OF_GROUP: ClassVar = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize")

    learning_rate: Floats
    beta1: Floats
    beta2: Floats
    eps: Floats
    weight_decay: Floats
    decoupled: Floats
    maximize: Floats
    clip_coefficient: Floats
    step_count: Floats
    stepped: Floats

    def take(self, places: Any) -> Hyperparameters:
        """Those at an index of every array."""
        return Hyperparameters(*(getattr(self, field.name)[places] for field in fields(self)))

    @classmethod
    def stacked(cls, several: Sequence[Hyperparameters]) -> Hyperparameters:
        """Float64[p, n] of p parameters."""
        return cls(*(np.stack([getattr(one, field.name) for one in several]) for field in fields(cls)))

    @property
    def rate(self) -> Floats:
        """Learning rate; 0 where the parameter was skipped, so that every term is."""
        return self.learning_rate * self.stepped

    @property
    def momentum_correction(self) -> Floats:
        """1 / (1 − β1^t) of the t updates before this one; 0 when there were none, as m is."""
        before = self.step_count - self.stepped
        with np.errstate(divide="ignore"):
            return np.where(before > 0, 1 / (1 - self.beta1**before), 0.0)


def multiples(own: Hyperparameters, other: Hyperparameters | None = None) -> dict[str, tuple[str, Floats]]:
    """Fields that are a multiple of another: field -> (the other, Float64[n]), so that one decomposition serves both.

    With `other` for the first-order field of a product, whose second factor is updated by it.
    """
    found = {"clipped_sgd": ("raw_sgd", own.clip_coefficient)}
    correction = own.momentum_correction
    if other is None or np.array_equal(correction, other.momentum_correction):
        found["bias_corrected_exp_avg"] = ("exp_avg", correction)
    parts = [own] if other is None else [own, other]
    if all(part.decoupled.all() for part in parts):
        # d(AᵀB) with dA = aA and dB = bB is (a + b) AᵀB.
        found["weight_decay"] = ("weight", np.sum([-part.rate * part.weight_decay for part in parts], axis=0))
    return found


def update_fields(
    weight: Floats,
    target: Floats,
    gradient: Floats,
    exp_avg: Floats,
    exp_avg_sq: Floats,
    of: Hyperparameters,
) -> dict[str, Floats]:
    """Every field by name, each Float64[n, rows, columns] as the arguments are.

    θ, m, v at the source step and g there, before clipping; `target` is θ after the update. With k = step_count:

        gc = clip_coefficient · g      m' = β1 m + (1 − β1) gc      v' = β2 v + (1 − β2) gc²
        den = sqrt(v') / sqrt(1 − β2^k) + eps                       rate = learning_rate / (1 − β1^k)
        adam_current_gradient = −rate (1 − β1) gc / den             adam_historical_momentum = −rate β1 m / den
        weight_decay = −learning_rate λ θ                           reconstruction_error = reconstructed − (θ' − θ)

    `adam_denominator` is that of the state before the update, sqrt(v / (1 − β2^(k−1))) + eps, not `den`. With Adam's
    coupled decay λθ joins gc in m' and v', and its share of m' is the decay term.
    """

    def each(value: Floats) -> Floats:
        return value[:, None, None]

    beta1, beta2, eps, decay = each(of.beta1), each(of.beta2), each(of.eps), each(of.weight_decay)
    rate, before = each(of.rate), of.step_count - of.stepped
    decoupled = each(of.decoupled) > 0
    raw = np.where(each(of.stepped) > 0, gradient, 0.0) * np.where(each(of.maximize) > 0, -1.0, 1.0)
    clipped = each(of.clip_coefficient) * raw
    decaying = decay * weight
    seen = clipped if decoupled.all() else np.where(decoupled, clipped, clipped + decaying)

    denominator = np.sqrt(beta2 * exp_avg_sq + (1 - beta2) * seen**2)
    denominator /= np.sqrt(1 - beta2 ** each(np.maximum(of.step_count, 1)))
    denominator += eps
    scale = -rate / (1 - beta1 ** each(np.maximum(of.step_count, 1))) / denominator
    current, momentum = scale * (1 - beta1) * clipped, scale * beta1 * exp_avg
    preconditioned = current + momentum
    decayed = -rate * decaying
    if not decoupled.all():
        decayed = np.where(decoupled, decayed, scale * (1 - beta1) * decaying)
    reconstructed = preconditioned + decayed
    actual = target - weight

    root = np.sqrt(exp_avg_sq)
    corrected = np.sqrt(1 - of.beta2**before)
    return {
        "weight": weight,
        "exp_avg": exp_avg,
        "bias_corrected_exp_avg": each(of.momentum_correction) * exp_avg,
        "sqrt_exp_avg_sq": root,
        "adam_denominator": root * each(np.where(before > 0, 1 / np.where(before > 0, corrected, 1.0), 0.0))
        + eps,
        "raw_sgd": -rate * raw,
        "clipped_sgd": -rate * clipped,
        "adam_current_gradient": current,
        "adam_historical_momentum": momentum,
        "adam_preconditioned": preconditioned,
        "weight_decay": decayed,
        "reconstructed_adamw_update": reconstructed,
        "actual_parameter_delta": actual,
        "reconstruction_error": reconstructed - actual,
    }


__all__ = [
    "ACTUAL",
    "FIELDS",
    "STATE_FIELDS",
    "UPDATE_FIELDS",
    "Hyperparameters",
    "multiples",
    "update_fields",
]

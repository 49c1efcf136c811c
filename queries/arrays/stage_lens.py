"""Reading vectors as the model's last stage would be read: final LayerNorm, unembedding, the values that compete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .groups import group_by_token

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class StageLens:
    """U·LN_f(x) for some tokens: their rows of the unembedding Float64[v, d], LN_f's gain and bias Float64[d], epsilon."""

    unembedding: NDArray[np.float64]
    gain: NDArray[np.float64]
    bias: NDArray[np.float64]
    epsilon: float

    def logits(self, vectors: NDArray[np.float64], normalized: bool) -> NDArray[np.float64]:
        """Float64[n, d] -> Float64[n, v]; vectors of stage final_norm are `normalized` already."""
        if normalized:
            return vectors @ self.unembedding.T
        centered = vectors - vectors.mean(1, keepdims=True)
        variance = np.einsum("nd,nd->n", centered, centered) / vectors.shape[1]
        # Gain and scale are taken in where there is less of them: in the few tokens, and after the product.
        read: NDArray[np.float64] = centered @ (self.unembedding * self.gain).T
        read /= np.sqrt(variance + self.epsilon)[:, None]
        read += self.unembedding @ self.bias
        return read


@dataclass(frozen=True)
class Candidates:
    """Which tokens compete for each of n events.

    `tokens` Int64[v] ascending are those of any event; `allowed` Bool[n, v] those of each; `answers` Int64[n] is the
    place of the right one among `tokens`.
    """

    tokens: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    answers: NDArray[np.int64]

    @classmethod
    def of(
        cls, answers: NDArray[np.int64], competitors: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> Candidates:
        """From each event's answer Int64[n] and its competitors, the answer not among them: `counts` Int64[n] of them,
        one event after the other."""
        events = np.arange(len(answers))
        tokens = group_by_token(np.concatenate([answers, competitors])).tokens
        places = np.searchsorted(tokens, answers)
        allowed = np.zeros((len(answers), len(tokens)), np.bool_)
        allowed[np.repeat(events, counts), np.searchsorted(tokens, competitors)] = True
        allowed[events, places] = True
        return cls(tokens, allowed, places)

    def take(self, events: NDArray[np.int64]) -> Candidates:
        """Those of some of the events."""
        return Candidates(self.tokens, self.allowed[events], self.answers[events])


@dataclass(frozen=True)
class ValueMetrics:
    """Definitions 4 §0.5, per event: Float64[n], and the Int64[n] token with the largest logit (tie: the smallest id)."""

    correct_logit: NDArray[np.float64]
    best_wrong_logit: NDArray[np.float64]
    margin: NDArray[np.float64]
    best_token: NDArray[np.int64]
    accuracy: NDArray[np.float64]


def value_metrics(logits: NDArray[np.float64], candidates: Candidates) -> ValueMetrics:
    """Value metrics of logits Float64[n, v] over the candidate tokens."""
    rows = np.arange(len(logits))
    competing = np.where(candidates.allowed, logits, -np.inf)
    correct = competing[rows, candidates.answers]
    best = competing.argmax(1)
    competing[rows, candidates.answers] = -np.inf
    wrong = competing.max(1)
    return ValueMetrics(
        correct,
        wrong,
        correct - wrong,
        candidates.tokens[best],
        (best == candidates.answers).astype(np.float64),
    )

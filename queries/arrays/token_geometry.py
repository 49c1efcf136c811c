"""Directions of the residual stream against the token embedding (definitions 2 §A1, §B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..report import ReportFailed
from .subspaces import STORED_EPSILON

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenSubspace:
    """What tells the tokens of a class apart: `basis` Float64[d, r] orthonormal, `singular_values` Float64[r] descending.

    r is the numerical rank: singular values above σ₁·max(tokens, d)·ε, ε of float32.
    """

    basis: NDArray[np.float64]
    singular_values: NDArray[np.float64]
    num_tokens: int

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.basis.shape[1])


def token_subspace(embedding: NDArray[np.float64], what: str) -> TokenSubspace:
    """Right singular vectors of the rows Float64[tokens, d] minus their mean, at full numerical rank.

    Raises ReportFailed for fewer than two tokens, or tokens that are all alike; `what` names them ("key tokens").
    """
    tokens, width = embedding.shape
    if tokens < 2:
        raise ReportFailed(
            f"the identity subspace of the {what} needs at least two of them, there is {tokens}"
        )
    _, values, right = np.linalg.svd(embedding - embedding.mean(0), full_matrices=False)
    rank = int((values > values[0] * max(tokens, width) * STORED_EPSILON).sum())
    if rank == 0:
        raise ReportFailed(f"the embeddings of the {what} are all alike: their identity subspace has rank 0")
    return TokenSubspace(np.ascontiguousarray(right[:rank].T), values[:rank].copy(), tokens)


def subspace_alignment(directions: NDArray[np.float64], subspace: TokenSubspace) -> NDArray[np.float64]:
    """‖BBᵀu‖/‖u‖ of Float64[…, d] -> Float64[…], between 0 and 1."""
    inside = np.linalg.norm(directions @ subspace.basis, axis=-1)
    aligned: NDArray[np.float64] = inside / np.linalg.norm(directions, axis=-1)
    return aligned


def top_tokens(
    directions: NDArray[np.float64], embedding: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The `count` tokens with the largest |E·u|, descending: (token ids, E·u with its sign), Int64 and Float64[…, count].

    `directions` Float64[…, d], `embedding` Float64[vocabulary, d]. Fewer where the vocabulary is smaller.
    """
    scores = directions @ embedding.T
    count = min(count, scores.shape[-1])
    chosen = np.argpartition(-np.abs(scores), count - 1, axis=-1)[..., :count]
    signed = np.take_along_axis(scores, chosen, -1)
    order = np.argsort(-np.abs(signed), axis=-1, kind="stable")
    return np.take_along_axis(chosen, order, -1), np.take_along_axis(signed, order, -1)

"""Directions and subspaces of a set of vectors, and of a head's QK form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..report import ReportFailed
from .groups import Groups, group_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Stored vectors are float32; a rank counts what stands above the rounding of that, not of our float64.
STORED_EPSILON = float(np.finfo(np.float32).eps)
# A mean this much shorter than what it is the mean of is zero but for rounding.
NO_LENGTH = 1e-14


@dataclass(frozen=True)
class PrincipalDirections:
    """`basis` Float64[d, r] orthonormal, `singular_values` Float64[r] descending, numerical `centered_rank`.

    `variance_share` is the share of all squared singular values that these r hold.
    """

    basis: NDArray[np.float64]
    singular_values: NDArray[np.float64]
    centered_rank: int
    variance_share: float


@dataclass(frozen=True)
class IdentitySubspace:
    """What the vectors of a role share and what tells their tokens apart (definitions 4 §0.7, 1 §J.2).

    `mean_direction` Float64[d]; `identity`: principal directions of the tokens' mean vectors, each token weighing
    the same; `all_vectors`: those of all vectors.
    """

    mean_direction: NDArray[np.float64]
    identity: PrincipalDirections
    all_vectors: PrincipalDirections


def principal_directions(vectors: NDArray[np.float64], rank: int, what: str) -> PrincipalDirections:
    """Top `rank` right singular vectors of the rows minus their mean, Float64[n, d].

    The numerical rank is the number of singular values above σ₁·max(n, d)·ε (the usual matrix-rank tolerance, ε of
    float32). Raises ReportFailed, naming the largest rank that can be taken, for fewer than rank + 1 rows or a numerical
    rank below `rank`; `what` says what the rows are.
    """
    rows, width = vectors.shape
    if rank < 1:
        raise ReportFailed(f"the PCA rank must be at least 1, not {rank}")
    if rows < rank + 1:
        raise ReportFailed(
            f"PCA rank {rank} needs at least {rank + 1} {what}, there are {rows}; {_at_most(rows - 1)}"
        )
    centered = vectors - vectors.mean(0)
    values, basis = _right_singular(centered, rank)
    found = int((values > values[0] * max(rows, width) * STORED_EPSILON).sum())
    if found < rank:
        raise ReportFailed(
            f"PCA rank {rank} exceeds the numerical rank {found} of the centred {what}; {_at_most(found)}"
        )
    squares = np.square(values)
    share = min(1.0, float(squares[:rank].sum() / squares.sum()))
    return PrincipalDirections(np.ascontiguousarray(basis), values[:rank].copy(), found, share)


def _right_singular(
    centered: NDArray[np.float64], rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All singular values of Float64[n, d], descending, and the first `rank` right singular vectors Float64[d, rank]."""
    wide = len(centered) <= centered.shape[1]
    # CᵀC or CCᵀ is quicker by half, and as good where the singular values asked for are not small beside the first.
    squares, vectors = np.linalg.eigh(centered @ centered.T if wide else centered.T @ centered)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    if values[min(rank, len(values)) - 1] > 1e-3 * values[0]:
        first = vectors[:, ::-1][:, :rank]
        return values, centered.T @ (first / values[:rank]) if wide else first
    _, values, right = np.linalg.svd(
        centered if wide else np.linalg.qr(centered, mode="r"), full_matrices=False
    )
    return values, right[:rank].T


def _at_most(limit: int) -> str:
    return f"take at most {limit}" if limit > 0 else "there is nothing to decompose"


def mean_direction(vectors: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    """Unit mean of the rows, Float64[n, d] -> Float64[d]; raises ReportFailed where the mean is zero."""
    mean = vectors.mean(0)
    length = float(np.linalg.norm(mean))
    if length <= NO_LENGTH * float(row_lengths(vectors).mean()):
        raise ReportFailed(f"the mean of the {what} is the zero vector, which has no direction")
    direction: NDArray[np.float64] = mean / length
    return direction


def identity_subspace(vectors: NDArray[np.float64], groups: Groups, rank: int, what: str) -> IdentitySubspace:
    """Mean direction, identity basis and all-vector basis of Float64[n, d]; `what` names them ("role prediction").

    Raises ReportFailed as `mean_direction` and `principal_directions` do.
    """
    return IdentitySubspace(
        mean_direction(vectors, f"vectors of {what}"),
        principal_directions(group_means(vectors, groups), rank, f"token means of {what}"),
        principal_directions(vectors, rank, f"vectors of {what}"),
    )


def row_lengths(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length of each row, Float64[n, d] -> Float64[n]; np.linalg.norm would hold their squares."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return lengths


def overlap(directions: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖Bᵀu‖ (a norm, not squared) of Float64[…, d] with an orthonormal Float64[d, r] -> Float64[…], 0 to 1 for unit u."""
    lengths: NDArray[np.float64] = np.linalg.norm(directions @ basis, axis=-1)
    return lengths


def qk_bases(left: NDArray[np.float64], right: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Bases Float64[d, …] of a head's first r singular directions, given as rows Float64[r, d] of either side.

    `qk_left` and `qk_right` are the directions themselves; `qk_both` is an orthonormal basis of all of them (left
    singular vectors of [U V]), as wide as their numerical rank, at most 2r.
    """
    both, values, _ = np.linalg.svd(np.concatenate([left, right]).T, full_matrices=False)
    width = int((values > values[0] * max(left.shape[1], 2 * len(left)) * STORED_EPSILON).sum())
    return {"qk_left": left.T, "qk_right": right.T, "qk_both": both[:, :width]}


def match_directions(
    previous: tuple[NDArray[np.float64], NDArray[np.float64]],
    current: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which direction each one was a step before: (index Int64[k] into the previous ones, |cos| Float64[k]).

    Both are (left, right) rows Float64[k, d]. Their likeness |u·u'|·|v·v'| is the |cosine| of the rank-one matrices
    u vᵀ, so it needs no signs. Pairs are taken from the most alike down, each direction once (a greedy assignment).
    """
    alike = np.abs(current[0] @ previous[0].T) * np.abs(current[1] @ previous[1].T)
    count, held = alike.shape
    index, likeness = np.full(count, -1, np.int64), np.full(count, np.nan)
    remaining = alike.copy()
    for _ in range(min(count, held)):
        row, column = divmod(int(remaining.argmax()), held)
        index[row], likeness[row] = column, alike[row, column]
        remaining[row, :] = remaining[:, column] = -1.0
    return index, likeness

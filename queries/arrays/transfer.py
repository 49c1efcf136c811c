"""Affine maps between coordinates, fitted with a ridge (definitions 4 §B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..report import ReportFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class AffineMap:
    """ẑ = (a − ā) W + z̄: `weights` Float64[p, q], `source_mean` Float64[p], `target_mean` Float64[q]."""

    weights: NDArray[np.float64]
    source_mean: NDArray[np.float64]
    target_mean: NDArray[np.float64]

    def __call__(self, source: NDArray[np.float64]) -> NDArray[np.float64]:
        """Float64[n, p] -> Float64[n, q]."""
        return (source - self.source_mean) @ self.weights + self.target_mean


def ridge_map(source: NDArray[np.float64], target: NDArray[np.float64], ridge: float, what: str) -> AffineMap:
    """W = (AᵀA + λI)⁻¹ AᵀZ of the centred rows Float64[n, p] and Float64[n, q]; the offset is not penalized.

    λ is absolute, not scaled by n. Raises ReportFailed where AᵀA + λI is singular, or n does not exceed p and q.
    """
    rows, width = source.shape
    largest = max(width, target.shape[1])
    if rows <= largest:
        raise ReportFailed(
            f"{what} has {rows} fit examples for {largest} coordinates; it needs more examples than coordinates: "
            "raise --fit-fraction or --max-records, or lower --basis-rank"
        )
    source_mean, target_mean = source.mean(0), target.mean(0)
    a, z = source - source_mean, target - target_mean
    try:
        weights = np.linalg.solve(a.T @ a + ridge * np.eye(width), a.T @ z)
    except np.linalg.LinAlgError:
        raise ReportFailed(
            f"{what}: the fit is singular with --ridge-lambda {ridge:g}; give a positive one"
        ) from None
    return AffineMap(weights, source_mean, target_mean)


def random_basis(width: int, rank: int, seed: int) -> NDArray[np.float64]:
    """Orthonormal Float64[width, rank]: Q of the QR of a seeded standard-normal matrix."""
    if rank > width:
        raise ReportFailed(f"--basis-rank {rank} exceeds the {width} dimensions of the residual stream")
    drawn = np.random.default_rng(seed).standard_normal((width, rank))
    basis: NDArray[np.float64] = np.linalg.qr(drawn)[0]
    return basis


def row_cosines(left: NDArray[np.float64], right: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    """Cosine of each row of Float64[n, d] with the same row of the other; raises ReportFailed for a zero row."""
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    if (lengths == 0).any():
        raise ReportFailed(f"{what}: a vector is zero and has no direction")
    cosines: NDArray[np.float64] = np.clip(np.einsum("nd,nd->n", left, right) / lengths, -1.0, 1.0)
    return cosines

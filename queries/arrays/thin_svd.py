"""Full spectra and first singular vectors of many small matrices at once, and of products of thin factors.

The counterpart, without torch, of what dataset svd is made with; products are never formed to be decomposed (Golub & Van
Loan, Matrix Computations, 4th ed., §8.6). Float64, descending.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# λ of MMᵀ carry an error of about ε λ₁, so σ = √λ one of ε σ₁² / σ: 1e-12 σ₁ at this share of σ₁.
_WELL_ABOVE = 1e-4
# Squares of what is smaller lose digits, or vanish.
_NO_SQUARES = 1e-140


@dataclass(frozen=True)
class Spectra:
    """`values` Float64[n, k], every singular value; `left` Float64[n, t, rows], `right` Float64[n, t, columns], the first t.

    Left and right vectors of a rank share one sign: the largest entry of the left one, in size, is positive.
    """

    values: Floats
    left: Floats
    right: Floats

    def scaled(self, factors: Floats) -> Spectra:
        """Of the same matrices times Float64[n]."""
        return Spectra(
            self.values * np.abs(factors)[:, None],
            self.left,
            self.right * np.where(factors < 0, -1.0, 1.0)[:, None, None],
        )


def spectra(matrices: Floats, ranks: int) -> Spectra:
    """Of Float64[n, rows, columns], all finite, with the first `ranks` vectors."""
    return _aligned(*_decomposed(matrices, ranks))


def product_spectra(left: Floats, right: Floats, ranks: int) -> Spectra:
    """Of left @ right, Float64[n, rows, e] and Float64[n, e, columns]: QR of both, and the spectra of the small core.

    At most min(rows, e, columns) values. Householder's QR errs by column, so factors may hold blocks of very different
    size.
    """
    left_basis, left_core = np.linalg.qr(left)
    right_basis, right_core = np.linalg.qr(right.mT)
    values, inner_left, inner_right = _decomposed(left_core @ right_core.mT, ranks)
    return _aligned(values, inner_left @ left_basis.mT, inner_right @ right_basis.mT)


def first_order_factors(
    first: Floats, first_move: Floats, second: Floats, second_move: Floats
) -> tuple[Floats, Floats]:
    """Thin factors of d(AᵀB) = dAᵀ B + Aᵀ dB: A, dA Float64[n, e, rows], B, dB Float64[n, e, columns].

    -> Float64[n, rows, 2e] and Float64[n, 2e, columns], so its rank is at most 2e.
    """
    return (
        np.concatenate([first_move.mT, first.mT], axis=-1),
        np.concatenate([second, second_move], axis=-2),
    )


def _decomposed(matrices: Floats, ranks: int) -> tuple[Floats, Floats, Floats]:
    """Values Float64[n, k], the first left and right vectors as rows; signs as they come."""
    rows, columns = matrices.shape[-2:]
    if rows > columns:
        values, right, left = _decomposed(matrices.mT, ranks)
        return values, left, right
    count = min(ranks, rows)
    # MMᵀ is as good as M where the spectrum is not steep, and takes a third of the time.
    squares, vectors = np.linalg.eigh(matrices @ matrices.mT)
    values = np.sqrt(np.maximum(squares[:, ::-1], 0.0))
    left = vectors[:, :, ::-1][:, :, :count].mT
    with np.errstate(divide="ignore", invalid="ignore"):
        right = left @ matrices / values[:, :count, None]
    half = rows // 2
    tiny = values[:, 0] < _NO_SQUARES
    steep = ~(values[:, -1] > _WELL_ABOVE * values[:, 0])
    # The upper half stands; what it hides is seen once M is cut to the directions of the lower half.
    halved = steep & ~tiny & (values[:, max(half, count) - 1] > _WELL_ABOVE * values[:, 0]) & (half >= count)
    if halved.any():
        lower, _, _ = _decomposed(vectors[halved, :, : rows - half].mT @ matrices[halved], 0)
        values[halved, half:] = np.minimum(lower, values[halved, half - 1][:, None])
    whole = (steep & ~halved) | tiny
    if whole.any():
        exact_left, values[whole], exact_right = _svd(matrices[whole])
        left[whole], right[whole] = exact_left.mT[:, :count], exact_right[:, :count]
    return values, left, right


def _svd(matrices: Floats) -> tuple[Floats, Floats, Floats]:
    try:
        left, values, right = np.linalg.svd(matrices, full_matrices=False)
    except np.linalg.LinAlgError:
        # LAPACK's divide and conquer fails, rarely, on a matrix with nothing wrong with it, and not on its transpose.
        right, values, left = np.linalg.svd(matrices.mT, full_matrices=False)
        left, right = left.mT, right.mT
    return left, values, right


def _aligned(values: Floats, left: Floats, right: Floats) -> Spectra:
    place = np.abs(left).argmax(axis=-1)[..., None]
    sign = np.where(np.take_along_axis(left, place, axis=-1) < 0, -1.0, 1.0)
    return Spectra(values, left * sign, right * sign)


__all__ = ["Spectra", "first_order_factors", "product_spectra", "spectra"]

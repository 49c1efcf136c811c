"""Singular values of weight matrices, from thin factors where a matrix is a product (W_QK, W_OV).

Source: the QR-then-core construction is standard (Golub & Van Loan, Matrix Computations, 4th ed., §8.6).
Everything is float64, batched over any leading axes (layers, heads), descending in the singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import LakebedError

_NoConvergence: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class NonFiniteMatrix(LakebedError, ValueError):
    """A matrix holds NaN or infinity, so it has no singular values."""


class ZeroSpectrum(LakebedError, ValueError):
    """A matrix is zero: its effective rank and spectral mass are 0/0."""


class SVD(NamedTuple):
    """``U diag(S) Vh``: U Float64[…, m, r], S Float64[…, r] descending, Vh Float64[…, r, n], r = full thin rank."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def matrix_svd(matrix: Tensor) -> SVD:
    """Thin SVD of Float[…, m, n], in float64; r = min(m, n). Raises NonFiniteMatrix."""
    matrix = matrix.to(torch.float64)
    _require_finite(matrix)
    try:
        return SVD(*torch.linalg.svd(matrix, full_matrices=False))
    except _NoConvergence:
        # LAPACK's divide and conquer can fail to converge on a matrix with nothing wrong with it. One such
        # matrix in a batch must not cost the others theirs.
        flat = matrix.reshape(-1, *matrix.shape[-2:])
        each = [_single_svd(one) for one in flat]
        parts = [torch.stack(part) for part in zip(*each, strict=True)]
        return SVD(*(part.reshape(*matrix.shape[:-2], *part.shape[1:]) for part in parts))


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """Thin SVD of ``left @ right`` without forming it: QR of both factors, SVD of the small core.

    ``left`` Float[…, m, e], ``right`` Float[…, e, n], leading axes broadcast; r = min(m, e, n), so the rank
    reported never exceeds the inner width. U and Vh are orthonormal even where the factors are rank-deficient
    (the singular values are then at rounding level). Singular values carry an absolute error of rounding size
    relative to the product of the factors' norms. Raises NonFiniteMatrix, and ValueError on shapes.
    """
    if left.ndim < 2 or right.ndim < 2 or left.shape[-1] != right.shape[-2]:
        raise ValueError(f"cannot multiply factors of shapes {tuple(left.shape)} and {tuple(right.shape)}")
    left, right = left.to(torch.float64), right.to(torch.float64)
    _require_finite(left)
    _require_finite(right)
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.mT)
    core = matrix_svd(left_core @ right_core.mT)
    return SVD(left_basis @ core.U, core.S, core.Vh @ right_basis.mT)


def effective_rank(singular_values: Tensor) -> Tensor:
    """(Σσ)² / Σσ² over the last axis: the participation ratio, between 1 and the number of values.

    Float[…, r] -> Float[…]. Not the entropy-based rank of the same name. Raises ZeroSpectrum.
    """
    total = _require_spectrum(singular_values)
    scaled = singular_values / total.unsqueeze(-1)  # so that squares neither overflow nor vanish
    return 1.0 / scaled.square().sum(-1)


def spectral_mass(singular_values: Tensor, k: int = 3) -> Tensor:
    """The share of the first k singular values in their sum: Float[…, r] -> Float[…]. Raises ZeroSpectrum."""
    if k < 1:
        raise ValueError(f"spectral mass needs at least one singular value, got k={k}")
    return singular_values[..., :k].sum(-1) / _require_spectrum(singular_values)


def align_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Fix the joint sign of each singular pair: the largest entry of the left vector, in size, is positive.

    U Float[…, m, r], Vh Float[…, r, n]; on a tie the first such entry decides. The product U diag(S) Vh does not
    change. A solver's signs are arbitrary and may differ between machines; these only change where two entries
    of the left vector are equally large. (Along a training run, compare vectors by |cos| all the same.)
    """
    place = U.abs().argmax(dim=-2, keepdim=True)
    sign = torch.where(U.gather(-2, place) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, Vh * sign.mT


def split_heads(projection: Tensor, n_heads: int) -> Tensor:
    """Rows of a q, k or v projection by head: Float[…, n_heads·d_h, d] -> Float[…, head, d_h, d]."""
    *batch, rows, width = projection.shape
    return projection.reshape(*batch, n_heads, _head_width(rows, n_heads), width)


def split_output_heads(projection: Tensor, n_heads: int) -> Tensor:
    """Columns of an output projection by head: Float[…, d, n_heads·d_h] -> Float[…, head, d, d_h]."""
    *batch, width, columns = projection.shape
    return projection.reshape(*batch, width, n_heads, _head_width(columns, n_heads)).movedim(-2, -3)


def share_key_value_heads(weight: Tensor, n_heads: int) -> Tensor:
    """Grouped-query attention: repeat each key/value head for the query heads that read it.

    Float[…, kv_head, a, b] -> Float[…, head, a, b]; query head h reads key/value head h // (heads per group).
    """
    return weight.repeat_interleave(_head_width(n_heads, weight.shape[-3]), dim=-3)


def qk_factors(W_Q: Tensor, W_K: Tensor) -> tuple[Tensor, Tensor]:
    """W_QK = W_Qᵀ W_K, the unscaled bias-free score ``x_qᵀ W_QK x_k``: both Float[…, head, d_h, d]."""
    return W_Q.mT, W_K


def ov_factors(W_V: Tensor, W_O: Tensor) -> tuple[Tensor, Tensor]:
    """W_OV = W_Vᵀ W_Oᵀ, what x writes is ``xᵀ W_OV``: W_V Float[…, head, d_h, d], W_O Float[…, head, d, d_h]."""
    return W_V.mT, W_O.mT


@dataclass(frozen=True)
class WeightMatrix:
    """A matrix whose spectrum is followed: which weights make it, and as which thin factors if it is a product."""

    weights: tuple[str, ...]
    factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


MATRICES: Mapping[str, WeightMatrix] = {
    "W_QK": WeightMatrix(("W_Q", "W_K"), qk_factors),
    "W_OV": WeightMatrix(("W_V", "W_O"), ov_factors),
    **{name: WeightMatrix((name,)) for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")},
}
"""The matrices by name: raw stored weights, no bias, no LayerNorm gain folded in, no 1/√d_h."""


def weight_matrix_svd(name: str, weights: Mapping[str, Tensor]) -> SVD:
    """Thin SVD of one of ``MATRICES``, over any leading axes (layers, heads).

    ``weights`` holds what the matrix is made of: W_Q, W_K, W_V Float[…, head, d_h, d], W_O Float[…, head, d, d_h]
    (see ``split_heads``, ``split_output_heads``), W_in Float[…, F, d], W_out Float[…, d, F]. Raises KeyError with
    the known names, NonFiniteMatrix.
    """
    if name not in MATRICES:
        raise KeyError(f"no matrix {name!r}; the matrices are {', '.join(MATRICES)}")
    matrix = MATRICES[name]
    if matrix.factors is None:
        return matrix_svd(weights[matrix.weights[0]])
    first, second = matrix.weights
    return product_svd(*matrix.factors(weights[first], weights[second]))


def _head_width(total: int, parts: int) -> int:
    if parts < 1 or total % parts:
        raise ValueError(f"{total} does not divide into {parts} heads")
    return total // parts


def _require_finite(matrix: Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteMatrix(f"a matrix of shape {tuple(matrix.shape)} holds NaN or infinite entries")


def _require_spectrum(singular_values: Tensor) -> Tensor:
    total = singular_values.sum(-1)
    if bool((total <= 0).any()):
        raise ZeroSpectrum("every singular value is zero: the matrix is zero")
    return total


def _single_svd(matrix: Tensor) -> SVD:
    """One matrix, for which the batched call failed: try it alone, then transposed, then by Jacobi rotations."""
    try:
        return SVD(*torch.linalg.svd(matrix, full_matrices=False))
    except _NoConvergence:
        pass
    try:
        V, S, Uh = torch.linalg.svd(matrix.mT, full_matrices=False)
        return SVD(Uh.mT, S, V.mT)
    except _NoConvergence:
        return _jacobi_svd(matrix)


def _jacobi_svd(matrix: Tensor, sweeps: int = 60) -> SVD:
    """One-sided Jacobi (Hestenes 1958), which cannot fail to converge: Float64[m, n] -> SVD.

    Columns are rotated in disjoint pairs, all pairs of a round at once, until every two are orthogonal. Their
    lengths are then the singular values; directions of zero length are completed to an orthonormal set by QR.
    """
    if matrix.shape[0] < matrix.shape[1]:
        flipped = _jacobi_svd(matrix.mT, sweeps)
        return SVD(flipped.Vh.mT, flipped.S, flipped.U.mT)
    peak = matrix.abs().max()
    peak = torch.where(peak > 0, peak, 1.0)  # squares of the scaled entries neither overflow nor vanish
    basis, core = torch.linalg.qr(matrix / peak)
    n = core.shape[1]
    columns, V = core.clone(), torch.eye(n, dtype=core.dtype, device=core.device)
    tiny = torch.finfo(core.dtype).eps * core.norm() / 8
    for _ in range(sweeps):
        turned = False
        for p, q in _tournament(n):
            x, y = columns[:, p], columns[:, q]
            a, b, c = x.square().sum(0), y.square().sum(0), (x * y).sum(0)
            skip = c.abs() <= 4 * torch.finfo(core.dtype).eps * (a * b).sqrt() + tiny**2
            zeta = (b - a) / torch.where(skip, 1.0, 2 * c)
            t = torch.where(zeta < 0, -1.0, 1.0) / (zeta.abs() + (1 + zeta.square()).sqrt())
            t = torch.where(skip, 0.0, t)
            cosine = 1 / (1 + t.square()).sqrt()
            sine = cosine * t
            for rotated in (columns, V):
                x, y = rotated[:, p], rotated[:, q]
                rotated[:, p], rotated[:, q] = cosine * x - sine * y, sine * x + cosine * y
            turned = turned or not bool(skip.all())
        if not turned:
            break
    S, order = columns.norm(dim=0).sort(descending=True)
    columns, V = columns[:, order], V[:, order]
    # QR of orthogonal columns gives them back normalised, up to sign, and completes the zero ones.
    U, R = torch.linalg.qr(columns)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return SVD(basis @ (U * sign), S * peak, V.mT)


def _tournament(n: int) -> list[tuple[Tensor, Tensor]]:
    """Every pair of 0 … n−1 once, in rounds of disjoint pairs (the circle method): [(p, q), …], Int[pairs] each."""
    players = list(range(n + n % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [
            (a, b) for a, b in zip(players[:half], reversed(players[half:]), strict=True) if max(a, b) < n
        ]
        rounds.append(
            (
                torch.tensor([a for a, _ in pairs], dtype=torch.long),
                torch.tensor([b for _, b in pairs], dtype=torch.long),
            )
        )
        players = [players[0], players[-1], *players[1:-1]]
    return rounds

"""Value codes: what tells tokens apart at one place of the residual stream, and affine maps from one code to another.

Everything is float64. Axes: `vector` (a query event's), `d_model`, `rank`. Source: definitions 4 §0.7, §B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import LakebedError
from .svd import align_signs, matrix_svd

_Singular: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
# States are float32: a rank counts what stands above the rounding of that, not of our float64.
_STATE_EPSILON = torch.finfo(torch.float32).eps


class ValueCodeError(LakebedError, ValueError):
    """Events that no value code can be fitted on."""


class BasisRankTooHigh(ValueCodeError):
    """More directions than the tokens, the vectors or the residual stream have; the message names the limit."""


class TooFewExamples(ValueCodeError):
    """A side of the split, or a fit, with too few events."""


class SingularFit(ValueCodeError):
    """A map without a ridge penalty whose source coordinates do not vary in every direction."""


@dataclass(frozen=True)
class Side:
    """Vectors of one end of a transfer, and the tokens that group them."""

    vectors: Tensor
    """`Float64[vector, d_model]`."""
    tokens: Tensor
    """`Int[vector]`."""
    name: str
    """What errors call it."""

    def of(self, chosen: Tensor) -> Side:
        """Some of the vectors, `Bool[vector]`."""
        return Side(self.vectors[chosen], self.tokens[chosen], self.name)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of centred vectors."""

    singular_values: Tensor
    """`Float64[rank]`: the first ones, descending."""
    centered_rank: int
    """How many stand above σ₁ · max(vectors, d_model) · ε."""


@dataclass(frozen=True)
class IdentityBasis:
    """The directions along which the mean vectors of the tokens differ most, each token weighing the same."""

    basis: Tensor
    """`Float64[d_model, rank]`, orthonormal; a direction's largest token coordinate, in size, is positive."""
    identity: Spectrum
    """Of the token means."""
    all_vectors: Spectrum
    tokens: Tensor
    """`Int[token]`, ascending."""
    num_vectors: int


def identity_basis(side: Side, rank: int) -> IdentityBasis:
    """Right singular vectors of the token means minus their mean. Raises BasisRankTooHigh or TooFewExamples."""
    tokens, group = torch.unique(side.tokens, return_inverse=True)
    count, width = len(tokens), side.vectors.shape[1]
    if count < 2:
        raise TooFewExamples(
            f"the basis of {side.name} needs at least two tokens among the fit examples, there is {count}"
        )
    if rank > count - 1:
        raise BasisRankTooHigh(
            f"basis rank {rank} is above what {side.name} allows: {count} tokens among the {len(group)} fit examples, so at "
            f"most rank {count - 1}"
        )
    sums = side.vectors.new_zeros(count, width).index_add_(0, group, side.vectors)
    means = sums / torch.bincount(group, minlength=count)[:, None]
    found = matrix_svd(means - means.mean(0))
    identity = _spectrum(found.S, rank, means)
    if identity.centered_rank < rank:
        raise BasisRankTooHigh(
            f"basis rank {rank} is above the numerical rank of the token means of {side.name}, which is "
            f"{identity.centered_rank}"
        )
    basis = align_signs(found.U, found.Vh)[1][:rank].mT.contiguous()
    whole = _spectrum(_singular_values(side.vectors), rank, side.vectors)
    return IdentityBasis(basis, identity, whole, tokens, len(group))


def _singular_values(vectors: Tensor) -> Tensor:
    """Of the centred vectors; the triangle of a QR has the same, and fewer rows."""
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(vectors - vectors.mean(0), mode="r").R)
    return values


def _spectrum(values: Tensor, rank: int, vectors: Tensor) -> Spectrum:
    above = values > values[0] * max(vectors.shape) * _STATE_EPSILON
    return Spectrum(values[:rank], int(above.sum()))


def random_basis(width: int, rank: int, seed: int) -> Tensor:
    """Orthonormal `Float64[width, rank]`: Q of the QR of standard normals, drawn in float32 by torch's CPU generator."""
    if rank > width:
        raise BasisRankTooHigh(f"basis rank {rank} exceeds the {width} dimensions of the residual stream")
    drawn = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    basis: Tensor = torch.linalg.qr(drawn.double()).Q
    return basis


@dataclass(frozen=True)
class AffineMap:
    """ẑ = (a − ā) W + z̄."""

    weights: Tensor
    """`Float64[source, target]`."""
    source_mean: Tensor
    target_mean: Tensor

    def __call__(self, source: Tensor) -> Tensor:
        """`Float64[vector, source]` to `Float64[vector, target]`."""
        return (source - self.source_mean) @ self.weights + self.target_mean


def ridge_map(source: Tensor, target: Tensor, ridge: float, what: str) -> AffineMap:
    """W = (AᵀA + λI)⁻¹ AᵀZ of centred `Float64[vector, source]` and `Float64[vector, target]`; the offset is not penalized.

    λ is absolute, not scaled by the number of vectors. Raises SingularFit, and TooFewExamples unless there are more vectors
    than coordinates on either side.
    """
    count, width = source.shape
    most = max(width, target.shape[1])
    if count <= most:
        raise TooFewExamples(
            f"{what} has {count} fit examples for {most} coordinates, and needs more examples than coordinates: raise "
            "--fit-fraction or --max-records, or lower the rank"
        )
    source_mean, target_mean = source.mean(0), target.mean(0)
    a, z = source - source_mean, target - target_mean
    normal = a.mT @ a + ridge * torch.eye(width, dtype=a.dtype, device=a.device)
    try:
        weights = torch.linalg.solve(normal, a.mT @ z)
    except _Singular:
        raise SingularFit(f"{what} is singular with --ridge-lambda {ridge:g}; give a positive one") from None
    return AffineMap(weights, source_mean, target_mean)

"""What chance looks like: the same numbers with the group labels shuffled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .groups import Groups, one_hot
from .separation import nearest_centroids
from .subspaces import STORED_EPSILON

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Numbers that one chunk of permutations may hold at once.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Chance:
    """A number under shuffled labels: mean, population standard deviation, 95th percentile, and p = (1 + #≥) / (1 + N)."""

    mean: float
    std: float
    percentile_95: float
    p_value: float


def permuted_labels(labels: NDArray[Any], count: int, seed: int) -> NDArray[np.int64]:
    """`count` seeded shuffles of the labels: Int[n] -> Int64[count, n]."""
    many = np.broadcast_to(np.asarray(labels, np.int64), (count, len(labels)))
    return np.random.default_rng(seed).permuted(many, axis=1)


def against_chance(observed: float, sampled: NDArray[np.float64]) -> Chance:
    """Where the observed number stands among Float64[N]; equal within rounding counts as at least as large."""
    slack = 1e-12 * max(abs(observed), 1e-300)
    at_least = int((sampled >= observed - slack).sum())
    return Chance(
        float(sampled.mean()),
        float(sampled.std()),
        float(np.percentile(sampled, 95)),
        (1 + at_least) / (1 + len(sampled)),
    )


def chance_columns(
    name: str, observed: float, sampled: NDArray[np.float64] | None
) -> dict[str, float | None]:
    """`against_chance` as columns NAME_permuted_mean, _std, _percentile_95 and _p_value; None where nothing was sampled."""
    if sampled is None:
        return {f"{name}_permuted_{field.name}": None for field in fields(Chance)}
    found = asdict(against_chance(observed, sampled))
    return {f"{name}_permuted_{field}": value for field, value in found.items()}


def permuted_separation(
    vectors: NDArray[np.float64], groups: Groups, shuffled: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Separation ratio and leave-one-out accuracy of Float64[n, k] under each of Int64[N, n] labels: Float64[N] each.

    within + between is the total variance whatever the labels, so only the centroids are made anew.
    """
    rows, width = vectors.shape
    centered = vectors - vectors.mean(0)
    total = np.square(centered).sum() / rows
    ratios, accuracies = [], []
    for labels, means in _means(centered, groups, shuffled, rows * len(groups) + width * len(groups)):
        between = (np.square(means).sum(-1) @ groups.counts) / rows
        ratios.append(between / (total - between))
        nearest, _ = nearest_centroids(centered, labels, means, groups.counts)
        accuracies.append((nearest == labels).mean(-1))
    return np.concatenate(ratios), np.concatenate(accuracies)


def permuted_overlaps(
    vectors: NDArray[np.float64],
    groups: Groups,
    shuffled: NDArray[np.int64],
    directions: NDArray[np.float64],
    rank: int,
) -> NDArray[np.float64]:
    """Identity overlap of directions Float64[k, d] under each of Int64[N, n] labels: Float64[N, k].

    The identity basis is that of `identity_subspace`: the top `rank` right singular vectors of the centred group means M.
    With M Mᵀ = W Σ² Wᵀ (g × g, small), the coordinates of u on it are Σ⁻¹ Wᵀ M u.
    """
    found = []
    for _, means in _means(vectors, groups, shuffled, sum(vectors.shape) * len(groups)):
        means = means - means.mean(1, keepdims=True)
        squares, weights = np.linalg.eigh(means @ np.swapaxes(means, -1, -2))
        top, weights = squares[:, ::-1][:, :rank], weights[:, :, ::-1][:, :, :rank]
        floor = top[:, :1] * (max(len(groups), vectors.shape[1]) * STORED_EPSILON) ** 2
        scale = np.where(top > floor, 1.0 / np.sqrt(np.where(top > floor, top, 1.0)), 0.0)
        coordinates = scale[:, :, None] * (np.swapaxes(weights, -1, -2) @ (means @ directions.T))
        found.append(np.linalg.norm(coordinates, axis=1))
    return np.concatenate(found)


def _means(
    vectors: NDArray[np.float64], groups: Groups, shuffled: NDArray[np.int64], size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Chunks of (labels Int64[c, n], group means Float64[c, g, d]), `size` numbers per permutation."""
    chunk = max(1, _CHUNK // size)
    for start in range(0, len(shuffled), chunk):
        labels = shuffled[start : start + chunk]
        chosen = one_hot(labels, len(groups))
        sums = chosen.reshape(-1, len(vectors)) @ vectors
        yield labels, sums.reshape(len(labels), len(groups), -1) / groups.counts[:, None]

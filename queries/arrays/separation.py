"""How well groups of vectors stand apart (definitions 1 §J.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .groups import Groups, group_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Squared distances closer than this share of the squared lengths they come from are equal: a tie, not rounding.
TIE = 1e-12
# Below this share of the mean squared length, vectors that differ do so by less than float32 can hold.
NOTHING = float(np.finfo(np.float32).eps) ** 2


@dataclass(frozen=True)
class Separation:
    """Separation of grouped vectors; per group in the order of its tokens.

    within = Σ_g Σ_{i∈g} ‖z_i−μ_g‖² / N, between = Σ_g n_g ‖μ_g−μ‖² / N; `ratio` is their quotient, NaN where nothing
    is left within. `nearest_accuracy` and `nearest_margin` leave each vector out of its own group's centroid.
    `group_within` is a group's own Σ ‖z_i−μ_g‖² / n_g, `group_distance` ‖μ_g−μ‖², `group_norm` ‖μ_g‖.
    """

    within: float
    between: float
    ratio: float
    nearest_accuracy: float
    nearest_margin: float
    mean_centroid_norm: float
    group_within: NDArray[np.float64]
    group_distance: NDArray[np.float64]
    group_norm: NDArray[np.float64]


def separation(vectors: NDArray[np.float64], groups: Groups) -> Separation:
    """Separation of Float64[n, k]; every group needs two vectors or more, and there must be two groups or more."""
    total, centroids = len(vectors), group_means(vectors, groups)
    deviations = np.square(vectors - centroids[groups.labels]).sum(1)
    group_within = np.bincount(groups.labels, deviations, len(groups)) / groups.counts
    group_distance = np.square(centroids - vectors.mean(0)).sum(1)
    group_norm = np.linalg.norm(centroids, axis=1)
    within = float(deviations.sum() / total)
    between = float(groups.counts @ group_distance / total)
    nearest, margin = nearest_centroids(vectors, groups.labels, centroids, groups.counts)
    return Separation(
        within=within,
        between=between,
        ratio=between / within
        if within > NOTHING * float(np.square(vectors).sum() / total)
        else float("nan"),
        nearest_accuracy=float((nearest == groups.labels).mean()),
        nearest_margin=float(margin.mean()),
        mean_centroid_norm=float(groups.counts @ group_norm / total),
        group_within=group_within,
        group_distance=group_distance,
        group_norm=group_norm,
    )


def nearest_centroids(
    vectors: NDArray[np.float64],
    labels: NDArray[Any],
    centroids: NDArray[np.float64],
    counts: NDArray[Any],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Nearest centroid of every vector, itself left out of its own group's: (group Int64[…, n], margin Float64[…, n]).

    `vectors` Float64[n, k], `labels` Int[…, n], `centroids` Float64[…, g, k], `counts` Int[g] ≥ 2. The margin is the
    squared distance to the nearest other centroid minus that to the own one. Ties go to the first group, whose token id
    is the smallest. Moving z out of its mean stretches their difference by n/(n−1).
    """
    lengths = np.square(vectors).sum(-1)[:, None] + np.square(centroids).sum(-1)[..., None, :]
    distances = np.maximum(lengths - 2.0 * (vectors @ np.swapaxes(centroids, -1, -2)), 0.0)
    tie = TIE * lengths.max(-1)
    own_label = labels[..., None]
    own = np.take_along_axis(distances, own_label, -1)[..., 0] * np.square(counts / (counts - 1.0))[labels]
    np.put_along_axis(distances, own_label, np.inf, -1)
    other = distances.min(-1)
    # The first of the other groups that is as near as the nearest of them.
    other_label = (distances <= (other + tie)[..., None]).argmax(-1)
    margin = other - own
    tied_and_first = (np.abs(margin) <= tie) & (labels < other_label)
    nearest = np.where((margin > tie) | tied_and_first, labels, other_label)
    return nearest.astype(np.int64), margin

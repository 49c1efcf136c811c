"""What reports need and SQL lacks: bases, principal components, centroids. NumPy only, float64, batched.

One file per topic; everything is imported from here. Vectors are rows: Float64[n, d].
"""

from __future__ import annotations

from .centroids import CosineCentroids, cosine_to_centroids, leave_one_out_cosines
from .columns import matrix, stack_by
from .groups import Groups, group_by_token, group_means
from .permutations import Chance, against_chance, permuted_labels, permuted_overlaps, permuted_separation
from .separation import Separation, nearest_centroids, separation
from .subspaces import (
    IdentitySubspace,
    PrincipalDirections,
    identity_subspace,
    match_directions,
    mean_direction,
    overlap,
    principal_directions,
    qk_bases,
)

__all__ = [
    "Chance",
    "CosineCentroids",
    "Groups",
    "IdentitySubspace",
    "PrincipalDirections",
    "Separation",
    "against_chance",
    "cosine_to_centroids",
    "group_by_token",
    "group_means",
    "identity_subspace",
    "leave_one_out_cosines",
    "match_directions",
    "matrix",
    "mean_direction",
    "nearest_centroids",
    "overlap",
    "permuted_labels",
    "permuted_overlaps",
    "permuted_separation",
    "principal_directions",
    "qk_bases",
    "separation",
    "stack_by",
]

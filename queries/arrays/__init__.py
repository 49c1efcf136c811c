"""What reports need and SQL lacks: bases, principal components, centroids. NumPy only, float64, batched.

One file per topic; everything is imported from here. Vectors are rows: Float64[n, d].
"""

from __future__ import annotations

from .centroids import CosineCentroids, cosine_to_centroids, leave_one_out_cosines
from .columns import as_columns, matrix, stack_by, stored_matrix
from .groups import Groups, group_by_token, group_means
from .permutations import (
    Chance,
    against_chance,
    chance_columns,
    permuted_labels,
    permuted_overlaps,
    permuted_separation,
)
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
from .token_geometry import TokenSubspace, subspace_alignment, token_subspace, top_tokens

__all__ = [
    "Chance",
    "CosineCentroids",
    "Groups",
    "IdentitySubspace",
    "PrincipalDirections",
    "Separation",
    "TokenSubspace",
    "against_chance",
    "as_columns",
    "chance_columns",
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
    "stored_matrix",
    "subspace_alignment",
    "token_subspace",
    "top_tokens",
]

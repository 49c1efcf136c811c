"""How grouped vectors lie: on their own principal directions, and near their group's mean (definitions 4 §A, 0.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .centroids import CosineCentroids, leave_one_out_cosines
from .groups import group_by_token, group_means
from .stage_lens import Candidates, value_metrics
from .subspaces import PrincipalDirections, mean_direction, overlap, principal_directions, row_lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray


def lens_columns(logits: NDArray[np.float64], candidates: Candidates) -> dict[str, NDArray[Any]]:
    """Value metrics of logits Float64[n, v], as columns."""
    metrics = value_metrics(logits, candidates)
    return {
        "lens_correct_logit": metrics.correct_logit,
        "lens_best_wrong_logit": metrics.best_wrong_logit,
        "lens_margin": metrics.margin,
        "lens_best_token": metrics.best_token,
        "lens_accuracy": metrics.accuracy,
    }


def centroid_columns(found: CosineCentroids) -> dict[str, NDArray[Any]]:
    """Of centroid classification, as columns; where a vector is not scored the prediction has no meaning."""
    return {
        "centroid_scored": found.scored,
        "centroid_prediction": found.prediction,
        "centroid_true_cosine": found.true_cosine,
        "centroid_best_wrong_cosine": found.best_wrong_cosine,
        "centroid_margin": found.margin,
    }


def code_columns(
    vectors: NDArray[np.float64], groupings: Mapping[str, NDArray[np.int64]], rank: int, what: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(grouping, columns) of vectors Float64[n, d] grouped by tokens Int64[n] each.

    Groupings that name the same tokens share one computation. Raises ReportFailed for a zero vector or mean, fewer than two
    groups, or a rank that vectors or groups do not have; `what` says which vectors they are.
    """
    norms = row_lengths(vectors)
    held: dict[bytes, dict[str, Any]] = {}
    common: dict[str, Any] = {}
    for grouping, token_ids in groupings.items():
        key = token_ids.tobytes()
        if key not in held:
            named = f"{what}, grouped by {grouping}"
            groups = group_by_token(token_ids)
            # Refuses zero vectors and single groups, so that it comes before what divides by norms.
            centroids = leave_one_out_cosines(vectors, groups, named)
            if not common:
                common = _common(vectors, norms, rank, what)
            identity = principal_directions(group_means(vectors, groups), rank, f"token means of {named}")
            held[key] = {
                **common,
                "group_tokens": token_ids,
                "num_unique_tokens": len(groups),
                "tokens": groups.tokens,
                "min_group_count": int(groups.counts.min()),
                "max_group_count": int(groups.counts.max()),
                "largest_group_share": float(groups.counts.max() / groups.counts.sum()),
                "identity_overlap": np.minimum(overlap(vectors, identity.basis) / norms, 1.0),
                **_spectrum("identity", identity),
                **centroid_columns(centroids),
            }
        yield grouping, held[key]


def _common(vectors: NDArray[np.float64], norms: NDArray[np.float64], rank: int, what: str) -> dict[str, Any]:
    """What does not depend on the grouping."""
    found = principal_directions(vectors, rank, f"vectors of {what}")
    mean = mean_direction(vectors, f"vectors of {what}")
    return {
        "num_vectors": len(vectors),
        "ambient_dim": vectors.shape[1],
        "vector_norm": norms,
        "mean_abs_cosine": np.minimum(np.abs(vectors @ mean) / norms, 1.0),
        "all_vector_overlap": np.minimum(overlap(vectors, found.basis) / norms, 1.0),
        **_spectrum("all_vector", found),
    }


def _spectrum(prefix: str, found: PrincipalDirections) -> dict[str, Any]:
    return {
        f"{prefix}_centered_rank": found.centered_rank,
        f"{prefix}_singular_values": found.singular_values,
        f"{prefix}_variance_share": found.variance_share,
    }

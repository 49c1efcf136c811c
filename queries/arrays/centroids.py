"""Classification of vectors by the cosine with each token's mean vector (definitions 4 §A, §B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..report import ReportFailed
from .groups import Groups, group_means
from .subspaces import row_lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Cosines closer than this are equal: a tie, not rounding.
TIE = 1e-12
# Below this share of the squared lengths it is the difference of, a squared length has lost digits.
_CANCELS = 1e-2


@dataclass(frozen=True)
class CosineCentroids:
    """Per vector, Float64[n] unless said: `scored` Bool[n]; where it is False the rest is -1 or NaN.

    `prediction` Int64[n] is the token id of the largest cosine (tie: smallest id), `true_cosine` that with its own token,
    `best_wrong_cosine` the largest of the others, `margin` their difference, `correct` Bool[n].
    """

    scored: NDArray[np.bool_]
    prediction: NDArray[np.int64]
    true_cosine: NDArray[np.float64]
    best_wrong_cosine: NDArray[np.float64]
    margin: NDArray[np.float64]
    correct: NDArray[np.bool_]


def leave_one_out_cosines(vectors: NDArray[np.float64], groups: Groups, what: str) -> CosineCentroids:
    """Each vector of Float64[n, d] against the token means, itself left out of its own token's.

    A token's only vector is not scored, but its mean is a candidate for the others. Raises ReportFailed for fewer than two
    tokens, or a zero vector or mean; `what` names the vectors.
    """
    if len(groups) < 2:
        raise ReportFailed(f"centroids of {what} need at least two tokens, there are {len(groups)}")
    lengths = _lengths(vectors, f"vector of {what}")
    means = group_means(vectors, groups)
    mean_lengths = _lengths(means, f"token mean of {what}")
    cosines = vectors @ (means / mean_lengths[:, None]).T
    cosines /= lengths[:, None]
    scored = groups.counts[groups.labels] > 1
    chosen = np.flatnonzero(scored)
    labels = groups.labels[chosen]
    # The sum s of a group points where its mean does: cos(x, s − x) = (|s| cos(x, s) − |x|) / |s − x|.
    own, length = cosines[chosen, labels], lengths[chosen]
    total = (groups.counts * mean_lengths)[labels]
    along, rest = total * own - length, total**2 + length**2 - 2 * total * length * own
    near = np.flatnonzero(rest < _CANCELS * (total**2 + length**2))
    others = groups.counts[labels[near], None] * means[labels[near]] - vectors[chosen[near]]
    along[near] = np.einsum("nd,nd->n", vectors[chosen[near]], others) / length[near]
    rest[near] = np.square(_lengths(others, f"token mean of {what}, one vector left out,"))
    cosines[chosen, labels] = along / np.sqrt(rest)
    return _classify(cosines, groups.labels, groups.tokens, scored)


def cosine_to_centroids(
    vectors: NDArray[np.float64],
    token_ids: NDArray[np.int64],
    centroid_tokens: NDArray[np.int64],
    centroids: NDArray[np.float64],
    what: str,
) -> CosineCentroids:
    """Each vector of Float64[n, d] against centroids Float64[g, d] made from other vectors, `centroid_tokens` ascending.

    A vector whose token has no centroid is not scored. Raises ReportFailed as `leave_one_out_cosines` does.
    """
    if len(centroid_tokens) < 2:
        raise ReportFailed(f"centroids of {what} need at least two tokens, there are {len(centroid_tokens)}")
    lengths = _lengths(vectors, f"vector of {what}")
    cosines = vectors @ (centroids / _lengths(centroids, f"centroid of {what}")[:, None]).T
    cosines /= lengths[:, None]
    labels = np.minimum(np.searchsorted(centroid_tokens, token_ids), len(centroid_tokens) - 1)
    return _classify(cosines, labels, centroid_tokens, centroid_tokens[labels] == token_ids)


def _classify(
    cosines: NDArray[np.float64],
    labels: NDArray[np.int64],
    tokens: NDArray[np.int64],
    scored: NDArray[np.bool_],
) -> CosineCentroids:
    """From cosines Float64[n, g], which are used up, and the own group of each row."""
    rows = np.arange(len(cosines))
    true = cosines[rows, labels]
    # Tokens ascend, so the first within rounding of the largest has the smallest id.
    prediction = tokens[(cosines >= cosines.max(1, keepdims=True) - TIE).argmax(1)]
    cosines[rows, labels] = -np.inf
    wrong = cosines.max(1)
    return CosineCentroids(
        scored=scored,
        prediction=np.where(scored, prediction, -1),
        true_cosine=np.where(scored, true, np.nan),
        best_wrong_cosine=np.where(scored, wrong, np.nan),
        margin=np.where(scored, true - wrong, np.nan),
        correct=scored & (prediction == tokens[labels]),
    )


def _lengths(vectors: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    lengths = row_lengths(vectors)
    if not lengths.all():
        raise ReportFailed(f"a {what} is the zero vector, which has no direction")
    return lengths

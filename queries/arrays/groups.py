"""Vectors grouped by a token id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Groups:
    """Which vector belongs to which group: `tokens` Int64[g] ascending, `labels` Int64[n] into them, `counts` Int64[g]."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    counts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def one_hot(self) -> NDArray[np.float64]:
        """Float64[g, n]: 1 where the vector belongs to the group."""
        return one_hot(self.labels, len(self))


def group_by_token(token_ids: ArrayLike) -> Groups:
    """Groups vectors by token id, Int[n]."""
    ids = np.asarray(token_ids, np.int64).reshape(-1)
    order = np.argsort(ids, kind="stable")
    # np.unique would do, but it imports numpy.ma, which takes longer than a report's whole arithmetic.
    first = np.diff(ids[order], prepend=ids[order[:1]] - 1) != 0
    labels = np.empty_like(ids)
    labels[order] = np.cumsum(first) - 1
    return Groups(ids[order][first], labels, np.bincount(labels))


def one_hot(labels: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Int[…, n] -> Float64[…, size, n]."""
    chosen: NDArray[np.float64] = (labels[..., None, :] == np.arange(size)[:, None]).astype(np.float64)
    return chosen


def group_means(vectors: NDArray[np.float64], groups: Groups) -> NDArray[np.float64]:
    """Mean vector of each group: Float64[n, d] -> Float64[g, d]."""
    order = np.argsort(groups.labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(groups.counts)[:-1]])
    sums: NDArray[np.float64] = np.add.reduceat(vectors[order], starts, axis=0)
    means: NDArray[np.float64] = sums / groups.counts[:, None]
    return means

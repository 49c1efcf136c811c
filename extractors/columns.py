"""Arrow columns from arrays: what repeats along a grid of events, layers and heads, and lists from flat values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

Array = np.ndarray[Any, Any]


def constant(text: str, count: int) -> pa.Array:
    """The same text in every row."""
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int8), pa.array([text]))


def texts(values: Sequence[str], index: Array) -> pa.Array:
    """`values[index]`."""
    return pa.DictionaryArray.from_arrays(index.astype(np.int32), pa.array(values, pa.string()))


def grid(*sizes: int) -> list[Array]:
    """`Int[row]` per axis: the indices of a dense grid whose last axis moves fastest."""
    return [axis.reshape(-1) for axis in np.indices(sizes, np.int32)]


def flat(values: Tensor) -> Array:
    """The cells of a tensor, last axis fastest."""
    array: Array = values.contiguous().reshape(-1).cpu().numpy()
    return array


def lists(values: Array, lengths: Array) -> pa.Array:
    """A list per row, of these lengths, one after the other in `values`."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def vectors(values: Tensor) -> pa.Array:
    """A list per row of `Float[row, width]`."""
    count, width = values.shape
    return lists(flat(values), np.full(count, width, np.int32))


def sorted_order(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Names in the order of their key column, and the place each had."""
    order = sorted(range(len(names)), key=names.__getitem__)
    return [names[place] for place in order], order

"""Arrow list columns as matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...lake.imports import leave_pandas_alone

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


def matrix(column: Any) -> NDArray[np.float64]:
    """An Arrow list column of n rows of equal length d -> Float64[n, d]; n = 0 gives Float64[0, 0].

    Raises ValueError for a null row or rows of different lengths.
    """
    widened: NDArray[np.float64] = stored_matrix(column).astype(np.float64)
    return widened


def stored_matrix(column: Any) -> NDArray[Any]:
    """`matrix` in the type that is stored, without a copy where the column is in one piece."""
    import pyarrow as pa

    joined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    rows = len(joined)
    if rows == 0:
        return np.zeros((0, 0))
    if joined.null_count:
        raise ValueError(f"{joined.null_count} of {rows} rows of a vector column are null")
    flat = joined.flatten().to_numpy(zero_copy_only=False)
    width = len(joined[0])
    lengths = np.diff(np.asarray(joined.offsets)) if hasattr(joined, "offsets") else np.full(rows, width)
    if not (lengths == width).all():
        raise ValueError(f"rows of a vector column have between {lengths.min()} and {lengths.max()} numbers")
    shaped: NDArray[Any] = flat.reshape(rows, width)
    return shaped


def stack_by(labels: Sequence[Any], *columns: NDArray[Any]) -> dict[Any, tuple[NDArray[Any], ...]]:
    """Cuts arrays with a common first axis into one tuple per label, labels in order of first appearance.

    Rows of a label need not be neighbours; they keep their order.
    """
    places: dict[Any, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return {label: tuple(column[chosen] for column in columns) for label, chosen in places.items()}


def as_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows with the same keys, as Arrow columns; arrays become lists, and a column of nothing but None is of numbers."""
    import pyarrow as pa

    leave_pandas_alone()
    columns: dict[str, Any] = {}
    for name in rows[0] if rows else ():
        values = [_plain(row[name]) for row in rows]
        columns[name] = pa.array(values, pa.float64() if all(value is None for value in values) else None)
    return columns


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

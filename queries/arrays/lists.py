"""Rows whose cells may be lists, gathered one by one into Arrow columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RowsOfLists:
    """Rows of scalars and vectors; a vector (Float64, Int64 or Bool) becomes a list cell, its NaN null."""

    def __init__(self) -> None:
        self._cells: dict[str, list[Any]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """One row; every row has the same keys."""
        for name, value in row.items():
            self._cells.setdefault(name, []).append(value)

    def columns(self) -> dict[str, Any]:
        """The columns, in the order of the first row."""
        import pyarrow as pa

        found: dict[str, Any] = {}
        for name, cells in self._cells.items():
            if isinstance(cells[0], np.ndarray):
                offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(np.int64)
                found[name] = pa.LargeListArray.from_arrays(_arrow(offsets), _arrow(np.concatenate(cells)))
            else:
                found[name] = pa.array(cells)
        return found


def _arrow(values: NDArray[Any]) -> Any:
    """A NumPy vector as an Arrow array, from its memory: `pa.array` would import numpy.ma, a tenth of a report's time."""
    import pyarrow as pa

    if values.dtype == np.bool_:
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])
    valid = None
    if values.dtype.kind == "f" and np.isnan(values).any():
        valid = _bits(~np.isnan(values))
    kind = pa.float64() if values.dtype.kind == "f" else pa.int64()
    data = np.ascontiguousarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(data)])


def _bits(values: NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    return pa.py_buffer(np.packbits(values, bitorder="little"))

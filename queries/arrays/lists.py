"""Rows whose cells may be lists, gathered one by one into Arrow columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class RowsOfLists:
    """Rows of scalars and vectors; a vector (NumPy or Arrow) becomes a list cell, its NaN null."""

    def __init__(self) -> None:
        self._cells: dict[str, list[Any]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """One row; every row has the same keys."""
        import pyarrow as pa

        for name, value in row.items():
            cell = pa.array(value, from_pandas=True) if isinstance(value, np.ndarray) else value
            self._cells.setdefault(name, []).append(cell)

    def columns(self) -> dict[str, Any]:
        """The columns, in the order of the first row."""
        import pyarrow as pa

        found: dict[str, Any] = {}
        for name, cells in self._cells.items():
            if isinstance(cells[0], pa.Array):
                offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])])
                found[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.concat_arrays(cells))
            else:
                found[name] = pa.array(cells)
        return found

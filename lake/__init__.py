"""Storage: Parquet tables, Zarr tensors, receipts and the DuckDB session. Knows no torch and no transformer."""

from .errors import LakebedError
from .lake import Lake
from .receipts import Receipt, Unit
from .tensors import Tensor
from .units import RowBlock, UnitWriter

__all__ = ["Lake", "LakebedError", "Receipt", "RowBlock", "Tensor", "Unit", "UnitWriter"]

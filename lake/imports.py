"""Imports that cost more than what they are for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


class _Absent:
    """A finder that says pandas is not installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not looked for here", name=name)


@contextmanager
def without_pandas() -> Iterator[None]:
    """While a module is imported, pandas looks absent, unless it was imported before.

    `pyarrow.dataset` imports pandas wherever it is installed, at a third of a second; nothing here converts to it. pyarrow
    looks again when something does.
    """
    finder = _Absent()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@cache
def leave_pandas_alone() -> None:
    """Settles that pyarrow makes NumPy arrays without pandas, which it imports otherwise wherever it is installed.

    That is half a second. A conversion to pandas, should somebody ask for one, still finds it.
    """
    import pyarrow as pa

    with without_pandas():
        pa.chunked_array([[0]]).to_numpy()

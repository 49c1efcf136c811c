"""Large files are written past the page cache where the system can; their bytes are the same wherever it stops."""

from __future__ import annotations

import errno
import os

import pytest
from lakebed.lake.storage import Storage

CONTENT = os.urandom((1 << 20) + 4097)


@pytest.mark.parametrize("accepted", [None, 0, 1000, 1 << 20])
def test_a_large_file_is_whole_wherever_the_uncached_write_gives_up(tmp_path, monkeypatch, accepted) -> None:
    """`accepted` bytes go past the cache, then the system refuses; None leaves the system as it is."""
    calls: list[int] = []

    def short(file: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        calls.append(offset)
        if accepted is None or offset >= accepted:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return os.pwrite(file, buffers[0][: min(accepted - offset, 600)], offset)

    if accepted is not None:
        monkeypatch.setattr(os, "pwritev", short)
    storage = Storage(tmp_path)
    storage.write("tensors/large", CONTENT)
    assert storage.read("tensors/large") == CONTENT
    assert bool(calls) == (accepted is not None)


def test_a_small_file_goes_the_ordinary_way(tmp_path, monkeypatch) -> None:
    monkeypatch.delattr(os, "pwritev")
    storage = Storage(tmp_path)
    storage.write("small", b"abc")
    storage.write("large", CONTENT)
    assert (storage.read("small"), storage.read("large")) == (b"abc", CONTENT)

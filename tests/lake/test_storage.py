"""Large files are written past the page cache where the system can; their bytes are the same wherever it stops."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from lakebed.lake import storage as module
from lakebed.lake.storage import PAGE, Storage

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


def _page_aligned() -> memoryview:
    memory = np.empty(len(CONTENT) + PAGE, np.uint8)
    memory = memory[-memory.ctypes.data % PAGE :][: len(CONTENT)]
    memory[:] = np.frombuffer(CONTENT, np.uint8)
    return memory.data


@pytest.mark.parametrize("accepted", [None, 0, 1000, 3 * PAGE, 1 << 20])
def test_a_large_file_is_whole_wherever_the_direct_write_gives_up(tmp_path, monkeypatch, accepted) -> None:
    write, taken = os.pwrite, []

    def short(file: int, data: memoryview, offset: int) -> int:
        if accepted is not None and offset >= accepted:
            raise OSError(errno.EINVAL, "Invalid argument")
        taken.append(write(file, data if accepted is None else data[: min(accepted - offset, PAGE)], offset))
        return taken[-1]

    monkeypatch.setattr(os, "pwrite", short)
    # In no file is a byte of the one before it.
    for _ in range(2):
        Storage(tmp_path).write("tensors/large", _page_aligned())
        assert Storage(tmp_path).read("tensors/large") == CONTENT
    assert sum(taken) <= 2 * len(CONTENT)


def test_a_disk_that_does_not_keep_up_is_not_waited_for(tmp_path, monkeypatch) -> None:
    direct, write = [], os.pwrite

    def slow(file: int, data: memoryview, offset: int) -> int:
        direct.append(1)
        return write(file, data, offset)

    clock = iter(range(1000))
    monkeypatch.setattr(os, "pwrite", slow)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    storage = Storage(tmp_path)
    for _ in range(3):
        storage.write("tensors/large", _page_aligned())
        assert storage.read("tensors/large") == CONTENT
    assert len(direct) <= 1

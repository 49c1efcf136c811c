"""How many threads torch may use; set once, explicitly, by whoever starts the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_threads(count: int | None) -> int:
    """Sets and returns the number of threads: `count`, or one per core this process may use, at most 8."""
    chosen = count or min(
        8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(chosen)
    return chosen


@contextmanager
def small_work(largest_side: int) -> Iterator[None]:
    """One thread while small matrices are decomposed: two threads that wait for each other between tiny LAPACK calls take
    several times longer than one, as soon as anything else runs on the machine."""
    before = torch.get_num_threads()
    if largest_side <= 512:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

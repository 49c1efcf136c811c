"""One function over many items, a few at a time in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, in the items' order, as `map` gives it, on as many threads as there are cores.

    NumPy lets go of the interpreter while it computes. Items are taken in the caller's thread, only a few ahead of the
    results, so that what they hold does not pile up. The first error, in the items' order, is raised.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


__all__ = ["side_by_side"]

"""How many threads torch may use; set once, explicitly, by whoever starts the work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

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


def work_in_the_background() -> None:
    """Called by a thread that works beside a training which uses every core: one torch thread, low priority.

    OpenMP threads that wait for a busy core spin, and a training step waits for the slowest of its own.
    """
    torch.set_num_threads(1)
    with suppress(
        AttributeError, OSError
    ):  # Linux gives threads priorities of their own; elsewhere it stays as it is
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def start_single_threaded(thread: threading.Thread, ready: threading.Event) -> None:
    """Starts a thread that calls `work_in_the_background` and then sets `ready`.

    torch keeps the number of threads per thread, but also as the default of those to come: that is put back here.
    """
    count = torch.get_num_threads()
    thread.start()
    ready.wait()
    torch.set_num_threads(count)


def thread_pool(count: int, name: str, torch_threads: int) -> ThreadPoolExecutor:
    """Threads that compute on so many torch threads each."""
    before, started = torch.get_num_threads(), threading.Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(torch_threads)
        started.wait()

    pool = ThreadPoolExecutor(count, name, start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    # torch takes the last number set for the default of every thread to come.
    torch.set_num_threads(before)
    return pool

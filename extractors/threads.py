"""How many threads torch may use; set once, explicitly, by whoever starts the work."""

from __future__ import annotations

import os

import torch


def set_threads(count: int | None) -> int:
    """Sets and returns the number of threads: `count`, or one per core this process may use, at most 8."""
    chosen = count or min(
        8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(chosen)
    return chosen

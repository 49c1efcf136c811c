"""Replays whole runs from anchor to anchor and compares: what `lakebed verify --replay` does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..lake import Lake
from .progress import Progress, Silent
from .runs import ReplayMismatch, run_row
from .states import StateReader


@dataclass(frozen=True)
class ReplayResult:
    """Steps replayed by run, and what differed, one line each."""

    replayed: dict[str, int]
    differing: list[str]


def verify_replay(lake: Lake, run: str | None = None, progress: Progress | None = None) -> ReplayResult:
    """Replays every recorded block of exact traces and compares its end with the stored anchor, bit for bit."""
    progress = progress or Silent()
    replayed: dict[str, int] = {}
    differing: list[str] = []
    for name in lake.runs() if run is None else [run]:
        if run_row(lake, name)["store"] != "exact":
            continue
        reader = StateReader(lake, name)
        anchors = reader.anchors()
        blocks = [(a, b) for a, b in pairwise(anchors) if reader.is_recorded(a, b)]
        progress.start(f"replaying {name}", len(blocks))
        replayed[name] = 0
        for start, stop in blocks:
            try:
                replayed[name] += reader.verify_replay(start, stop)
            except ReplayMismatch as error:
                differing.append(str(error))
            progress.advance(note=f"step {stop}")
    return ReplayResult(replayed, differing)

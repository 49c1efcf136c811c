"""What extractions by workers are tested with: needs of every kind, and units whose process is killed half-way.

needs() at STEPS, over `attribution_lake`; `Mortal(executor, folder)` kills the process of the first piece once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lakebed.extractors.executor import Executor, Work
from lakebed.extractors.making import make_piece
from lakebed.extractors.progress import Progress
from lakebed.lake.datasets import (
    ACTIVATIONS,
    ATTRIBUTIONS,
    MOMENTS,
    READOUTS,
    SCALAR_CHANGES,
    SVD,
    UPDATE_NORMS,
    WEIGHTS,
    Need,
    attribution_parameters,
    scalar_change_parameters,
)

from tests.attribution_lake import HEAD, STAGE

STEPS = "0:24"
_SCALAR = {
    "head": HEAD,
    "rank": 4,
    "stage": STAGE,
    "support_key_role": "support_key",
    "distractor_key_role": "key_distractors",
}
_PROBE = {"probe": "probe"}
_PAIRS = {"pair_type": ("support_value",)}


def needs() -> tuple[Need, ...]:
    """Tensors whose step axis all workers extend, rows of forward passes, and what lies between steps."""
    return (
        Need(SVD),
        Need(WEIGHTS),
        Need(MOMENTS),
        Need(READOUTS, _PROBE),
        Need(ACTIVATIONS, {**_PROBE, "layout": "roles"}),
        Need(ATTRIBUTIONS, attribution_parameters("qk_rank_separation", _SCALAR, **_PAIRS)),
        Need(SCALAR_CHANGES, scalar_change_parameters("qk_rank_separation", _SCALAR, **_PAIRS)),
        Need(UPDATE_NORMS),
    )


class Bar:
    """Notes what a progress bar would show."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.notes: list[str] = []

    def start(self, label: str, total: int, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, done: int = 1, note: str = "") -> None:
        self.done += done
        self.notes.append(note)


class _Deadly:
    """Progress that ends its process at the second step, the first time."""

    def __init__(self, inner: Progress, mark: Path) -> None:
        self._inner, self._mark, self._left = inner, mark, 2

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._inner.start(label, total, done)

    def advance(self, done: int = 1, note: str = "") -> None:
        self._inner.advance(done, note)
        self._left -= 1
        if not self._left and not self._mark.exists():
            self._mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)


def make_and_die(progress: Progress, mark: str, **arguments: Any) -> None:
    """`make_piece`, killed at the second step the first time."""
    make_piece(_Deadly(progress, Path(mark)), **arguments)


def fail(progress: Progress, how: str) -> None:
    """A unit that prints, and goes wrong."""
    print("so far so good")
    raise ValueError(f"nothing\ncan be done about {how}")


def sleep_and_tell(progress: Progress, value: int) -> tuple[int, str]:
    """A unit that takes half a second; what it was given, and the machine of the cluster it was done on."""
    import ray

    progress.start("sleeping", 4)
    for _ in range(4):
        time.sleep(0.125)
        progress.advance()
    return value, ray.get_runtime_context().get_node_id()


@dataclass(frozen=True)
class Mortal:
    """Another executor, with the first of its units killed half-way."""

    inner: Executor
    folder: Path

    @property
    def workers(self) -> int:
        return self.inner.workers

    @property
    def mark(self) -> Path:
        """Holds the pid of the process that was killed."""
        return self.folder / "killed"

    def run(self, units: Iterable[Work], progress: Progress) -> list[Any]:
        first, *others = units
        deadly = Work.of(first.name, make_and_die, first.parts, mark=str(self.mark), **first.arguments)
        return self.inner.run([deadly, *others], progress)

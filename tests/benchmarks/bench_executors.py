"""Four scans: one after another on one core, on two local processes of one thread each, and on Ray.

One process that may use every core writes on a second one while it computes; that is timed beside the same held to one core,
which is what a worker has for itself where there are as many workers as cores.

A scan is what `extract` does for one seed's run: every stage, head and ablation over its probe, at every checkpoint; the four
are of copies of one run, since training others would take longer than the rest and change nothing here. Local processes are
forks of one that has imported torch, which is started with the first of them, and that is counted; Ray is started once, as a
cluster is there already, and said apart. Processor seconds are those of the scans alone: on a machine that has other work they
say what wall time cannot.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lakebed.engine.config import load_config
from lakebed.extractors.executor import Executor, LocalProcesses, Sequential, Work
from lakebed.extractors.plan import extract
from lakebed.extractors.progress import Progress, Silent
from lakebed.extractors.ray_executor import RayExecutor
from lakebed.extractors.seeds import train_seed
from lakebed.lake import Lake
from lakebed.lake.datasets import ATTENTION, HEAD_WRITES, INTERVENTIONS, READOUTS, SVD, Need
from lakebed.lake.interventions import ZERO_EACH, intervention_parameters

SCANS, STEPS, REPEATS, RUN = 4, 64, 2, "seed"
_PROBE = {"probe": "probe"}
_QUERY = {**_PROBE, "query_role": "prediction"}
NEEDS = (
    Need(SVD),
    Need(READOUTS, _PROBE),
    Need(ATTENTION, _QUERY),
    Need(HEAD_WRITES, _QUERY),
    Need(INTERVENTIONS, intervention_parameters(ZERO_EACH)),
)


class OneCore(Sequential):
    """This process, with its writing threads, on a single core."""

    def run(self, units: Iterable[Work], progress: Progress) -> list[Any]:
        """Results, in order."""
        cores = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(cores)})
            return super().run(units, progress)
        finally:
            os.sched_setaffinity(0, cores)


def build(path: Path) -> None:
    """A short run with a checkpoint at every step, and its probe."""
    config = load_config("demo", num_steps=STEPS, checkpoint_every_steps=1)
    train_seed(Silent(), str(path), RUN, json.loads(config.canonical_json()), "probe", "cpu")


def scan(progress: Progress, lake: str) -> tuple[int, float, float]:
    """(rows, wall seconds, processor seconds) of one scan."""
    wall, processor = time.perf_counter(), time.process_time()
    with Lake.open(lake) as opened:
        made = extract(opened, RUN, NEEDS, progress=progress)
    return made.rows, time.perf_counter() - wall, time.process_time() - processor


def _measure(executor: Executor, base: Path, folder: Path) -> tuple[float, float, float, int]:
    """(wall seconds, processor seconds of the scans, longest scan, rows) of all four, on new lakes.

    They stay to the end: ext4 makes files two to four times slower for seconds after it has deleted many.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    lakes = [Path(shutil.copytree(base, place / f"scanned-{at}.lake")) for at in range(SCANS)]
    units = [Work.of(lake.stem, scan, lake=str(lake)) for lake in lakes]
    started = time.perf_counter()
    found: list[tuple[int, float, float]] = executor.run(units, Silent())
    wall = time.perf_counter() - started
    rows, walls, processors = zip(*found, strict=True)
    return wall, sum(processors), max(walls), sum(rows)


def run() -> dict[str, float | str]:
    """Medians, and ratios of them."""
    torch.set_num_threads(1)
    ray = RayExecutor(None, 2)
    executors: dict[str, Executor] = {
        "one core": OneCore(),
        "one process": Sequential(),
        "local": LocalProcesses(2),
        "ray": ray,
    }
    taken: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in executors}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "seed.lake"
        build(base)
        try:
            starting = _timed(lambda: ray.run([], Silent()))
            for _ in range(REPEATS):
                for name, executor in executors.items():
                    taken[name].append(_measure(executor, base, Path(folder)))
        finally:
            ray.close()
    assert len({rows for of in taken.values() for _, _, _, rows in of}) == 1
    wall, processor, longest = (
        {name: statistics.median(found[at] for found in of) for name, of in taken.items()} for at in range(3)
    )
    return {
        "what": f"four scans of {STEPS + 1} checkpoints, two workers of one thread",
        "a scan alone, s": longest["one process"],
        **{f"{name}, s": wall[name] for name in executors},
        **{f"{name}, s of processor": processor[name] for name in executors},
        "starting Ray on this machine, s": starting,
        "local over one core (>= 1.7)": wall["one core"] / wall["local"],
        "ray over one core": wall["one core"] / wall["ray"],
        "local over one process that writes on another core": wall["one process"] / wall["local"],
        "ray / local (<= 1.1)": wall["ray"] / wall["local"],
        "ray / local, of processor": processor["ray"] / processor["local"],
    }


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

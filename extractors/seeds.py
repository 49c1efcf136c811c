"""Units of work on the run of one seed: train it, record a window of it again, extract what a report reads.

Each opens the lake by its URI, takes and returns what JSON can hold, and done again does only what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.config import RunConfig
from ..engine.symbolic_kv import generate_benchmark
from ..lake import Lake
from ..lake.datasets import TRACE, Need
from ..lake.drop import drop, plan_drop
from .plan import extract
from .probes import ProbeError, build_probe
from .progress import Progress
from .training import load, trace, train


def base_config(name_or_path: str) -> str:
    """A configuration as canonical JSON; raises ConfigError."""
    return load(name_or_path).canonical_json()


def read_config(config: Mapping[str, Any]) -> str:
    """A changed configuration as canonical JSON; raises ConfigError where it is none any more."""
    return RunConfig.from_json(json.dumps(dict(config))).canonical_json()


def train_seed(
    progress: Progress, lake: str, run: str, config: Mapping[str, Any], probe: str, device: str
) -> dict[str, Any]:
    """Trains a run to its end, with a checkpoint every `checkpoint_every_steps`, and builds its probe if it has none."""
    read = RunConfig.from_json(json.dumps(dict(config)))
    benchmark = generate_benchmark(read.benchmark)
    with Lake.open_or_create(lake) as opened:
        result = train(
            opened, run, read, record="none", device=device, benchmark=benchmark, progress=progress
        )
        if not _probes(opened, run, probe):
            build_probe(opened, run, probe, benchmark=benchmark)
    return {"run": run, "step": result.step, "steps_taken": result.steps_taken}


def record_window(
    progress: Progress,
    lake: str,
    run: str,
    into: str,
    from_step: int,
    start: int,
    end: int,
    probe: str,
    device: str,
) -> dict[str, Any]:
    """Goes on from the checkpoint of `run` at `from_step` in a run of its own, `into`, and records `start` to `end`.

    The steps have the bits of the run's own. The new run gets the same probe. Raises what `trace` raises, and ProbeError
    for a probe that cannot be built a second time.
    """
    with Lake.open(lake) as opened:
        result = trace(
            opened,
            run,
            from_step,
            end - from_step,
            into=into,
            device=device,
            require_historical_replay=True,
            record_from=start,
            progress=progress,
        )
        _copy_probe(opened, run, into, probe)
    return {"run": into, "step": result.step, "steps_taken": result.steps_taken}


def extract_needs(
    progress: Progress, lake: str, run: str, needs: Sequence[Mapping[str, Any]], steps: str, device: str
) -> dict[str, Any]:
    """Makes what these needs of reports lack, in one pass over the steps."""
    with Lake.open(lake) as opened:
        result = extract(
            opened, run, [Need(**dict(need)) for need in needs], steps, progress=progress, device=device
        )
    return {"run": run, "rows": result.rows, "bytes": result.bytes}


def plain_needs(needs: Iterable[Need]) -> list[dict[str, Any]]:
    """Needs as a unit takes them."""
    return [{"dataset": of.dataset, "parameters": dict(of.parameters), "steps": of.steps} for of in needs]


def drop_trace(lake: Lake, run: str) -> int:
    """Drops the recorded steps of a run; the bytes that it frees. What was extracted from them stays."""
    if run not in lake.runs():
        return 0
    what = plan_drop(lake, run, {TRACE})
    drop(lake, what)
    return what.bytes


@dataclass(frozen=True)
class Pace:
    """How fast a configuration trains here: seconds of a training step and of an evaluation; parameters of the model."""

    step: float
    evaluation: float
    parameters: int


def time_training(config: Mapping[str, Any], steps: int, warmup: int = 2) -> Pace:
    """Times a few training steps and one evaluation. Writes nothing."""
    from ..engine.training import TrainingLoop

    read = RunConfig.from_json(json.dumps(dict(config)))
    loop = TrainingLoop(read, generate_benchmark(read.benchmark))
    for _ in range(warmup):
        loop.train_step()
    started = time.perf_counter()
    for _ in range(steps):
        loop.train_step()
    stepped = time.perf_counter()
    loop.evaluate()
    return Pace(
        (stepped - started) / steps,
        time.perf_counter() - stepped,
        sum(of.numel() for of in loop.model.parameters()),
    )


def _probes(lake: Lake, run: str, name: str) -> list[dict[str, Any]]:
    rows = lake.table("probes", run).collect().to_dicts()
    return [row for row in rows if row["probe"] == name]


def _copy_probe(lake: Lake, run: str, into: str, name: str) -> None:
    """Builds in `into` the probe that `run` has, from the same benchmark by the same recipe."""
    held = next(iter(_probes(lake, run, name)), None)
    if held is None or _probes(lake, into, name):
        return
    if held["source"] != "symbolic_kv":
        raise ProbeError(
            f"probe {name!r} of run {run!r} was imported, and has no causal patch pairs to attribute updates on: give a "
            "--probe that `lakebed probe build` made"
        )
    recipe = json.loads(held["metadata"])
    made = build_probe(
        lake,
        into,
        name,
        recipe["splits"],
        recipe["examples_per_split"],
        recipe["seed"],
        recipe["max_pairs_per_type"],
    )
    if made.sha256 != held["sha256"]:
        raise ProbeError(
            f"probe {name!r} of run {into!r} has other records than that of run {run!r}: build both with this version"
        )

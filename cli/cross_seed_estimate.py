"""`--dry-run`: what each stage would do, in bytes and seconds, from the plan and a few timed steps. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..lake import Lake
from ..lake.errors import LakeNotFound
from ..lake.steps import summarize_steps
from .cross_seed_plan import CrossSeed
from .cross_seed_units import is_scanned, is_trained, unrecorded

if TYPE_CHECKING:
    from ..extractors.seeds import Pace

_FLOAT = 4
_TIMED_STEPS = 8
# Records of a probe as `lakebed probe build` makes it, 24 of each of four splits; of a record's longest length, the share of
# positions that have a role.
_RECORDS, _WITH_ROLE = 96, 0.45
_ANCHOR_EVERY = 64
# In training steps, as measured on the demo: a forward pass over a batch; singular vectors of every matrix, whose arithmetic
# is to a step's as the width to the batch's tokens; what recording adds to a step; what a recorded step's replay and its
# products with a gradient take; the gradient over as many tokens as a batch has.
_FORWARD, _SINGULAR, _RECORDING, _REPLAY, _GRADIENT = 1 / 3, 270.0, 0.1, 0.5, 1.5
# Seconds: a report with its charts, and starting a worker.
_REPORT, _START = 2.5, 4.0


def estimate(plan: CrossSeed, stages: Sequence[str], workers: int) -> dict[str, Any]:
    """What `--dry-run` prints. Seconds are those of the whole, with `workers` units at a time, each as fast as one alone."""
    from ..extractors.seeds import time_training

    pace = time_training(plan.seed_config(plan.seeds[0]), _TIMED_STEPS)
    done, seeds = _done(plan), len(plan.seeds)
    rows: list[dict[str, Any]] = []
    for stage in stages:
        size, seconds = _of_seed(plan, stage, pace)
        left = seeds - done.get(stage, 0)
        started = _START if left and seconds else 0
        rows.append(
            {
                "stage": stage,
                "seeds": seeds,
                "done": seeds - left,
                "bytes": round(left * size),
                "seconds": round(left * seconds / min(workers, seeds) + started, 1),
            }
        )
    return {
        "dry_run": True,
        "lake": plan.lake,
        "out": plan.out,
        "runs": [plan.run(seed) for seed in plan.seeds],
        "heads": [f"L{layer}H{head} on {plan.stage_of(layer)}" for layer, head in plan.all_heads],
        "scan_steps": summarize_steps(plan.scan_steps),
        "recorded_steps": f"{plan.adam_start}:{plan.adam_end}, reached from step {plan.trace_from}",
        "parameters": pace.parameters,
        "seconds_per_training_step": round(pace.step, 5),
        "workers": workers,
        "stages": rows,
        "bytes": sum(row["bytes"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def table(plan: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{'stage':12} {'seeds':>5} {'done':>5} {'MB':>10} {'seconds':>9}"]
    for row in plan["stages"]:
        lines.append(
            f"{row['stage']:12} {row['seeds']:5} {row['done']:5} {row['bytes'] / 1e6:10,.1f} {row['seconds']:9,.0f}"
        )
    return "\n".join([*lines, f"{'in all':24} {plan['bytes'] / 1e6:10,.1f} {plan['seconds']:9,.0f}"])


def _of_seed(plan: CrossSeed, stage: str, pace: Pace) -> tuple[float, float]:
    """(bytes, seconds) of a stage for one seed; of arrays the bytes before they are compressed."""
    config = json.loads(plan.config)
    batch, evaluated = int(config["batch_size"]), int(config["eval_every_steps"])
    model = pace.parameters * _FLOAT
    scans, recorded = len(plan.scan_steps), plan.adam_end - plan.adam_start
    length, width = plan.model["max_seq_len"], plan.model["d_model"]
    match stage:
        case "trace-scan":
            # Weights and two moments; the moments before the first step are known without being stored.
            evaluations = plan.end_step // evaluated + 1
            return (3 * scans - 2) * model, plan.end_step * pace.step + evaluations * pace.evaluation
        case "scan":
            coordinates = _RECORDS * _WITH_ROLE * length * len(plan.all_heads) * 2
            size = coordinates * width / plan.model["n_heads"] * _FLOAT + 2 * model
            steps = _FORWARD * _RECORDS / batch + _SINGULAR * width / (batch * length)
            return scans * size, scans * steps * pace.step + len(plan.all_heads) * _REPORT
        case "trace-adam":
            size = (recorded + 3 * (recorded // _ANCHOR_EVERY + 2)) * model
            return size, (plan.adam_end - plan.trace_from) * pace.step * (1 + _RECORDING)
        case "adam":
            steps = _REPLAY + len(plan.candidates) * _GRADIENT * plan.max_route_pairs / batch
            return 0.0, recorded * steps * pace.step + len(plan.candidates) * _REPORT
    return 0.0, 0.0


def _done(plan: CrossSeed) -> dict[str, int]:
    """Seeds of which a stage is done already."""
    try:
        with Lake.open(plan.lake) as lake:
            runs = lake.runs()
            trained = [seed for seed in plan.seeds if plan.run(seed) in runs and is_trained(lake, plan, seed)]
            return {
                "trace-scan": len(trained),
                "scan": sum(_is_scanned(lake, plan, seed) for seed in trained),
                "trace-adam": sum(not unrecorded(lake, plan, seed) for seed in plan.seeds),
            }
    except LakeNotFound:
        return {}


def _is_scanned(lake: Lake, plan: CrossSeed, seed: int) -> bool:
    return all(is_scanned(lake, plan, seed, layer, head) for layer, head in plan.all_heads)

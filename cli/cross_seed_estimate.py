"""`--dry-run`: what each stage would do, in bytes and seconds, from the plan and a few timed steps. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..lake import Lake
from ..lake.errors import LakeNotFound
from ..lake.steps import summarize_steps
from .cross_seed_plan import CrossSeed
from .cross_seed_units import is_scanned, is_trained, unrecorded

_FLOAT = 4
# Records of a probe as `lakebed probe build` makes it: 24 of each of four splits.
_RECORDS = 96
# Of a training step's time: a forward pass, what recording adds, and what a step's replay and products cost beside the
# gradient of a candidate.
_FORWARD, _RECORDING, _REPLAY = 1 / 3, 0.1, 0.5
_ANCHOR_EVERY = 64
_TIMED_STEPS = 8
_REPORT_SECONDS = 1.0


def estimate(plan: CrossSeed, stages: Sequence[str], workers: int) -> dict[str, Any]:
    """What `--dry-run` prints. Seconds are those of the whole, with `workers` units at a time, each as fast as one alone."""
    from ..extractors.seeds import time_training

    step, parameters, tokens = time_training(plan.seed_config(plan.seeds[0]), _TIMED_STEPS)
    done = _done(plan)
    seeds, scans, recorded = len(plan.seeds), len(plan.scan_steps), plan.adam_end - plan.adam_start
    side_by_side = min(workers, seeds)
    record_tokens = tokens / _batch(plan)
    per_seed: dict[str, tuple[float, float]] = {
        "configs": (0, 0),
        "trace-scan": ((3 * scans - 2) * parameters * _FLOAT, plan.end_step * step),
        "scan": (
            scans * _scan_bytes(plan, parameters, record_tokens),
            scans * step * _FORWARD * _RECORDS * record_tokens / tokens
            + len(plan.all_heads) * _REPORT_SECONDS,
        ),
        "select": (0, 0),
        "trace-adam": (
            (recorded + 3 * (recorded // _ANCHOR_EVERY + 2)) * parameters * _FLOAT,
            (plan.adam_end - plan.trace_from) * step * (1 + _RECORDING),
        ),
        "adam": (
            0,
            recorded * step * (_REPLAY + len(plan.candidates) * plan.max_route_pairs * record_tokens / tokens)
            + len(plan.candidates) * _REPORT_SECONDS,
        ),
    }
    rows: list[dict[str, Any]] = []
    for stage in stages:
        size, seconds = per_seed[stage]
        left = seeds - done.get(stage, 0)
        rows.append(
            {
                "stage": stage,
                "seeds": seeds,
                "done": seeds - left,
                "bytes": round(left * size),
                "seconds": round(left * seconds / side_by_side, 1),
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
        "parameters": parameters,
        "seconds_per_training_step": round(step, 5),
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


def _batch(plan: CrossSeed) -> int:
    size: int = json.loads(plan.config)["batch_size"]
    return size


def _scan_bytes(plan: CrossSeed, parameters: int, record_tokens: float) -> float:
    """Of a step: two coordinate lists per head and position, and singular vectors of about the model's own size, twice."""
    width = plan.model["d_model"] // plan.model["n_heads"]
    cells: float = _RECORDS * record_tokens * len(plan.all_heads) * 2 * width + 2 * parameters
    return cells * _FLOAT


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

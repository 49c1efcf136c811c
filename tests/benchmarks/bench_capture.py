"""Capture of all six datasets, against the bare batched forward pass on the same batches, at the formation model.

Run it: ``python -m tests.benchmarks capture``. The model has 626,048 parameters, the probe 96 records per split; weights are
those of initialization moved a little per step, since what they are does not change the work. Ratios are of medians within
one process; writing is included, the reading of weights too. CPU seconds are beside wall seconds, because writing overlaps
computing. Peak memory is that of one process each, at 2 and at 24 checkpoints.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lakebed.engine.config import load_config
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.tap import TrainingState
from lakebed.extractors.dataset import Context
from lakebed.extractors.plan import extract
from lakebed.extractors.probe_batches import load_probe, make_batches
from lakebed.extractors.probes import build_probe
from lakebed.extractors.runs import RunInfo, model_parameters, register_run
from lakebed.extractors.states import StateReader
from lakebed.extractors.trace_writer import write_state
from lakebed.lake import Lake
from lakebed.lake.datasets import (
    ACTIVATIONS,
    ATTENTION,
    COMPONENT_LOGITS,
    HEAD_WRITES,
    QK_COORDINATES,
    READOUTS,
    Need,
)

RUN = "bench"
CHECKPOINTS = 24
_PROBE = {"probe": "probe"}


def needs(layout: str) -> list[Need]:
    """The six datasets, one head and stage for the coordinates."""
    head = {"head": "L2H1", "stage": "layer_1_post_mlp", "layernorm_mode": "head_ln1"}
    return [
        Need(ACTIVATIONS, {**_PROBE, "layout": layout}),
        Need(ATTENTION, {**_PROBE, "query_role": "prediction"}),
        Need(READOUTS, _PROBE),
        Need(HEAD_WRITES, {**_PROBE, "query_role": "prediction"}),
        Need(COMPONENT_LOGITS, _PROBE),
        Need(QK_COORDINATES, {**_PROBE, **head}),
    ]


def build(path: Path, examples_per_split: int = 96) -> None:
    """A lake with checkpoints of the formation model and its probe."""
    config = load_config("formation")
    torch.manual_seed(config.seed)
    model = SymbolicKVDecoder(config.model, config.benchmark.vocabulary_size)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    info = RunInfo(source="bench", adapter="symbolic_kv", config=config.canonical_json(), seed=config.seed)
    with Lake.create(path) as lake:
        register_run(lake, RUN, info, model_parameters(model, {}))
        for step in range(CHECKPOINTS):
            write_state(lake, RUN, step, TrainingState(weights, {}, {}), f"step {step}")
            weights = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()}
        build_probe(lake, RUN, examples_per_split=examples_per_split)


def bare_forward(lake: Lake) -> tuple[Callable[[], None], int, int]:
    """One bare pass over the probe's whole records, cut into batches as for the extraction; its events and positions."""
    context = Context(lake, RUN)
    model = context.adapter().load_model(StateReader(lake, RUN).read(0).weights)
    batches = make_batches(load_probe(lake, RUN, "probe"), model, [], ["all"])

    @torch.no_grad()
    def run() -> None:
        for batch in batches.batches:
            _ = model.forward(batch.tokens).logits

    tokens = sum(batch.tokens.numel() for batch in batches.batches)
    return run, batches.data.events, tokens


def _spent(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def _peak_megabytes(lake: Path, checkpoints: int, layout: str) -> float:
    """Of a process that extracts that many checkpoints."""
    program = (
        "from tests.benchmarks.bench_capture import extract_copy; "
        f"extract_copy({str(lake)!r}, '0:{checkpoints - 1}', {layout!r}); "
        # Not getrusage: its maximum survives exec, and so would be this process's own.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1]) / 1024


def extract_copy(lake_path: str | Path, steps: str, layout: str) -> tuple[float, float, int]:
    """Extracts into a copy of the lake; wall and CPU seconds of the extraction, and its bytes."""
    copy = Path(tempfile.mkdtemp()) / "copy.lake"
    shutil.copytree(lake_path, copy)
    try:
        with Lake.open(copy) as lake:
            made = []
            wall, cpu = _spent(lambda: made.append(extract(lake, RUN, needs(layout), steps)))
            return wall, cpu, made[0].bytes
    finally:
        shutil.rmtree(copy.parent)


def run(checkpoints: int = 14, repeats: int = 2) -> dict[str, float | str]:
    """Medians over repeats; the bare pass is measured between the extractions, so that both see the same machine."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "bench.lake"
        build(path)
        with Lake.open(path) as lake:
            bare, events, tokens = bare_forward(lake)
        bare()
        extract_copy(path, "0", "roles")  # what is imported once is not the work of a checkpoint
        spent: dict[str, list[tuple[float, float]]] = {"bare": [], "roles": [], "all": []}
        size = {}
        for _ in range(repeats):
            for layout in ("roles", "all"):
                spent["bare"] += [_spent(bare) for _ in range(checkpoints)]
                wall, cpu, written = extract_copy(path, f"0:{checkpoints - 1}", layout)
                spent[layout].append((wall / checkpoints, cpu / checkpoints))
                size[layout] = written / checkpoints
        wall, cpu = (
            {name: statistics.median(of[kind] for of in taken) for name, taken in spent.items()}
            for kind in (0, 1)
        )
        peak = {count: _peak_megabytes(path, count, "roles") for count in (2, CHECKPOINTS)}
    finally:
        shutil.rmtree(folder)
    return {
        "what": f"six datasets of {events} events, {tokens:,} token positions a checkpoint, 626,048 parameters",
        "threads": torch.get_num_threads(),
        "bare_forward_seconds": wall["bare"],
        "roles_over_bare_forward": wall["roles"] / wall["bare"],
        "all_over_bare_forward": wall["all"] / wall["bare"],
        "roles_over_bare_forward_cpu": cpu["roles"] / cpu["bare"],
        "all_over_bare_forward_cpu": cpu["all"] / cpu["bare"],
        "megabytes_per_checkpoint_roles": size["roles"] / 1e6,
        "megabytes_per_checkpoint_all": size["all"] / 1e6,
        "peak_megabytes_2_checkpoints": peak[2],
        "peak_megabytes_24_checkpoints": peak[CHECKPOINTS],
    }


def main() -> None:
    for name, value in run().items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.4g')}")


if __name__ == "__main__":
    main()

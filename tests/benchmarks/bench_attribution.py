"""Stepwise Adam-state attribution over 64 recorded steps of the formation model: all terms, every part of the model.

Held against the forward and backward passes of the scalar alone, one record per pair as a script would stack them, and
against what the reference toolkit does for every step: load a checkpoint file, recompute the batch's gradient, differentiate
the scalar, form the terms, multiply. Both are measured on some of the steps, in the same process, and counted up linearly.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lakebed.engine.config import load_config
from lakebed.engine.scalars import build_scalar
from lakebed.engine.scalars.measure import Frozen, PairBatch, Task, measure
from lakebed.engine.training import TrainingLoop, language_model_loss
from lakebed.extractors.dataset import Context
from lakebed.extractors.forward import probe_of
from lakebed.extractors.pair_sets import PairSelection, load_pairs
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import ATTRIBUTIONS, UPDATE_NORMS, Need, attribution_parameters

RUN, STEPS, SAMPLED = "ref", 64, 6
SCALAR = {
    "head": "L2H1",
    "rank": 8,
    "stage": "layer_1_post_mlp",
    "layernorm_mode": "head_ln1",
    "record_side": "clean",
    "score_query_role": "prediction",
    "support_key_role": "support_value",
    "distractor_key_role": "value_distractors",
}
PAIRS = {"pair_type": ("support_value",), "max_pairs_per_type": 64}
REPORT = (
    *(
        "--head",
        "L2H1",
        "--rank",
        "8",
        "--context-stage",
        "layer_1_post_mlp",
        "--score-query-role",
        "prediction",
    ),
    *("--support-key-role", "support_value", "--distractor-key-role", "value_distractors"),
    *("--route-pair-source-type", "support_value"),
)


def build(path: Path) -> None:
    """A recorded run and its probe."""
    config = load_config("formation")
    with Lake.create(path) as lake:
        train(lake, RUN, config, num_steps=STEPS + 1)
        build_probe(lake, RUN, examples_per_split=96)


def needs() -> list[Need]:
    """The scalar's attributions, and the norms of the updates."""
    return [
        Need(ATTRIBUTIONS, attribution_parameters("qk_rank_separation", SCALAR, **PAIRS)),
        Need(UPDATE_NORMS),
    ]


def _seconds(job: Callable[[], Any]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def _batches(context: Context, repeated: bool) -> list[PairBatch]:
    """The pairs' batches; `repeated` as a script stacks them, one record per pair."""
    pairs = load_pairs(context, PairSelection("probe", ("support_value",), (), 64), ["clean"])
    batches = pairs.batches({"clean": probe_of(context, "probe")}, "cpu")
    if repeated:
        for batch in batches:
            records = batch.pairs.sides["clean"]
            object.__setattr__(records, "distinct", records.tokens)
            object.__setattr__(records, "row", torch.arange(len(records.tokens)))
    return batches


def _pass(context: Context, weights: dict[str, torch.Tensor], batches: list[PairBatch]) -> Task:
    """Forward and backward of the scalar at some weights."""
    leaves = {name: of.detach().clone().requires_grad_() for name, of in weights.items()}
    task = Task(build_scalar("qk_rank_separation", SCALAR), cells=1)
    measure(context.adapter().load_model(leaves), leaves, batches, [task])
    return task


def _batch_gradient(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    """The loss gradient of one training batch."""
    batch = loop.encoded("train").batch(loop.stream.next())
    loop.optimizer.zero_grad()
    loss, _ = language_model_loss(loop.model(batch.token_ids, batch.attention_mask), batch)
    loss.backward()
    return {name: of.grad for name, of in loop.model.named_parameters() if of.grad is not None}


def _reference_step(
    folder: Path, step: int, loop: TrainingLoop, context: Context, batches: list[PairBatch]
) -> float:
    """One step as the reference takes it: files, the batch's gradient, the scalar's, the terms, the products."""
    before, after = (torch.load(folder / f"step_{at:06d}.pt", weights_only=True) for at in (step, step + 1))
    loop.model.load_state_dict(before["model"], strict=False)
    gradient = _batch_gradient(loop)
    task = _pass(context, before["model"], batches)
    end = Task(task.scalar, Frozen(task.frozen.basis, list(task.frozen.per_batch)))
    measure(context.adapter().load_model(after["model"]), {}, batches, [end])
    total = 0.0
    for name, theta in before["model"].items():
        g, m, v = gradient[name], before["exp_avg"][name], before["exp_avg_sq"][name]
        denominator = (0.98 * v + 0.02 * g * g).sqrt() + 1e-8
        current, carried, decay = -1e-5 * g / denominator, -9e-5 * m / denominator, -1e-6 * theta
        terms = (-1e-4 * g, current, carried, current + carried, decay, current + carried + decay)
        for term in (*terms, after["model"][name] - theta):
            of = task.gradients.get(name)
            total += float(term.square().sum()) + (0.0 if of is None else float((of[0] * term).sum()))
    return total


def _write_checkpoints(lake: Lake, folder: Path, first: int, count: int) -> None:
    context = Context(lake, RUN)
    for state in context.reader.iterate(range(first, first + count + 1)):
        held = {
            "model": state.weights,
            "exp_avg": state.exp_avg,
            "exp_avg_sq": state.exp_avg_sq,
        }
        held = {name: {key: of.clone() for key, of in part.items()} for name, part in held.items()}
        torch.save({"step": state.step, **held}, folder / f"step_{state.step:06d}.pt")


PEAK = """
import sys, torch
torch.set_num_threads(2)
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from tests.benchmarks.bench_attribution import RUN, needs
with Lake.open(sys.argv[1]) as lake:
    extract(lake, RUN, needs(), sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _peak_megabytes(path: Path, steps: str) -> float:
    """Of a process that attributes those steps."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), steps],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split()[-1]) / 1024


def run() -> dict[str, float | str]:
    """Seconds of a step, ratios, and the query afterwards."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.lake"
        build(path)
        small = Path(folder) / "small.lake"
        shutil.copytree(path, small)
        with Lake.open(path) as lake:
            context = Context(lake, RUN)
            _write_checkpoints(lake, Path(folder), 20, SAMPLED)
            weights = {name: of.clone() for name, of in context.reader.read(20).weights.items()}
            plain, own = _batches(context, True), _batches(context, False)
            loop = TrainingLoop(load_config("formation"))
            _pass(context, weights, plain)
            _batch_gradient(loop)

            passes = _seconds(lambda: [_pass(context, weights, plain) for _ in range(SAMPLED)]) / SAMPLED
            own_passes = _seconds(lambda: [_pass(context, weights, own) for _ in range(SAMPLED)]) / SAMPLED
            taken = _seconds(lambda: extract(lake, RUN, needs(), f"0:{STEPS}")) / STEPS
            again = _seconds(lambda: [_pass(context, weights, plain) for _ in range(SAMPLED)]) / SAMPLED
            reference = (
                _seconds(
                    lambda: [
                        _reference_step(Path(folder), 20 + at, loop, context, plain) for at in range(SAMPLED)
                    ]
                )
                / SAMPLED
            )
            size = sum(of.bytes for of in lake.receipts.all(RUN, ATTRIBUTIONS))
        query = min(_query_seconds(path, folder) for _ in range(3))
        peaks = [_peak_megabytes(small, steps) for steps in ("0:8", f"0:{STEPS}")]
    bare = (passes + again) / 2
    return {
        "what": f"{STEPS} recorded steps, 626,048 parameters, 64 pairs, 7 fields over 1,636 parts",
        "attribution, ms a step": 1000 * taken,
        "forward and backward of the scalar alone, ms": 1000 * bare,
        "attribution / passes alone (<= 2.5)": taken / bare,
        "passes over distinct records, ms": 1000 * own_passes,
        "reference's way, ms a step": 1000 * reference,
        "reference's way / attribution (>= 5)": reference / taken,
        "bytes a step": size / STEPS,
        "query of the 64 steps, s (< 1)": query,
        "peak memory, 64 / 8 steps": peaks[1] / peaks[0],
        "peak memory, MB": peaks[1],
    }


def _query_seconds(path: Path, folder: str) -> float:
    words = [sys.executable, "-c", "import sys; from lakebed.cli import main; main()", "query"]
    words += ["bilinear-qk-rank-adam-state-attribution", "--lake", str(path), "--run", RUN, *REPORT]
    words += ["--out", f"{folder}/out", "--overwrite", "--chart-format", "none"]
    return _seconds(lambda: subprocess.run(words, check=True, capture_output=True))


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

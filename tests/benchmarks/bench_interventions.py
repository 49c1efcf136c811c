"""Interventions on the formation model's residual stages, against one whole forward pass per intervention.

Run it: ``python -m tests.benchmarks interventions``. The model has 626,048 parameters, the probe 16 records per split; weights
are those of initialization moved a little, since what they are does not change the work. At every stage `COUNT` subspaces of
rank 16 are removed at the prediction, in both query modes: together for all queries of a record, and each query in a run of
its own. The engine's time includes the untouched run, the edits and the reading of answers; the other way's is the bare
batched forward pass alone, over the same records, or over one record per query. One torch thread, rounds interleaved.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lakebed.engine.forward import Model
from lakebed.engine.interventions import Bases, Engine, Intervention, read_answers, read_interventions
from lakebed.engine.scalars import Records
from lakebed.extractors.dataset import Context
from lakebed.extractors.forward import probe_of
from lakebed.extractors.interventions import _cut
from lakebed.extractors.pair_sets import event_records
from lakebed.extractors.probe_batches import DEFAULT_BATCH_SIZE
from lakebed.extractors.states import StateReader
from lakebed.lake import Lake

from .bench_capture import RUN, build

COUNT, ROUNDS, STEP = 8, 3, 4


def removed(stage: str, role: str = "prediction") -> list[Intervention]:
    """Subspaces of one size, removed at a role's positions."""
    return read_interventions(
        [
            {
                "name": f"{stage} {seed}",
                "edits": [
                    {
                        "stage": stage,
                        "operation": "remove",
                        "subspace": "random",
                        "rank": 16,
                        "seed": seed,
                        "position_role": role,
                    }
                ],
            }
            for seed in range(COUNT)
        ]
    )


def heads(model: Model) -> list[Intervention]:
    """Every head of the model zeroed, one at a time."""
    labels = [f"L{layer}H{head}" for layer in range(model.n_layers) for head in range(model.n_heads)]
    return read_interventions([{"name": label, "edits": [{"zero": label}]} for label in labels])


@torch.no_grad()
def engine_pass(model: Model, batches: list[Records], asked: list[Intervention], union: bool) -> None:
    """All interventions on all batches, the untouched run included, down to answers."""
    bases = Bases(model, {})
    for records in batches:
        read_answers(model, Engine(model, records, bases=bases, union=union).run(asked), records.choices)


@torch.no_grad()
def whole_pass(model: Model, tokens: list[torch.Tensor]) -> None:
    """One whole forward pass over all records."""
    for part in tokens:
        _ = model.forward(part).logits


def _pieces(batches: list[Records], union: bool) -> Iterator[torch.Tensor]:
    """Records, or one per query, as many at a time as suits a processor's cache."""
    for records in batches:
        tokens = records.distinct if union else records.tokens
        yield from tokens.split(max(1, DEFAULT_BATCH_SIZE // tokens.shape[1]))


def _seconds(job: Callable[[], Any]) -> float:
    started = time.process_time()
    job()
    return time.process_time() - started


def run() -> dict[str, float | str]:
    """CPU seconds of an intervention at each stage in both modes, and ratios to a whole pass."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "i.lake", 16)
        with Lake.open(Path(folder) / "i.lake") as lake:
            context = Context(lake, RUN)
            model = context.adapter().load_model(StateReader(lake, RUN).read(STEP).weights)
            data = probe_of(context, "probe")
            batches = [event_records(data, part, "cpu") for part in _cut(data, np.arange(data.events))]
    stages = model.stages
    asked = {stage: removed(stage) for stage in stages}
    asked["support"] = removed("layer_0_post_mlp", "support_value")
    asked["heads"] = heads(model)
    spent: dict[tuple[str, bool], list[float]] = {}
    for _ in range(ROUNDS):
        for union in (True, False):
            tokens = list(_pieces(batches, union))
            spent.setdefault(("whole", union), []).append(_seconds(partial(whole_pass, model, tokens)))
            for name, of in asked.items():
                job = partial(engine_pass, model, batches, of, union)
                spent.setdefault((name, union), []).append(_seconds(job) / len(of))
    each = {key: statistics.median(times) for key, times in spent.items()}
    found: dict[str, float | str] = {
        "what": f"626,048 parameters, {len(data.lengths)} records, {data.events:,} queries, {COUNT} interventions a stage"
    }
    for union, mode in ((True, "batch_union"), (False, "single_query")):
        whole = each["whole", union]
        found[f"{mode}: whole pass, ms"] = 1000 * whole
        for stage in stages:
            least = " (>= 4)" if stage in stages[-3:] else ""
            found[f"{mode}: whole pass / intervention at {stage}{least}"] = whole / each[stage, union]
        mean = statistics.fmean(each[stage, union] for stage in stages)
        found[f"{mode}: whole pass / intervention, all stages (>= 2)"] = whole / mean
        found[f"{mode}: interventions per second, all stages"] = 1 / mean
        found[f"{mode}: whole pass / removal at the support, layer_0_post_mlp"] = (
            whole / each["support", union]
        )
    found["whole pass / zeroed head, all heads"] = each["whole", True] / each["heads", True]
    return found

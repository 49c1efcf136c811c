"""Value codes replaced: extraction against the bare forward pass and against a pass with hooks per run, and the report.

Seconds of the processor in one process, extraction and passes interleaved; the passes with hooks fit no map and write nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lakebed.engine.config import load_config
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.extractors.dataset import Context
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.training import train
from lakebed.extractors.value_code_examples import load_examples
from lakebed.lake import Lake
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report

STEPS = "2:22:4"
RECORDS = 256
CONTROLS = ("shuffled_answer_value", "wrong_support_value", "random_subspace")
# A stage after the last attention, and one before it.
STAGES = {"layer_1_post_mlp": "layer_2_post_mlp", "layer_0_post_mlp": "layer_1_post_mlp"}


def _report(source: str, target: str, seed: int) -> Any:
    return load_report("value-code-transfer-rescue").parse(
        {
            **{
                "run": "ref",
                "steps": STEPS,
                "max_records": RECORDS,
                "random_seed": seed,
                "basis_rank": (16,),
            },
            **{"source_stage": source, "target_stage": target, "group_by": "answer_value"},
            **{"source_position_role": "support_value", "target_position_role": "prediction"},
            **{"context_stage": source, "context_position_role": "prediction", "context_rank": 16},
            "control": CONTROLS,
        }
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def run() -> dict[str, float | str]:
    """Ratios at the sizes of the formation run."""
    torch.set_num_threads(1)
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as folder, Lake.create(f"{folder}/rescue.lake") as lake:
        with contextlib.redirect_stdout(io.StringIO()):
            train(lake, "ref", load_config("formation"), num_steps=22, anchor_every=1)
            build_probe(lake, "ref", splits=("validation_iid",), examples_per_split=RECORDS)
        for source, target in STAGES.items():
            found |= _compare(lake, source, target)
        asked = _report(*next(iter(STAGES.items())), seed=0)
        out = Path(folder) / "out"
        run_report(lake, asked, out, chart_formats=[])
        report = min(
            _seconds(lambda: run_report(lake, asked, out, overwrite=True, chart_formats=[])) for _ in range(3)
        )
        found["report, s of the processor without process start"] = report
    return found


def _compare(lake: Lake, source: str, target: str) -> dict[str, float | str]:
    bare, hooked = _passes(lake, _report(source, target, 0).needs()[0].parameters, target)
    times: dict[str, list[float]] = {"extraction": [], "bare": [], "hooked": []}
    for seed in range(4):
        # Another seed is another spec: everything is made again.
        needs, steps = _report(source, target, seed).needs(), len(range(2, 23, 4))
        times["extraction"].append(_seconds(lambda needs=needs: extract(lake, "ref", needs, STEPS)) / steps)
        times["bare"].append(_seconds(bare))
        times["hooked"].append(_seconds(hooked))
    best = {name: min(of[1:]) for name, of in times.items()}
    return {
        f"{target}: extraction of 12 runs / one bare pass": best["extraction"] / best["bare"],
        f"{target}: 12 passes with hooks / extraction": best["hooked"] / best["extraction"],
    }


def _passes(lake: Lake, parameters: Any, target: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """One pass over the records as they are measured, and one with a hook for each run."""
    context = Context(lake, "ref")
    weights = context.reader.read(22).weights
    examples = load_examples(context, parameters)
    last = np.zeros(len(examples.data.lengths), np.int64)
    np.maximum.at(last, examples.record, examples.prediction)
    batches = [torch.from_numpy(batch.tokens) for batch in examples.batches(last)]
    model = context.adapter().load_model(weights, "cpu")
    decoder = SymbolicKVDecoder(load_config("formation").model, model.vocabulary_size).eval()
    decoder.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def bare() -> None:
        for tokens in batches:
            model.forward(tokens)

    @torch.no_grad()
    def hooked() -> None:
        handle = decoder.blocks[int(target.split("_")[1])].ff.register_forward_hook(
            lambda module, given, output: output + 0.01
        )
        for tokens in batches * 12:
            decoder(tokens)
        handle.remove()

    return bare, hooked


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

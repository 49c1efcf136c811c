"""The eight observation reports, extraction included, against a plain PyTorch script that answers the same questions.

The script (`plain_script.py`) is timed on some events of one checkpoint and counted linearly up to all of them; its
leave-one-out loops grow faster than that, so the ratio is understated.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lakebed.engine.config import load_config
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.extractors.probes import build_probe
from lakebed.extractors.states import StateReader
from lakebed.extractors.training import train
from lakebed.lake import Lake

from tests.benchmarks import plain_script

CHECKPOINTS, EVERY = 14, 2
SPLIT = "validation_iid"
HEAD = ("--head-layer", "2", "--head", "1")
STAGE = ("--context-stage", "layer_1_post_mlp")
ROLES = ("--score-query-role", "prediction", "--support-key-role", "support_value")
VALUE_STAGES = ("layer_0_post_mlp", "layer_1_post_mlp", "layer_2_post_mlp", "final_norm")
TRANSFER = ("--source-stage", "layer_1_post_mlp", "--target-stage", "layer_2_post_mlp")
TRANSFER_ROLES = ("--source-position-role", "support_value", "--target-position-role", "prediction")
CONTROLS = ("shuffled_answer_value", "wrong_support_value", "random_subspace")


def _repeated(option: str, values: Sequence[object]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (option, str(value)))


REPORTS: dict[str, tuple[str, ...]] = {
    "attention-geometry-trace": (),
    "path-logit-decomposition": ("--ablation-top-k", "3"),
    "contextual-key-separability": (*HEAD, *STAGE, "--projection-rank", "8", "--include-full-residual"),
    "contextual-svd-alignment": (
        *(*HEAD, *STAGE, "--role", "prediction", "--role-spec", "support_value:position_role=support_value"),
        *("--plot-left-role", "prediction", "--plot-right-role", "support_value"),
    ),
    "bilinear-qk-match-separation": (
        *(*HEAD, *STAGE, "--rank", "8"),
        *("--support-role", "support_value", "--distractor-role", "value_distractors"),
    ),
    "attention-retrieval-chain-report": (
        *(*HEAD, *ROLES, "--distractor-key-role", "value_distractors"),
        *("--pair-type", "support_value", "--pair-type", "distractor", "--record-side", "clean"),
    ),
    "value-code-subspace-report": (
        *(
            *_repeated("--stage", VALUE_STAGES),
            *_repeated("--position-role", ("prediction", "support_value")),
        ),
        *("--group-by", "answer_value"),
    ),
    "value-code-transfer-map-report": (
        *(*TRANSFER, *TRANSFER_ROLES, "--group-by", "answer_value"),
        *(*_repeated("--basis-rank", (4, 8, 16)), *_repeated("--control", CONTROLS)),
    ),
}
_COMMAND = "import sys; from lakebed.cli import main; main()"


def _timed(*words: str) -> float:
    started = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", _COMMAND, *words], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"lakebed {' '.join(words)}\n{ran.stderr}")
    return time.perf_counter() - started


def build(folder: Path, examples_per_split: int = 96) -> tuple[Path, list[int]]:
    """A formation run of a few steps with a probe: the lake's path and the steps to look at."""
    path, steps = folder / "chain.lake", [EVERY * i for i in range(CHECKPOINTS)]
    config = load_config("formation")
    with Lake.open_or_create(path) as lake, contextlib.redirect_stdout(io.StringIO()):
        train(lake, "ref", config, num_steps=steps[-1])
        build_probe(lake, "ref", splits=(SPLIT,), examples_per_split=examples_per_split)
    return path, steps


def run(events: int = 24, reports: Sequence[str] = tuple(REPORTS)) -> dict[str, float | str]:
    """Seconds of extraction, of each report, of the script, and the ratio of the wholes."""
    torch.set_num_threads(2)
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, steps = build(Path(folder))
        common = ("--lake", str(path), "--run", "ref")
        listed = ",".join(map(str, steps))
        queries = 0.0
        options = [word for name in reports for word in REPORTS[name]]
        extraction = _timed("extract", *_repeated("--for", reports), *common, "--steps", listed, *options)
        for name in reports:
            words = ("--split", SPLIT, "--out", f"{folder}/{name}", "--chart-format", "none")
            found[f"{name}, s (< 1)"] = _timed(
                "query", name, *common, "--steps", listed, *REPORTS[name], *words
            )
            queries += float(found[f"{name}, s (< 1)"])
        script, total = _script(path, steps, events, Path(folder))
    found |= {
        "extraction for all, s": extraction,
        "all queries, s": queries,
        f"plain script, s (measured on {events} of {total} events of 1 of {CHECKPOINTS} checkpoints)": script,
        "plain script / (extraction + queries) (>= 10)": script / (extraction + queries),
    }
    return found


def _script(path: Path, steps: Sequence[int], count: int, folder: Path) -> tuple[float, int]:
    with Lake.open(path) as lake:
        weights = next(iter(StateReader(lake, "ref").iterate([steps[-1]]))).weights
        events = _events(lake)
    config = load_config("formation")
    probe = SymbolicKVDecoder(config.model, weights["token_embedding.weight"].shape[0])
    probe.load_state_dict(weights, strict=False)
    torch.save(probe.state_dict(), folder / "step.pt")

    def make() -> SymbolicKVDecoder:
        return SymbolicKVDecoder(config.model, probe.vocabulary_size)

    def seconds(question: Callable[..., Any]) -> float:
        started = time.perf_counter()
        plain_script.answer(question, [folder / "step.pt"], events[:count], make, folder / "rows.jsonl")
        return time.perf_counter() - started

    seconds(plain_script.bilinear)  # warm
    every = sum(seconds(question) for question in plain_script.QUESTIONS) * len(steps)
    return (every + seconds(plain_script.ablations)) * len(events) / count, len(events)


def _events(lake: Lake) -> list[dict[str, Any]]:
    rows = lake.sql(
        "SELECT e.event, x.tokens, e.prediction_position AS p, e.answer_token AS answer, e.competitors AS wrong "
        "FROM events e JOIN probe_examples x USING (run, probe, example) "
        f"WHERE e.probe = 'probe' AND e.split = '{SPLIT}' ORDER BY e.event"
    ).fetchall()
    places = lake.sql(
        "SELECT event, role, kind, list(position ORDER BY position) FROM positions WHERE probe = 'probe' "
        "AND (kind = 'partition' OR role IN ('support_value', 'value_distractors')) GROUP BY event, role, kind"
    ).fetchall()
    found = []
    of: dict[int, dict[tuple[str, str], list[int]]] = {}
    for event, role, kind, positions in places:
        of.setdefault(event, {})[kind, role] = positions
    for event, tokens, p, answer, wrong in rows:
        at = of[event]
        found.append(
            {
                "tokens": tokens,
                "p": p,
                "answer": answer,
                "wrong": torch.tensor(wrong),
                "support": at["role", "support_value"][0],
                "distractors": [q for q in at["role", "value_distractors"] if q <= p],
                "partition": {role: held for (kind, role), held in at.items() if kind == "partition"},
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

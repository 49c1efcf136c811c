"""The formation run before its first step, with the probe of 24 records per split (seed 17): what published numbers are of.

lake = build(folder)      # run "formation", step 0 extracted
"""

from __future__ import annotations

from pathlib import Path

from lakebed.engine.config import load_config
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import ACTIVATIONS, DEFAULT_PROBE, QK_COORDINATES, READOUTS, SVD, Need

RUN = "formation"
HEAD, STAGE = "L2H1", "layer_1_post_mlp"
_PROBE = {"probe": DEFAULT_PROBE}
NEEDS = (
    Need(SVD),
    Need(READOUTS, _PROBE),
    Need(ACTIVATIONS, {**_PROBE, "layout": "roles"}),
    Need(QK_COORDINATES, {**_PROBE, "head": HEAD, "stage": STAGE, "layernorm_mode": "head_ln1"}),
)


def build(folder: Path) -> Path:
    """Draws the benchmark, records the initial weights (and one step), builds the probe, extracts step 0."""
    path = Path(folder) / "formation.lake"
    settings = load_config("formation", **{"evaluation.max_eval_batches": 1})
    benchmark = generate_benchmark(settings.benchmark)
    with Lake.create(path) as lake:
        train(lake, RUN, settings, num_steps=1, benchmark=benchmark)
        build_probe(lake, RUN, examples_per_split=24, seed=17, benchmark=benchmark)
        extract(lake, RUN, NEEDS, "0")
    return path

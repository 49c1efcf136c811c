"""A small symbolic-KV run with a probe and every dataset of forward passes: what tests of extractors and reports share.

lake = build(folder)      # run "r", probe "probe", steps 0 to 150, states stored every 50
extract_all(lake)         # all datasets, at STEPS
"""

from __future__ import annotations

from pathlib import Path

from lakebed.engine.config import RunConfig, load_config
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import (
    ACTIVATIONS,
    ATTENTION,
    COMPONENT_LOGITS,
    DEFAULT_PROBE,
    HEAD_WRITES,
    INTERVENTIONS,
    MOMENTS,
    QK_COORDINATES,
    READOUTS,
    SVD,
    WEIGHTS,
    Need,
)
from lakebed.lake.interventions import ZERO_EACH, intervention_parameters

RUN = "r"
NUM_STEPS = 150
STEPS = (0, 50, 100, 150)
EXAMPLES_PER_SPLIT = 8
HEAD, STAGE = "L1H1", "layer_0_post_mlp"

_PROBE = {"probe": DEFAULT_PROBE}
_CORRUPTED = {"probe": f"{DEFAULT_PROBE}.corrupted"}
NEEDS = (
    Need(SVD),
    Need(ACTIVATIONS, {**_PROBE, "layout": "roles"}),
    Need(ACTIVATIONS, {**_PROBE, "layout": "all"}),
    Need(READOUTS, _PROBE),
    Need(ATTENTION, {**_PROBE, "query_role": "prediction"}),
    Need(HEAD_WRITES, {**_PROBE, "query_role": "prediction"}),
    Need(COMPONENT_LOGITS, _PROBE),
    Need(QK_COORDINATES, {**_PROBE, "head": HEAD, "stage": STAGE, "layernorm_mode": "head_ln1"}),
    Need(QK_COORDINATES, {**_PROBE, "head": HEAD, "stage": STAGE, "layernorm_mode": "none"}),
    Need(INTERVENTIONS, intervention_parameters(ZERO_EACH)),
    Need(ACTIVATIONS, {**_CORRUPTED, "layout": "roles"}),
    Need(READOUTS, _CORRUPTED),
    Need(HEAD_WRITES, {**_CORRUPTED, "query_role": "prediction"}),
)


def config() -> RunConfig:
    """The demo's task and less data; two layers, four heads."""
    sizes = {
        f"benchmark.{split}.num_samples": 32
        for split in ("validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual")
    }
    return load_config(
        "demo",
        **{
            "num_steps": NUM_STEPS,
            "eval_every_steps": 1000,
            "checkpoint_every_steps": 50,
            "model.d_model": 32,
            "model.n_heads": 4,
            "model.d_ff": 64,
            "benchmark.train.num_samples": 1200,
            **sizes,
        },
    )


def build(folder: Path) -> Path:
    """Trains, and builds the probe; returns the lake's path."""
    path = Path(folder) / "probed.lake"
    settings = config()
    benchmark = generate_benchmark(settings.benchmark)
    with Lake.create(path) as lake:
        train(lake, RUN, settings, benchmark=benchmark, anchor_every=50)
        build_probe(
            lake, RUN, examples_per_split=EXAMPLES_PER_SPLIT, max_pairs_per_type=4, benchmark=benchmark
        )
    return path


def extract_all(path: Path) -> None:
    """Every dataset of forward passes, and svd, at STEPS; weights and moments of two updates."""
    with Lake.open(path) as lake:
        extract(lake, RUN, NEEDS, ",".join(map(str, STEPS)))
        extract(lake, RUN, (Need(WEIGHTS), Need(MOMENTS)), "50:52")

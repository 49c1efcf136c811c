"""A short recorded training with a probe, weights and moments of its last steps: what tests of downstream scalars share.

lake = build(folder)      # run "r", probe "probe", steps 0 to 40, states of 34 to 40
"""

from __future__ import annotations

from pathlib import Path

from lakebed.engine.config import RunConfig, load_config
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import MOMENTS, WEIGHTS, Need

RUN = "r"
NUM_STEPS = 40
HEADS = 4


def config() -> RunConfig:
    """Two layers of four heads; a learning rate at which forty steps move everything."""
    splits = ("validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual")
    return load_config(
        "tiny",
        **{
            "num_steps": NUM_STEPS,
            "batch_size": 12,
            "eval_every_steps": 1000,
            "checkpoint_every_steps": 1000,
            "model.d_model": 32,
            "model.n_layers": 2,
            "model.n_heads": HEADS,
            "model.d_ff": 32,
            "model.embedding_std": 0.3,
            "optimization.learning_rate": 0.01,
            "optimization.warmup_steps": 5,
            "optimization.weight_decay": 0.05,
            "benchmark.train.num_samples": 96,
            **{f"benchmark.{split}.num_samples": 12 for split in splits},
        },
    )


def build(folder: Path) -> Path:
    """Trains, and builds the probe; returns the lake's path."""
    path = Path(folder) / "downstream.lake"
    settings = config()
    benchmark = generate_benchmark(settings.benchmark)
    with Lake.create(path) as lake:
        train(lake, RUN, settings, benchmark=benchmark, anchor_every=20)
        build_probe(lake, RUN, examples_per_split=3, max_pairs_per_type=8, benchmark=benchmark)
        extract(lake, RUN, (Need(WEIGHTS), Need(MOMENTS)), f"34:{NUM_STEPS}")
    return path

"""A short recorded training with a probe, weights and moments of some steps: what tests of updates to a head's match share.

lake = build(folder)      # run "r", probe "probe", steps 0 to 24, states of 0 to 6 and 24

The learning rate differs from step to step, and gradients are clipped in some steps and not in others.
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
NUM_STEPS = 24
HEADS = 2
HEAD, STAGE = "L1H1", "layer_0_post_mlp"


def config() -> RunConfig:
    """Two layers of two heads, eight wide."""
    splits = ("validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual")
    return load_config(
        "tiny",
        **{
            "num_steps": NUM_STEPS,
            "batch_size": 8,
            "eval_every_steps": 1000,
            "checkpoint_every_steps": 1000,
            "model.d_model": 16,
            "model.n_layers": 2,
            "model.n_heads": HEADS,
            "model.d_ff": 24,
            "model.embedding_std": 0.3,
            "optimization.learning_rate": 0.01,
            "optimization.warmup_steps": 12,
            "optimization.weight_decay": 0.05,
            "optimization.grad_clip_norm": 2.0,
            "benchmark.train.num_samples": 64,
            **{f"benchmark.{split}.num_samples": 12 for split in splits},
        },
    )


def build(folder: Path) -> Path:
    """Trains, and builds the probe; returns the lake's path."""
    path = Path(folder) / "attribution.lake"
    settings = config()
    benchmark = generate_benchmark(settings.benchmark)
    with Lake.create(path) as lake:
        train(lake, RUN, settings, benchmark=benchmark, anchor_every=8)
        splits = ("validation_iid", "heldout_pairs")
        build_probe(
            lake, RUN, splits=splits, examples_per_split=2, max_pairs_per_type=16, benchmark=benchmark
        )
        extract(lake, RUN, (Need(WEIGHTS), Need(MOMENTS)), f"0:6,{NUM_STEPS}")
    return path

"""A short recorded training with a probe, weights and moments of its last steps: what tests of downstream scalars share.

lake = build(folder)      # run "r", probe "probe" of a record per split, steps 0 to 40, states of 34 to 40
"""

from __future__ import annotations

from pathlib import Path

from lakebed.engine.config import RunConfig
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import MOMENTS, WEIGHTS, Need

from tests.extractors.conftest import small_config

RUN = "r"
NUM_STEPS = 40
HEADS = 4


def config() -> RunConfig:
    """Two layers of four heads; a learning rate at which forty steps move everything, and clipping in some of them."""
    return small_config(
        **{
            "num_steps": NUM_STEPS,
            "model.d_ff": 32,
            "model.embedding_std": 0.3,
            "optimization.learning_rate": 0.01,
            "optimization.weight_decay": 0.05,
            "optimization.grad_clip_norm": 0.55,
        }
    )


def build(folder: Path) -> Path:
    """Trains, and builds the probe; returns the lake's path."""
    path = Path(folder) / "downstream.lake"
    settings = config()
    benchmark = generate_benchmark(settings.benchmark)
    with Lake.create(path) as lake:
        train(lake, RUN, settings, benchmark=benchmark, anchor_every=20)
        # Every pair keeps its corrupted record, so that the first pairs of a type are of several splits.
        build_probe(lake, RUN, examples_per_split=1, max_pairs_per_type=8, benchmark=benchmark)
        extract(lake, RUN, (Need(WEIGHTS), Need(MOMENTS)), f"34:{NUM_STEPS}")
    return path

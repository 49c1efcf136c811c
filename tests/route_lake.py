"""The run of downstream scalars with probes of held-out and of training records: what tests of routes share.

lake = build(folder)      # run "r", probes "probe" and "train-probe", states of 34 to 40
"""

from __future__ import annotations

from pathlib import Path

from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import DEFAULT_PROBE, WEIGHTS, Need

from tests.downstream_lake import HEADS, NUM_STEPS, RUN, config

TRAIN_PROBE = "train-probe"
_PROBES = {DEFAULT_PROBE: {}, TRAIN_PROBE: {"splits": ("train",)}}

__all__ = ["HEADS", "RUN", "TRAIN_PROBE", "build", "config"]


def build(folder: Path) -> Path:
    """Trains, and builds both probes; returns the lake's path."""
    path = Path(folder) / "routes.lake"
    settings = config()
    benchmark = generate_benchmark(settings.benchmark)
    with Lake.create(path) as lake:
        train(lake, RUN, settings, benchmark=benchmark, anchor_every=20)
        for name, of in _PROBES.items():
            build_probe(
                lake, RUN, name, **of, examples_per_split=3, max_pairs_per_type=8, benchmark=benchmark
            )
        extract(lake, RUN, (Need(WEIGHTS),), f"34:{NUM_STEPS}")
    return path

"""The lake of downstream scalars with a second probe, of training records: what tests of routes share.

lake = build(folder)      # run "r", probes "probe" and "train-probe"
"""

from __future__ import annotations

from pathlib import Path

from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.probes import build_probe
from lakebed.lake import Lake

from tests import downstream_lake
from tests.downstream_lake import HEADS, RUN, config

TRAIN_PROBE = "train-probe"

__all__ = ["HEADS", "RUN", "TRAIN_PROBE", "build", "config"]


def build(folder: Path) -> Path:
    """Trains, and builds both probes; returns the lake's path."""
    path = downstream_lake.build(folder)
    benchmark = generate_benchmark(config().benchmark)
    with Lake.open(path) as lake:
        build_probe(
            lake,
            RUN,
            TRAIN_PROBE,
            ("train",),
            examples_per_split=3,
            max_pairs_per_type=8,
            benchmark=benchmark,
        )
    return path

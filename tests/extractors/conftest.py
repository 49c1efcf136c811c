"""A small task, a small transformer and lakes that were trained on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lakebed.engine.config import RunConfig, load_config
from lakebed.engine.symbolic_kv import Benchmark, generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import Need

from tests.attribution_lake import RUN
from tests.shared_work import STEPS, needs

NUM_STEPS = 48


@pytest.fixture(autouse=True)
def _one_thread():
    """A command run inside a test sets as many threads as there are cores, and sums over two threads have other last bits."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def small_config(**overrides) -> RunConfig:
    sizes = {
        f"benchmark.{split}.num_samples": 48 for split in ("validation_iid", "test_iid", "heldout_pairs")
    }
    settings = {
        "num_steps": NUM_STEPS,
        "batch_size": 12,
        "eval_every_steps": 20,
        "checkpoint_every_steps": 16,
        "model.d_model": 32,
        "model.n_layers": 2,
        "model.n_heads": 4,
        "model.d_ff": 48,
        "model.embedding_std": 0.05,
        "optimization.learning_rate": 3e-3,
        "optimization.warmup_steps": 5,
        "benchmark.train.num_samples": 100,
        "benchmark.structural_ood.num_samples": 24,
        "benchmark.counterfactual.num_samples": 24,
        **sizes,
    }
    return load_config("tiny", **{**settings, **overrides})


@pytest.fixture(scope="session")
def config() -> RunConfig:
    return small_config()


@pytest.fixture(scope="session")
def benchmark_data(config) -> Benchmark:
    return generate_benchmark(config.benchmark)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, config, benchmark_data) -> Path:
    """A lake with run `exact` (anchors every 16), run `full` (everything at every step), and svd of both at 0:48:12."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("trained") / "t.lake"
    with Lake.create(path) as lake:
        train(lake, "exact", config, benchmark=benchmark_data, anchor_every=16)
        train(lake, "full", config, benchmark=benchmark_data, anchor_every=16, store="full")
        extract(lake, "exact", [Need("svd")], "0:48:12")
    return path


@pytest.fixture(scope="session")
def extracted_alone(tmp_path_factory, attribution_lake_path) -> Path:
    """What one process leaves of `shared_work.needs()`: read it, do not write it."""
    path = tmp_path_factory.mktemp("alone") / "x.lake"
    shutil.copytree(attribution_lake_path, path)
    with Lake.open(path) as lake:
        extract(lake, RUN, needs(), STEPS)
    return path


@pytest.fixture
def lake(tmp_path):
    with Lake.create(tmp_path / "l.lake") as opened:
        yield opened


@pytest.fixture
def trained_lake(trained):
    with Lake.open(trained) as opened:
        yield opened

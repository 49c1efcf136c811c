"""A pipeline over two seeds of a small model: what tests of the pipeline and of its report share.

toml(folder)       # the base configuration, as --base-config takes it
plan(folder, …)    # the pipeline, in folder/seeds.lake and folder/out
run(plan, …)       # its stages, in this process
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from lakebed.cli.cross_seed import Pipeline
from lakebed.cli.cross_seed_plan import STAGES, CrossSeed
from lakebed.engine import configs
from lakebed.extractors.executor import Executor, Sequential
from lakebed.extractors.progress import Silent
from lakebed.extractors.seeds import base_config

SEEDS = (11, 13)


def toml(folder: Path) -> Path:
    """The demo's task with less data and a narrower model."""
    text = (Path(configs.__file__).parent / "demo.toml").read_text()
    text = text.replace("num_samples = 4000", "num_samples = 320")
    text = re.sub(r"num_samples = (512|256)", "num_samples = 40", text)
    text = text.replace("d_model = 64", "d_model = 32").replace("d_ff = 128", "d_ff = 64")
    path = Path(folder) / "small.toml"
    path.write_text(text)
    return path


def plan(folder: Path, **changed: Any) -> CrossSeed:
    """Checkpoints at 0, 20, 40 and 50; growth from 20 to 50; steps 22 to 26 recorded."""
    made = CrossSeed(
        lake=str(Path(folder) / "seeds.lake"),
        out=str(Path(folder) / "out"),
        config=base_config(str(toml(folder))),
        run_name="small",
        seeds=SEEDS,
        end_step=50,
        layers=2,
        heads=2,
        window_start=20,
        window_end=50,
        adam_start=22,
        adam_end=26,
        rank=4,
        scan_every=20,
    )
    return dataclasses.replace(made, **changed)


def run(
    of: CrossSeed,
    *stages: str,
    cleanup: bool = False,
    overwrite: bool = False,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Runs the stages, all by default; what the command prints."""
    of.check()
    ordered = [stage for stage in STAGES if stage in (stages or STAGES)]
    return Pipeline(of, executor or Sequential(), Silent(), overwrite).run(ordered, cleanup)

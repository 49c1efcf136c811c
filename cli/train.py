"""`lakebed train`."""

from __future__ import annotations

import json
from typing import Any

import click

from .options import lake_option, recording_options, run_option


@click.command(
    epilog="Example: lakebed train demo --lake demo.lake --run demo --num-steps 200. "
    "Configs inside the package: demo, formation, generalization, generalization_decay, tiny."
)
@click.argument("config", metavar="CONFIG")
@lake_option
@run_option
@click.option(
    "--num-steps", type=click.IntRange(1), help="Train up to this step [default: the config's num_steps]."
)
@click.option(
    "--record",
    default="all",
    show_default=True,
    metavar="all|none|A:B",
    help="Steps to record; elsewhere a checkpoint every checkpoint_every_steps.",
)
@recording_options
def train(config: str, lake_uri: str, run: str, num_steps: int | None, record: str, **options: Any) -> None:
    """Train CONFIG (a name or a TOML file) into run NAME, recording every step.

    An interrupted run goes on where it was when the same command is given again, with the same bits.
    """
    from ..extractors.threads import set_threads
    from ..extractors.training import load, train
    from ..lake import Lake
    from .progress import Bars

    set_threads(options.pop("threads"))
    loaded = load(config)
    with Lake.open_or_create(lake_uri) as lake, Bars() as bars:
        result = train(lake, run, loaded, num_steps=num_steps, record=record, progress=bars, **options)
    click.echo(json.dumps(training_json(lake_uri, result)))


def training_json(lake_uri: str, result: Any) -> dict[str, Any]:
    """What train and trace print."""
    accuracy = {split: of.get("answer_accuracy") for split, of in result.metrics.items()}
    return {
        "lake": lake_uri,
        "run": result.run,
        "step": result.step,
        "steps_taken": result.steps_taken,
        "steps_recorded": result.recorded,
        "seconds": round(result.seconds, 3),
        "answer_accuracy": accuracy,
    }

"""`lakebed trace`."""

from __future__ import annotations

import json
from typing import Any

import click

from .options import lake_option, recording_options, run_option
from .train import training_json


@click.command(epilog="Example: lakebed trace --lake demo.lake --run demo --from-step 500 --num-steps 64")
@lake_option
@run_option
@click.option(
    "--from-step", type=click.IntRange(0), required=True, help="Step to start from; any step the run has."
)
@click.option("--num-steps", type=click.IntRange(1), help="Steps to record.")
@click.option("--end-step", type=click.IntRange(1), help="Record up to this step (instead of --num-steps).")
@click.option(
    "--into", metavar="NAME", help="Run to write [default: the run itself at its end, else RUN@STEP]."
)
@click.option(
    "--require-historical-replay",
    is_flag=True,
    help="Refuse to start where the original batch order is unknown (an imported checkpoint).",
)
@recording_options
def trace(
    lake_uri: str, run: str, from_step: int, num_steps: int | None, end_step: int | None, **options: Any
) -> None:
    """Record steps from any step of a run: its end, the middle of its trace, or an imported checkpoint."""
    if (num_steps is None) == (end_step is None):
        raise click.UsageError("give one of --num-steps and --end-step")
    if end_step is not None and end_step <= from_step:
        raise click.UsageError(f"--end-step {end_step} does not come after --from-step {from_step}")
    from ..extractors.threads import set_threads
    from ..extractors.training import trace
    from ..lake import Lake
    from .progress import Bars

    set_threads(options.pop("threads"))
    count = num_steps if num_steps is not None else (end_step or 0) - from_step
    with Lake.open(lake_uri) as lake, Bars() as bars:
        result = trace(lake, run, from_step, count, progress=bars, **options)
    click.echo(json.dumps(training_json(lake_uri, result)))

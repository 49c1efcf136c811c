"""`lakebed extract`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .options import lake_option, run_option, steps_option, threads_option

if TYPE_CHECKING:
    from ..lake.datasets import Need


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Examples: lakebed extract svd --lake demo.lake --run demo --steps 0:600:20    "
    "lakebed extract --for weight-svd-trace --lake demo.lake --run demo",
)
@click.argument("datasets", nargs=-1, type=click.UNPROCESSED, metavar="[DATASET]...")
@click.option(
    "--for", "report", metavar="REPORT", help="Make whatever this report still needs, given its own options."
)
@lake_option
@run_option
@steps_option
@threads_option
@click.pass_context
def extract(
    context: click.Context,
    datasets: tuple[str, ...],
    report: str | None,
    lake_uri: str,
    run: str,
    steps: str | None,
    threads: int | None,
) -> None:
    """Make datasets (svd, weights) of a run, where they are missing.

    Without --steps: the steps whose weights are stored. A second call makes nothing; an interrupted one goes on.
    With --for, the report's own options may follow, as `lakebed query` takes them.
    """
    from ..extractors.plan import extract as run_extraction
    from ..extractors.threads import set_threads
    from ..lake import Lake
    from ..lake.datasets import Need
    from .progress import Bars

    if report is not None:
        needs = report_needs(report, run, steps, datasets)
    else:
        stray = next((name for name in datasets if name.startswith("-")), None)
        if stray or not datasets:
            raise click.UsageError(f"No such option: {stray}" if stray else "name a DATASET, or --for REPORT")
        needs = [Need(name) for name in datasets]
    set_threads(threads)
    with Lake.open(lake_uri) as lake, Bars() as bars:
        result = run_extraction(lake, run, needs, steps, progress=bars)
    made = {name: len(of) for name, of in result.made.items()}
    shown = {"lake": lake_uri, "run": run, "made": made, "standing": result.standing}
    click.echo(json.dumps({**shown, "rows": result.rows, "bytes": result.bytes}))


def report_needs(name: str, run: str, steps: str | None, arguments: Sequence[str]) -> list[Need]:
    """What a report with these command-line options reads; raises UnknownReport and InvalidOption."""
    from ..queries.registry import load_report
    from .query import read_report, report_options

    report = load_report(name)
    options = [option for option in report_options(report) if option.name not in ("lake", "run", "steps")]
    parser = click.Command(f"extract --for {name}", params=options, callback=lambda **values: values)
    values = parser.main(list(arguments), standalone_mode=False)
    return list(read_report(report, {**values, "run": run, "steps": steps}).needs())

"""`lakebed verify`: every file of a lake against its receipt."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from .options import lake_option

if TYPE_CHECKING:
    from ..lake import Lake
    from ..lake.verify import VerifyResult


@click.command(epilog="Example: lakebed verify --lake demo.lake --run demo")
@lake_option
@click.option("--run", metavar="NAME", help="Only this run (default: every run).")
@click.option(
    "--replay",
    is_flag=True,
    help="Also replay every recorded block and compare it with its anchor, bit for bit.",
)
def verify(lake_uri: str, run: str | None, replay: bool) -> int:
    """Check every file of the lake against the length and checksum of its receipt.

    Prints one JSON object: ok, files, bytes, damaged (path, reason, remedy, run, unit, dataset) and unreferenced
    (files that killed writers left; they are no damage, and no reader sees them). The exit status is 1 if anything
    is damaged.
    """
    from ..lake import Lake

    with Lake.open(lake_uri) as lake:
        result = _with_progress(lake, run)
        found = result.to_json()
        if replay and found["ok"]:
            from ..extractors.replay import verify_replay
            from .progress import Bars

            with Bars() as bars:
                compared = verify_replay(lake, run, bars)
            found["replayed"], found["differing"] = compared.replayed, compared.differing
            found["ok"] = not compared.differing
    click.echo(json.dumps(found, indent=2))
    return 0 if found["ok"] else 1


def _with_progress(lake: Lake, run: str | None) -> VerifyResult:
    from ..lake.verify import verify as check

    if not sys.stderr.isatty():
        return check(lake, run)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("verify"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify", total=None)

        def advance(done: int, total: int, done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        return check(lake, run, advance)

"""`lakebed gc`: removes files that no receipt names."""

from __future__ import annotations

import json
import re

import click

from .options import lake_option

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(_context: click.Context, _option: click.Parameter, text: str) -> float:
    """Seconds of a number of seconds, minutes, hours or days: 30s, 10m, 1h, 2d."""
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no age: write 30s, 10m, 1h or 2d")
    return float(int(match[1]) * _SECONDS[match[2]])


@click.command(epilog="Example: lakebed gc --lake demo.lake --dry-run && lakebed gc --lake demo.lake")
@lake_option
@click.option(
    "--older-than",
    callback=_seconds,
    default="1h",
    show_default=True,
    metavar="AGE",
    help="Leave what is younger (30s, 10m, 1h, 2d): a writer or a reader may be at work on it.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def gc(lake_uri: str, older_than: float, dry_run: bool) -> None:
    """Remove files that no receipt names: what was compacted, and what killed writers left.

    Files of units without a receipt count as left behind when they are older than --older-than, and chunks only when their
    run got no new ones for as long; what was compacted when the compaction is. Others may read and write meanwhile, if
    none of them takes longer over one query or one unit. A catalog is written again first.

    Says on stderr what will be removed; prints one JSON object: files and bytes, in all and by kind.
    """
    from ..lake import Lake
    from ..lake.collect import collect, plan_collection, totals
    from .progress import Bars

    with Lake.open(lake_uri) as lake:
        garbage = plan_collection(lake, older_than)
        kinds = totals(garbage)
        files, size = len(garbage), sum(of.bytes for of in garbage)
        parts = ", ".join(f"{of['files']:,} {kind}" for kind, of in kinds.items() if of["files"])
        what = f"{files:,} files, {size / 1e6:,.1f} MB: {parts}" if garbage else "nothing to remove"
        click.echo(what, err=True)
        if garbage and not dry_run:
            with Bars() as bars:
                bars.start("removing", files)
                collect(lake, garbage, bars.advance)
    click.echo(
        json.dumps(
            {"lake": lake_uri, "dry_run": dry_run, "files": files, "bytes": size, "kinds": kinds}, indent=2
        )
    )

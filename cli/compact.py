"""`lakebed compact`: many small files become few, for readers that would open them one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from .options import lake_option

if TYPE_CHECKING:
    from ..lake.compact import Compacted, Group


@click.command(
    epilog="Examples: lakebed compact --lake demo.lake --run demo    "
    "lakebed compact attribution_slices scalar_changes --lake demo.lake --dry-run"
)
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@lake_option
@click.option("--run", metavar="NAME", help="Only this run (default: every run).")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def compact(tables: tuple[str, ...], lake_uri: str, run: str | None, dry_run: bool) -> None:
    """Merge the small files of tables, and the receipts of their units, so that queries open few files.

    Rows stay what they are, and `extractions` keeps a row per unit. Others may read and write meanwhile. What was merged
    stays until `lakebed gc`; run `lakebed catalog` for plain duckdb users. `lakebed extract` does the same by itself when it
    has made many units.

    Says on stderr what will be done; prints one JSON object: groups of units by run and dataset, with the objects
    (files and receipts) that a reader opens, and their bytes, before and after.
    """
    from ..lake import Lake
    from ..lake.compact import compact as run_compaction
    from ..lake.compact import plan_compaction
    from .progress import Bars

    with Lake.open(lake_uri) as lake:
        groups = plan_compaction(lake, run, tables)
        for line in _announce(groups):
            click.echo(line, err=True)
        done: list[Compacted] = []
        if not dry_run:
            with Bars() as bars:
                bars.start("compacting", sum(group.files for group in groups))
                done = list(run_compaction(lake, groups, bars.advance))
    shown = [_planned(group) for group in groups] if dry_run else [_done(of) for of in done]
    sums = {"objects": _sum(shown, "objects"), "bytes": _sum(shown, "bytes")}
    click.echo(json.dumps({"lake": lake_uri, "dry_run": dry_run, **sums, "groups": shown}, indent=2))


def _announce(groups: Iterable[Group]) -> list[str]:
    lines = [
        f"{group.dataset} of run {group.run}: {len(group.receipts):,} units, {group.files:,} files and "
        f"{len(group.receipt_keys):,} receipts ({group.bytes / 1e6:,.1f} MB) → {len(group.sources)} and 1"
        for group in groups
    ]
    return lines or ["nothing to compact"]


def _planned(group: Group) -> dict[str, Any]:
    """A group before it is compacted; bytes of the files to merge."""
    return {
        "run": group.run,
        "dataset": group.dataset,
        "tables": list(group.sources),
        "units": len(group.receipts),
        "objects": {"before": group.files + len(group.receipt_keys), "after": len(group.sources) + 1},
        "bytes": {"before": group.bytes},
    }


def _done(compacted: Compacted) -> dict[str, Any]:
    """A group afterwards; one that another process compacted first is as it was planned, and not committed."""
    shown = _planned(compacted.group)
    if compacted.committed:
        shown["bytes"]["after"] = compacted.bytes
    return {**shown, "committed": compacted.committed}


def _sum(shown: Iterable[Mapping[str, Any]], name: str) -> dict[str, int]:
    parts = [group[name] for group in shown if group.get("committed", True)]
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part[key] for part in parts) for key in keys or ("before",)}

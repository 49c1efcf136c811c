"""`lakebed probe`: the fixed records on which the steps of a run are compared."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..lake.datasets import DEFAULT_PROBE
from .options import lake_option, run_option

if TYPE_CHECKING:
    from ..extractors.probes import ProbeResult
    from ..lake import Lake


@click.group(
    epilog="Example: lakebed probe build --lake demo.lake --run demo, then lakebed probe show --lake demo.lake --run demo"
)
def probe() -> None:
    """Make and show probes: fixed records with query events, on which every step of a run is measured.

    Reports over what the network computes need one; `build` makes it for the symbolic-KV task, `import` for any other.
    """


@probe.command(
    epilog="Example: lakebed probe build --lake demo.lake --run demo --probe train --split train --examples-per-split 96"
)
@lake_option
@run_option
@click.option(
    "--probe", "name", default=DEFAULT_PROBE, show_default=True, metavar="NAME", help="Name of the probe."
)
@click.option(
    "--examples-per-split",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Records sampled from each split.",
)
@click.option("--seed", type=int, default=17, show_default=True, help="The same seed gives the same records.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="SPLIT",
    help="Split to sample from, repeatable, in this order [default: validation_iid, heldout_pairs, structural_ood, "
    "counterfactual].",
)
@click.option(
    "--max-pairs-per-type",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Corrupted records kept per pair type and split.",
)
def build(lake_uri: str, run: str, name: str, splits: tuple[str, ...], **options: Any) -> None:
    """Sample a probe from a symbolic-KV run's own benchmark, with the causal patch pairs of its events.

    The same command again does nothing.
    """
    from ..extractors.probes import build_probe
    from ..lake import Lake

    chosen: dict[str, Any] = {"splits": splits} if splits else {}
    with Lake.open(lake_uri) as lake:
        result = build_probe(lake, run, name, **chosen, **options)
    _print(lake_uri, result)


@probe.command(
    "import",
    epilog="Example: lakebed probe import questions.jsonl --lake demo.lake --run demo --probe questions",
)
@click.argument("file", metavar="FILE.jsonl")
@lake_option
@run_option
@click.option("--probe", "name", required=True, metavar="NAME", help="Name of the probe.")
def import_(file: str, lake_uri: str, run: str, name: str) -> None:
    """Import a probe for any task from FILE.jsonl: tokens, events, named roles, answer and competitors.

    The format is in docs/probes.md; every line is checked, and the first bad one is named.
    """
    from ..extractors.probes import import_probe
    from ..lake import Lake

    with Lake.open(lake_uri) as lake:
        result = import_probe(lake, run, file, name)
    _print(lake_uri, result)


def _print(lake_uri: str, result: ProbeResult) -> None:
    shown = {"lake": lake_uri, "run": result.run, "probe": result.probe, "made": result.made}
    counts = {
        "sha256": result.sha256,
        "examples": result.num_examples,
        "events": result.num_events,
        "corrupted_records": result.num_corrupted,
    }
    click.echo(json.dumps({**shown, **counts}))


@probe.command(epilog="Example: lakebed probe show --lake demo.lake --run demo")
@lake_option
@run_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def show(lake_uri: str, run: str, as_json: bool) -> None:
    """Show the probes of a run: records and events by split, roles, and pairs by type with the reasons for none."""
    from ..lake import Lake

    with Lake.open(lake_uri) as lake:
        lake.require_run(run)
        found = contents(lake, run)
    if as_json:
        click.echo(json.dumps({"lake": lake_uri, "run": run, "probes": found}, ensure_ascii=False))
    elif not found:
        click.echo(
            f"run {run} has no probes yet: make one with `lakebed probe build --lake {lake_uri} --run {run}` or "
            "`lakebed probe import`"
        )
    else:
        _draw(found)


def contents(lake: Lake, run: str) -> list[dict[str, Any]]:
    """The probes of a run as plain data, in order of their names."""
    found: dict[str, dict[str, Any]] = {
        name: {
            "probe": name,
            "source": source,
            "sha256": sha256,
            "examples": examples,
            "events": events,
            "splits": {},
            "roles": {},
            "pairs": {},
        }
        for name, source, sha256, examples, events in _ask(lake, run, _PROBES)
    }
    for name, split, examples, events in _ask(lake, run, _SPLITS):
        found[name]["splits"][split] = {"examples": examples, "events": events}
    for name, role, events, smallest, largest in _ask(lake, run, _ROLES):
        found[name]["roles"][role] = {"events": events, "positions": [smallest, largest]}
    for name, pair_type, built, with_record, reason, skipped in _ask(lake, run, _PAIRS):
        entry = found[name]["pairs"].setdefault(
            pair_type, {"pairs": 0, "corrupted_records": 0, "skipped": {}}
        )
        if reason is None:
            entry.update(pairs=built, corrupted_records=with_record)
        else:
            entry["skipped"][reason] = skipped
    return list(found.values())


_PROBES = "SELECT probe, source, sha256, num_examples, num_events FROM probes WHERE run = $run ORDER BY probe"
_SPLITS = """
SELECT probe, split, count(DISTINCT example), count(*) FROM events WHERE run = $run
GROUP BY ALL ORDER BY probe, min(event)"""
_ROLES = """
SELECT probe, role, count(*), min(held), max(held)
FROM (SELECT probe, event, role, count(*) AS held FROM positions WHERE run = $run AND kind = 'role' GROUP BY ALL)
GROUP BY ALL ORDER BY probe, role"""
_PAIRS = """
SELECT probe, pair_type, count(pair_id), count(corrupted_event), skip_reason, count(skip_reason) FROM pairs
WHERE run = $run GROUP BY ALL ORDER BY probe, pair_type, skip_reason NULLS FIRST"""


def _ask(lake: Lake, run: str, query: str) -> list[tuple[Any, ...]]:
    tables = {"probes", "events", "positions", "pairs"}
    rows: list[tuple[Any, ...]] = lake.session.execute(query, {"run": run}, tables=tables).fetchall()
    return rows


def _draw(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for entry in found:
        console.print(
            f"[bold]{entry['probe']}[/]  {entry['source']}, {entry['examples']:,} records, {entry['events']:,} events, "
            f"sha256 {entry['sha256'][:16]}",
            highlight=False,
        )
        if entry["source"] == "corrupted":
            # As the probe whose pairs its records belong to.
            continue
        splits = Table("split", "records", "events")
        for split, counts in entry["splits"].items():
            splits.add_row(split, f"{counts['examples']:,}", f"{counts['events']:,}")
        console.print(splits)
        roles = Table("role", "events", "positions each")
        for role, held in entry["roles"].items():
            smallest, largest = held["positions"]
            each = str(smallest) if smallest == largest else f"{smallest} to {largest}"
            roles.add_row(role, f"{held['events']:,}", each)
        console.print(roles)
        if entry["pairs"]:
            pairs = Table("pair type", "pairs", "corrupted records", "skipped")
            for pair_type, held in entry["pairs"].items():
                skipped = "\n".join(f"{count:,} {reason}" for reason, count in held["skipped"].items())
                pairs.add_row(
                    pair_type, f"{held['pairs']:,}", f"{held['corrupted_records']:,}", skipped or "none"
                )
            console.print(pairs)
        console.print()

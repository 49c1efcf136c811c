"""`lakebed show`: what a lake holds, or the schema every lake has."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from .schema_text import SCHEMA_FORMATS, schema_text

if TYPE_CHECKING:
    from ..lake import Lake

_EVERYTHING = "*"
# Parameters that tell sets apart best come first, the others by name.
_FIRST = ("scalar", "head", "probe")


@click.command(
    epilog="""\b
Examples:
  lakebed show --lake demo.lake
  lakebed show --lake demo.lake --run demo --json
  lakebed show --schema parameter_updates"""
)
@click.option(
    "--lake",
    "lake_uri",
    envvar="LAKEBED_LAKE",
    show_envvar=True,
    metavar="PATH|URI",
    help="The lake: a folder, or a URI such as s3://bucket/my.lake.",
)
@click.option("--run", metavar="NAME", help="Only this run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option(
    "--schema",
    "table",
    is_flag=False,
    flag_value=_EVERYTHING,
    metavar="[TABLE]",
    help="Tables, tensors, views and macros with their columns, types and meanings; needs no lake.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(SCHEMA_FORMATS),
    default="text",
    show_default=True,
    help="Format of --schema.",
)
def show(lake_uri: str | None, run: str | None, as_json: bool, table: str | None, form: str) -> None:
    """Show what a lake holds: its runs, their source and configuration, datasets with their steps, and sizes.

    With --schema, show what any lake can hold: every column with its type and meaning, keys, and the SQL views of
    the tensors.
    """
    if table is not None:
        only = None if table == _EVERYTHING else table
        click.echo(schema_text(only, "json" if as_json else form), nl=False)
        return
    if lake_uri is None:
        raise click.UsageError(
            "which lake? Give --lake PATH (or set LAKEBED_LAKE), or --schema for the tables alone"
        )
    from ..lake import Lake

    with Lake.open(lake_uri) as lake:
        if run is not None:
            lake.require_run(run)
        found = contents(lake, run)
    click.echo(
        json.dumps(found, indent=2, ensure_ascii=False) if as_json else contents_text(found), nl=as_json
    )


def contents(lake: Lake, run: str | None = None) -> dict[str, Any]:
    """The lake as plain data: `runs` is a list with one object per run."""
    import polars as pl

    details = {row["run"]: row for row in lake.table("runs").collect().to_dicts()}
    sizes = pl.col("numel").sum().alias("total"), pl.len().alias("tensors")
    parameters = {
        row["run"]: row for row in lake.table("parameters").group_by("run").agg(*sizes).collect().to_dicts()
    }
    runs = []
    for summary in lake.summary():
        if run is not None and summary["run"] != run:
            continue
        about = details.get(summary["run"], {})
        counted = parameters.get(summary["run"], {})
        config = about.get("config")
        runs.append(
            {
                "run": summary["run"],
                "source": about.get("source"),
                "adapter": about.get("adapter"),
                "seed": about.get("seed"),
                "store": about.get("store"),
                "parent_run": about.get("parent_run"),
                "parent_step": about.get("parent_step"),
                "created_at": about.get("created_at"),
                "config": json.loads(config) if config else None,
                "config_hash": about.get("config_hash"),
                "parameters": counted.get("total"),
                "parameter_tensors": counted.get("tensors"),
                "datasets": _datasets(lake, summary["run"]),
                "units": summary["units"],
                "rows": summary["rows"],
                "bytes": summary["bytes"],
            }
        )
    return {"lake": lake.uri, "id": lake.id, "format": lake.format, "runs": runs}


def _datasets(lake: Lake, run: str) -> list[dict[str, Any]]:
    """Datasets of a run, one entry per set of parameters."""
    from ..lake.steps import summarize_steps

    found: dict[tuple[str, str], dict[str, Any]] = {}
    for receipt in lake.receipts.all(run):
        entry = found.setdefault(
            (receipt.dataset, receipt.spec),
            {
                "dataset": receipt.dataset,
                "spec": receipt.spec or None,
                "parameters": json.loads(receipt.parameters),
                "steps": set(),
                "units": 0,
                "rows": 0,
                "bytes": 0,
                "seconds": 0.0,
            },
        )
        entry["steps"].update(receipt.steps)
        entry["units"] += 1
        for name in ("rows", "bytes", "seconds"):
            entry[name] += getattr(receipt, name)
    return [
        {**entry, "step_count": len(entry["steps"]), "steps": summarize_steps(entry["steps"])}
        for _, entry in sorted(found.items())
    ]


def contents_text(found: dict[str, Any]) -> str:
    """The same for a person, with a line break at its end."""
    lines = [f"{found['lake']}  (format {found['format']}, id {found['id']})"]
    if not found["runs"]:
        lines.append("  no runs yet: `lakebed demo`, `lakebed train` and `lakebed import` make one")
    for run in found["runs"]:
        lines += ["", _headline(run)]
        lines += _dataset_lines(run["datasets"])
    return "\n".join(lines) + "\n"


def _headline(run: dict[str, Any]) -> str:
    parts = [
        f"{label} {run[key]}"
        for label, key in (("source", "source"), ("adapter", "adapter"), ("seed", "seed"), ("store", "store"))
        if run[key] is not None
    ]
    if run["parent_run"]:
        parts.append(f"continues {run['parent_run']} from step {run['parent_step']}")
    if run["parameters"] is not None:
        parts.append(f"{run['parameters']:,} parameters in {run['parameter_tensors']} tensors")
    parts.append(size_text(run["bytes"]))
    return f"run {run['run']}: {', '.join(parts)}"


def _dataset_lines(entries: list[dict[str, Any]]) -> list[str]:
    """A line per dataset, with its parameters; below it one for each of several sets of them, with what they differ in."""
    cells: list[tuple[str, dict[str, Any], str]] = []
    for dataset, group in groupby(entries, key=lambda entry: entry["dataset"]):
        sets = [(entry, _flat(entry["parameters"])) for entry in group]
        common = {
            name: value for name, value in sets[0][1].items() if all(of.get(name) == value for _, of in sets)
        }
        if len(sets) == 1:
            cells.append((dataset, sets[0][0], _chosen(common)))
            continue
        totals = {name: sum(entry[name] for entry, _ in sets) for name in ("bytes", "rows")}
        alike = f", alike in {_chosen(common)}" if common else ""
        cells.append((dataset, {**totals, "steps": "none"}, f"{len(sets)} sets{alike}"))
        own = [
            (_chosen({name: value for name, value in of.items() if name not in common}), entry)
            for entry, of in sets
        ]
        cells += [(f"  {dataset}", entry, chosen) for chosen, entry in sorted(own, key=lambda pair: pair[0])]
    width = max((len(name) for name, _, _ in cells), default=0)
    return [
        f"  {name:{width}}  {size_text(entry['bytes']):>8}  {entry['rows']:>11,} rows"
        f"  {'  '.join(filter(None, (_steps(entry['steps']), parameters)))}".rstrip()
        for name, entry, parameters in cells
    ]


def _steps(steps: str) -> str:
    return "" if steps == "none" else f"steps {steps}"


def _flat(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters with those of a scalar among the others."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        found.update(_flat(value) if isinstance(value, dict) else {name: value})
    return found


def _chosen(parameters: dict[str, Any]) -> str:
    """`name=value` of each, a list's values with commas; what is empty chooses nothing, and is left out."""
    ordered = sorted(parameters.items(), key=lambda of: (*(of[0] != name for name in _FIRST), of[0]))
    return " ".join(f"{name}={_value(value)}" for name, value in ordered if value not in (None, [], {}))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_value, value))
    if isinstance(value, dict):
        return f"({_chosen(_flat(value))})"
    return str(value)


def size_text(count: int) -> str:
    """Bytes for a person: 1.5 GB."""
    size, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if size < 1000 or unit == units[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")

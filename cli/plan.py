"""`lakebed plan`: bytes, chunks and hours of a lake, before it is made."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from .options import threads_option


@click.command(
    epilog="Examples: lakebed plan formation --steps 6000    "
    "lakebed plan --layers 24 --heads 16 --d-model 1792 --steps 10000 --flops 1e14 --write 1e9"
)
@click.argument("config", required=False, metavar="[CONFIG]")
@click.option("--layers", type=click.IntRange(1), help="Without CONFIG: layers of a GPT-2-like decoder.")
@click.option("--heads", type=click.IntRange(1), help="Its heads per layer.")
@click.option("--d-model", type=click.IntRange(1), help="Its width.")
@click.option("--d-ff", type=click.IntRange(1), help="Neurons of an MLP [default: four times the width].")
@click.option("--vocabulary", type=click.IntRange(1), default=50257, show_default=True, help="Its tokens.")
@click.option(
    "--positions", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a record."
)
@click.option("--steps", type=click.IntRange(1), default=10_000, show_default=True, help="Recorded steps.")
@click.option(
    "--checkpoints", type=click.IntRange(0), default=50, show_default=True, help="Steps a probe is asked at."
)
@click.option(
    "--records", type=click.IntRange(1), default=256, show_default=True, help="Records of the probe."
)
@click.option("--events", type=click.IntRange(1), default=1024, show_default=True, help="Its query events.")
@click.option(
    "--pairs", type=click.IntRange(1), default=64, show_default=True, help="Causal patch pairs of a scalar."
)
@click.option(
    "--scalars", type=click.IntRange(0), default=4, show_default=True, help="Scalars that are attributed."
)
@click.option(
    "--window", type=click.IntRange(0), help="Recorded steps that are attributed [default: a tenth]."
)
@click.option(
    "--anchor-every",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Steps between stored states.",
)
@click.option(
    "--flops", type=click.FloatRange(1), metavar="N", help="Operations a second [default: timed here]."
)
@click.option(
    "--write", type=click.FloatRange(1), metavar="N", help="Bytes written a second [default: timed here]."
)
@click.option("--format", "form", type=click.Choice(("table", "json")), default="table", show_default=True)
@threads_option
def plan(config: str | None, form: str, threads: int | None, **options: Any) -> None:
    """Say what a lake of a run will hold: bytes, objects, chunk shapes and hours, part by part.

    For a CONFIG (a name or a TOML file), or for a decoder of given sizes. Tensors are counted exactly and uncompressed; the
    time is an estimate from a pace of computing and of writing, which is timed here for a second unless it is given.
    """
    from ..extractors.sizing import Load, measure_pace, size_of_config, size_of_decoder, stepwise_checkpoints
    from ..extractors.sizing import plan as make_plan
    from ..extractors.threads import set_threads

    set_threads(threads)
    named = ("layers", "heads", "d_model")
    sizes = {name: options.pop(name) for name in (*named, "d_ff", "vocabulary", "positions")}
    if config is not None:
        if given := next((name for name in (*named, "d_ff") if sizes[name] is not None), None):
            raise click.UsageError(f"--{given.replace('_', '-')} is of a decoder without CONFIG")
        size = size_of_config(config)
    else:
        if missing := next((name for name in named if sizes[name] is None), None):
            raise click.UsageError(f"name a CONFIG, or a decoder's --{missing.replace('_', '-')}")
        size = size_of_decoder(
            sizes["layers"],
            sizes["heads"],
            sizes["d_model"],
            sizes["d_ff"] or 4 * sizes["d_model"],
            sizes["vocabulary"],
            sizes["positions"],
        )
    pace = measure_pace(None, options.pop("flops"), options.pop("write"))
    window = options.pop("window")
    work = Load(**options, window=max(1, options["steps"] // 10) if window is None else window)
    parts = make_plan(size, work, pace)
    whole = {
        "parameters": size.parameters,
        "bytes": sum(part.bytes for part in parts),
        "objects": sum(part.objects for part in parts),
        "hours": sum(part.seconds for part in parts) / 3600,
        "stepwise_checkpoint_bytes": stepwise_checkpoints(size, work),
        "flops_per_second": pace.flops,
        "write_bytes_per_second": pace.write,
        "timed_here": pace.measured,
    }
    if form == "json":
        click.echo(json.dumps({**whole, "parts": [asdict(part) for part in parts]}))
        return
    _print(whole, parts)


def _print(whole: dict[str, Any], parts: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{whole['parameters'] / 1e6:,.1f} million parameters")
    for heading in ("part", "what"):
        table.add_column(heading)
    for heading in ("bytes", "objects", "largest array's chunk", "time"):
        table.add_column(heading, justify="right")
    for part in parts:
        table.add_row(
            part.name, part.about, _bytes(part.bytes), f"{part.objects:,}", part.chunk, _time(part.seconds)
        )
    table.add_section()
    table.add_row(
        "all", "", _bytes(whole["bytes"]), f"{whole['objects']:,}", "", _time(3600 * whole["hours"])
    )
    console = Console(width=140)
    console.print(table)
    how = "timed here" if whole["timed_here"] else "as given"
    console.print(
        f"weights and moments saved at every step would take {_bytes(whole['stepwise_checkpoint_bytes'])}. Pace {how}: "
        f"{whole['flops_per_second']:.3g} operations and {_bytes(whole['write_bytes_per_second'])} a second; recording "
        "runs beside training, and its time is that of writing alone. Units are independent: N workers take an Nth."
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.1f} {unit}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"

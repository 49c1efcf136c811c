"""`lakebed import`."""

from __future__ import annotations

import json

import click

from .options import lake_option, run_option


@click.command(
    "import",
    epilog="Example: lakebed import runs/mine/checkpoints --config formation --lake my.lake --run mine",
)
@click.argument("folder", metavar="DIR")
@lake_option
@run_option
@click.option(
    "--config",
    metavar="CONFIG",
    help="A symbolic-KV run's configuration (a name or a TOML file): checks shapes, and makes layers and heads known. "
    "A transformers folder says so itself, in config.json.",
)
@click.option(
    "--step",
    type=click.IntRange(min=0),
    help="Step of a transformers folder that holds one model.safetensors [default: 0].",
)
def import_(folder: str, lake_uri: str, run: str, config: str | None, step: int | None) -> None:
    """Import the checkpoints in DIR: step_*.pt with model_state (and optimizer_state), *.safetensors, or what transformers
    saves: config.json (of a GPT-2) with model.safetensors, also in subfolders step_N or checkpoint-N."""
    from ..extractors.importing import find_source, import_checkpoints
    from ..extractors.training import load
    from ..lake import Lake
    from .progress import Bars

    loaded = None if config is None else load(config)
    find_source(folder, loaded, step)  # before a lake is made for nothing
    with Lake.open_or_create(lake_uri) as lake, Bars() as bars:
        result = import_checkpoints(lake, folder, run, loaded, progress=bars, step=step)
    shown = {"lake": lake_uri, "run": run, "imported": result.imported, "standing": result.standing}
    click.echo(json.dumps({**shown, "with_moments": result.with_moments, "bytes": result.bytes}))

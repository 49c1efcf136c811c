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
    help="The run's configuration (a name or a TOML file): checks shapes, and makes layers and heads known.",
)
def import_(folder: str, lake_uri: str, run: str, config: str | None) -> None:
    """Import the checkpoints in DIR: step_*.pt with model_state (and optimizer_state), or *.safetensors."""
    from ..extractors.importing import find_checkpoints, import_checkpoints
    from ..extractors.training import load
    from ..lake import Lake
    from .progress import Bars

    loaded = None if config is None else load(config)
    find_checkpoints(folder)  # before a lake is made for nothing
    with Lake.open_or_create(lake_uri) as lake, Bars() as bars:
        result = import_checkpoints(lake, folder, run, loaded, progress=bars)
    shown = {"lake": lake_uri, "run": run, "imported": result.imported, "standing": result.standing}
    click.echo(json.dumps({**shown, "with_moments": result.with_moments, "bytes": result.bytes}))

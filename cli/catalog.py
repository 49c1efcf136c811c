"""`lakebed catalog`: views for plain duckdb users, array lengths for plain Zarr readers."""

from __future__ import annotations

import json

import click

from .options import lake_option


@click.command(
    epilog="Example: lakebed catalog --lake demo.lake && cd demo.lake && duckdb catalog.duckdb 'FROM training_steps'"
)
@lake_option
def catalog(lake_uri: str) -> None:
    """Write views.sql and catalog.duckdb into the lake, for readers that have DuckDB and not lakebed.

    The views name the files of finished units only. The lengths and the `step` coordinate of the Zarr arrays are
    brought up to date too, for xarray, zarr and whatever else reads Zarr. Run it again after new extractions.
    """
    from ..lake import Lake
    from ..lake.catalog import write_catalog

    with Lake.open(lake_uri) as lake:
        written = write_catalog(lake)
    if written.note:
        click.echo(f"lakebed: {written.note}", err=True)
    click.echo(json.dumps(written.to_json(), indent=2))

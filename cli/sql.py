"""`lakebed sql`: one query, or a shell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from .. import LakebedError
from .options import lake_option
from .row_formats import FORMATS, write_parquet, write_result

if TYPE_CHECKING:
    from ..lake import Lake


@click.command(
    epilog="""\b
Examples:
  lakebed sql --lake demo.lake "SELECT step, loss FROM training_steps ORDER BY step LIMIT 5"
  lakebed sql --lake demo.lake --format parquet --output loss.parquet "FROM training_steps"
  lakebed sql --lake demo.lake                    (a shell: .help lists its commands)"""
)
@click.argument("query", required=False)
@lake_option
@click.option(
    "--file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read SQL from a file.",
)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="Output format."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write here instead of standard output."
)
@click.option(
    "--max-rows", type=click.IntRange(min=1), default=100, show_default=True, help="Rows a table shows."
)
def sql(
    query: str | None, lake_uri: str, file: Path | None, form: str, output: Path | None, max_rows: int
) -> None:
    """Ask the lake in SQL (DuckDB's dialect): every table, every tensor quantity and the shared macros.

    QUERY may be - to read standard input. Without a query, a terminal gets a shell, and a pipe is read as SQL. The
    table format is for people; csv, json, jsonl, markdown and parquet hold every row, and floats that read back as
    the same number. In JSON, NaN and infinities are null; a BLOB is written in hexadecimal.
    """
    from ..lake import Lake

    text = _query_text(query, file)
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise click.UsageError("Parquet is binary: name a file with --output, or redirect standard output")
    with Lake.open(lake_uri) as lake:
        if text is None:
            from .sql_shell import Shell

            Shell(lake, form if form != "parquet" else "table", max_rows).loop()
            return
        _answer(lake, text, form, output, max_rows)


def _answer(lake: Lake, text: str, form: str, output: Path | None, max_rows: int) -> None:
    with lake.session.errors():
        if form == "parquet":
            relation = lake.sql(text)
            with _sink(output) as sink:
                write_parquet(relation, sink)
            return
        result = lake.session.execute(text)
        with _sink(output) as sink:
            write_result(result, form, sink, max_rows)


def _query_text(query: str | None, file: Path | None) -> str | None:
    """The SQL to run, or None for the shell."""
    if query is not None and file is not None:
        raise click.UsageError("give a QUERY or --file, not both")
    if file is not None:
        text = file.read_text()
    elif query is None and sys.stdin.isatty() and sys.stdout.isatty():
        return None
    else:
        text = sys.stdin.read() if query in (None, "-") else str(query)
    if not text.strip():
        raise click.UsageError('no SQL to run: give a QUERY such as "SELECT * FROM training_steps LIMIT 5"')
    return text


@contextmanager
def _sink(output: Path | None) -> Iterator[BinaryIO]:
    """Standard output, or a file that appears under its name once it is whole."""
    if output is None:
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(output)
    except OSError as error:
        raise LakebedError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)

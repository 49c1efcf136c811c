"""A query's result as a table for people, or as csv, json, jsonl, markdown or Parquet for programs.

Rows stream: only the table format, which is cut at a number of rows, is held in memory.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO

from .. import LakebedError

if TYPE_CHECKING:
    import duckdb

FORMATS = ("table", "csv", "json", "jsonl", "parquet", "markdown")
_BATCH = 2048
_LIST_SHOWN = 4
_NUMBERS = (int, float, Decimal)

Rows = Iterator[list[tuple[Any, ...]]]


def write_result(result: duckdb.DuckDBPyConnection, form: str, sink: BinaryIO, max_rows: int) -> None:
    """Writes every row of an executed query to `sink`, in any format but parquet; a table shows `max_rows` of them."""
    names = column_names([str(column[0]) for column in result.description or []])
    if form == "table":
        sink.write(table_text(result, names, max_rows).encode())
    else:
        text = io.TextIOWrapper(sink, encoding="utf-8", newline="", write_through=True)
        try:
            {"csv": _write_csv, "json": _write_json, "jsonl": _write_jsonl, "markdown": _write_markdown}[
                form
            ](names, _batches(result), text)
        finally:
            text.detach()


def column_names(names: Sequence[str]) -> list[str]:
    """Names made unique, since an object or a Parquet file holds each once: a, a_1, a_2."""
    found: list[str] = []
    for name in names:
        unique, count = name, 0
        while unique in found or (count and unique in names):
            count += 1
            unique = f"{name}_{count}"
        found.append(unique)
    return found


def _batches(result: duckdb.DuckDBPyConnection) -> Rows:
    while rows := result.fetchmany(_BATCH):
        yield rows


def plain(value: Any) -> Any:
    """A value as JSON has it: NaN and infinities null, BLOB in hexadecimal, times ISO 8601, decimals exact."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Decimal):
        return _plain_decimal(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return str(value)


def _plain_decimal(value: Decimal) -> int | float | str:
    if value == value.to_integral_value():
        return int(value)
    near = float(value)
    return near if Decimal(repr(near)) == value else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _write_json(names: list[str], rows: Rows, text: io.TextIOWrapper) -> None:
    start = "[\n"
    for batch in rows:
        lines = [_json(dict(zip(names, plain(row), strict=True))) for row in batch]
        text.write(start + ",\n".join(lines))
        start = ",\n"
    text.write("[]\n" if start == "[\n" else "\n]\n")


def _write_jsonl(names: list[str], rows: Rows, text: io.TextIOWrapper) -> None:
    for batch in rows:
        text.write("".join(_json(dict(zip(names, plain(row), strict=True))) + "\n" for row in batch))


def cell(value: Any) -> str:
    """A value as one field of csv or markdown: NULL empty, floats as short as reads back exactly, lists as JSON."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple | dict):
        return _json(plain(value))
    if isinstance(value, Decimal):
        return str(value)
    return str(plain(value))


def _write_csv(names: list[str], rows: Rows, text: io.TextIOWrapper) -> None:
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for batch in rows:
        writer.writerows([cell(value) for value in row] for row in batch)


def _write_markdown(names: list[str], rows: Rows, text: io.TextIOWrapper) -> None:
    def line(cells: Sequence[str]) -> str:
        kept = [cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in cells]
        return f"| {' | '.join(kept)} |\n"

    text.write(line(names))
    started = False
    for batch in rows:
        if not started:
            text.write(_rule(batch[0]))
            started = True
        text.write("".join(line([cell(value) for value in row]) for row in batch))
    if not started:
        text.write(_rule(("",) * len(names)))


def _rule(row: Sequence[Any]) -> str:
    return f"| {' | '.join('---:' if _is_number(value) else '---' for value in row)} |\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def write_parquet(relation: duckdb.DuckDBPyRelation | None, sink: BinaryIO) -> None:
    """Writes every row of a relation as zstd Parquet, with DuckDB's types (a sum of integers is a DECIMAL(38,0))."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if relation is None:
        raise LakebedError("this statement has no rows to write as Parquet: give a SELECT")
    names = column_names(relation.columns)
    reader = relation.to_arrow_reader(_BATCH * 16)
    schema = pa.schema([field.with_name(name) for field, name in zip(reader.schema, names, strict=True)])
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))


def table_text(result: duckdb.DuckDBPyConnection, names: list[str], max_rows: int) -> str:
    """At most `max_rows` rows, drawn for a person: numbers to the right, floats to six digits, long lists shortened."""
    import shutil
    import sys

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = result.fetchmany(max_rows + 1)
    more, rows = len(rows) > max_rows, rows[:max_rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for at, name in enumerate(names):
        numeric = any(_is_number(row[at]) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("NULL", style="dim") if value is None else Text(shown(value)) for value in row))
    # In a pipe nothing bounds the width, so nothing is folded.
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else 100_000
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, force_terminal=terminal, color_system="auto" if terminal else None
    )
    console.print(table)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    count = (
        f"the first {max_rows:,} rows; --max-rows shows more, the other formats all" if more else _count(rows)
    )
    return "\n".join([*lines, f"({count})", ""])


def _count(rows: Sequence[Any]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows):,} rows"


def shown(value: Any) -> str:
    """A value for a person's eyes."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        kept = ", ".join(shown(item) for item in value[:_LIST_SHOWN])
        return f"[{kept}]" if len(value) <= _LIST_SHOWN else f"[{kept}, … {len(value):,}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "NULL"
    text = cell(value)
    return text if len(text) <= 200 else f"{text[:199]}…"

"""What a table, a column and a tensor quantity are; the schema is declared with these."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column: its SQL type and what a reader needs to know (meaning, unit, when it is null)."""

    name: str
    type: str
    about: str


@dataclass(frozen=True)
class Table:
    """One table: a row per `key`, together with `run`."""

    name: str
    key: tuple[str, ...]
    about: str
    columns: tuple[Column, ...]

    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of the table's Parquet files (without `run`)."""
        return _arrow_schema(self)

    def names(self) -> list[str]:
        """Column names as stored, without `run`."""
        return [column.name for column in self.columns]


@dataclass(frozen=True)
class Quantity:
    """One kind of tensor: an array per name with a leading step axis; `view` is the SQL table it appears as."""

    name: str
    view: str
    about: str


def _columns(text: str) -> tuple[Column, ...]:
    lines = (line.strip() for line in text.strip().splitlines())
    return tuple(Column(*(part.strip() for part in line.split("|", 2))) for line in lines if line)


def table(name: str, key: str, about: str, columns: str) -> Table:
    return Table(name, tuple(key.split()), about, _columns(columns))


_ARROW_TYPES = {
    "VARCHAR": "string",
    "BIGINT": "int64",
    "INTEGER": "int32",
    "DOUBLE": "float64",
    "FLOAT": "float32",
    "BOOLEAN": "bool_",
    "BLOB": "binary",
}


def _arrow_type(sql: str) -> pa.DataType:
    import pyarrow as pa

    if sql.endswith("[]"):
        return pa.list_(_arrow_type(sql[:-2]))
    if sql.startswith("STRUCT("):
        fields = sql[len("STRUCT(") : -1].split(", ")
        return pa.struct(
            [(name, _arrow_type(kind)) for name, kind in (field.split(" ", 1) for field in fields)]
        )
    return getattr(pa, _ARROW_TYPES[sql])()


@cache
def _arrow_schema(table: Table) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([pa.field(column.name, _arrow_type(column.type)) for column in table.columns])

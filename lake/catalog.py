"""What a reader without lakebed needs: SQL views over the committed files, and true array lengths for Zarr readers.

`views.sql` lists the Parquet files that receipts name, so that a reader sees whole units only; `catalog.duckdb`
holds the same views. Both are written whole, to another name first, and written again from scratch each time.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import axis
from .errors import LakebedError
from .macros import MACROS
from .schema import QUANTITIES, TABLES, VIEWS
from .session import select_from

if TYPE_CHECKING:
    from .lake import Lake

VIEWS_FILE = "views.sql"
DATABASE_FILE = "catalog.duckdb"
# The oldest storage version that holds views, macros and comments: an older duckdb shell opens the file as well.
_STORAGE_VERSION = "v1.0.0"


class CatalogError(LakebedError):
    """The catalog could not be written."""


@dataclass(frozen=True)
class Catalog:
    """What `write_catalog` wrote; `database` is None where there can be none, and `note` then says why."""

    views_file: str
    database: str | None
    views: tuple[str, ...]
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object `lakebed catalog` prints."""
        return {
            "views_file": self.views_file,
            "database": self.database,
            "views": list(self.views),
            "note": self.note,
        }


def write_catalog(lake: Lake) -> Catalog:
    """Publishes the step axes, then writes `views.sql` and `catalog.duckdb`; safe to repeat, and while others read."""
    axis.publish(lake)
    statements, names = _statements(lake)
    text = "".join(f"{statement}\n" for statement in [*_header(lake), *(f"{line};" for line in statements)])
    lake.storage.write(VIEWS_FILE, text.encode())
    if lake.storage.local:
        _write_database(lake, statements)
        database, note = lake.storage.path(DATABASE_FILE), None
    else:
        database, note = (
            None,
            (
                f"no {DATABASE_FILE}: duckdb attaches a database file only from a disk; {VIEWS_FILE} has full URIs, for "
                "`duckdb -init` anywhere"
            ),
        )
    return Catalog(lake.storage.path(VIEWS_FILE), database, tuple(names), note)


def _header(lake: Lake) -> list[str]:
    where = f"cd into the lake's folder and run: duckdb -init {VIEWS_FILE}   (or: duckdb {DATABASE_FILE})"
    if not lake.storage.local:
        where = f"Run: duckdb -init {VIEWS_FILE}, with the httpfs extension and credentials for {lake.uri}"
    return [
        "-- Written by `lakebed catalog` from the receipts; run it again after new extractions.",
        f"-- {where}",
        "-- Tensors (weights, gradients, ...) are Zarr arrays below tensors/: lakebed's own session has them as tables.",
    ]


def _statements(lake: Lake) -> tuple[list[str], list[str]]:
    """SQL statements without their semicolon, and the names of the views they make."""
    found = [f"CREATE OR REPLACE MACRO {signature} AS {body}" for signature, (_, body) in MACROS.items()]
    names = []
    for name, table in TABLES.items():
        found.append(f"CREATE OR REPLACE VIEW {name} AS {select_from(name, _paths(lake, name))}")
        found.append(f"COMMENT ON VIEW {name} IS {_quoted(table.about)}")
        found += [
            f'COMMENT ON COLUMN {name}."{column.name}" IS {_quoted(column.about)}' for column in table.columns
        ]
        names.append(name)
    for name in _readable_views():
        about, query = VIEWS[name]
        found.append(f"CREATE OR REPLACE VIEW {name} AS {query}")
        found.append(f"COMMENT ON VIEW {name} IS {_quoted(about)}")
        names.append(name)
    return found, names


def _paths(lake: Lake, table: str) -> list[str]:
    keys = [entry.path for entry in lake.table_files(table)]
    return keys if lake.storage.local else [lake.storage.path(key) for key in keys]


def _readable_views() -> list[str]:
    """Derived views that stand on tables alone; those over tensors need lakebed's session."""
    tensors = {quantity.view for quantity in QUANTITIES.values()}
    return [name for name, (_, query) in VIEWS.items() if not set(re.findall(r"\w+", query)) & tensors]


def _write_database(lake: Lake, statements: list[str]) -> None:
    import duckdb

    root = lake.storage.path("")
    temporary = os.path.join(root, f".{DATABASE_FILE}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with duckdb.connect() as connection:
            # The views keep paths relative to the lake's folder; here they are looked up from wherever we are.
            connection.execute(f"SET file_search_path = {_quoted(root)}")
            connection.execute(
                f"ATTACH {_quoted(temporary)} AS catalog (STORAGE_VERSION '{_STORAGE_VERSION}')"
            )
            connection.execute("USE catalog")
            for statement in statements:
                connection.execute(statement)
            connection.execute("USE memory")
            connection.execute("DETACH catalog")
        os.replace(temporary, os.path.join(root, DATABASE_FILE))
    except (duckdb.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise CatalogError(f"could not write {DATABASE_FILE} in {lake.uri}: {reason}") from error
    finally:
        for left in (temporary, f"{temporary}.wal"):
            if os.path.exists(left):
                os.unlink(left)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

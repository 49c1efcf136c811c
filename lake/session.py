"""The DuckDB session of a lake: every table, every tensor quantity and the shared macros, ready for SQL."""

from __future__ import annotations

import atexit
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import duckdb

from .errors import CorruptFile, LakebedError, QueryError
from .macros import create_macros
from .receipts import FileEntry, read_checked
from .schema import QUANTITIES, TABLES, VIEWS

if TYPE_CHECKING:
    from .lake import Lake
    from .object_files import ObjectFiles

# How DuckDB says that a file of a view is not there.
_GONE = re.compile(r'(?:No files found that match the pattern|Cannot open file) "([^"]+)"')
_OPEN: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """One in-memory DuckDB connection whose views show what the receipts name, no more.

    Views are made when a query first names them, and again when new receipts have come.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self.connection = duckdb.connect(":memory:")
        self._failures: list[LakebedError] = []
        self.files = None if lake.storage.local else self._register_files()
        for statement in create_macros():
            self.connection.execute(statement)
        self._made: dict[str, Any] = {}
        self._checked: set[str] = set()
        _OPEN.add(self)

    def _register_files(self) -> ObjectFiles:
        """Lets DuckDB read from the lake's store."""
        from .object_files import ObjectFiles

        # A lazy frame may keep the files until the interpreter exits; it must not keep the connection with them.
        session = weakref.ref(self)

        def missing(key: str) -> str:
            found = session()
            return f"{key} is missing" if found is None else found._missing(key)

        files = ObjectFiles(self._lake.storage, missing, self._failures)
        self.connection.register_filesystem(files)
        return files

    def execute(
        self,
        query: str,
        parameters: Mapping[str, Any] | list[Any] | None = None,
        tables: Iterable[str] | None = None,
    ) -> duckdb.DuckDBPyConnection:
        """Runs SQL; raises QueryError with DuckDB's message and, for an unknown table, the ones there are.

        `tables` names the tables the query reads, where the caller knows: DuckDB cannot tell for a query with
        parameters, and then every word of it counts.
        """
        with self.errors():
            wanted = self._named(query) if tables is None else set(tables)
            if wanted:
                self.prepare(wanted)
            return (
                self.connection.execute(query, parameters) if parameters else self.connection.execute(query)
            )

    def relation(
        self, query: str, parameters: Mapping[str, Any] | list[Any] | None = None
    ) -> duckdb.DuckDBPyRelation:
        """A lazy relation over the session."""
        with self.errors():
            self.prepare(self._named(query))
            return self.connection.sql(query, params=parameters)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns DuckDB's errors into QueryError; rows are computed as they are fetched, so fetch inside it too."""
        self._failures.clear()
        try:
            yield
        except duckdb.Error as error:
            if self._failures:
                raise self._failures[0] from None
            if gone := _GONE.search(str(error)):
                raise CorruptFile(
                    self._missing(gone[1].removeprefix(self._lake.storage.path("")).lstrip("/"))
                ) from error
            raise QueryError(self._explain(str(error))) from error

    def _named(self, query: str) -> set[str]:
        words = set(re.findall(r"\w+", query))
        try:
            found = {name.split(".")[-1] for name in self.connection.get_table_names(query)}
        except duckdb.Error:
            # SUMMARIZE, DESCRIBE, SHOW and the like: look for the words instead.
            return words
        # Of a view that is there already DuckDB names what lies below it, and that may be nothing.
        return found | (words & self._made.keys())

    def prepare(self, names: Iterable[str] | None = None) -> None:
        """Makes the views named (default: all) that are not there yet, or not up to date."""
        self._lake.refresh()
        everything = {*TABLES, *VIEWS, *(quantity.view for quantity in QUANTITIES.values())}
        wanted = everything if names is None else set(names) & everything
        for name in wanted & VIEWS.keys():
            wanted |= set(re.findall(r"\w+", VIEWS[name][1])) & everything
        for name in sorted(wanted & TABLES.keys()):
            self._make_table(name)
        for quantity in QUANTITIES.values():
            if quantity.view in wanted:
                self._make_tensor(quantity.name, quantity.view)
        for name in sorted(wanted & VIEWS.keys()):
            self.connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {VIEWS[name][1]}")

    def _make_table(self, name: str) -> None:
        if self._made.get(name) == self._lake.receipts.version:
            return
        files = self._lake.table_files(name)
        self.check(files)
        paths = [self._lake.storage.path(entry.path) for entry in files]
        self.connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {select_from(name, paths)}")
        self._made[name] = self._lake.receipts.version

    def _make_tensor(self, quantity: str, view: str) -> None:
        if view in self._made:
            return
        from .duckdb_source import TensorDataset
        from .sources import tensor_scan

        dataset = TensorDataset(tensor_scan(self._lake, quantity, view), self._failures)
        self.connection.register(view, dataset)
        self._made[view] = True

    def check(self, files: Iterable[FileEntry]) -> None:
        """Compares files on a local disk with their receipts, once per session; raises CorruptFile.

        An object store keeps checksums itself; there only `lakebed verify` reads everything, and sizes are noted.
        """
        if self.files is not None:
            self.files.note(files)
            return
        for entry in files:
            # A receipt is its own witness: its pages carry checksums, and no other receipt names it.
            if entry.bytes >= 0 and entry.path not in self._checked:
                try:
                    read_checked(self._lake.storage, entry)
                except FileNotFoundError as error:
                    raise CorruptFile(self._missing(entry.path)) from error
                self._checked.add(entry.path)

    def _missing(self, path: str) -> str:
        """What a file that cannot be found says to a person."""
        self._lake.receipts.refresh()
        named = {entry.path for receipt in self._lake.receipts.all() for entry in receipt.files}
        if path in named:
            return f"{path} is missing: run `lakebed verify` to list every damaged file"
        return f"{path} was compacted, and `lakebed gc` removed it while it was read: ask again"

    def _explain(self, message: str) -> str:
        line = re.sub(r"[ ^]+$", "", " ".join(message.split()))
        if "Catalog Error: Table with name" in line:
            views = sorted({*TABLES, *VIEWS, *(quantity.view for quantity in QUANTITIES.values())})
            line = f"{line.split('! ')[0].split(' LINE ')[0]}; the lake has {', '.join(views)}"
        return line

    def close(self) -> None:
        """Closes the connection; DuckDB's bindings want that before the interpreter exits."""
        self.connection.close()
        _OPEN.discard(self)


@atexit.register
def _close_all() -> None:
    for session in list(_OPEN):
        session.close()


def select_from(name: str, paths: list[str]) -> str:
    """SQL that reads a table from its files; typed and empty if there are none."""
    columns = TABLES[name].columns
    if not paths:
        empty = ", ".join(f'NULL::{column.type} AS "{column.name}"' for column in columns)
        return f"SELECT NULL::VARCHAR AS run, {empty} WHERE false"
    listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    stored = ", ".join(f'"{column.name}"' for column in columns)
    return (
        f"SELECT run, {stored} FROM read_parquet([{listed}], hive_partitioning = true, "
        "hive_types = {'run': VARCHAR}, hive_types_autocast = false)"
    )

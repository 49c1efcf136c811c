"""A report's sections, computed: one SQL session, every section a table of it while the report is at work."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..lake.imports import leave_pandas_alone
from ..lake.schema import QUANTITIES, TABLES, VIEWS
from .needs import resolve_run, resolve_steps
from .output import OutputUnwritable
from .sections import Section, SectionError, parse_sections

if TYPE_CHECKING:
    import duckdb
    import polars as pl
    import pyarrow as pa

    from ..lake import Lake
    from .report import Report


class Results:
    """The tables of one report over one lake, as it is when they are made; use as a context manager, or close it.

    `on_rows` is called with these results and the name of each section that is written out, as soon as it is made. Raises
    UnknownName and MissingData, naming what exists or the command that makes it, before anything is computed.
    """

    def __init__(
        self, lake: Lake, report: Report, on_rows: Callable[[Results, str], None] = lambda results, name: None
    ) -> None:
        self.lake = lake
        self.report = report
        self._on_rows = on_rows
        self._pool: ThreadPoolExecutor | None = None
        self._copies: list[tuple[Path, duckdb.DuckDBPyConnection, Future[None]]] = []
        self._made: list[str] = []
        self._columns: dict[str, dict[str, str]] = {}
        self._open = ExitStack()
        self._open.enter_context(lake.pinned())
        try:
            self._compute()
        except BaseException:
            self.close()
            raise

    def _compute(self) -> None:
        lake, report = self.lake, self.report
        self.run = resolve_run(lake, report)
        report.require(lake, self.run)
        self.steps = resolve_steps(lake, report, self.run)
        self.sections = parse_sections(report.sql_text(), f"{report.file_stem()}.sql")
        self.parameters: dict[str, Any] = {
            **report.parameters(),
            **report.lake_parameters(lake),
            "run": self.run,
            "steps": self.steps,
            "lake": lake.uri,
        }
        taken = {*TABLES, *VIEWS, *(quantity.view for quantity in QUANTITIES.values())}
        for section in self.sections:
            if section.name in taken:
                raise SectionError(f"section {section.name!r} hides a table of the lake")
            self._make(section)
            if section.kind == "rows":
                self._on_rows(self, section.name)

    def _make(self, section: Section) -> None:
        if section.kind == "arrays":
            self._store(section.name, self.report.arrays(section.name, self))
            return
        unknown = section.parameters() - self.parameters.keys()
        if unknown:
            raise SectionError(
                f"section {section.name!r} uses unknown parameters {', '.join(sorted(unknown))}"
            )
        self._execute(
            f"CREATE OR REPLACE TABLE {section.name} AS {section.sql}",
            section.reads(),
            {name: self.parameters[name] for name in section.parameters()},
        )
        self._made.append(section.name)

    def _store(self, name: str, columns: Mapping[str, Any]) -> None:
        import pyarrow as pa

        self.lake.session.connection.register("arrays_in_hand", pa.table(dict(columns)))
        self._execute(f"CREATE OR REPLACE TABLE {name} AS FROM arrays_in_hand", set(), {})
        self.lake.session.connection.unregister("arrays_in_hand")
        self._made.append(name)

    def _execute(self, sql: str, tables: set[str], parameters: Mapping[str, Any]) -> Any:
        return self.lake.session.execute(sql, dict(parameters), tables=tables)

    def rows(self, query: str, **parameters: Any) -> list[dict[str, Any]]:
        """Rows of a query over the report's tables, as mappings."""
        cursor = self._execute(query, set(), parameters)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def first(self, query: str, **parameters: Any) -> dict[str, Any] | None:
        """The first row of a query, or None."""
        found = self.rows(query, **parameters)
        return found[0] if found else None

    def value(self, query: str, **parameters: Any) -> Any:
        """The first column of the first row, or None."""
        found = self.first(query, **parameters)
        return None if found is None else next(iter(found.values()))

    def arrow(self, query: str, tables: Iterable[str] = (), **parameters: Any) -> pa.Table:
        """A query over the report's sections, and over the lake's `tables` it names, as an Arrow table."""
        leave_pandas_alone()
        session = self.lake.session
        with session.errors():
            if tables:
                session.prepare(tables)
            # A relation hands its rows over as they are; a cursor would copy them, and warn that it does.
            return session.connection.sql(query, params=parameters or None).to_arrow_table()

    def frame(self, name: str) -> pl.DataFrame:
        """One section as a Polars frame."""
        if not re.fullmatch(r"\w+", name) or name not in self._made:
            raise KeyError(f"no section {name!r}; there are {', '.join(self._made)}")
        frame: pl.DataFrame = self.lake.session.connection.sql(f"FROM {name}").pl()
        return frame

    def columns(self, name: str) -> dict[str, str]:
        """SQL types of a section by column, in order."""
        if name not in self._columns:
            described = self.rows(f"DESCRIBE {name}")
            self._columns[name] = {row["column_name"]: row["column_type"] for row in described}
        return self._columns[name]

    def start_copies(self, files: Iterable[tuple[str, Path, str]]) -> None:
        """Writes sections, or parenthesised SELECTs over sections, to files: (source, path, options of COPY) each.

        They are written in the background while what comes after them is computed: wait for them with `finish_copies`.
        Until `close` DuckDB gives one thread to a file, and to a query: with more of them to a file it first holds a whole
        row group of text in memory to keep the rows' order, which took as long again as making it.
        """

        def write(cursor: duckdb.DuckDBPyConnection, source: str, path: Path, options: str) -> None:
            quoted = str(path).replace("'", "''")
            cursor.execute(f"COPY {source} TO '{quoted}' {options}")

        if self._pool is None:
            self._threads = int(self.value("SELECT current_setting('threads')"))
            self._pool = ThreadPoolExecutor(self._threads, "lakebed-rows")
            self._execute("SET threads = 1", set(), {})
        for file in files:
            cursor = self.lake.session.connection.cursor()
            self._copies.append((file[1], cursor, self._pool.submit(write, cursor, *file)))

    def finish_copies(self) -> None:
        """Waits until every file is written; raises OutputUnwritable for the first that could not be."""
        import duckdb

        copies, self._copies = self._copies, []
        wait(written for _, _, written in copies)
        with self.lake.session.errors():
            for path, _, written in copies:
                try:
                    written.result()
                except duckdb.IOException as error:
                    # Not of the lake's files: what is copied is in memory. What a thread of DuckDB meets comes as JSON.
                    number = re.search(r'"errno":"(\d+)"', str(error))
                    reason = os.strerror(int(number[1])) if number else str(error).rsplit(": ", 1)[-1]
                    raise OutputUnwritable(
                        f"writing {path.name} failed: {reason}; nothing of the folder was changed"
                    ) from error

    def row_sets(self) -> list[str]:
        """Names of the sections that are written out, in file order."""
        return [section.name for section in self.sections if section.kind == "rows"]

    def close(self) -> None:
        """Drops the tables; the lake's session stays open. A file that is still being written is given up."""
        for _, cursor, written in self._copies:
            if not written.cancel() and not written.done():
                cursor.interrupt()
        self._copies.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._execute(f"SET threads = {self._threads}", set(), {})
        for name in reversed(self._made):
            self._execute(f"DROP TABLE IF EXISTS {name}", set(), {})
        self._made.clear()
        self._open.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

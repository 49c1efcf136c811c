"""The interactive SQL shell: history, completion, statements over several lines, errors that do not end it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import has_completions
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer

from .. import LakebedError
from ..lake.macros import MACROS
from ..lake.schema import QUANTITIES, TABLES, VIEWS
from .row_formats import FORMATS, write_result

if TYPE_CHECKING:
    from ..lake import Lake

HELP = """\
SQL ends with a semicolon and may take several lines; Ctrl-C drops the line, Ctrl-D leaves.
.tables          tables, tensors and derived views
.schema NAME     columns of one of them
.format NAME     table, csv, json, jsonl or markdown
.help            this text
.quit            leave"""
_KEYWORDS = """
    SELECT FROM WHERE GROUP BY ORDER LIMIT JOIN USING ON AS AND OR NOT IN BETWEEN LIKE IS NULL DISTINCT HAVING WITH
    UNION ALL CASE WHEN THEN ELSE END DESC ASC OVER PARTITION QUALIFY UNNEST DESCRIBE SUMMARIZE EXPLAIN
    list_sum list_dot_product list_cosine_similarity sqrt sum avg min max count arg_max arg_min
"""
_COMMANDS = (".tables", ".schema", ".format", ".help", ".quit")


class SqlCompleter(Completer):
    """Completes tables, columns, macros and keywords; after .schema only tables."""

    def __init__(self) -> None:
        columns = {column.name for table in TABLES.values() for column in table.columns}
        tensor_columns = {
            "run",
            "step",
            "parameter",
            "row",
            "values",
            "matrix",
            "layer",
            "head",
            "rank",
            "side",
        }
        macros = {signature.split("(")[0] + "(" for signature in MACROS}
        self.tables = sorted(table_names())
        self.words = sorted(
            {*self.tables, *columns, *tensor_columns, *macros, *_KEYWORDS.split()}, key=str.lower
        )

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Words that begin as the one before the cursor does."""
        line = document.text_before_cursor
        if line.startswith(".") and " " not in line:
            words: Iterable[str] = _COMMANDS
            typed = line
        else:
            found = re.search(r"\w*$", line)
            typed = found.group() if found else ""
            words = self.tables if line.startswith(".schema") else self.words
            if line.startswith(".format"):
                words = [name for name in FORMATS if name != "parquet"]
            if not typed and not line.startswith("."):
                return
        for word in words:
            if word.lower().startswith(typed.lower()) and word != typed:
                yield Completion(word, -len(typed))


def table_names() -> list[str]:
    """Everything that can stand after FROM."""
    return [*TABLES, *dict.fromkeys(quantity.view for quantity in QUANTITIES.values()), *VIEWS]


def history_path() -> Path:
    """Where the shell remembers, by the XDG base directory rules."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "lakebed" / "sql_history"


def _history() -> History:
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def is_whole(text: str) -> bool:
    """Whether what was typed can run: a dot command, nothing, or SQL up to its semicolon."""
    stripped = text.strip()
    return not stripped or stripped.startswith(".") or stripped.endswith(";")


class Shell:
    """Reads statements, prints their answers. `run` handles one of them and says whether to go on."""

    def __init__(self, lake: Lake, form: str = "table", max_rows: int = 100) -> None:
        self._lake = lake
        self._form = form
        self._max_rows = max_rows

    def loop(self, **options: Any) -> None:
        """The shell, until .quit or Ctrl-D; `options` go to prompt_toolkit (tests give it another terminal)."""
        session: PromptSession[str] = PromptSession(
            message=f"{Path(self._lake.uri).name}> ",
            prompt_continuation=lambda width, *_: "· ".rjust(width),
            multiline=True,
            key_bindings=_bindings(),
            completer=SqlCompleter(),
            complete_while_typing=False,
            lexer=PygmentsLexer(SqlLexer),
            **{"history": _history(), **options} if "history" not in options else options,
        )
        runs = ", ".join(self._lake.runs()) or "no runs yet"
        click.echo(f"{self._lake.uri} holds {runs}; .help lists commands, .quit leaves")
        while True:
            try:
                text = session.prompt()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if not self.run(text):
                return

    def run(self, text: str) -> bool:
        """Runs one statement or dot command; errors are one line. Returns False when the shell should end."""
        stripped = text.strip()
        if not stripped.strip(";"):
            return True
        try:
            if stripped.startswith("."):
                return self._command(*stripped.rstrip(";").split())
            self._query(stripped)
        except LakebedError as error:
            click.echo(f"error: {error}")
        except KeyboardInterrupt:
            self._lake.session.connection.interrupt()
            click.echo("interrupted")
        return True

    def _query(self, text: str) -> None:
        sink = io.BytesIO()
        with self._lake.session.errors():
            write_result(self._lake.session.execute(text), self._form, sink, self._max_rows)
        click.echo(sink.getvalue().decode(), nl=False)

    def _command(self, name: str, *arguments: str) -> bool:
        if name in (".quit", ".exit"):
            return False
        if name == ".tables":
            click.echo("\n".join(table_names()))
        elif name == ".schema" and len(arguments) == 1:
            from .schema_text import schema_text

            click.echo(schema_text(arguments[0]), nl=False)
        elif (
            name == ".format"
            and len(arguments) == 1
            and arguments[0] in FORMATS
            and arguments[0] != "parquet"
        ):
            self._form = arguments[0]
        elif name == ".help":
            click.echo(HELP)
        else:
            raise LakebedError(
                f"{' '.join((name, *arguments))} is no command of this shell: .help lists them"
            )
        return True


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter", filter=~has_completions)
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    return bindings

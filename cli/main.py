"""The `lakebed` command: a group that imports a command's module only when that command runs."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any, NoReturn

import click

from .. import LakebedError, __version__

# name -> module that defines a click command of that name (`import` is `import_`), with the line `--help` shows.
COMMANDS = {
    "demo": "train the built-in run, extract, run every report and open their index",
    "train": "train a configured run and record every step",
    "trace": "continue a run from any step, recording every step",
    "import": "bring in checkpoints made elsewhere (.pt or .safetensors)",
    "probe": "make and show the fixed records on which steps are compared",
    "extract": "make a dataset, or whatever a report lacks",
    "pipeline": "train several seeds and ask which head took the role in each",
    "query": "run a report: rows, Markdown and charts from the lake",
    "sql": "ask the lake in SQL, once or in a shell",
    "show": "what a lake holds, or the schema of its tables",
    "verify": "check every file against its receipt",
    "catalog": "write views for plain duckdb users and lengths for plain Zarr readers",
    "compact": "merge many small files and their receipts, so that queries open few",
    "plan": "say what a lake will hold, in bytes, chunks and hours, before it is made",
    "gc": "remove files that no receipt names: compacted ones, and what killed writers left",
}
# Commands that are over in a second or so; see _collect_rarely and _leave.
_SHORT = {"query", "show"}


class LazyGroup(click.Group):
    """Looks commands up by name in `lakebed.cli.<name>`."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Commands in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports the module of one command."""
        if name not in COMMANDS:
            return None
        if name in _SHORT:
            _collect_rarely()
            _compute_in_one_thread()
        suffix = "_" if name == "import" else ""
        module = importlib.import_module(f".{name}{suffix}", __package__)
        command: click.Command = getattr(module, f"{name}{suffix}")
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _collect_rarely() -> None:
    """Spares a short command the search for garbage: what it imports lives to the end, and was walked again and again.

    Not for those that run long, whose garbage may hold tensors.
    """
    gc.set_threshold(100_000)


def _compute_in_one_thread() -> None:
    """Keeps NumPy's matrices of a short command, all small, in one thread: the others spin while they wait, and where the
    machine has other work a report took several times as long. Read when NumPy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with `lakebed demo`; every command has its own --help with an example.",
)
@click.version_option(__version__, prog_name="lakebed")
def cli() -> None:
    """A data lake of how transformer circuits form during training: record once, then ask in SQL."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a LakebedError becomes one line on stderr and exit status 1."""
    try:
        result: Any = cli(args=arguments, standalone_mode=False)
        if arguments is None and not result and sys.argv[1:2] and sys.argv[1] in _SHORT:
            _leave()
    except click.exceptions.Abort:
        _fail("interrupted: what was finished is kept; run the same command again to go on", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LakebedError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(result if isinstance(result, int) else 0)


def _leave() -> NoReturn:
    """Ends the process without taking it apart object by object, as mypy does: the system takes the memory back anyway.

    By now files are closed, and so is the lake, with DuckDB's connection.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _fail(message: str, status: int) -> None:
    click.echo(f"lakebed: {' '.join(message.split())}", err=True)
    sys.exit(status)

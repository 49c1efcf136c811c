"""Progress on stderr: a bar on a terminal, nothing at all elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Bars:
    """One bar after another; implements the extractors' Progress."""

    def __init__(self) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description:32}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    def start(self, label: str, total: int, done: int = 0) -> None:
        """A new bar."""
        self._task = self._bars.add_task(label, total=total, completed=done, note="")

    def advance(self, done: int = 1, note: str = "") -> None:
        """Moves the current bar."""
        if self._task is not None:
            self._bars.update(self._task, advance=done, note=note)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

"""How long work tells how far it is; the command line draws it, tests and notebooks may leave it out."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One bar at a time."""

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Begins a stretch of work of `total` parts, `done` of which are done."""
        ...

    def advance(self, done: int = 1, note: str = "") -> None:
        """Some parts are finished; `note` is shown beside the bar (a loss, a step)."""
        ...


class Silent:
    """No progress at all."""

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Does nothing."""

    def advance(self, done: int = 1, note: str = "") -> None:
        """Does nothing."""

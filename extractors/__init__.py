"""Joins the model side and the lake: the recorder, and one file per dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recorder import Recorder

__all__ = ["Recorder"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import; the command line's help should not wait for it.
    if name == "Recorder":
        from .recorder import Recorder

        return Recorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

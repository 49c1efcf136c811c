"""Which reports there are: the `.sql`/`.py` pairs of this folder, and those of other packages by entry point.

Listing reads names and docstrings only; a report's module is imported when it is used.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .. import LakebedError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from .report import Report

GROUP = "lakebed.reports"
_FOLDER = Path(__file__).parent


class UnknownReport(LakebedError):
    """A report name that nothing provides."""


@cache
def report_names() -> tuple[str, ...]:
    """Names of all reports, sorted."""
    return tuple(sorted({*_own(), *_others()}))


def has_report(name: str) -> bool:
    """Whether there is a report of that name; what other packages have installed is looked up only if it is not ours."""
    return name in _own() or name in _others()


def _own() -> dict[str, Path]:
    return {path.stem.replace("_", "-"): path.with_suffix(".py") for path in _FOLDER.glob("*.sql")}


def _others() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_report(name: str) -> type[Report]:
    """The report class; raises UnknownReport, listing those that exist."""
    if name in _own():
        module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        return _only_report(module.__name__)
    other = _others().get(name)
    if other is None:
        raise UnknownReport(f"no report {name!r}; there are {', '.join(report_names())}")
    found: type[Report] = other.load()
    return found


def _only_report(module: str) -> type[Report]:
    from .report import Report

    found = [
        value
        for value in vars(importlib.import_module(module)).values()
        if isinstance(value, type) and issubclass(value, Report) and value.__module__ == module
    ]
    if len(found) != 1:
        raise TypeError(f"{module} must define exactly one Report, not {len(found)}")
    return found[0]


def report_summary(name: str) -> str:
    """One line about a report, read from its source without importing it."""
    path = _own().get(name)
    if path is None:
        other = _others().get(name)
        return f"from {other.module}" if other is not None else ""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.lower() == path.stem.replace("_", ""):
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""

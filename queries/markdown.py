"""The Markdown of a report: the findings first, then tables and charts, how to read them, and SQL to go on with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..lake.steps import summarize_steps

if TYPE_CHECKING:
    from .report import TextTable
    from .results import Results


def number(value: Any, digits: int = 4) -> str:
    """A value as a person reads it: four significant digits, a dash for what is not there.

    >>> number(0.123456), number(1234567), number(1.5e-7), number(None)
    ('0.1235', '1,234,567', '1.5e-07', '–')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return f"{value:.{digits - 1}g}"


def percent(value: float | None) -> str:
    """A share as a percentage.

    >>> percent(0.1234)
    '12.3 %'
    """
    return "–" if value is None or math.isnan(value) else f"{100 * value:.3g} %"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; `columns` maps headings to keys. Under a heading with "step" numbers have no commas."""
    if not rows:
        return "*(no rows)*"
    headings = (name.replace("|", "\\|") for name in columns)
    lines = [f"| {' | '.join(headings)} |", f"|{'|'.join(_rule(rows, key) for key in columns.values())}|"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row[key], name) for name, key in columns.items())} |")
    return "\n".join(lines)


def _rule(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return "---:" if any(isinstance(row[key], int | float) for row in rows) else "---"


def _cell(value: Any, heading: str) -> str:
    text = str(value) if "step" in heading and isinstance(value, int) else number(value)
    return text.replace("|", "\\|")


def render(
    results: Results,
    findings: Sequence[str],
    warnings: Sequence[str],
    tables: Sequence[tuple[TextTable, list[dict[str, Any]]]],
    charts: Mapping[str, str],
    files: Mapping[str, tuple[str, int]],
) -> str:
    """The whole document. `charts` are image files by title, `files` (suffixes, rows) by row file."""
    report = results.report
    parts = [
        f"# {report.report_name()}: {report.about(results)}",
        f"*{report.summary()} {_steps(results.steps)} of `{results.lake.uri}`.*",
        "\n".join(f"- {line}" for line in findings),
    ]
    if warnings:
        parts.append("\n".join(f"> **Warning.** {line}" for line in warnings))
    parts.extend(f"![{title}]({name})" for title, name in charts.items())
    for declared, rows in tables:
        about = f"{declared.about}\n\n" if declared.about else ""
        parts.append(f"## {declared.title}\n\n{about}{table(rows, declared.columns)}")
    if report.how_to_read:
        parts.append("## How to read this\n\n" + "\n".join(f"- {line}" for line in report.how_to_read))
    listed = "\n".join(
        f"- `{file}` ({suffixes}): {count:,} rows" for file, (suffixes, count) in files.items()
    )
    parts.append(f"## Rows\n\n{listed}")
    if report.next_queries:
        parts.append(
            "## Go on in SQL\n\n" + "\n\n".join(_query(results, *query) for query in report.next_queries)
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "All of it,"
    return f"{'Step' if len(steps) == 1 else f'{len(steps):,} steps'} {summarize_steps(steps)}".replace(
        ") steps", " steps)"
    )


def _query(results: Results, question: str, sql: str) -> str:
    filled = sql.replace("$run", f"'{results.run}'")
    return f'{question}\n\n```sh\nlakebed sql --lake {results.lake.uri} "{filled}"\n```'

"""`run_report`: from a lake and a report to a folder of rows, Markdown, JSON and charts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from . import markdown
from .output import ROW_FORMATS, OutputFolder, count_nonfinite, row_copies, to_json
from .report import InvalidOption, Report, RowFile
from .results import Results

if TYPE_CHECKING:
    from ..lake import Lake

CHART_FORMATS = ("svg", "html", "png", "vl")
DEFAULT_ROWS = ("jsonl", "parquet")


def run_report(
    lake: Lake,
    report: Report,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    rows_format: Sequence[str] | None = None,
    chart_formats: Sequence[str] = ("svg",),
) -> dict[str, Any]:
    """Computes the report and writes it to the folder `out`; returns what `lakebed query` prints.

    `rows_format` None means JSONL and Parquet, and CSV where the report's contract has one. Raises OutputExists,
    MissingData, UnknownName, InvalidOption or ReportFailed; then `out` is as it was.
    """
    _known("--rows-format", rows_format or (), ROW_FORMATS)
    _known("--chart-format", chart_formats, CHART_FORMATS)
    stem = report.file_stem()
    report_file, markdown_file = f"{stem}_report.json", f"{stem}_report.md"
    with (
        OutputFolder(out, report_file, overwrite) as folder,
        Results(lake, report, row_files := _RowFiles(folder.path, rows_format)) as results,
    ):
        report.check(results)
        row_files.start(results)
        plots = _draw(results, folder.path, chart_formats)
        nonfinite = {name: count_nonfinite(results, name) for name in results.row_sets()}
        warnings = _warnings(results, nonfinite)
        findings = report.findings(results)
        tables = [(each, results.rows(f"FROM {each.view}")) for each in report.tables]
        text = markdown.render(
            results, findings, warnings, tables, _images(report, plots), _listing(results, row_files)
        )
        (folder.path / markdown_file).write_text(text, encoding="utf-8")
        written = {report_file, markdown_file, *row_files.files.values(), *plots.values()}
        content = {
            "report": report.report_name(),
            "version": __version__,
            "lake": {"uri": lake.uri, "id": lake.id},
            "run": results.run,
            "steps": results.steps,
            "options": report.model_dump(exclude={"run", "steps"}),
            "findings": findings,
            "warnings": warnings,
            "row_counts": row_files.counts,
            "nonfinite_values": nonfinite,
            "files": sorted(written),
            **{each.view: rows for each, rows in tables},
            **report.facts(lake, results),
        }
        (folder.path / report_file).write_text(to_json(content), encoding="utf-8")
        results.finish_copies()
        folder.commit()

    def at(name: str) -> str:
        return str(Path(out) / name)

    return {
        "report": at(report_file),
        "markdown": at(markdown_file),
        **{key: at(name) for key, name in row_files.files.items()},
        **report.outputs(lake.uri, results.run),
        "plots": {name: at(file) for name, file in plots.items()},
    }


def _known(option: str, values: Iterable[str], allowed: Sequence[str]) -> None:
    for value in values:
        if value not in allowed:
            raise InvalidOption(f"{option} {value!r} is none of {', '.join(allowed)}")


def _row_file(report: Report, section: str) -> RowFile:
    return report.row_files.get(section) or RowFile(f"{report.file_stem()}_{section}", section)


# Fewer cells are written in less time than later sections lose with one thread each.
_MANY_CELLS = 500_000


class _RowFiles:
    """Starts writing sections when a large one is made, or at the end.

    `files` are names by key of the printed JSON, `counts` rows by section.
    """

    def __init__(self, folder: Path, formats: Sequence[str] | None) -> None:
        self._folder = folder
        self._formats = formats
        self.files: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self._waiting: list[tuple[str, Path, str]] = []

    def __call__(self, results: Results, section: str) -> None:
        row_file = _row_file(results.report, section)
        formats = self._formats or [*DEFAULT_ROWS, *(["csv"] if row_file.csv_key else [])]
        written, copies = row_copies(results, section, row_file, self._folder, dict.fromkeys(formats))
        self.files.update(written)
        self.counts[section] = int(results.value(f"SELECT count(*) FROM {section}"))
        # Last first: a large one is begun before the small ones, which fit in beside it.
        self._waiting[:0] = copies
        if self.counts[section] * len(results.columns(section)) >= _MANY_CELLS:
            self.start(results)

    def start(self, results: Results) -> None:
        """Starts what waits."""
        results.start_copies(self._waiting)
        self._waiting.clear()


def _warnings(results: Results, nonfinite: Mapping[str, Mapping[str, int]]) -> list[str]:
    lines = []
    for section, found in nonfinite.items():
        if found:
            columns = ", ".join(f"{name} ({count:,})" for name, count in found.items())
            lines.append(f"{section} holds NaN or infinite values, written as null: {columns}.")
    return [*lines, *results.report.warnings(results)]


def _draw(results: Results, folder: Path, formats: Sequence[str]) -> dict[str, str]:
    """Draws every chart in every format; file names by plot name (`name`, and `name.html` … beyond the first)."""
    if not formats:
        return {}
    from .drawing import draw

    plots: dict[str, str] = {}
    for chart in results.report.charts:
        files = draw(chart, results, folder, formats)
        for index, form in enumerate(dict.fromkeys(formats)):
            if form in files:
                plots[chart.name if index == 0 else f"{chart.name}.{form}"] = files[form]
    return plots


def _images(report: Report, plots: dict[str, str]) -> dict[str, str]:
    titles = {chart.name: chart.title for chart in report.charts}
    chosen: dict[str, str] = {}
    for name, file in plots.items():
        if file.endswith((".svg", ".png")):
            chosen.setdefault(titles[name.split(".")[0]], file)
    return chosen


def _listing(results: Results, row_files: _RowFiles) -> dict[str, tuple[str, int]]:
    listed: dict[str, tuple[str, int]] = {}
    for section in results.row_sets():
        file = _row_file(results.report, section).file
        names = {name for name in row_files.files.values() if name.rsplit(".", 1)[0] == file}
        suffixes = ", ".join(name.rsplit(".", 1)[1] for name in sorted(names))
        listed[file] = (suffixes, row_files.counts[section])
    return listed


__all__ = ["CHART_FORMATS", "DEFAULT_ROWS", "run_report"]

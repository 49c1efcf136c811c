"""A report's output folder: everything is written beside it first, and moved in when it is whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import LakebedError

if TYPE_CHECKING:
    from .report import RowFile
    from .results import Results

ROW_FORMATS = ("jsonl", "parquet", "csv")
_COPY = {
    "jsonl": "(FORMAT json)",
    "csv": "(FORMAT csv, HEADER)",
    "parquet": "(FORMAT parquet, COMPRESSION zstd)",
}


class OutputExists(LakebedError):
    """The output folder holds something and `--overwrite` was not given."""


class OutputUnwritable(LakebedError):
    """The output folder cannot be made or written."""


class OutputFolder:
    """Context manager around `--out DIR`: write into `.path`, then `commit`.

    Without a commit nothing of DIR changes. With `overwrite`, files of the same names are replaced, files that the
    last run of this report listed and this one does not write are removed, and nothing else is touched.
    """

    def __init__(self, target: str | os.PathLike[str], report_file: str, overwrite: bool) -> None:
        self.target = Path(target)
        self._report_file = report_file
        if self.target.exists() and not self.target.is_dir():
            raise OutputExists(f"Output path is a file: {self.target}; name a folder")
        self._was_empty = not self.target.is_dir() or not any(self.target.iterdir())
        if not self._was_empty and not overwrite:
            raise OutputExists(
                f"Output directory already exists and is non-empty: {self.target}; add --overwrite or name another"
            )
        resolved = self.target.absolute()
        self.path = resolved.parent / f".{resolved.name}.{uuid.uuid4().hex[:8]}.partial"

    def __enter__(self) -> OutputFolder:
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise OutputUnwritable(f"cannot write beside {self.target}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputUnwritable(
                f"writing {self.target} failed: {error.strerror}; nothing of it was changed"
            ) from error

    def commit(self) -> None:
        """Moves the folder into place."""
        if self._was_empty:
            # On every system a rename onto an empty folder is refused or atomic; without the folder it is atomic.
            if self.target.is_dir():
                self.target.rmdir()
            self.path.rename(self.target)
            return
        new = sorted(path.name for path in self.path.iterdir())
        stale = set(self._listed()) - set(new)
        # The report's JSON goes first and comes last: a folder without it is recognisably unfinished.
        (self.target / self._report_file).unlink(missing_ok=True)
        for name in stale:
            (self.target / name).unlink(missing_ok=True)
        for name in sorted(new, key=lambda name: name == self._report_file):
            os.replace(self.path / name, self.target / name)

    def _listed(self) -> list[str]:
        """Plain file names that the last run of this report says it wrote."""
        try:
            files = json.loads((self.target / self._report_file).read_text(encoding="utf-8"))["files"]
            names = [str(name) for name in files]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [name for name in names if name == os.path.basename(name) and name not in ("", ".", "..")]


def row_copies(
    results: Results, section: str, row_file: RowFile, folder: Path, formats: Iterable[str]
) -> tuple[dict[str, str], list[tuple[str, Path, str]]]:
    """A section in each format: file names by key of the printed JSON, and what `Results.copy` writes them from.

    JSONL has sorted keys and null for NaN and infinity; CSV has the section's columns in order, an empty cell for
    those, and JSON text for lists and maps; Parquet keeps the columns as they are.
    """
    written: dict[str, str] = {}
    copies = []
    for form in formats:
        name = f"{row_file.file}.{form}"
        source = section if form == "parquet" else _plain_select(results, section, form)
        copies.append((source, folder / name, _COPY[form]))
        key = {
            "jsonl": row_file.key,
            "csv": row_file.csv_key or f"{row_file.key.removesuffix('_rows')}_csv",
            "parquet": row_file.parquet_key,
        }[form]
        written[key] = name
    if row_file.key not in written and row_file.key.endswith("_rows") and written:
        written[row_file.key] = next(iter(written.values()))
    return written, copies


def _plain_select(results: Results, section: str, form: str) -> str:
    columns = results.columns(section)
    names = sorted(columns) if form == "jsonl" else list(columns)
    parts = []
    for name in names:
        value = _finite(f'"{name}"', columns[name])
        nested = form == "csv" and (
            columns[name].endswith("[]") or columns[name].startswith(("STRUCT", "MAP"))
        )
        parts.append(f'{f"to_json({value})" if nested else value} AS "{name}"')
    return f"(SELECT {', '.join(parts)} FROM {section})"


def _finite(value: str, kind: str) -> str:
    """SQL for a value with null in place of NaN and infinity; structs inside lists are left to their section."""
    if kind in ("DOUBLE", "FLOAT"):
        return f"CASE WHEN isfinite({value}) THEN {value} END"
    if kind in ("DOUBLE[]", "FLOAT[]"):
        return f"list_transform({value}, lambda x: CASE WHEN isfinite(x) THEN x END)"
    return value


def count_nonfinite(results: Results, section: str) -> dict[str, int]:
    """Number of NaN or infinite values by column of a section; columns without any are left out."""
    counts = {
        name: f'count(*) FILTER (NOT isfinite("{name}"))'
        if kind in ("DOUBLE", "FLOAT")
        else f'coalesce(sum(len(list_filter("{name}", lambda x: NOT isfinite(x)))), 0)'
        for name, kind in results.columns(section).items()
        if kind.removesuffix("[]") in ("DOUBLE", "FLOAT")
    }
    if not counts:
        return {}
    selected = ", ".join(f'{sql} AS "{name}"' for name, sql in counts.items())
    found = results.first(f"SELECT {selected} FROM {section}") or {}
    return {name: int(count) for name, count in found.items() if count}


def plain(value: Any) -> Any:
    """A value as JSON takes it: NaN and infinity become null, tuples lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """JSON with sorted keys and an indent of 2."""
    return json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

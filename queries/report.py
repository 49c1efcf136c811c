"""`Report`: what a report asks for, what it needs and what it writes. The numbers are in the `.sql` file beside it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import LakebedError
from .chart import Chart

if TYPE_CHECKING:
    from ..lake import Lake
    from ..lake.datasets import Need
    from .results import Results


class InvalidOption(LakebedError):
    """An option of a report that it does not have, lacks, or cannot take."""


class ReportFailed(LakebedError):
    """The data is there but the report has no meaning on it (a single step, a zero vector, …)."""


@dataclass(frozen=True)
class RowFile:
    """How a row set is written: file name without suffix, its key in the printed JSON, and the key of its CSV.

    A row set with `csv_key` is written as CSV too when no row format was asked for.
    """

    file: str
    key: str
    csv_key: str | None = None

    @property
    def parquet_key(self) -> str:
        """Key of the Parquet file in the printed JSON."""
        return f"{self.key.removesuffix('_rows').removesuffix('_jsonl')}_parquet"


@dataclass(frozen=True)
class TextTable:
    """A small table of the Markdown: the section it shows and the columns by heading.

    The same rows stand in the report's JSON under the section's name.
    """

    view: str
    title: str
    columns: Mapping[str, str]
    about: str = ""


class Report(BaseModel):
    """Base of every report. A field is an option, a key of the report's JSON and a SQL parameter of the same name.

    A report is a module NAME.py that defines one subclass, and NAME.sql beside it; see `queries/sections.py`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    row_files: ClassVar[Mapping[str, RowFile]] = {}
    tables: ClassVar[Sequence[TextTable]] = ()
    charts: ClassVar[Sequence[Chart]] = ()
    how_to_read: ClassVar[Sequence[str]] = ()
    next_queries: ClassVar[Sequence[tuple[str, str]]] = ()
    # Where it stands in the story of `queries/index.py`: chapter, and place in it.
    place: ClassVar[tuple[int, int]] = (99, 1)
    example: ClassVar[str] = ""
    # Options of the report in `lakebed demo`, for those that have required ones.
    demo_options: ClassVar[Mapping[str, Any]] = {}
    # Which steps of the demo: those its needs are made at, some checkpoints, or a window of neighbouring steps.
    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "states"
    # The demo has one run; a report that compares several has no place in it.
    in_demo: ClassVar[bool] = True

    run: str | None = Field(None, description="run to report on; may be left out when the lake has only one")
    steps: str | None = Field(
        None, description="steps: 500, 250:5500, 250:5500:250, first, last, joined by commas; default all"
    )

    @classmethod
    def report_name(cls) -> str:
        """The name on the command line: the module's, with dashes."""
        return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")

    @classmethod
    def file_stem(cls) -> str:
        """What the report's own files begin with: its name without a trailing `-report`, which the files add."""
        return cls.report_name().removesuffix("-report").replace("-", "_")

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    @classmethod
    def sql_text(cls) -> str:
        """Text of the `.sql` file beside the module."""
        module = sys.modules[cls.__module__].__file__
        assert module is not None
        return Path(module).with_suffix(".sql").read_text(encoding="utf-8")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """A report from option values; None means not given. Raises InvalidOption, in one line."""
        given = {name: value for name, value in values.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise InvalidOption(f"{cls.report_name()}: {_one_line(cls, error)}") from error

    def needs(self) -> tuple[Need, ...]:
        """Datasets the report reads: what `extract --for` makes and `query` requires."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """SQL parameters: every field, lists for tuples. A subclass may add derived ones."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.model_dump().items()
        }

    def subject(self, lake: Lake) -> str | None:
        """The run the report is about, None for the only one of the lake. One that compares runs names the first."""
        return self.run

    def about(self, results: Results) -> str:
        """What the Markdown's title says it is about."""
        return f"run {results.run}"

    def lake_parameters(self, lake: Lake) -> dict[str, Any]:
        """SQL parameters that depend on what the lake holds, such as the runs that are compared."""
        return {}

    def require(self, lake: Lake, run: str) -> None:
        """Raises UnknownName or MissingData when an option names what the run does not have."""

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Columns of the `-- arrays:` section `name`: what SQL lacks, computed by `queries/arrays.py`."""
        raise NotImplementedError(name)

    def check(self, results: Results) -> None:
        """Raises ReportFailed when the rows cannot carry the report."""

    def findings(self, results: Results) -> list[str]:
        """The first lines of the Markdown: what was found, in sentences with numbers."""
        return []

    def warnings(self, results: Results) -> list[str]:
        """What a reader must know before trusting the numbers."""
        return []

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """Further keys of the report's JSON."""
        return {}

    def outputs(self, lake_uri: str, run: str) -> dict[str, str]:
        """Further keys of the printed JSON."""
        return {}

    def arguments(self) -> list[str]:
        """The options that differ from their defaults, as command-line words; run and steps left out."""
        words: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in ("run", "steps") or value == field.get_default(call_default_factory=True):
                continue
            option = option_name(name)
            if isinstance(value, bool):
                words.append(option if value else f"--no-{option[2:]}")
            elif isinstance(value, tuple):
                words.extend(word for item in value for word in (option, str(item)))
            elif value is not None:
                words.extend((option, str(value)))
        return words


def option_name(field: str) -> str:
    """The command-line option of a field."""
    return f"--{field.replace('_', '-')}"


def _one_line(cls: type[Report], error: ValidationError) -> str:
    parts = []
    for found in error.errors():
        name = str(found["loc"][0]) if found["loc"] else ""
        if found["type"] == "extra_forbidden":
            has = ", ".join(option_name(field) for field in cls.model_fields)
            parts.append(f"no option {option_name(name)}; it has {has}")
        elif found["type"] == "missing":
            parts.append(f"{option_name(name)} is required")
        else:
            message = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
            parts.append(f"{option_name(name)} {message}, not {found['input']!r}" if name else message)
    return "; ".join(parts)

"""`lakebed query REPORT`: a command per report, with options made from the report's fields."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from ..queries.registry import UnknownReport, has_report, load_report, report_names, report_summary

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from ..queries.report import Report

_ROW_FORMATS = "jsonl, parquet, csv"
_CHART_FORMATS = "svg, html, png, vl or none"


class ReportGroup(click.Group):
    """Reports as commands. A report is imported when it is named; its summary is read from its source."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all reports."""
        return list(report_names())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The command of one report; raises UnknownReport, listing those that exist."""
        return report_command(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The named command, without click's own guess at an unknown one."""
        if args and not has_report(args[0]):
            raise UnknownReport(f"no report {args[0]!r}; there are {', '.join(report_names())}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line per report."""
        with formatter.section("Reports"):
            formatter.write_dl([(name, report_summary(name)) for name in report_names()])


@click.group(
    "query",
    cls=ReportGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`lakebed query REPORT --help` lists a report's options. Prints one JSON object: the files written.",
)
def query() -> None:
    """Write a report from what a lake holds: rows, Markdown, JSON and charts.

    A report is SQL over the lake. It never runs the model; what is missing is named with the command that makes it.
    """


def report_command(name: str) -> click.Command:
    """The click command of one report."""
    report = load_report(name)
    example = f"\n\n\b\nExample:\n  {_wrapped(report.example)}" if report.example else ""
    return click.Command(
        name,
        callback=_callback(report),
        params=[*report_options(report), *_output_options()],
        help=f"{(report.__doc__ or '').strip()}{example}",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _wrapped(example: str) -> str:
    return example.replace(" --out ", " \\\n    --out ")


def _output_options() -> list[click.Parameter]:
    return [
        click.Option(["--out"], required=True, metavar="DIR", help="folder for the report's files"),
        click.Option(
            ["--overwrite"], is_flag=True, help="replace this report's files in a folder that has some"
        ),
        click.Option(
            ["--chart-format"],
            default="svg",
            show_default=True,
            metavar="LIST",
            help=f"comma-separated: {_CHART_FORMATS}",
        ),
        click.Option(
            ["--rows-format"],
            metavar="LIST",
            help=f"comma-separated: {_ROW_FORMATS}; default jsonl,parquet, and csv where the report has one",
        ),
    ]


def _callback(report: type[Report]) -> Callable[..., None]:
    def call(
        lake: str, out: str, overwrite: bool, chart_format: str, rows_format: str | None, **values: Any
    ) -> None:
        from ..lake import Lake
        from ..queries.run import run_report

        asked = read_report(report, values)
        with Lake.open(lake) as opened:
            printed = run_report(
                opened,
                asked,
                out,
                overwrite=overwrite,
                rows_format=_listed(rows_format) if rows_format else None,
                chart_formats=[] if chart_format == "none" else _listed(chart_format),
            )
        click.echo(json.dumps(printed, indent=2))

    return call


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def report_options(report: type[Report]) -> list[click.Parameter]:
    """`--lake` and one option per field of the report; `lakebed extract --for` takes the same."""
    lake = click.Option(
        ["--lake"],
        required=True,
        envvar="LAKEBED_LAKE",
        show_envvar=True,
        metavar="PATH",
        help="path or URI of the lake",
    )
    return [lake, *(_option(name, field) for name, field in report.model_fields.items())]


def read_report(report: type[Report], values: dict[str, Any]) -> Report:
    """The report with these option values; what was not given keeps its default. Raises InvalidOption."""
    return report.parse({name: value for name, value in values.items() if value not in (None, ())})


def _option(name: str, field: FieldInfo) -> click.Option:
    kind, repeated = _plain_type(field.annotation)
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("typed_as") == "text":
        kind = str
    dashed = name.replace("_", "-")
    declared = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
    return click.Option(
        [declared, name],
        type=_click_type(kind),
        multiple=repeated,
        default=None,
        required=field.is_required(),
        help=_help(field, repeated),
        metavar=None if kind is bool or get_origin(kind) is Literal else _metavar(kind),
    )


def _plain_type(annotation: Any) -> tuple[Any, bool]:
    """The type of one value, and whether the option is repeatable."""
    if get_origin(annotation) is typing.Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(annotation) if part is not type(None))
        return _plain_type(kind)
    if get_origin(annotation) in (tuple, list):
        return _plain_type(get_args(annotation)[0])[0], True
    return annotation, False


def _click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice([str(value) for value in get_args(kind)])
    return kind if kind in (int, float, bool) else str


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _help(field: FieldInfo, repeated: bool) -> str:
    text = field.description or ""
    if repeated:
        text += "; may be given several times"
    default = field.get_default(call_default_factory=True)
    if not field.is_required() and default is not None:
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f"  [default: {shown}]"
    return text


__all__ = ["query", "read_report", "report_command", "report_options"]

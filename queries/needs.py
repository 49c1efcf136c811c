"""Which run and steps a report is about, and what is missing for it, with the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..lake.datasets import (
    MOMENTS,
    OF_INTERVALS,
    RECORDED,
    WEIGHTS,
    Need,
    need_intervals,
    need_steps,
)
from ..lake.errors import MissingData, UnknownName
from ..lake.steps import StepSyntax, select_steps, step_option, summarize_steps

if TYPE_CHECKING:
    from ..lake import Lake
    from .report import Report


def resolve_run(lake: Lake, report: Report) -> str:
    """The run the report is about; raises UnknownName, listing the runs, if it is not there or not clear."""
    run = report.subject(lake)
    if run is not None:
        lake.require_run(run)
        return run
    runs = lake.runs()
    if len(runs) != 1:
        raise UnknownName(
            f"{report.report_name()}: which --run? {lake.uri} has {', '.join(runs) or 'no runs yet'}"
        )
    return runs[0]


def resolve_steps(lake: Lake, report: Report, run: str) -> list[int]:
    """The steps the report reads, ascending; raises MissingData for what was not recorded or extracted."""
    needs = [(need, set(held_steps(lake, run, need))) for need in report.needs()]
    selected = [(need, steps) for need, steps in needs if need.steps == "selected"]
    for need, steps in needs:
        if not steps and need.steps in ("selected", "any"):
            raise MissingData(_message(lake, report, run, need, _explicit(report.steps)))
    common = sorted(set.intersection(*(steps for _, steps in selected))) if selected else []
    wanted = select_steps(report.steps, common)
    for need, steps in selected:
        absent = [step for step in wanted if step not in steps]
        if absent:
            raise MissingData(_message(lake, report, run, need, absent))
    if selected and not wanted:
        what = ", ".join(sorted({need.dataset for need, _ in selected}))
        raise MissingData(
            f"{report.report_name()}: no step of run {run!r} lies in --steps {report.steps}; {what} is there for "
            f"{summarize_steps(common)}"
        )
    for need, _ in selected:
        if need.dataset in OF_INTERVALS:
            _require_intervals(lake, report, run, need, wanted)
    for need, steps in needs:
        if need.steps not in ("selected", "any"):
            absent = [step for step in need_steps(need, wanted) if step not in steps]
            if absent:
                raise MissingData(_message(lake, report, run, need, absent))
    return wanted


def _require_intervals(lake: Lake, report: Report, run: str, need: Need, wanted: list[int]) -> None:
    """Every interval between neighbouring steps must be there; the command that makes them names every step."""
    if len(wanted) < 2:
        raise MissingData(
            f"{report.report_name()}: an update lies between two steps, and --steps {report.steps or 'all'} leaves "
            f"{summarize_steps(wanted)} of run {run!r}"
        )
    held = lake.dataset_intervals(run, need.dataset, need.parameters)
    if any(ends not in held for ends in need_intervals(wanted)):
        raise MissingData(_message(lake, report, run, need, wanted))


def held_steps(lake: Lake, run: str, need: Need) -> list[int]:
    """Steps at which a dataset is there, ascending.

    Weights and moments stand at every anchor of a trace, extracted or not; before the first update moments are zero, and
    known without being stored.
    """
    if need.dataset == MOMENTS:
        stored = lake.session.execute(
            "SELECT step FROM steps WHERE run = ? AND state = 'stored' AND has_moments",
            [run],
            tables={"steps"},
        ).fetchall()
        return sorted({*lake.dataset_steps(run, MOMENTS), *(int(step) for (step,) in stored)})
    if need.dataset != WEIGHTS:
        return lake.dataset_steps(run, need.dataset, need.parameters)
    axes = lake.axes.groups(run, WEIGHTS).values()
    return sorted({int(step) for axis in axes for step in axis.steps})


def _details(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Parameters as a person reads them: what is empty or zero left out, what is nested on its own."""
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _details(value)
        elif isinstance(value, list) and any(isinstance(of, Mapping) for of in value):
            for of in value:
                yield from _details(of)
        elif isinstance(value, list):
            yield from ([f"{name} {' and '.join(map(str, value))}"] if value else [])
        elif value not in (None, 0):
            yield f"{name} {value}"


def _explicit(text: str | None) -> list[int]:
    """Steps that `--steps` names whatever there is."""
    try:
        return select_steps(text or "all", [])
    except StepSyntax:
        raise
    except IndexError:
        return []


def _message(lake: Lake, report: Report, run: str, need: Need, steps: Iterable[int]) -> str:
    listed = list(steps)
    at = f" at {'step' if len(listed) == 1 else 'steps'} {summarize_steps(listed)}" if listed else ""
    details = ", ".join(_details(need.parameters))
    made_with = f" ({details})" if details else ""
    opening = f"{report.report_name()} needs {need.dataset} for run {run!r}{at}{made_with}."
    held = held_steps(lake, run, need)
    if need.dataset in RECORDED:
        has = f"recorded are steps {summarize_steps(held)}; the rest" if held else "it"
        return (
            f"{opening} In a run's own training {has} is recorded, never computed afterwards. Run: "
            f"lakebed train --lake {shlex.quote(lake.uri)} --run NAME (our loop), or record your own loop with "
            "lakebed trace"
        )
    words = ["lakebed", "extract", "--for", report.report_name(), "--lake", lake.uri, "--run", run]
    if listed:
        words += ["--steps", step_option(listed)]
    elif report.steps is not None:
        words += ["--steps", report.steps]
    return f"{opening} Run: {shlex.join([*words, *report.arguments()])}"

"""Drawing: a chart as a report declares it, its section's rows, and files in the formats asked for.

Only this module, `drawing_points`, `drawing_bars`, `marks` and `theme` import Altair, and only when a chart is asked for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl
import vl_convert
from altair.utils.schemapi import debug_mode

from ..lake.steps import summarize_steps
from . import theme
from .chart import Bars, Chart, Grid, Heatmap, Histogram, Scatter, StackedBars, Trajectory
from .chart_data import HIGHLIGHTED, Lines, stacked, thin_cells, trajectory_lines
from .drawing_bars import bars, histogram
from .drawing_points import grid, scatter
from .marks import Note, inline_rows, steps_axis

if TYPE_CHECKING:
    from .results import Results


def draw(chart: Chart, results: Results, folder: Path, formats: Sequence[str]) -> dict[str, str]:
    """Writes `<report>_<chart>.<format>` into `folder`; returns file names by format, none when there is no row."""
    frame = results.frame(chart.view)
    if isinstance(chart, Trajectory):
        # What a run lacks altogether has no chart, and no panel.
        frame = frame.filter(pl.col(chart.y).cast(pl.Float64).is_finite())
        if isinstance(chart.highlight, str):
            chart = replace(chart, highlight=getattr(results.report, chart.highlight))
    if frame.is_empty():
        return {}
    stem = f"{results.report.file_stem()}_{chart.name}"
    specs: dict[bool, str] = {}
    written: dict[str, str] = {}
    for form in dict.fromkeys(formats):
        interactive = form in ("html", "vl")
        if interactive not in specs:
            specs[interactive] = json.dumps(specification(chart, frame, _about(results), interactive))
        suffix = "vl.json" if form == "vl" else form
        _write(specs[interactive], folder / f"{stem}.{suffix}", form)
        written[form] = f"{stem}.{suffix}"
    return written


def specification(chart: Chart, frame: pl.DataFrame, about: str, interactive: bool) -> dict[str, Any]:
    """The Vega-Lite specification. Interactive ones have tooltips and a legend to click, the others direct labels."""
    build = next((build for kind, build in _BUILDERS.items() if isinstance(chart, kind)), None)
    if build is None:
        raise TypeError(f"no drawing for {type(chart).__name__}")
    # Altair holds every object against the whole Vega-Lite schema as it is made: more than half of a chart's time, for
    # what does not change from run to run. A test validates the specification of every kind of chart instead.
    with debug_mode(False):
        layers, notes = build(chart, frame, interactive)
        subtitle = [line for line in (chart.about, " · ".join([about, *notes])) if line]
        spec: dict[str, Any] = theme.finish(layers, chart.title, subtitle).to_dict(validate=False)
    return spec


def _about(results: Results) -> str:
    about = results.report.about(results)
    if not results.steps:
        return about
    return f"{about}, {'step' if len(results.steps) == 1 else 'steps'} {summarize_steps(results.steps)}"


def _write(spec: str, path: Path, form: str) -> None:
    version = theme.vega_lite_version()
    if form == "svg":
        path.write_text(vl_convert.vegalite_to_svg(spec, vl_version=version), encoding="utf-8")
    elif form == "png":
        path.write_bytes(vl_convert.vegalite_to_png(spec, vl_version=version, scale=2))
    elif form == "html":
        path.write_text(vl_convert.vegalite_to_html(spec, vl_version=version, bundle=True), encoding="utf-8")
    else:
        path.write_text(json.dumps(json.loads(spec), indent=1, sort_keys=True) + "\n", encoding="utf-8")


# -- trajectories ----------------------------------------------------------------------------------------------------


def _trajectory(chart: Trajectory, frame: pl.DataFrame, interactive: bool) -> tuple[Any, Note]:
    if chart.panel is None:
        lines = trajectory_lines(chart, frame, theme.HEIGHT)
        return _panel(chart, lines, chart.y_title, chart.log_y, interactive, theme.HEIGHT), lines.notes
    height = theme.HEIGHT // 2
    names = frame[chart.panel].unique(maintain_order=True).to_list()
    parts = [trajectory_lines(chart, frame.filter(pl.col(chart.panel) == name), height) for name in names]
    # Where the panels show the same series, each has the same colour in all of them.
    shown = list(dict.fromkeys(name for lines in parts for name in lines.names))
    if len(shown) == max(len(lines.names) for lines in parts):
        parts = [replace(lines, names=shown) for lines in parts]
    parts = _same_colours(parts)
    # One axis for all panels, so that what happened at one step stands above itself.
    together = [min(lines.x_domain[0] for lines in parts), max(lines.x_domain[1] for lines in parts)]
    panels = [
        _panel(
            # The axes are the same, so only the last needs its title.
            chart if lines is parts[-1] else replace(chart, x_title=""),
            replace(lines, x_domain=together),
            chart.panel_titles.get(name, str(name)),
            name in chart.log_panels,
            interactive,
            height,
        )
        for name, lines in zip(names, parts, strict=True)
    ]
    # Panels have series of their own too; with one scale for all, there would be too few colours.
    stacked_panels = alt.vconcat(*panels, spacing=18).resolve_scale(color="independent")
    return stacked_panels, list(dict.fromkeys(note for lines in parts for note in lines.notes))


def _same_colours(parts: list[Lines]) -> list[Lines]:
    """Puts series that stand in several panels first, in one order, since colours are given in order."""
    counts = Counter(name for lines in parts for name in lines.names)
    shared = [name for name, count in counts.items() if count > 1]
    return [
        replace(
            lines,
            names=[name for name in shared if name in lines.names]
            + [name for name in lines.names if name not in shared],
        )
        for lines in parts
    ]


def _panel(chart: Trajectory, lines: Lines, y_title: str, log_y: bool, interactive: bool, height: int) -> Any:
    x = steps_axis(chart.x, chart.x_title, lines.x_domain)
    scale = alt.Scale(type="log" if log_y else "linear", domain=lines.y_domain, nice=False, zero=False)
    y = alt.Y("value:Q", title=y_title, scale=scale, axis=alt.Axis(tickCount=6))
    base = alt.Chart().properties(width=theme.WIDTH, height=height)
    detail = alt.Detail("series:N")
    layers: list[alt.Chart] = []
    if not lines.other.is_empty():
        layers.append(
            base.properties(data=inline_rows(lines.other))
            .mark_line(color=theme.GREY, strokeWidth=1, opacity=0.55)
            .encode(x=x, y=y, detail=detail, tooltip=_tips(chart.x, "value", chart.y_title or chart.y))
        )
    points = len(lines.steps) <= 40
    colour = alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(domain=lines.names, range=theme.colours(len(lines.names))),
        legend=alt.Legend(symbolLimit=0, orient="right") if interactive and len(lines.names) > 1 else None,
    )
    top = base.properties(data=inline_rows(lines.top)).mark_line(
        strokeWidth=2 if len(lines.steps) <= 400 else 1,
        point=alt.OverlayMarkDef(size=18) if points else False,
    )
    tips = _tips(chart.x, "value", y_title)
    if interactive and len(lines.names) > 1:
        picked = alt.selection_point(fields=["series"], bind="legend", name=_parameter_name(y_title))
        top = top.encode(
            x=x,
            y=y,
            color=colour,
            tooltip=tips,
            opacity=alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.12)),
        ).add_params(picked)
    else:
        top = top.encode(x=x, y=y, color=colour, tooltip=tips)
    layers.append(top)
    if not interactive and len(lines.names) > 1:
        layers.append(
            base.properties(data=inline_rows(lines.labels))
            .mark_text(align="left", dx=7, fontSize=11, baseline="middle")
            .encode(x=x, y=alt.Y("label_at:Q", scale=scale), text="series:N", color=colour)
        )
    return alt.layer(*layers)


def _parameter_name(title: str) -> str:
    return "picked_" + re.sub(r"\W", "_", title)


def _tips(x: str, value: str, title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("series:N", title="series"),
        alt.Tooltip(f"{x}:Q", title="step", format="~d"),
        alt.Tooltip(f"{value}:Q", title=title, format=".4~g"),
    ]


def _span(frame: pl.DataFrame, start: str, end: str) -> tuple[int, int]:
    low, high = frame.select(low=pl.col(start).min(), high=pl.col(end).max()).row(0)
    return int(low), int(high)


# -- bars and cells --------------------------------------------------------------------------------------------------


def _bars(chart: StackedBars, frame: pl.DataFrame, interactive: bool) -> tuple[Any, Note]:
    data, names, notes = stacked(chart, frame)
    colours = [*theme.colours(len([name for name in names if name != HIGHLIGHTED])), theme.GREY]
    colour = alt.Color(
        f"{chart.color}:N",
        title=None,
        sort=names,
        scale=alt.Scale(domain=names, range=colours[: len(names)]),
        legend=alt.Legend(symbolLimit=0, orient="right", symbolType="square"),
    )
    axis = alt.Axis(format=chart.y_format) if chart.y_format else alt.Axis()
    low, high = _span(frame, chart.start, chart.end)
    bars = (
        alt.Chart(inline_rows(data))
        .mark_rect(stroke="white", strokeWidth=0.3)
        .encode(
            x=steps_axis(chart.start, chart.x_title, [low, high]),
            x2=f"{chart.end}:Q",
            y=alt.Y("bottom:Q", title=chart.y_title, axis=axis, scale=alt.Scale(nice=not chart.y_format)),
            y2="top:Q",
            color=colour,
            tooltip=[
                alt.Tooltip(f"{chart.color}:N", title="part"),
                alt.Tooltip(f"{chart.start}:Q", title="from step", format="~d"),
                alt.Tooltip(f"{chart.end}:Q", title="to step", format="~d"),
                alt.Tooltip(f"{chart.y}:Q", title=chart.y_title, format=".4~g"),
            ],
        )
        .properties(width=theme.WIDTH, height=theme.HEIGHT)
    )
    if interactive:
        picked = alt.selection_point(fields=[chart.color], bind="legend", name="picked")
        faded = alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.15))
        bars = bars.encode(opacity=faded).add_params(picked)
    return bars, notes


def _cells(chart: Heatmap, frame: pl.DataFrame, interactive: bool) -> tuple[Any, Note]:
    data, names, notes = thin_cells(chart, frame)
    scale = alt.Scale(scheme="viridis", domain=list(chart.domain) if chart.domain else alt.Undefined)
    row = 17 if len(names) <= 20 else 13
    low, high = _span(frame, chart.start, chart.end)
    cells = (
        alt.Chart(inline_rows(data))
        .mark_rect(stroke="white", strokeWidth=0.3)
        .encode(
            x=steps_axis(chart.start, chart.x_title, [low, high], grid=False),
            x2=f"{chart.end}:Q",
            y=alt.Y(
                f"{chart.series}:N",
                title=None,
                sort=names,
                axis=alt.Axis(grid=False, ticks=False, labelLimit=220),
            ),
            color=alt.Color(
                f"{chart.value}:Q",
                title=chart.value_title,
                scale=scale,
                legend=alt.Legend(gradientLength=160),
            ),
            tooltip=[
                alt.Tooltip(f"{chart.series}:N", title="series"),
                alt.Tooltip(f"{chart.start}:Q", title="from step", format="~d"),
                alt.Tooltip(f"{chart.end}:Q", title="to step", format="~d"),
                alt.Tooltip(f"{chart.value}:Q", title=chart.value_title, format=".4~g"),
            ],
        )
        .properties(width=theme.WIDTH, height=max(60, row * len(names)))
    )
    return cells, notes


_BUILDERS: dict[type[Chart], Callable[[Any, pl.DataFrame, bool], tuple[Any, Note]]] = {
    Trajectory: _trajectory,
    StackedBars: _bars,
    Heatmap: _cells,
    Scatter: scatter,
    Grid: grid,
    Bars: bars,
    Histogram: histogram,
}

"""Drawing bars without a step axis: horizontal ones, a value per name; and histograms."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from . import theme
from .chart import Bars, Histogram
from .marks import Note, inline_rows

_ROW = 17


def bars(chart: Bars, frame: pl.DataFrame, interactive: bool) -> tuple[Any, Note]:
    """Bars from zero, longest names in full; those beyond `rows` are left out, and the subtitle says how many."""
    panels = [None] if chart.panel is None else frame[chart.panel].unique(maintain_order=True).to_list()
    parts, left_out = [], 0
    colours = [] if chart.color is None else frame[chart.color].unique(maintain_order=True).to_list()
    for panel in panels:
        of = frame if panel is None else frame.filter(pl.col(str(chart.panel)) == panel)
        left_out += max(0, of.height - chart.rows)
        parts.append(_panel(chart, of.head(chart.rows), panel, colours))
    notes = [f"{left_out} more left out"] if left_out else []
    if len(parts) == 1:
        return parts[0], notes
    return alt.vconcat(*parts, spacing=18), notes


def _panel(chart: Bars, frame: pl.DataFrame, panel: Any, colours: list[Any]) -> alt.Chart:
    kept = [chart.label, chart.value, *([chart.color] if chart.color else [])]
    names = frame[chart.label].unique(maintain_order=True).to_list()
    encoding: dict[str, Any] = {
        "x": alt.X(f"{chart.value}:Q", title=chart.value_title, axis=alt.Axis(format=".3~g", tickCount=6)),
        "y": alt.Y(
            f"{chart.label}:N",
            title=None,
            sort=names,
            axis=alt.Axis(grid=False, ticks=False, labelLimit=260),
        ),
        "tooltip": [
            alt.Tooltip(f"{chart.label}:N", title="group"),
            alt.Tooltip(f"{chart.value}:Q", title=chart.value_title, format=".4~g"),
        ],
    }
    if chart.color is not None:
        encoding["color"] = alt.Color(
            f"{chart.color}:N",
            title=None,
            sort=colours,
            scale=alt.Scale(domain=colours, range=theme.colours(len(colours))),
        )
        encoding["yOffset"] = alt.YOffset(f"{chart.color}:N", sort=colours)
        encoding["tooltip"].insert(1, alt.Tooltip(f"{chart.color}:N"))
    else:
        encoding["color"] = alt.value(theme.colours(1)[0])
    rows = max(1, len(names)) * (1 if chart.color is None else max(1, len(colours) * 0.6))
    title = alt.Undefined if panel is None else alt.Title(str(panel), anchor="start", fontSize=12)
    drawn: alt.Chart = (
        alt.Chart(inline_rows(frame.select(kept)), title=title)
        .mark_bar()
        .encode(**encoding)
        .properties(width=theme.WIDTH, height=int(max(40, _ROW * rows)))
    )
    return drawn


def histogram(chart: Histogram, frame: pl.DataFrame, interactive: bool) -> tuple[Any, Note]:
    """Bars from zero over bins; where series overlap, both are seen."""
    names = frame[chart.series].unique(maintain_order=True).to_list()
    kept = [chart.series, chart.start, chart.end, chart.y]
    axis = alt.Axis(format=".3~g", tickCount=10)
    drawn = (
        alt.Chart(inline_rows(frame.select(kept).with_columns(pl.lit(0).alias("zero"))))
        .mark_rect(opacity=0.55, stroke="white", strokeWidth=0.3)
        .encode(
            x=alt.X(
                f"{chart.start}:Q", title=chart.x_title, axis=axis, scale=alt.Scale(zero=False, nice=False)
            ),
            x2=f"{chart.end}:Q",
            y=alt.Y(f"{chart.y}:Q", title=chart.y_title, axis=alt.Axis(tickCount=6)),
            y2="zero:Q",
            color=alt.Color(
                f"{chart.series}:N",
                title=None,
                sort=names,
                scale=alt.Scale(domain=names, range=theme.colours(len(names))),
                legend=alt.Legend(symbolLimit=0, orient="right", symbolType="square")
                if len(names) > 1
                else None,
            ),
            tooltip=[
                alt.Tooltip(f"{chart.series}:N", title="series"),
                alt.Tooltip(f"{chart.start}:Q", title="from", format=".4~g"),
                alt.Tooltip(f"{chart.end}:Q", title="to", format=".4~g"),
                alt.Tooltip(f"{chart.y}:Q", title=chart.y_title, format=".4~g"),
            ],
        )
        .properties(width=theme.WIDTH, height=theme.HEIGHT)
    )
    return drawn, []

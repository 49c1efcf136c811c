"""Drawing charts without a step axis: points in a plane, and a grid of named rows and columns."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from . import theme
from .chart import Grid, Scatter
from .chart_data import Points, grid_cells, scatter_points
from .marks import Note, inline_rows

_CELL = 36
_GAP = 70
# White to dark blue: an empty cell reads as empty.
_SHADES = ("#ffffff", "#6baed6", "#08306b")
# Values on both sides of zero: orange below, blue above.
_TWO_SIDED = ("#b35806", "#ffffff", "#08519c")


def scatter(chart: Scatter, frame: pl.DataFrame, interactive: bool) -> tuple[Any, Note]:
    """One panel, or a panel per value of `chart.panel`, two beside each other."""
    groups = (
        []
        if chart.color is None
        else frame[chart.color].cast(pl.String).unique(maintain_order=True).to_list()
    )
    if chart.panel is None:
        points = scatter_points(chart, frame)
        titles = (chart.x_title, chart.y_title)
        return _panel(
            chart, points, titles, groups, (theme.WIDTH, theme.HEIGHT + 40), interactive
        ), points.notes
    size = ((theme.WIDTH - _GAP) // 2, theme.HEIGHT * 2 // 3)
    panels, notes = [], []
    for name in frame[chart.panel].unique(maintain_order=True).to_list():
        points = scatter_points(chart, frame.filter(pl.col(chart.panel) == name))
        titles = chart.panel_titles.get(name, (chart.x_title, str(name)))
        panels.append(_panel(chart, points, titles, groups, size, interactive))
        notes += points.notes
    rows = [alt.hconcat(*panels[i : i + 2], spacing=24) for i in range(0, len(panels), 2)]
    return alt.vconcat(*rows, spacing=24), list(dict.fromkeys(notes))


def _panel(
    chart: Scatter,
    points: Points,
    titles: tuple[str, str],
    groups: list[str],
    size: tuple[int, int],
    interactive: bool,
) -> Any:
    base = alt.Chart().properties(width=size[0], height=size[1])
    scales = [
        alt.Scale(domain=domain, nice=False, zero=False) for domain in (points.x_domain, points.y_domain)
    ]
    x = alt.X("x:Q", title=titles[0], scale=scales[0], axis=alt.Axis(tickCount=6))
    y = alt.Y("y:Q", title=titles[1], scale=scales[1], axis=alt.Axis(tickCount=6))
    layers: list[Any] = []
    if chart.zero:
        zero = alt.InlineData(values=[{"at": 0}])
        rule = base.properties(data=zero).mark_rule(color=theme.GREY, strokeWidth=1)
        layers += [
            rule.encode(x=alt.X("at:Q", scale=scales[0])),
            rule.encode(y=alt.Y("at:Q", scale=scales[1])),
        ]
    if chart.diagonal:
        ends = alt.InlineData(values=[{"x": value, "y": value} for value in points.x_domain])
        layers.append(
            base.properties(data=ends).mark_line(color=theme.GREY, strokeDash=[4, 3]).encode(x=x, y=y)
        )
    colour = _colour(chart, groups)
    tips = [
        alt.Tooltip("label:N", title="point"),
        *([alt.Tooltip("color:N", title=chart.color_title or "group")] if groups else []),
        alt.Tooltip("x:Q", title=titles[0], format=".4~g"),
        alt.Tooltip("y:Q", title=titles[1], format=".4~g"),
    ]
    dots = base.properties(data=inline_rows(points.points)).mark_circle(size=46, opacity=0.75)
    dots = dots.encode(x=x, y=y, color=colour, tooltip=tips)
    layers.append(dots.interactive() if interactive and chart.panel is None else dots)
    if not points.labels.is_empty():
        middle = sum(points.x_domain) / 2
        # A label stands on the side of its point that has more room.
        for right in (False, True):
            side = points.labels.filter((pl.col("x") > middle) == right)
            named = base.properties(data=inline_rows(side)).mark_text(
                align="right" if right else "left", dx=-7 if right else 7, fontSize=11, baseline="middle"
            )
            layers.append(named.encode(x=x, y=y, text="label:N", color=colour))
    return alt.layer(*layers)


def _colour(chart: Scatter, groups: list[str]) -> Any:
    if not groups:
        return alt.value(theme.colours(1)[0])
    return alt.Color(
        "color:N",
        title=chart.color_title or None,
        sort=groups,
        scale=alt.Scale(domain=groups, range=theme.colours(len(groups))),
        legend=alt.Legend(symbolLimit=0) if len(groups) > 1 else None,
    )


def grid(chart: Grid, frame: pl.DataFrame, interactive: bool) -> tuple[Any, Note]:
    """Cells coloured by value, the number in each where it does not round to zero."""
    cells, rows, columns, notes = grid_cells(chart, frame)
    low, high = chart.domain or _limits(cells["value"])
    row_height = 20 if len(rows) <= 24 else 15
    # Columns are wide enough for their numbers; few of them share the usual width.
    size = {"width": max(theme.WIDTH - 40, _CELL * len(columns)), "height": row_height * len(rows)}
    shown = pl.col("value").round(chart.digits) != 0
    text = (
        pl.when(shown)
        .then(pl.col("value").map_elements(lambda v: f"{v:.{chart.digits}f}", pl.String))
        .otherwise(pl.lit(""))
    )
    base = alt.Chart(inline_rows(cells.with_columns(text=text))).properties(**size)
    x = alt.X(
        "column:N",
        title=None,
        sort=columns,
        axis=alt.Axis(grid=False, ticks=False, labelAngle=-40, labelLimit=200),
    )
    y = alt.Y("row:N", title=None, sort=rows, axis=alt.Axis(grid=False, ticks=False, labelLimit=220))
    two_sided = low < 0 < high
    middle = 0 if two_sided else (low + high) / 2
    shades = _TWO_SIDED if two_sided else _SHADES
    scale = alt.Scale(domain=[low, middle, high], range=list(shades), interpolate="rgb")
    boxes = base.mark_rect(stroke="white", strokeWidth=0.5).encode(
        x=x,
        y=y,
        color=alt.Color(
            "value:Q", title=chart.value_title, scale=scale, legend=alt.Legend(gradientLength=120)
        ),
        tooltip=[
            alt.Tooltip("row:N", title="row"),
            alt.Tooltip("column:N", title="column"),
            alt.Tooltip("value:Q", title=chart.value_title, format=".4~g"),
        ],
    )
    dark = alt.datum.value > (0.5 * high if two_sided else low + 0.55 * (high - low))
    if two_sided:
        dark = dark | (alt.datum.value < 0.5 * low)
    numbers = base.mark_text(fontSize=10 if row_height == 20 else 9).encode(
        x=x, y=y, text="text:N", color=alt.when(dark).then(alt.value("white")).otherwise(alt.value("#222222"))
    )
    return alt.layer(boxes, numbers), notes


def _limits(values: pl.Series) -> tuple[float, float]:
    low, high = values.min(), values.max()
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low == high:
        return 0.0, 1.0
    return float(low), float(high)

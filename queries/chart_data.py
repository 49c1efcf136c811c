"""What a chart shows of its rows: which series stand out, which steps are left out, where labels go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from .chart import Grid, Heatmap, Scatter, StackedBars, Trajectory

MAX_ROWS = 5000
HIGHLIGHTED = "all others"
_LABEL_PIXELS = 13
_WHY = {
    "change": "they changed most",
    "range": "their range is widest",
    "last": "they end highest",
    "last_abs": "they end farthest from zero",
}


@dataclass(frozen=True)
class Lines:
    """A trajectory panel: highlighted rows and the rest (columns x, series, value), labels, domains, notes."""

    top: pl.DataFrame
    other: pl.DataFrame
    labels: pl.DataFrame
    names: list[str]
    steps: list[int]
    x_domain: list[float]
    y_domain: list[float]
    notes: list[str]


def trajectory_lines(chart: Trajectory, frame: pl.DataFrame, height: int) -> Lines:
    """Splits the series into those that moved most and the rest, and thins the steps to at most MAX_ROWS rows."""
    series = pl.lit(chart.y) if chart.series is None else pl.col(chart.series)
    data = frame.select(
        pl.col(chart.x), series.alias("series"), pl.col(chart.y).cast(pl.Float64).alias("value")
    )
    finite = data.filter(pl.col("value").is_finite())
    log_y = chart.log_y
    thinned, notes = thin_steps(finite, chart.x)
    ranked = _ranked(finite, chart)
    names = ranked[: int(chart.highlight)]
    if len(ranked) > len(names):
        notes = [f"{len(names)} of {len(ranked)} series in colour, because {_WHY[chart.rank_by]}", *notes]
    low, high = _limits(finite, log_y)
    y_domain = list(chart.y_domain) if chart.y_domain else _padded(low, high, log_y)
    steps = thinned[chart.x].unique().sort().to_list()
    top = thinned.filter(pl.col("series").is_in(names))
    last = top.group_by("series").agg(pl.all().sort_by(chart.x).last())
    labels = spread_labels(last.sort("value", "series"), y_domain, height, log_y)
    return Lines(
        top=top,
        other=thinned.filter(~pl.col("series").is_in(names)),
        labels=labels,
        names=names,
        steps=steps,
        x_domain=[steps[0], steps[-1]] if len(steps) > 1 else [steps[0] - 1, steps[0] + 1],
        y_domain=y_domain,
        notes=notes,
    )


def _ranked(data: pl.DataFrame, chart: Trajectory) -> list[str]:
    ordered = data.sort(chart.x)
    value = pl.col("value")
    measure = {
        "change": (value.last() - value.first()).abs(),
        "range": value.max() - value.min(),
        "last": value.last(),
        "last_abs": value.last().abs(),
    }[chart.rank_by]
    ranked = ordered.group_by("series", maintain_order=True).agg(measure=measure)
    return ranked.sort(["measure", "series"], descending=[True, False])["series"].to_list()


def _limits(data: pl.DataFrame, log_y: bool) -> tuple[float, float]:
    values = data.filter(pl.col("value") > 0)["value"] if log_y else data["value"]
    low, high = values.min(), values.max()
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return (1.0, 10.0) if log_y else (0.0, 1.0)
    return float(low), float(high)


def _padded(low: float, high: float, log_y: bool) -> list[float]:
    if log_y:
        factor = max((high / low) ** 0.04, 1.05)
        return [low / factor, high * factor]
    if low == high:
        return [min(0.0, 1.2 * low), max(0.0, 1.2 * high) or 1.0]
    room = 0.04 * (high - low)
    bottom = 0.0 if 0 <= low < 0.35 * high else low - room
    return [bottom, high + room]


def thin_steps(data: pl.DataFrame, x: str, limit: int = MAX_ROWS) -> tuple[pl.DataFrame, list[str]]:
    """Keeps every k-th step, the first and the last, with the smallest k that leaves at most `limit` rows."""
    if len(data) <= limit:
        return data, []
    steps = data[x].unique().sort()
    per_step = math.ceil(len(data) / len(steps))
    stride = math.ceil(len(steps) / max(1, limit // per_step - 1))
    kept = pl.concat([steps.gather_every(stride), steps.tail(1)]).unique()
    note = f"every {_ordinal(stride)} of {len(steps):,} steps is drawn"
    return data.filter(pl.col(x).is_in(kept.implode())), [note]


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def spread_labels(labels: pl.DataFrame, domain: Sequence[float], height: int, log_y: bool) -> pl.DataFrame:
    """Adds `label_at`: label heights moved apart until none overlap, near to where their lines end.

    `labels` has one row per series, ascending by value.
    """
    scale = math.log if log_y else float
    low, high = scale(domain[0]), scale(domain[1])
    pixels = [(scale(value) - low) / (high - low) * height for value in labels["value"]]
    placed: list[float] = []
    for pixel in pixels:
        placed.append(max(pixel, placed[-1] + _LABEL_PIXELS) if placed else pixel)
    ceiling = float(height)
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - _LABEL_PIXELS
    back = [low + pixel / height * (high - low) for pixel in placed]
    return labels.with_columns(
        label_at=pl.Series([math.exp(at) if log_y else at for at in back], dtype=pl.Float64)
    )


def stacked(chart: StackedBars, frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str], list[str]]:
    """Bars with `bottom` and `top`, names of the parts, notes; parts beyond `highlight` are summed as one."""
    value = pl.col(chart.y).cast(pl.Float64)
    totals = frame.group_by(chart.color, maintain_order=True).agg(total=value.abs().sum())
    names: list[str] = totals[chart.color].to_list()
    notes: list[str] = []
    data = frame.select(chart.start, chart.end, chart.color, value)
    if len(names) > chart.highlight:
        ranked = totals.sort(["total", chart.color], descending=[True, False])[chart.color].to_list()
        kept = ranked[: chart.highlight - 1]
        notes = [f"the {len(names) - len(kept)} smallest of {len(names)} parts are drawn as one"]
        name = (
            pl.when(pl.col(chart.color).is_in(kept)).then(pl.col(chart.color)).otherwise(pl.lit(HIGHLIGHTED))
        )
        data = data.with_columns(name.alias(chart.color))
        data = data.group_by(chart.start, chart.end, chart.color, maintain_order=True).agg(
            pl.col(chart.y).sum()
        )
        names = [*(name for name in names if name in kept), HIGHLIGHTED]
    order = pl.col(chart.color).replace_strict(
        {name: i for i, name in enumerate(names)}, return_dtype=pl.Int64
    )
    return _stack(data.with_columns(order=order), chart), names, notes


def _stack(data: pl.DataFrame, chart: StackedBars) -> pl.DataFrame:
    """Adds `bottom` and `top` of every bar: positive values stack upwards from zero, negative ones downwards."""
    value, window = pl.col(chart.y).fill_nan(None), [chart.start, pl.col(chart.y) < 0]
    top = value.cum_sum().over(window, order_by="order")
    return data.with_columns(bottom=top - value, top=top).drop_nulls("top").sort(chart.start, "order")


def thin_cells(chart: Heatmap, frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str], list[str]]:
    """The rows of the series with the largest values, at most MAX_ROWS of them; names in the order of the section."""
    value = pl.col(chart.value).cast(pl.Float64)
    data = frame.select(chart.start, chart.end, chart.series, value)
    names: list[str] = data[chart.series].unique(maintain_order=True).to_list()
    notes: list[str] = []
    if len(names) > chart.rows:
        ranked = data.group_by(chart.series).agg(total=pl.col(chart.value).sum())
        kept = set(
            ranked.sort(["total", chart.series], descending=[True, False])[chart.series].head(chart.rows)
        )
        notes = [f"{chart.rows} of {len(names)} series, those with the largest sums"]
        names = [name for name in names if name in kept]
        data = data.filter(pl.col(chart.series).is_in(names))
    intervals = data[chart.start].unique().sort()
    room = max(1, MAX_ROWS // max(1, len(names)))
    if len(intervals) > room:
        stride = math.ceil(len(intervals) / room)
        kept_starts = intervals.gather_every(stride)
        data = data.filter(pl.col(chart.start).is_in(kept_starts.implode()))
        notes = [*notes, f"every {_ordinal(stride)} of {len(intervals):,} intervals is drawn"]
    return data, names, notes


@dataclass(frozen=True)
class Points:
    """A scatter panel: points (columns x, y, label, color), the rows of them that carry a label, domains, notes."""

    points: pl.DataFrame
    labels: pl.DataFrame
    x_domain: list[float]
    y_domain: list[float]
    notes: list[str]


def scatter_points(chart: Scatter, frame: pl.DataFrame) -> Points:
    """Points with finite coordinates; labelled are those farthest from the mean, in units of the spread of each axis."""
    none = pl.lit(None, pl.String)
    data = frame.select(
        pl.col(chart.x).cast(pl.Float64).alias("x"),
        pl.col(chart.y).cast(pl.Float64).alias("y"),
        (none if chart.label is None else pl.col(chart.label).cast(pl.String)).alias("label"),
        (none if chart.color is None else pl.col(chart.color).cast(pl.String)).alias("color"),
    ).filter(pl.col("x").is_finite(), pl.col("y").is_finite())
    x, y = pl.col("x"), pl.col("y")
    distance = sum(((of - of.mean()) / (of.max() - of.min())).fill_nan(0).fill_null(0) ** 2 for of in (x, y))
    ranked = data.with_columns(distance=distance).sort("distance", descending=True, maintain_order=True)
    notes = []
    if len(data) > MAX_ROWS:
        ranked = pl.concat(
            [ranked.head(MAX_ROWS // 2), ranked[MAX_ROWS // 2 :].sample(MAX_ROWS // 2, seed=0)]
        )
        notes = [f"{len(ranked):,} of {len(data):,} points, the outer ones and some of the rest"]
    labels = ranked.head(chart.highlight if chart.label else 0)
    if chart.label and len(labels) < len(ranked):
        notes = [f"the {len(labels)} outermost of {len(ranked):,} points are named", *notes]
    domains = [_span_with_room(ranked[name], chart.zero) for name in ("x", "y")]
    if chart.diagonal:
        domains = [[min(low for low, _ in domains), max(high for _, high in domains)]] * 2
    return Points(ranked.drop("distance"), labels.drop("distance"), domains[0], domains[1], notes)


def _span_with_room(values: pl.Series, zero: bool) -> list[float]:
    found = [float(value) for value in (values.min(), values.max()) if isinstance(value, int | float)]
    ends = [*found, 0.0] if zero or not found else found
    low, high = min(ends), max(ends)
    room = 0.07 * (high - low) or 0.5 * abs(high) or 1.0
    return [low - room, high + room]


def grid_cells(chart: Grid, frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str], list[str], list[str]]:
    """Cells (columns row, column, value), names down, names across, notes."""
    data = frame.select(
        pl.col(chart.row).alias("row"),
        pl.col(chart.column).alias("column"),
        pl.col(chart.value).cast(pl.Float64).alias("value"),
    )
    rows: list[str] = data["row"].unique(maintain_order=True).to_list()
    columns: list[str] = data["column"].unique(maintain_order=True).to_list()
    notes = [f"the first {chart.rows} of {len(rows)} rows"] if len(rows) > chart.rows else []
    rows = rows[: chart.rows]
    return data.filter(pl.col("row").is_in(rows)), rows, columns, notes

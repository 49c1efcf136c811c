"""Charts as a report declares them: which section, which columns, what the title states. No drawing here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chart:
    """What every chart has: a name (its file and its key in `plots`), the section it draws, a title."""

    name: str
    view: str
    title: str
    about: str = ""


@dataclass(frozen=True)
class Trajectory(Chart):
    """Lines over training steps, one per `series`; the first `highlight` series by `rank_by` are coloured and labelled.

    `rank_by` is "change" from first step to last, "range", "last" (the last value) or "last_abs" (its size). `highlight`
    may name an option of the report that holds the number. `panel` names a column whose values become panels above each
    other, each with its own y axis titled by `panel_titles`. `marks` names a column of steps at which a vertical rule is
    drawn.
    """

    y: str = "value"
    y_title: str = ""
    series: str | None = None
    x: str = "step"
    x_title: str = "training step"
    highlight: int | str = 8
    log_y: bool = False
    panel: str | None = None
    panel_titles: Mapping[str, str] = field(default_factory=dict)
    log_panels: tuple[str, ...] = ()
    y_domain: tuple[float, float] | None = None
    rank_by: str = "change"


@dataclass(frozen=True)
class StackedBars(Chart):
    """Bars over windows of training steps, stacked by `color`; negative values stack downwards."""

    y: str = "value"
    y_title: str = ""
    color: str = "part"
    start: str = "start_step"
    end: str = "end_step"
    x_title: str = "training step"
    highlight: int = 8
    y_format: str = ""


@dataclass(frozen=True)
class Heatmap(Chart):
    """A cell per step interval and series; `value` on one sequential scale, rows in the order of the section."""

    value: str = "value"
    value_title: str = ""
    series: str = "series"
    start: str = "start_step"
    end: str = "end_step"
    x_title: str = "training step"
    domain: tuple[float, float] | None = None
    rows: int = 40


@dataclass(frozen=True)
class Scatter(Chart):
    """A point per row, coloured by `color`; the `highlight` points farthest from the centre are labelled by `label`.

    `panel` names a column whose values become panels, two beside each other, each with its own axes, titled by
    `panel_titles` (x title, y title). `diagonal` draws the line y = x, and `zero` the lines x = 0 and y = 0.
    """

    x: str = "x"
    y: str = "y"
    x_title: str = ""
    y_title: str = ""
    label: str | None = None
    color: str | None = None
    color_title: str = ""
    highlight: int = 10
    panel: str | None = None
    panel_titles: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    diagonal: bool = False
    zero: bool = True


@dataclass(frozen=True)
class Grid(Chart):
    """A cell per pair of names, `row` down and `column` across, both in the order of the section; no step axis.

    The first `rows` names of `row` are drawn. `domain` fixes the colour scale, with two sides where zero lies within;
    `digits` decimals stand in the cells.
    """

    value: str = "value"
    value_title: str = ""
    row: str = "row"
    column: str = "column"
    domain: tuple[float, float] | None = None
    digits: int = 2
    rows: int = 48


@dataclass(frozen=True)
class Bars(Chart):
    """A horizontal bar per `label`, in the order of the section, from zero to `value`; no step axis.

    `panel` names a column whose values become groups of bars above each other, `color` one that colours them. The first
    `rows` of each panel are drawn.
    """

    value: str = "value"
    value_title: str = ""
    label: str = "label"
    panel: str | None = None
    color: str | None = None
    rows: int = 24


@dataclass(frozen=True)
class Histogram(Chart):
    """Bars over bins of a number from `start` to `end`, one translucent colour per `series`, laid over each other."""

    y: str = "count"
    y_title: str = ""
    x_title: str = ""
    series: str = "series"
    start: str = "start"
    end: str = "end"

"""Charts of reports on intervals, over the views of `decomposed_sql`. `dataclasses.replace` says of one what is its own."""

from __future__ import annotations

from .chart import Bars, Scatter, Trajectory

ACTUAL_VS_PREDICTED = Scatter(
    "actual_vs_predicted",
    "actual_vs_predicted",
    "Does the first order explain the change?",
    about="a point is an interval; on the diagonal gradient times update is the whole of it",
    x_title="first order: gradient · update",
    y_title="actual change",
    label="interval",
    color="series",
    diagonal=True,
    highlight=4,
)
RELATIVE_ERROR = Trajectory(
    "relative_error",
    "relative_error",
    "Error of the attribution, relative to the actual change",
    y_title="|actual − attributed| / |actual|",
    series="series",
    log_y=True,
)
TOP_CONTRIBUTIONS = Bars(
    "top_contributions",
    "top_groups",
    "Which groups of parameters carried the change?",
    about="summed over the intervals, integrated where that was asked for; compare within a kind of group",
    value="contribution",
    value_title="Σ gradient · update",
    label="name",
    panel="partition",
    rows=12,
)

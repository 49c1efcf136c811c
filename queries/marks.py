"""What every kind of chart is drawn with: rows as inline data, the axis of training steps."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl
import polars.selectors as cs

Note = list[str]


def inline_rows(frame: pl.DataFrame) -> alt.InlineData:
    """Rows as inline data; NaN and infinity become null, which Vega leaves out."""
    finite = frame.with_columns(pl.when(cs.float().is_finite()).then(cs.float()))
    # A tuple, since Altair copies a list and its rows each time charts are layered or configured.
    return alt.InlineData(values=tuple(finite.iter_rows(named=True)))


def steps_axis(field: str, title: str, domain: Sequence[float], grid: bool = True) -> alt.X:
    """The x axis of training steps."""
    scale = alt.Scale(domain=list(domain), nice=False)
    return alt.X(
        f"{field}:Q",
        title=title or None,
        scale=scale,
        axis=alt.Axis(format="~d", tickMinStep=1, tickCount=10, grid=grid),
    )

"""One look for all charts: sizes, a colour-blind-safe palette (Okabe and Ito 2008, without yellow), quiet axes."""

from __future__ import annotations

import re
from typing import Any

import altair as alt

WIDTH = 640
HEIGHT = 320
GREY = "#9a9a9a"
_INK = "#222222"
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f5539")


def colours(count: int) -> list[str]:
    """`count` colours; they repeat beyond eight."""
    return [_PALETTE[index % len(_PALETTE)] for index in range(count)]


def vega_lite_version() -> str:
    """Major and minor version of Vega-Lite that Altair writes, as vl-convert wants it."""
    found = re.match(r"v?(\d+\.\d+)", alt.SCHEMA_VERSION)
    assert found is not None
    return found[1]


def finish(chart: Any, title: str, subtitle: list[str]) -> Any:
    """The chart with its title and the common configuration."""
    titled = chart.properties(title=alt.TitleParams(title, subtitle=subtitle, anchor="start", offset=12))
    return (
        titled.configure(background="white", font="Helvetica Neue, Helvetica, Arial, sans-serif", padding=12)
        .configure_title(
            fontSize=15, color=_INK, subtitleColor="#555555", subtitleFontSize=11, subtitlePadding=5
        )
        .configure_view(stroke=None)
        .configure_axis(
            grid=True,
            gridColor="#ececec",
            domainColor="#888888",
            tickColor="#888888",
            labelColor=_INK,
            titleColor=_INK,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_legend(labelColor=_INK, titleColor=_INK, titleFontWeight="normal", labelLimit=240)
    )

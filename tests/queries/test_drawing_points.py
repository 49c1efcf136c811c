"""Charts without a step axis: scatter plots and grids."""

import json
import re

import polars as pl
import pytest
import vl_convert
from altair.utils.schemapi import validate_jsonschema
from altair.vegalite.v6.schema.core import load_schema
from lakebed.queries import theme
from lakebed.queries.chart import Grid, Scatter, Trajectory
from lakebed.queries.chart_data import grid_cells, scatter_points, trajectory_lines
from lakebed.queries.drawing import specification

POINTS = pl.DataFrame(
    {
        "panel": ["one"] * 4 + ["two"] * 3,
        "x": [0.0, 1.0, 2.0, 50.0, 1.0, 1.0, float("nan")],
        "y": [0.0, 0.5, -1.0, 3.0, 2.0, 4.0, 1.0],
        "name": list("abcdefg"),
        "step": [10, 10, 20, 20, 10, 20, 20],
    }
)
SCATTER = Scatter("s", "v", "Title", x_title="dose", y_title="response", label="name", highlight=2)
GRID = Grid("g", "v", "Title", value_title="share", row="head", column="role", domain=(0, 1))


def cells(heads, roles=3):
    return pl.DataFrame(
        [
            {"head": f"H{h}", "role": f"r{r}", "value": r / 10 + (h == 1)}
            for h in range(heads)
            for r in range(roles)
        ]
    )


def test_the_outermost_points_are_named():
    found = scatter_points(SCATTER, POINTS.head(4))
    assert found.labels["label"].to_list()[0] == "d"
    assert len(found.labels) == 2
    assert found.notes == ["the 2 outermost of 4 points are named"]
    assert found.x_domain[0] < 0 < 50 < found.x_domain[1]


def test_a_point_without_coordinates_is_left_out():
    found = scatter_points(SCATTER, POINTS)
    assert "g" not in found.points["label"].to_list()


def test_equal_points_and_a_single_one_have_a_span():
    for frame in (POINTS.head(1), pl.concat([POINTS.head(1)] * 3)):
        found = scatter_points(SCATTER, frame)
        assert found.x_domain[0] < found.x_domain[1]
        assert found.y_domain[0] < found.y_domain[1]


def test_a_diagonal_needs_equal_axes():
    found = scatter_points(Scatter("s", "v", "T", diagonal=True), POINTS)
    assert found.x_domain == found.y_domain


def test_many_points_are_thinned_and_the_outer_ones_stay():
    frame = pl.DataFrame({"x": [float(i % 100) for i in range(9000)] + [1e4], "y": 0.0})
    found = scatter_points(Scatter("s", "v", "T"), frame)
    assert len(found.points) == 5000
    assert found.points["x"].max() == 1e4
    assert found.notes == ["5,000 of 9,001 points, the outer ones and some of the rest"]


def test_a_grid_keeps_the_order_of_its_section():
    data, rows, columns, notes = grid_cells(GRID, cells(3).reverse())
    assert rows == ["H2", "H1", "H0"]
    assert columns == ["r2", "r1", "r0"]
    assert len(data) == 9
    assert notes == []


def test_a_grid_says_what_it_leaves_out():
    data, rows, _, notes = grid_cells(GRID, cells(60))
    assert len(rows) == 48
    assert len(data) == 48 * 3
    assert notes == ["the first 48 of 60 rows"]


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize(
    ("chart", "frame"),
    [
        (SCATTER, POINTS),
        (Scatter("s", "v", "T", label="name", color="step", diagonal=True), POINTS),
        (Scatter("s", "v", "T", panel="panel", panel_titles={"one": ("x of one", "y of one")}), POINTS),
        (GRID, cells(4)),
    ],
)
def test_every_specification_keeps_to_the_schema_and_is_drawn(chart, frame, interactive):
    spec = json.loads(json.dumps(specification(chart, frame, "about", interactive)))
    validate_jsonschema(spec, load_schema())
    assert vl_convert.vegalite_to_svg(spec, vl_version=theme.vega_lite_version()).startswith("<svg")


def test_numbers_stand_in_the_cells_unless_they_round_to_zero():
    spec = specification(GRID, cells(2), "about", False)
    svg = vl_convert.vegalite_to_svg(json.dumps(spec), vl_version=theme.vega_lite_version())
    assert ">0.10<" in svg
    assert ">1.20<" in svg
    assert ">0.00<" not in svg


def test_series_are_ranked_by_where_they_end():
    frame = pl.DataFrame(
        {
            "step": [1, 2] * 3,
            "name": ["down", "down", "up", "up", "flat", "flat"],
            "value": [9.0, -5.0, 0.0, 3.0, 4.0, 4.0],
        }
    )
    by_last = trajectory_lines(
        Trajectory("t", "v", "T", series="name", rank_by="last", highlight=2), frame, 320
    )
    by_size = trajectory_lines(
        Trajectory("t", "v", "T", series="name", rank_by="last_abs", highlight=1), frame, 320
    )
    assert by_last.names == ["flat", "up"]
    assert by_last.notes == ["2 of 3 series in colour, because they end highest"]
    assert by_size.names == ["down"]


def test_each_panel_colours_its_own_series():
    frame = pl.DataFrame(
        {
            "step": [1, 2] * 3,
            "panel": ["a", "a", "b", "b", "b", "b"],
            "name": ["one", "one", "two", "two", "three", "three"],
            "value": [1.0, 2.0, 3.0, 4.0, 5.0, 7.0],
        }
    )
    chart = Trajectory("t", "v", "T", series="name", panel="panel", x_title="training step")
    spec = json.dumps(specification(chart, frame, "about", False))
    svg = vl_convert.vegalite_to_svg(spec, vl_version=theme.vega_lite_version())
    coloured = {
        name: re.search(rf'<text[^>]*fill="(#\w+)"[^>]*>{name}</text>', svg)[1] for name in ("two", "three")
    }
    assert coloured["two"] != coloured["three"]
    assert svg.count(">training step<") == 1


def test_a_series_has_one_colour_in_all_panels():
    """Whichever moved most in a panel."""
    ends = {"a": {"two": 9.0, "three": 5.0, "level": 1.0}, "b": {"three": 9.0, "two": 5.0}}
    frame = pl.DataFrame(
        [
            {"step": step, "panel": panel, "name": name, "value": step * end}
            for panel, series in ends.items()
            for name, end in series.items()
            for step in (1, 2)
        ]
    )
    chart = Trajectory("t", "v", "T", series="name", panel="panel")
    spec = json.dumps(specification(chart, frame, "about", False))
    svg = vl_convert.vegalite_to_svg(spec, vl_version=theme.vega_lite_version())
    found = {
        name: set(re.findall(rf'<text[^>]*fill="(#\w+)"[^>]*>{name}</text>', svg))
        for name in ("two", "three", "level")
    }
    assert [len(colours) for colours in found.values()] == [1, 1, 1]
    assert len(set.union(*found.values())) == 3

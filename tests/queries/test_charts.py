import itertools
import json
import math
from pathlib import Path

import polars as pl
import pytest
from altair.utils.schemapi import validate_jsonschema
from altair.vegalite.v6.schema.core import load_schema
from lakebed.queries.chart import Heatmap, StackedBars, Trajectory
from lakebed.queries.chart_data import (
    MAX_ROWS,
    spread_labels,
    stacked,
    thin_cells,
    thin_steps,
    trajectory_lines,
)
from lakebed.queries.drawing import specification
from lakebed.queries.registry import load_report
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

CHART = Trajectory("t", "v", "Title", y="y", series="name")


def lines_of(count, steps=5):
    return pl.DataFrame(
        [
            {"step": s, "name": f"s{i:02d}", "y": float(i * s)}
            for s in range(1, steps + 1)
            for i in range(count)
        ]
    )


def test_fifty_series_leave_eight_in_colour():
    lines = trajectory_lines(CHART, lines_of(50), 320)
    assert lines.names == [f"s{i:02d}" for i in range(49, 41, -1)]
    assert lines.other["series"].n_unique() == 42
    assert lines.notes == ["8 of 50 series in colour, because they changed most"]


def test_few_series_need_no_note():
    lines = trajectory_lines(CHART, lines_of(3), 320)
    assert lines.other.is_empty()
    assert lines.notes == []


def test_steps_are_thinned_evenly_and_it_is_said():
    data = pl.DataFrame({"step": range(1, 12001), "value": [0.0] * 12000})
    thinned, notes = thin_steps(data, "step")
    assert len(thinned) <= MAX_ROWS
    assert thinned["step"][0] == 1
    assert thinned["step"][-1] == 12000
    assert thinned["step"].diff().drop_nulls()[:-1].unique().to_list() == [3]
    assert notes == ["every 3rd of 12,000 steps is drawn"]


def test_many_series_and_steps_stay_under_the_limit():
    data = pl.DataFrame({"step": [s for s in range(700) for _ in range(50)], "value": 0.0})
    assert len(thin_steps(data, "step")[0]) <= MAX_ROWS


@pytest.mark.parametrize("log_y", [False, True])
def test_labels_do_not_overlap_and_stay_inside(log_y):
    values = pl.DataFrame({"series": list("abcdef"), "value": [1.0, 1.01, 1.02, 5.0, 9.99, 10.0]})
    placed = spread_labels(values, (0.9, 10.0), 320, log_y)
    scale = math.log if log_y else float
    pixels = [(scale(at) - scale(0.9)) / (scale(10.0) - scale(0.9)) * 320 for at in placed["label_at"]]
    assert all(b - a >= 13 - 1e-6 for a, b in itertools.pairwise(pixels))
    assert pixels[-1] <= 320 + 1e-6


def test_bars_stack_upwards_and_downwards():
    frame = pl.DataFrame(
        {"start_step": [0, 0, 0], "end_step": [1, 1, 1], "part": ["a", "b", "c"], "share": [0.7, -0.1, 0.4]}
    )
    bars, names, _ = stacked(StackedBars("s", "v", "T", y="share"), frame)
    assert names == ["a", "b", "c"]
    assert bars["bottom"].to_list() == pytest.approx([0, 0, 0.7])
    assert bars["top"].to_list() == pytest.approx([0.7, -0.1, 1.1])


def test_many_parts_and_rows_are_gathered():
    frame = pl.DataFrame(
        {"start_step": 0, "end_step": 1, "part": [f"p{i:02d}" for i in range(20)], "share": 0.05}
    )
    bars, names, notes = stacked(StackedBars("s", "v", "T", y="share"), frame)
    assert len(names) == 8
    assert names[-1] == "all others"
    assert bars["top"].max() == pytest.approx(1)
    assert notes == ["the 13 smallest of 20 parts are drawn as one"]
    cells = pl.DataFrame(
        [
            {"start_step": s, "end_step": s + 1, "series": f"s{i}", "value": 1.0}
            for i in range(60)
            for s in range(300)
        ]
    )
    kept, rows, notes = thin_cells(Heatmap("h", "v", "T"), cells)
    assert len(rows) == 40
    assert len(kept) <= MAX_ROWS
    assert notes == ["40 of 60 series, those with the largest sums", "every 3rd of 300 intervals is drawn"]


@pytest.mark.parametrize("interactive", [False, True])
def test_every_specification_keeps_to_the_schema(svd, trace, interactive):
    """Drawing itself does not validate."""
    for made, name in (
        (svd, "weight-svd-trace"),
        (svd, "weight-svd-patterns"),
        (trace, "optimizer-update-trace"),
    ):
        report = load_report(name).parse({})
        with Results(made.lake, report) as results:
            for chart in report.charts:
                spec = specification(chart, results.frame(chart.view), "about", interactive)
                validate_jsonschema(json.loads(json.dumps(spec)), load_schema())


def test_every_format_of_every_chart(svd, trace, tmp_path):
    for made, name in (
        (svd, "weight-svd-trace"),
        (svd, "weight-svd-patterns"),
        (trace, "optimizer-update-trace"),
    ):
        report = load_report(name).parse({})
        printed = run_report(made.lake, report, tmp_path / name, chart_formats=["svg", "png", "html", "vl"])
        assert len(printed["plots"]) == 4 * len(report.charts)
        for chart in report.charts:
            svg = Path(printed["plots"][chart.name]).read_text()
            assert svg.startswith("<svg")
            assert chart.title.split(":")[0] in svg
            assert Path(printed["plots"][f"{chart.name}.png"]).read_bytes().startswith(b"\x89PNG")
            page = Path(printed["plots"][f"{chart.name}.html"]).read_text()
            assert 'src="http' not in page  # readable offline
            spec = json.loads(Path(printed["plots"][f"{chart.name}.vl"]).read_text())
            assert f"run {made.run}, steps" in json.dumps(spec["title"], ensure_ascii=False)
        text = Path(printed["markdown"]).read_text()
        assert all(f"]({report.file_stem()}_{chart.name}.svg)" in text for chart in report.charts)


def test_a_series_has_one_colour_in_all_panels():
    rows = [
        {"step": step, "name": name, "y": float(step * size), "part": part}
        for part, sizes in {"a": (3, 2, 1), "b": (1, 2, 3)}.items()
        for name, size in zip(("x", "y", "z"), sizes, strict=True)
        for step in (1, 2)
    ]
    chart = Trajectory("t", "v", "Title", y="y", series="name", panel="part")
    spec = json.dumps(specification(chart, pl.DataFrame(rows), "about", False))
    domains = [piece.split("]")[0] for piece in spec.split('"scale": {"domain": ["')[1:]]
    assert set(domains) == {'x", "y", "z"'}

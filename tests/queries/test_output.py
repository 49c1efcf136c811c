import json
import os
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from lakebed.lake.errors import QueryError
from lakebed.queries import run as run_module
from lakebed.queries.output import OutputExists, OutputFolder, OutputUnwritable
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from .conftest import make_svd_lake, make_trace_lake


def patterns(**options):
    return load_report("weight-svd-patterns").parse(options)


def test_keys_names_and_formats(svd, tmp_path):
    printed = run_report(svd.lake, patterns(), tmp_path / "out", chart_formats=["svg", "vl"])
    assert list(printed)[:4] == ["report", "markdown", "matrix_summary_rows", "matrix_summary_parquet"]
    for key in (
        "matrix_summary_rows",
        "matrix_summary_csv",
        "vector_alignment_rows",
        "interval_event_rows",
        "coordination_window_rows",
        "direction_birth_rows",
    ):
        assert os.path.getsize(printed[key]) > 0
    assert printed["interval_event_rows"].endswith("weight_svd_interval_events.jsonl")
    assert set(printed["plots"]) == {
        name + form
        for name in ("growth", "stabilization", "rotation", "coordination")
        for form in ("", ".vl")
    }
    report = json.loads((tmp_path / "out/weight_svd_patterns_report.json").read_text())
    assert sorted(report["files"]) == sorted(os.listdir(tmp_path / "out"))
    assert report["steps"] == svd.steps
    assert report["options"]["stability_patience"] == 3
    assert (
        (tmp_path / "out/weight_svd_patterns_report.md")
        .read_text()
        .startswith("# weight-svd-patterns: run ref\n")
    )


def test_rows_agree_across_formats(svd, tmp_path):
    printed = run_report(
        svd.lake,
        patterns(max_vector_rank=2),
        tmp_path / "out",
        rows_format=["jsonl", "csv", "parquet"],
        chart_formats=[],
    )
    for stem in ("matrix_summary", "vector_alignment", "interval_event", "direction_birth"):
        lines = Path(printed[f"{stem}_rows"]).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(list(row) == sorted(row) for row in rows)
        assert pl.read_parquet(printed[f"{stem}_parquet"]).to_dicts() == rows
        csv = pl.read_csv(printed[f"{stem}_csv"], infer_schema_length=None)
        assert csv.columns == pl.read_parquet(printed[f"{stem}_parquet"]).columns
        assert csv.to_dicts() == rows
    windows = [
        json.loads(line) for line in Path(printed["coordination_window_rows"]).read_text().splitlines()
    ]
    assert all(list(item) == sorted(item) for row in windows for item in row["top_growth_matrices"])


def test_two_runs_of_a_report_write_the_same_bytes(svd, tmp_path):
    for name in ("a", "b"):
        run_report(svd.lake, patterns(max_vector_rank=3), tmp_path / name, chart_formats=["vl"])
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(OutputExists) as error:
        run_report(None, patterns(), tmp_path / "out")  # no lake is even looked at
    assert str(error.value) == (
        f"Output directory already exists and is non-empty: {tmp_path}/out; add --overwrite or name another"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists, match="Output path is a file"):
        run_report(None, patterns(), tmp_path / "file", overwrite=True)


def test_overwrite_replaces_our_files_and_no_others(svd, tmp_path):
    out = tmp_path / "out"
    first = run_report(svd.lake, patterns(), out, chart_formats=["svg"])
    (out / "notes.txt").write_text("mine")
    (out / "weight_svd_old_notes.jsonl").write_text("mine too")
    before = os.stat(first["matrix_summary_rows"]).st_mtime_ns
    run_report(svd.lake, patterns(steps="250:750"), out, overwrite=True, chart_formats=[])
    left = set(os.listdir(out))
    assert {"notes.txt", "weight_svd_old_notes.jsonl"} <= left
    assert not any(name.endswith(".svg") for name in left)  # the earlier run's own charts would mislead
    assert os.stat(first["matrix_summary_rows"]).st_mtime_ns > before
    assert json.loads((out / "weight_svd_patterns_report.json").read_text())["steps"] == [250, 500, 750]


def test_a_listed_file_outside_the_folder_is_not_ours(svd, tmp_path):
    out = tmp_path / "out"
    run_report(svd.lake, patterns(), out, chart_formats=[])
    (tmp_path / "precious.txt").write_text("keep")
    path = out / "weight_svd_patterns_report.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "files": ["../precious.txt", "..", ""]}))
    run_report(svd.lake, patterns(), out, overwrite=True, chart_formats=[])
    assert (tmp_path / "precious.txt").read_text() == "keep"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_fails_changes_nothing(svd, tmp_path, monkeypatch, overwrite):
    out = tmp_path / "out"
    if overwrite:
        run_report(svd.lake, patterns(), out, chart_formats=[])
    before = {name: (out / name).read_bytes() for name in os.listdir(out)} if overwrite else {}

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "to_json", fail)
    with pytest.raises(KeyboardInterrupt):
        run_report(svd.lake, patterns(), out, overwrite=overwrite, chart_formats=[])
    assert sorted(os.listdir(tmp_path)) == (["out", "svd.lake"] if overwrite else ["svd.lake"])
    if overwrite:
        assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
    tables = svd.lake.session.connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
    assert tables == []


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputUnwritable, match="cannot write beside"),
        OutputFolder(tmp_path / "file/out", "r.json", False),
    ):
        pass


def test_new_folders_are_made_on_the_way(svd, tmp_path):
    run_report(svd.lake, patterns(), tmp_path / "a/b/c", chart_formats=[])
    assert (tmp_path / "a/b/c/weight_svd_patterns_report.md").exists()
    (tmp_path / "empty").mkdir()
    run_report(svd.lake, patterns(), tmp_path / "empty", chart_formats=[])
    assert (tmp_path / "empty/weight_svd_patterns_report.md").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_format": ["xml"]}, r"--rows-format 'xml' is none of jsonl, parquet, csv"),
        ({"chart_formats": ["gif"]}, r"--chart-format 'gif' is none of svg, html, png, vl"),
    ],
)
def test_unknown_formats(tmp_path, options, message):
    with pytest.raises(InvalidOption, match=message):
        run_report(None, patterns(), tmp_path / "out", **options)


def test_only_parquet(svd, tmp_path):
    printed = run_report(svd.lake, patterns(), tmp_path / "o", rows_format=["parquet"], chart_formats=[])
    assert printed["interval_event_rows"] == printed["interval_event_parquet"]
    assert not [name for name in os.listdir(tmp_path / "o") if name.endswith((".jsonl", ".csv"))]


def test_nan_is_null_and_counted(tmp_path):
    def spoil(decomposed):
        decomposed["W_QK"][0][2, 1, 0, 0] = np.nan

    made = make_svd_lake(tmp_path / "l", [1, 2, 3], change=spoil)
    printed = run_report(made.lake, patterns(), tmp_path / "o", chart_formats=["vl"])
    report = json.loads(Path(printed["report"]).read_text())
    assert report["nonfinite_values"]["matrix_summary"]["singular_value_rank1_delta"] == 1
    assert any("NaN" in line for line in report["warnings"])
    assert "**Warning.**" in Path(printed["markdown"]).read_text()
    text = Path(printed["matrix_summary_rows"]).read_text()
    assert "NaN" not in text
    (spoiled,) = (row for row in map(json.loads, text.splitlines()) if row["matrix_label"] == "L1H0 W_QK")
    assert spoiled["singular_value_rank1_delta"] is None
    assert (
        pl.read_parquet(printed["matrix_summary_parquet"])["singular_value_rank1_delta"].is_nan().sum() == 1
    )
    made.lake.close()


def test_nan_loss_is_counted_too(tmp_path):
    def spoil(steps, batches, updates):
        steps[1]["loss"] = float("nan")
        steps[2]["nonfinite_gradient_entries"] = 7
        updates[5]["delta_l2"] = float("inf")

    made = make_trace_lake(tmp_path / "l", [1, 2, 3], change=spoil)
    printed = run_report(
        made.lake, load_report("optimizer-update-trace").parse({}), tmp_path / "o", chart_formats=["svg"]
    )
    report = json.loads(Path(printed["report"]).read_text())
    assert report["nonfinite_values"]["step"] == {"loss": 1, "parameter_delta_l2": 1}
    assert "7 gradient entries were NaN or infinite, in 1 steps." in report["warnings"]
    made.lake.close()


def test_rows_are_written_while_later_sections_are_made(svd, tmp_path):
    """And an endless one is given up with the results, after which the session has its threads again."""
    begun = []

    def write(results, section):
        begun.append(section)
        results.start_copies([(section, tmp_path / f"{section}.jsonl", "(FORMAT json)")])

    threads = svd.lake.sql("SELECT current_setting('threads')").fetchall()
    with Results(svd.lake, patterns(), write) as results:
        assert begun == results.row_sets()
        results.finish_copies()
        for section in begun:
            lines = (tmp_path / f"{section}.jsonl").read_text().splitlines()
            assert len(lines) == results.value(f"SELECT count(*) FROM {section}")
        results.start_copies([("matrix_summary", tmp_path / "absent/rows.jsonl", "(FORMAT json)")])
        with pytest.raises(OutputUnwritable, match=r"writing rows\.jsonl failed: No such file"):
            results.finish_copies()
        results.start_copies([("(FROM range(1000000000000))", tmp_path / "endless.csv", "(FORMAT csv)")])
    assert svd.lake.sql("SELECT current_setting('threads')").fetchall() == threads


def test_a_later_section_that_fails_leaves_no_file_and_no_thread(svd, tmp_path, monkeypatch):
    broken = patterns().sql_text() + "\n-- view: broken\nSELECT error('no luck') AS x FROM matrix_summary\n"
    monkeypatch.setattr(type(patterns()), "sql_text", classmethod(lambda cls: broken))
    monkeypatch.setattr(run_module, "_MANY_CELLS", 0)
    with pytest.raises(QueryError, match="no luck"):
        run_report(svd.lake, patterns(), tmp_path / "out", chart_formats=[])
    assert os.listdir(tmp_path) == ["svd.lake"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lakebed-rows")]

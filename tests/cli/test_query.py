import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from lakebed.cli.query import query, read_report, report_options
from lakebed.lake import Lake, Unit
from lakebed.queries.needs import MissingData
from lakebed.queries.registry import UnknownReport, load_report, report_names, report_summary
from lakebed.queries.report import InvalidOption


@pytest.fixture
def traced(tmp_path):
    """Three recorded steps of one parameter."""
    lake = Lake.create(tmp_path / "t.lake")
    with lake.unit(Unit("trace", "demo", "trace", (1, 2, 3))) as writer:
        writer.rows("training_steps", [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)])
        writer.rows(
            "parameter_updates",
            [{"step": step, "parameter": "w", "numel": 2, "delta_l2": 0.1 * step} for step in (1, 2, 3)],
        )
    lake.close()
    return str(tmp_path / "t.lake")


def invoke(*words, **options):
    return CliRunner().invoke(query, list(words), **options)


def test_help_lists_every_report_with_a_line():
    text = " ".join(invoke("--help").output.split())
    for name in report_names():
        assert name in text
        assert " ".join(report_summary(name).split()) in text


@pytest.mark.parametrize("name", report_names())
def test_every_report_has_help_with_its_options_and_an_example(name):
    found = invoke(name, "--help")
    assert found.exit_code == 0
    for field in load_report(name).model_fields:
        assert f"--{field.replace('_', '-')}" in found.output
    assert f"Example:\n    lakebed query {name} --lake" in found.output
    assert "--overwrite" in found.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from lakebed.cli.query import query\n"
        "try: query(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('duckdb', 'polars', 'altair', 'numpy', 'torch', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_stdout_is_one_json_object(traced, tmp_path):
    found = invoke(
        "optimizer-update-trace", "--lake", traced, "--out", str(tmp_path / "o"), "--chart-format", "none"
    )
    assert found.exit_code == 0, found.exception
    printed = json.loads(found.stdout)
    assert printed["plots"] == {}
    assert json.loads(Path(printed["report"]).read_text())["steps"] == [1, 2, 3]


def test_options_reach_the_report(traced, tmp_path):
    words = (
        "--run",
        "demo",
        "--steps",
        "2:3",
        "--top-k-parameters",
        "0",
        "--rows-format",
        "jsonl, csv",
        "--chart-format",
        "vl",
    )
    found = invoke(
        "optimizer-update-trace", *words, "--out", str(tmp_path / "o"), env={"LAKEBED_LAKE": traced}
    )
    printed = json.loads(found.stdout)
    content = json.loads(Path(printed["report"]).read_text())
    assert (content["steps"], content["options"]) == ([2, 3], {"top_k_parameters": 0})
    assert "step_parquet" not in printed
    assert printed["step_csv"].endswith("optimizer_update_trace_steps.csv")
    assert all(path.endswith(".vl.json") for path in printed["plots"].values())


def test_overwrite(traced, tmp_path):
    words = (
        "optimizer-update-trace",
        "--lake",
        traced,
        "--out",
        str(tmp_path / "o"),
        "--chart-format",
        "none",
    )
    assert invoke(*words).exit_code == 0
    assert "Output directory already exists and is non-empty" in str(invoke(*words).exception)
    assert invoke(*words, "--overwrite").exit_code == 0


def test_errors_are_ours_and_one_line(traced, tmp_path):
    out = ("--lake", traced, "--out", str(tmp_path / "o"))
    cases = [
        (("nothing",), UnknownReport, "no report 'nothing'; there are "),
        (("weight-svd-patterns", *out), MissingData, "lakebed extract --for weight-svd-patterns --lake "),
        (
            ("optimizer-update-trace", *out, "--top-k-parameters", "-2"),
            InvalidOption,
            "--top-k-parameters should be",
        ),
        (
            ("optimizer-update-trace", *out, "--chart-format", "gif"),
            InvalidOption,
            "--chart-format 'gif' is none of",
        ),
    ]
    for words, kind, message in cases:
        found = invoke(*words)
        assert isinstance(found.exception, kind), found.output
        assert message in str(found.exception)
        assert "\n" not in str(found.exception)
        assert found.exit_code != 0
    assert not (tmp_path / "o").exists()


def test_click_refuses_what_is_no_value(traced, tmp_path):
    found = invoke("weight-svd-trace", "--lake", traced, "--out", str(tmp_path / "o"), "--matrix", "W_Z")
    assert found.exit_code == 2
    assert "'W_Z' is not one of" in found.output
    assert "Missing option '--out'" in invoke("weight-svd-trace", "--lake", traced).output


def test_repeated_options_for_extract_too():
    report = load_report("weight-svd-trace")
    names = [option.name for option in report_options(report)]
    assert names[0] == "lake"
    assert names[1:] == list(report.model_fields)
    asked = read_report(
        report, {"matrix": ("W_Q", "W_K"), "steps": None, "run": "r", "max_singular_values": None}
    )
    assert asked.matrix == ("W_Q", "W_K")
    assert asked.arguments() == ["--matrix", "W_Q", "--matrix", "W_K"]

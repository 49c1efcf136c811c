"""`lakebed compact` and `lakebed gc`: what they will do on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lakebed.lake import Lake, Unit


@pytest.fixture
def small(tmp_path) -> str:
    """Run `ref` with five units of one table, and a temporary of a killed writer."""
    path = str(tmp_path / "x.lake")
    with Lake.create(path) as lake:
        for step in range(5):
            with lake.unit(Unit("trace", "ref", f"trace-{step}", (step,))) as writer:
                writer.rows("training_steps", [{"step": step, "loss": 1.0 / (1 + step)}])
    (Path(path) / "tables/training_steps/run=ref/.x.ab12cd34.tmp").write_bytes(b"123")
    return path


def test_what_will_be_done_is_said_and_then_done(run_cli, small) -> None:
    said = "trace of run ref: 5 units, 5 files and 5 receipts (0.0 MB) → 1 and 1\n"
    dry = run_cli("compact", "--lake", small, "--dry-run")
    assert (dry.status, dry.err) == (0, said)
    planned = json.loads(dry.out)
    assert (planned["dry_run"], planned["objects"]) == (True, {"before": 10, "after": 2})
    with Lake.open(small) as lake:
        lake.refresh()
        assert len(lake.table_files("training_steps")) == 5

    answer = run_cli("compact", "--lake", small, "--run", "ref", "training_steps")
    done = json.loads(answer.out)
    assert (answer.status, answer.err) == (0, said)
    (group,) = done["groups"]
    assert (group["run"], group["dataset"], group["tables"]) == ("ref", "trace", ["training_steps"])
    assert (group["units"], group["committed"]) == (5, True)
    assert (done["objects"], done["bytes"]) == (group["objects"], group["bytes"])
    assert group["bytes"]["before"] == planned["bytes"]["before"] > 0 < group["bytes"]["after"]

    again = run_cli("compact", "--lake", small)
    assert (again.status, again.err, json.loads(again.out)["groups"]) == (0, "nothing to compact\n", [])
    shown = run_cli("sql", "SELECT count(*) AS n FROM training_steps", "--lake", small, "--format", "json")
    assert json.loads(shown.out) == [{"n": 5}]


def test_garbage_is_said_and_then_removed(run_cli, small) -> None:
    run_cli("compact", "--lake", small)
    young = run_cli("gc", "--lake", small)
    assert (young.status, young.err, json.loads(young.out)["files"]) == (0, "nothing to remove\n", 0)
    dry = run_cli("gc", "--lake", small, "--older-than", "0s", "--dry-run")
    assert dry.err == "11 files, 0.0 MB: 10 superseded, 1 temporary\n"
    answer = run_cli("gc", "--lake", small, "--older-than", "0s")
    found = json.loads(answer.out)
    assert (answer.status, answer.err, found["files"]) == (0, dry.err, 11)
    assert found["kinds"]["temporary"] == {"files": 1, "bytes": 3}
    assert {**found, "dry_run": True} == json.loads(dry.out)
    assert json.loads(run_cli("gc", "--lake", small, "--older-than", "0s").out)["files"] == 0
    shown = run_cli("sql", "SELECT count(*) AS n FROM extractions", "--lake", small, "--format", "json")
    assert json.loads(shown.out) == [{"n": 5}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compact", "nope"], "lakebed: no table 'nope'; there are activation_rows, attention_patterns"),
        (["compact", "--run", "nope"], "lakebed: no run 'nope' in"),
        (["gc", "--older-than", "soon"], "'soon' is no age: write 30s, 10m, 1h or 2d"),
    ],
)
def test_what_does_not_exist_is_one_line(run_cli, small, arguments, message) -> None:
    answer = run_cli(*arguments, "--lake", small)
    assert answer.status != 0
    assert answer.out == ""
    assert message in answer.err


def test_progress_is_drawn_on_a_terminal_only(run_cli, small, monkeypatch) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    answer = run_cli("compact", "--lake", small)
    assert json.loads(answer.out)["objects"] == {"before": 10, "after": 2}
    answer = run_cli("gc", "--lake", small, "--older-than", "0s")
    assert json.loads(answer.out)["files"] == 11

"""`lakebed verify`: one JSON object, and an exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copied(lake_path, tmp_path) -> Path:
    return Path(shutil.copytree(lake_path, tmp_path / "copy.lake"))


def test_a_lake_that_is_well(run_cli, copied) -> None:
    answer = run_cli("verify", "--lake", copied)
    found = json.loads(answer.out)
    assert (answer.status, answer.err) == (0, "")
    assert (found["ok"], found["damaged"], found["unreferenced"]) == (True, [], {"files": 0, "bytes": 0})
    assert (found["files"], found["bytes"] > 0) == (3 + 4, True)


def test_damage_is_listed_and_sets_the_exit_status(run_cli, copied) -> None:
    chunk = copied / "tensors/ref/gradients/w/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    answer = run_cli("verify", "--lake", copied, "--run", "ref")
    found = json.loads(answer.out)
    assert answer.status == 1
    assert found["ok"] is False
    (damage,) = found["damaged"]
    assert (damage["path"], damage["unit"]) == ("tensors/ref/gradients/w/c/0/0/0", "trace-1")


def test_what_cannot_be_opened_is_one_line(run_cli, copied, tmp_path) -> None:
    (copied / "lakebed.json").write_text("{")
    for place, message in ((copied, "is damaged"), (tmp_path / "none", "no lake at")):
        answer = run_cli("verify", "--lake", place)
        assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
        assert message in answer.err


def test_an_unknown_run_is_named(run_cli, copied) -> None:
    answer = run_cli("verify", "--lake", copied, "--run", "nope")
    assert (answer.status, answer.out) == (1, "")
    assert "no run 'nope'" in answer.err


def test_progress_is_drawn_on_a_terminal_only(run_cli, copied, monkeypatch) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    answer = run_cli("verify", "--lake", copied)
    assert json.loads(answer.out)["ok"] is True

"""`lakebed catalog`: what it writes is told as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
from lakebed.lake import Lake


def test_the_catalog_of_a_lake_on_disk(run_cli, lake_path, tmp_path, monkeypatch) -> None:
    path = Path(shutil.copytree(lake_path, tmp_path / "copy.lake"))
    answer = run_cli("catalog", "--lake", path)
    found = json.loads(answer.out)
    assert (answer.status, answer.err) == (0, "")
    assert (found["views_file"], found["database"]) == (str(path / "views.sql"), str(path / "catalog.duckdb"))
    assert "training_steps" in found["views"]
    monkeypatch.chdir(path)
    with duckdb.connect("catalog.duckdb", read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM training_steps").fetchall() == [(4,)]


def test_behind_a_uri_it_says_what_it_left_out(run_cli) -> None:
    Lake.create("memory://cli-catalog/x.lake").close()
    answer = run_cli("catalog", "--lake", "memory://cli-catalog/x.lake")
    assert answer.status == 0
    assert json.loads(answer.out)["database"] is None
    assert answer.err.startswith("lakebed: no catalog.duckdb")


def test_no_lake(run_cli, tmp_path) -> None:
    answer = run_cli("catalog", "--lake", tmp_path / "none")
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)

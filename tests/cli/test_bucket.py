"""Every command works on a lake in a bucket, with what it makes on a disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from lakebed.extractors.threads import set_threads
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.verify import verify

from tests import trained_probe_lake

RUN = ("--run", "r")
MAKE = (
    ("probe", "build", *RUN, "--examples-per-split", "4"),
    ("extract", "svd", "attention", *RUN, "--steps", "0:2:2", "--threads", "1"),
)
REPORTS = (
    ("weight-svd-trace", "--matrix", "W_QK"),
    ("optimizer-update-trace",),
)
QUERIES = (
    "SELECT * EXCLUDE (seconds) FROM training_steps ORDER BY step",
    "SELECT * FROM attention_patterns ORDER BY ALL",
    "SELECT step, matrix, layer, head, rank, singular_value FROM singular_values ORDER BY ALL",
)


@pytest.fixture
def places(bucket, tmp_path) -> tuple[str, str]:
    return str(tmp_path / "x.lake"), f"{bucket}/x.lake"


def ran(run_cli, *arguments: object) -> str:
    answer = run_cli(*arguments)
    assert answer.status == 0, answer.err
    return answer.out


def test_every_command_does_in_a_bucket_what_it_does_on_a_disk(run_cli, places, tmp_path, s3) -> None:
    set_threads(1)
    for lake in places:
        with Lake.create(lake) as made:
            train(made, "r", trained_probe_lake.config(), num_steps=2, anchor_every=1)
        for command in MAKE:
            ran(run_cli, *command, "--lake", lake)
    here, there = (units(lake) for lake in places)
    assert here.keys() == there.keys()
    for name, unit in here.items():
        assert unit == there[name], name
    here, there = (reports(run_cli, lake, tmp_path / str(at)) for at, lake in enumerate(places))
    assert here == there
    for query in QUERIES:
        here, there = (ran(run_cli, "sql", "--lake", lake, "--format", "jsonl", query) for lake in places)
        assert here == there
        assert here.count("\n") >= 2
    catalog = json.loads(ran(run_cli, "catalog", "--lake", places[1]))
    assert catalog["views_file"] == f"{places[1]}/views.sql"
    for command in (("show",), ("show", *RUN), ("verify",)):
        ran(run_cli, *command, "--lake", places[1])

    # Nothing is made twice.
    with s3.counted(places[1]) as asked:
        ran(run_cli, *MAKE[1], "--lake", places[1])
    assert "PUT" not in {kind for kind, _ in asked}

    before = reports(run_cli, places[1], tmp_path / "before")
    ran(run_cli, "compact", "--lake", places[1])
    ran(run_cli, "gc", "--lake", places[1], "--older-than", "0s")
    assert reports(run_cli, places[1], tmp_path / "after") == before
    assert json.loads(ran(run_cli, "verify", "--lake", places[1]))["unreferenced"]["files"] == 0


def units(uri: str) -> dict[str, Any]:
    """By unit: what it was made from, and the checksum of every chunk; all of them as they stand."""
    with Lake.open(uri) as lake:
        assert verify(lake).ok
        return {
            of.unit: (
                of.content_hash,
                of.rows,
                [file for file in of.files if file.path.startswith("tensors/")],
            )
            for of in lake.receipts.all()
        }


def reports(run_cli, lake: str, out: Path) -> dict[str, str]:
    """Row files of some reports, by name."""
    found = {}
    for name, *options in REPORTS:
        ran(run_cli, "query", name, *options, "--lake", lake, "--out", out, "--chart-format", "none")
        for path in out.glob("*.jsonl"):
            found[path.name] = re.sub(r'"seconds":[^,}]+', "", path.read_text().replace(lake, "LAKE"))
        shutil.rmtree(out)
    assert found
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "tiny", *RUN, "--num-steps", "1"), "there is no bucket 'nowhere'"),
        (("show",), "there is no bucket 'nowhere'"),
        (("sql", "SELECT 1"), "there is no bucket 'nowhere'"),
        (("verify",), "there is no bucket 'nowhere'"),
    ],
)
def test_a_command_says_in_one_line_that_there_is_no_bucket(run_cli, s3, arguments, said) -> None:
    answer = run_cli(*arguments, "--lake", "s3://nowhere/x.lake")
    assert answer.status != 0
    assert said in answer.err
    assert len(answer.err.strip().splitlines()) == 1

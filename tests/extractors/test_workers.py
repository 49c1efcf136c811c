"""An extraction shared out among processes leaves the lake that one process leaves, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lakebed.cli.main import cli
from lakebed.extractors.executor import LocalProcesses, Sequential, UnitFailed
from lakebed.extractors.pieces import NotShared, cut
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.datasets import QK_COORDINATES, SCALAR_CHANGES, SVD, WEIGHTS, Need
from lakebed.lake.verify import verify

from tests.attribution_lake import RUN, STAGE
from tests.same_lake import assert_same
from tests.shared_work import STEPS, Bar, Mortal, needs


def copy_of(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / "x.lake"))


def test_two_workers_leave_the_same_lake_though_one_is_killed(
    extracted_alone, attribution_lake_path, tmp_path
) -> None:
    path, bar = copy_of(attribution_lake_path, tmp_path), Bar()
    mortal = Mortal(LocalProcesses(2, logs=tmp_path), tmp_path)
    with Lake.open(path) as lake:
        lake.refresh()
        stood = {receipt.unit for receipt in lake.receipts.all(RUN)}
        made = extract(lake, RUN, needs(), STEPS, bar, executor=mortal)
        assert made.made[SVD] == list(range(25))
        assert made.made[SCALAR_CHANGES] == list(range(1, 25))
        assert made.made[WEIGHTS] == [step for step in range(7, 24) if step % 8], "anchors are stored"
        written = lake.receipts.all(RUN)
        fresh = [receipt for receipt in written if receipt.unit not in stood]
        assert (made.rows, made.bytes) == (sum(of.rows for of in fresh), sum(of.bytes for of in fresh))
        claims = [of.first_row for receipt in written for of in receipt.tensors if of.quantity == "weights"]
        assert len(claims) == len(set(claims)), "no two units share a row"
        again = extract(lake, RUN, needs(), STEPS, executor=mortal)
    assert mortal.mark.exists()
    assert bar.done == bar.total == 25 + 24
    assert not any(again.made.values())
    assert_same(extracted_alone, path)


def test_the_executor_of_one_process_leaves_it_too(extracted_alone, attribution_lake_path, tmp_path) -> None:
    path = copy_of(attribution_lake_path, tmp_path)
    with Lake.open(path) as lake:
        extract(lake, RUN, needs()[:4], STEPS, executor=Sequential())
        rest = extract(lake, RUN, needs(), STEPS, executor=Sequential())
    assert rest.made[SVD] == []
    assert_same(extracted_alone, path)


def test_what_goes_wrong_in_a_worker_is_one_line(attribution_lake_path, tmp_path) -> None:
    path = copy_of(attribution_lake_path, tmp_path)
    absent = Need(
        QK_COORDINATES, {"probe": "probe", "head": "L7H0", "stage": STAGE, "layernorm_mode": "none"}
    )
    with (
        Lake.open(path) as lake,
        pytest.raises(UnitFailed, match=r"^step.* 0.*no head L7H0; this run has layers"),
    ):
        extract(lake, RUN, (absent,), STEPS, executor=LocalProcesses(1, logs=tmp_path))


def test_workers_that_see_another_lake_are_found_out(attribution_lake_path, tmp_path) -> None:
    class Elsewhere(Sequential):
        def run(self, units, progress):
            return []

    with (
        Lake.open(copy_of(attribution_lake_path, tmp_path)) as lake,
        pytest.raises(NotShared, match="the same lake"),
    ):
        extract(lake, RUN, (Need(SVD),), "8", executor=Elsewhere())


def test_an_option_of_ray_without_ray_is_refused() -> None:
    words = ["extract", "svd", "--lake", "x.lake", "--run", "r", "--workers", "2", "--worker-gpus", "1"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 2
    assert "options of --executor ray" in shown.output


@given(
    steps=st.lists(st.integers(0, 400), min_size=1, max_size=80, unique=True).map(sorted),
    every=st.integers(1, 100),
    pieces=st.integers(1, 20),
)
def test_pieces_cover_all_steps_evenly_and_begin_at_anchors(steps, every, pieces) -> None:
    found = cut(steps, pieces, lambda step: step // every)
    assert [step for piece in found for step in piece] == steps
    assert len(found) <= pieces
    assert all(found)
    size = len(steps) / min(pieces, len(steps))
    assert max(map(len, found)) <= 2 * size + 1
    begins = {step for before, step in pairwise(steps) if before // every != step // every}
    for piece in found[1:]:
        at = steps.index(piece[0])
        near = [steps.index(step) for step in begins if abs(steps.index(step) - at) < size / 2 - 1]
        assert piece[0] in begins or not near


def test_an_interrupt_is_one_line_and_keeps_what_was_finished(attribution_lake_path, tmp_path) -> None:
    """As Ctrl-C sends it: to the command and its workers alike, in the middle of their work."""
    path = copy_of(attribution_lake_path, tmp_path)
    words = [
        "extract",
        "svd",
        "weights",
        "--lake",
        str(path),
        "--run",
        RUN,
        "--steps",
        STEPS,
        "--workers",
        "2",
    ]
    command = [sys.executable, "-c", "from lakebed.cli import main; main()", *words]
    before = len(list(path.rglob("*.parquet")))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as driver:
        deadline = time.monotonic() + 60
        while len(list(path.rglob("*.parquet"))) == before:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(driver.pid, signal.SIGINT)
        told = driver.communicate(timeout=30)[1]
    assert driver.returncode == 130
    assert [line for line in told.splitlines() if line] == [
        "lakebed: interrupted: what was finished is kept; run the same command again to go on"
    ]
    with Lake.open(path) as lake:
        assert verify(lake).ok

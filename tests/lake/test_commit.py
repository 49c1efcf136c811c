"""A unit appears whole or not at all, whoever else writes and whenever its writer dies."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake import Lake, Unit
from lakebed.lake.errors import InputMismatch, StorageFull, StorageRefused
from lakebed.lake.storage import Storage
from lakebed.lake.verify import verify

# What every forked writer below does: units of eight steps with recognisable cells, at steps start … stop.
WRITER = """
import os, random, signal, sys, time
import numpy as np
from lakebed.lake import Lake, Unit

def write(path, start, stop, inputs=None, scale=1.0, rows=8):
    lake = Lake.open(path)
    for first in range(start, stop, rows):
        steps = range(first, first + rows)
        unit = Unit("trace", "ref", f"trace-{first:08d}", tuple(steps), inputs=inputs or {})
        if lake.find_receipt(unit):
            continue
        with lake.unit(unit) as writer:
            block = writer.tensor_rows("gradients", steps, 4)
            for name in ("a", "b", "c"):
                block.write(name, np.array(steps, np.float32)[:, None, None] * scale * np.ones((rows, 16, 8), np.float32))
            writer.rows("training_steps", [{"step": step, "loss": step * scale} for step in steps])

def fork(function, *arguments):
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return child
"""


def in_subprocess(path: Path, script: str) -> str:
    """Runs WRITER and `script` with `path` in its own interpreter; returns what it wrote on stderr."""
    program = WRITER + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def check_whole(lake: Lake, steps: list[int]) -> None:
    """Every receipted step is in the table and in each array, with its own cells, and nothing else is."""
    lake.refresh()
    found = [row[0] for row in lake.sql("SELECT step FROM training_steps ORDER BY step").fetchall()]
    assert found == steps
    for name in ("a", "b", "c"):
        tensor = lake.tensor("gradients", name, "ref")
        assert tensor.steps.tolist() == steps
        assert (tensor.read() == np.array(steps, np.float32)[:, None, None]).all()
    result = verify(lake)
    assert result.ok, result.damaged


def test_two_processes_commit_the_same_units_at_once(lake: Lake) -> None:
    in_subprocess(
        lake.uri,
        """
        children = [fork(write, sys.argv[1], 0, 80) for _ in range(2)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
        """,
    )
    check_whole(lake, list(range(80)))
    assert verify(lake).unreferenced_files == 0
    assert len(lake.receipts.all()) == 10


def test_four_processes_write_different_units_of_one_array_at_once(lake: Lake) -> None:
    in_subprocess(
        lake.uri,
        """
        children = [fork(write, sys.argv[1], first, first + 40) for first in (0, 40, 80, 120)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
        """,
    )
    check_whole(lake, list(range(160)))


def test_the_same_name_from_other_inputs_is_refused_to_one_of_two(lake: Lake) -> None:
    errors = in_subprocess(
        lake.uri,
        """
        children = [fork(write, sys.argv[1], 0, 8, {"checkpoint": name}) for name in "xy"]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0, 1], codes
        """,
    )
    assert "InputMismatch" in errors
    assert "made from other inputs (checkpoint)" in errors
    check_whole(lake, list(range(8)))


def test_a_killed_writer_loses_only_the_unit_in_flight(lake: Lake) -> None:
    in_subprocess(
        lake.uri,
        """
        random.seed(0)
        write(sys.argv[1], 10**6, 10**6 + 8)  # imports what a unit needs, once
        started = time.perf_counter()
        write(sys.argv[1], 10**6 + 8, 10**6 + 40)
        unit_seconds = (time.perf_counter() - started) / 4
        for attempt in range(20):
            child = fork(write, sys.argv[1], attempt * 800, attempt * 800 + 800)
            time.sleep(random.uniform(0, 5 * unit_seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        """,
    )
    receipts = Lake.open(lake.uri)
    receipts.refresh()
    units = receipts.receipts.all()
    steps = sorted(step for receipt in units for step in receipt.steps)
    assert len(units) >= 8, "the writers were killed before any of them finished a unit: nothing was tested"
    check_whole(lake, steps)
    assert verify(lake).unreferenced_files > 0, "no writer was killed inside a unit: nothing was tested"
    # The lake goes on where it stopped, over what the dead left.
    in_subprocess(lake.uri, "write(sys.argv[1], 0, 80)")
    check_whole(lake, sorted({*steps, *range(80)}))


def test_an_exception_leaves_nothing(lake: Lake, write_unit) -> None:
    write_unit(lake, [1], {"w": np.zeros((1, 3), np.float32)})

    def stopped() -> None:
        with lake.unit(Unit("trace", "ref", "second", (2,))) as writer:
            writer.tensor_rows("gradients", [2], 8).write("w", np.ones((1, 3), np.float32))
            writer.rows("training_steps", [{"step": 2}])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    lake.refresh()
    assert lake.tensor("gradients", "w").steps.tolist() == [1]
    result = verify(lake)
    assert result.ok
    assert result.unreferenced_files == 0


def test_a_unit_from_other_inputs_is_refused_by_name_and_input(lake: Lake, write_unit) -> None:
    array = {"w": np.zeros((1, 3), np.float32)}
    made = write_unit(lake, [1], array, inputs={"checkpoint": "x", "probe": "p"})
    assert lake.find_receipt(made) is not None
    other = Unit("trace", "ref", made.name, (1,), inputs={"checkpoint": "y", "probe": "p"})
    for call in (
        lambda: lake.find_receipt(other),
        lambda: write_unit(lake, [1], array, inputs=dict(other.inputs)),
    ):
        with pytest.raises(
            InputMismatch, match=r"made from other inputs \(checkpoint\): use another run name"
        ):
            call()
    newer = Unit("trace", "ref", made.name, (1,), inputs=dict(made.inputs), version=2)
    with pytest.raises(InputMismatch, match="code version 1 in the lake, 2 now"):
        lake.find_receipt(newer)


def test_a_receipt_whose_answer_was_lost_keeps_its_files(lake: Lake, write_unit, monkeypatch) -> None:
    """An object store may write the receipt and lose the answer; a retry then finds it there, and it is ours."""
    create = Storage.create

    def lost(self: Storage, key: str, data: bytes) -> bool:
        made = create(self, key, data)
        if "extractions" not in key:
            return made
        if outcome is TimeoutError:
            raise TimeoutError
        return False

    monkeypatch.setattr(Storage, "create", lost)
    outcome: object = TimeoutError
    with pytest.raises(TimeoutError):
        write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})
    outcome = False
    write_unit(lake, [2], {"w": np.ones((1, 3), np.float32)})
    lake.refresh()
    assert lake.tensor("gradients", "w").steps.tolist() == [1, 2]
    assert verify(lake).ok


def test_a_receipt_that_could_not_be_written_leaves_nothing(lake: Lake, write_unit, monkeypatch) -> None:
    create = Storage.create

    def refuse(self: Storage, key: str, data: bytes) -> bool:
        if "extractions" in key:
            raise TimeoutError
        return create(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "create", refuse)
        with pytest.raises(TimeoutError):
            write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})
    assert lake.runs() == []
    assert verify(lake).unreferenced_files == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte; skipped where none can be mounted."""
    point = tmp_path / "disk"
    point.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_a_full_disk_shows_nothing_and_goes_on_when_there_is_space(small_disk: Path, write_unit) -> None:
    noise = np.random.default_rng(0).standard_normal((8, 100, 100)).astype(np.float32)
    with Lake.create(small_disk / "x.lake") as lake:
        write_unit(lake, range(8), {"w": noise})
        (small_disk / "ballast").write_bytes(bytes(400_000))
        with pytest.raises(StorageFull, match=r"no space left while writing .* free some space"):
            write_unit(lake, range(8, 16), {"w": noise, "v": noise})
        lake.refresh()
        assert lake.tensor("gradients", "w").steps.tolist() == list(range(8))
        result = verify(lake)
        assert result.ok
        assert result.unreferenced_files == 0
        (small_disk / "ballast").unlink()
        write_unit(lake, range(8, 16), {"w": noise})
        assert lake.tensor("gradients", "w").read().shape == (16, 100, 100)


@pytest.mark.parametrize("where", ["chunk", "table", "receipt"])
def test_every_place_of_a_commit_may_run_out_of_space(
    lake: Lake, write_unit, monkeypatch, where: str
) -> None:
    from lakebed.lake.storage import Storage

    part = {"chunk": "/tensors/", "table": "/training_steps/", "receipt": "/extractions/"}[where]
    write_file = Storage._write_file

    def full(storage: Storage, path: str, data: bytes) -> None:
        if part in path:
            write_file(storage, path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(storage, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "_write_file", full)
        with pytest.raises(StorageFull):
            write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})
    assert lake.runs() == []
    assert verify(lake).unreferenced_files == 0
    write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})
    assert lake.runs() == ["ref"]


def test_a_refused_write_is_one_line(lake: Lake, write_unit) -> None:
    Path(lake.uri, "tables").write_text("a file where a folder must be")
    with pytest.raises(StorageRefused, match=r"cannot write tables/training_steps/.*: Not a directory"):
        write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})


def test_a_new_lake_at_an_old_path_starts_its_axis_anew(tmp_path, write_unit) -> None:
    for _ in range(2):
        with Lake.create(tmp_path / "x.lake") as lake:
            write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)}, block_rows=1)
            (receipt,) = lake.receipts.all()
            assert receipt.tensors[0].first_row == 0
        shutil.rmtree(tmp_path / "x.lake")


def test_views_follow_a_receipt_that_was_replaced(lake: Lake, write_unit) -> None:
    """As many receipts as before, but others: the session must not go on reading the old files."""
    write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})
    query = "SELECT step FROM training_steps"
    assert lake.sql(query).fetchall() == [(1,)]
    os.unlink(Path(lake.uri, lake.receipts.all()[0].key))
    with Lake.open(lake.uri) as other:
        write_unit(other, [5], {"w": np.full((1, 3), 5, np.float32)})
    assert lake.sql(query).fetchall() == [(5,)]
    assert lake.tensor("gradients", "w", "ref").steps.tolist() == [5]


def test_an_array_made_by_another_process_meanwhile_must_fit(lake: Lake, write_unit, monkeypatch) -> None:
    """Between looking for the array and making it, another process made it, with another shape."""
    look = Lake.array_layout

    def slow(self: Lake, run: str, quantity: str, name: str) -> object:
        found = look(self, run, quantity, name)
        if found is None and self is lake:
            with Lake.open(lake.uri) as other:
                write_unit(other, [1], {"w": np.ones((1, 5), np.float32)}, name="theirs")
        return found

    monkeypatch.setattr(Lake, "array_layout", slow)
    with pytest.raises(InputMismatch, match=r"has rows of shape \(5,\)"):
        write_unit(lake, [2], {"w": np.ones((1, 3), np.float32)}, name="ours")
    lake.refresh()
    assert lake.tensor("gradients", "w").read(1).tolist() == [1.0] * 5
    assert verify(lake).ok

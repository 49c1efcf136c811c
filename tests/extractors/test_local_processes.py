"""Units of work give the same results wherever they run; what goes wrong in one reaches the caller in a line."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lakebed.extractors.executor import LocalProcesses, Sequential, UnitFailed, Work
from lakebed.lake.errors import MissingData


class Counted:
    """What a bar would be told."""

    def __init__(self) -> None:
        self.done = 0
        self.notes: list[str] = []

    def start(self, label, total, done=0):
        pass

    def advance(self, done=1, note=""):
        self.done += done
        self.notes.append(note)


def squared(progress, value, folder=None):
    progress.start("squaring", 4)
    for step in range(4):
        progress.advance(note=f"step {step}")
    return {"value": value * value, "threads": torch.get_num_threads(), "process": os.getpid()}


def failing(progress, kind):
    print("before it went wrong")
    raise (
        MissingData("no steps here: record some") if kind == "known" else ZeroDivisionError("a\nsecond line")
    )


def dying(progress, folder, times):
    """Killed by the system, the first `times` times."""
    marks = list(Path(folder).iterdir())
    (Path(folder) / f"{len(marks)}").touch()
    progress.start("dying", 2)
    progress.advance()
    if len(marks) < times:
        os.kill(os.getpid(), signal.SIGKILL)
    progress.advance()
    return len(marks)


def slow(progress, folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def work(function, name="unit", parts=10, **arguments):
    """A unit of this file, which a fresh process finds by the name it is imported under."""
    json.dumps(arguments)
    return Work(name, f"tests.extractors.test_local_processes:{function.__name__}", arguments, parts)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(root))


@pytest.mark.parametrize("executor", [Sequential(), LocalProcesses(2, 1)], ids=["here", "processes"])
def test_results_come_in_order_and_progress_adds_up(executor):
    units = [work(squared, f"unit {value}", value=value) for value in range(5)]
    told = Counted()
    found = executor.run(units, told)
    assert [of["value"] for of in found] == [0, 1, 4, 9, 16]
    assert told.done == 50
    assert "unit 3: step 2" in told.notes
    if isinstance(executor, LocalProcesses):
        assert {of["threads"] for of in found} == {1}
        assert os.getpid() not in {of["process"] for of in found}


@pytest.mark.parametrize(
    "executor", [Sequential, lambda logs: LocalProcesses(1, 1, logs)], ids=["here", "process"]
)
def test_a_known_error_is_its_own_line(executor, tmp_path):
    units = [work(squared, value=2), work(failing, "extracting seed 13", kind="known")]
    with pytest.raises(UnitFailed, match=r"^extracting seed 13: no steps here: record some"):
        executor(tmp_path).run(units, Counted())


def test_any_other_error_has_a_log(tmp_path):
    units = [work(failing, "report of L0H1", kind="unknown"), work(squared, value=3)]
    with pytest.raises(UnitFailed) as caught:
        LocalProcesses(1, 1, tmp_path).run(units, Counted())
    log = tmp_path / "report-of-L0H1.log"
    assert str(caught.value) == f"report of L0H1: ZeroDivisionError: a second line (log: {log})"
    assert "before it went wrong" in log.read_text()
    assert "Traceback" in log.read_text()


def test_a_unit_whose_process_was_killed_is_done_again(tmp_path):
    units = [work(dying, "unit", folder=str(tmp_path), times=1), work(squared, value=7)]
    told = Counted()
    again, other = LocalProcesses(1, 1).run(units, told)
    assert (again, other["value"]) == (1, 49)
    assert told.done == 20


def test_a_unit_that_is_killed_twice_fails(tmp_path):
    with pytest.raises(UnitFailed, match=r"unit: its process was ended 2 times .* use fewer --workers"):
        LocalProcesses(1, 1).run([work(dying, folder=str(tmp_path), times=9)], Counted())
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupt_ends_the_processes(tmp_path):
    class Interrupted(Counted):
        def advance(self, done=1, note=""):
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        LocalProcesses(2, 1).run([work(slow, folder=str(tmp_path)), work(squared, value=1)], Interrupted())
    assert time.monotonic() - started < 30
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)

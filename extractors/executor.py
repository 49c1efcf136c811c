"""Where units of work run: in this process, or in several of this machine. Another place is another class with `run`.

A unit is a module-level function and JSON-able arguments, among them the URI of the lake, which it opens itself. It takes
its `Progress` first, returns what JSON can hold, and done twice it leaves what it leaves done once: so it may go to any
process of any machine, in any order, and be given again when its process dies.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from .. import LakebedError
from .progress import Progress
from .threads import set_threads

# A unit whose process died is given to another one: it may have been killed for the memory of its neighbours.
ATTEMPTS = 2


class UnitFailed(LakebedError):
    """A unit of work that went wrong; the message holds its own, and where its log is."""


@dataclass(frozen=True)
class Work:
    """One unit: what people call it, "module:function", arguments, and how many parts of the whole it counts for."""

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 1

    @classmethod
    def of(cls, name: str, function: Callable[..., Any], parts: int = 1, **arguments: Any) -> Work:
        """A unit that calls `function(progress, **arguments)`."""
        return cls(name, f"{function.__module__}:{function.__qualname__}", arguments, parts)


@dataclass(frozen=True)
class Outcome:
    """What became of a unit: its result, or one line that says what is wrong, and the log that goes with it."""

    result: Any = None
    error: str | None = None
    log: str = ""


# Called with parts of the work done, and a note.
Advanced = Callable[[int, str], None]


class Executor(Protocol):
    """Runs units, which need not be in order, and returns their results in the order they came in.

    `progress` has been started by the caller, with the sum of all parts. Raises UnitFailed for the first unit that failed,
    after those at work are done; those not begun by then are left.
    """

    @property
    def workers(self) -> int:
        """How many units it does at a time."""
        ...

    def run(self, units: Iterable[Work], progress: Progress) -> list[Any]:
        """Results, one per unit."""
        ...


def perform(work: Work, advanced: Advanced, capture: bool = True) -> Outcome:
    """Does one unit in this process, whatever happens; what every executor's worker calls.

    With `capture`, what the unit prints goes to its log, and so does the traceback of what is no LakebedError.
    """
    printed, done = io.StringIO(), _Parts(work, advanced)
    try:
        module, _, name = work.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        with ExitStack() as redirected:
            if capture:
                redirected.enter_context(redirect_stdout(printed))
                redirected.enter_context(redirect_stderr(printed))
            result = function(done, **work.arguments)
        done.finish()
        return Outcome(result)
    except LakebedError as error:
        return Outcome(error=str(error), log=printed.getvalue())
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        log = f"{printed.getvalue()}{traceback.format_exc()}"
        return Outcome(error=f"{type(error).__name__}: {told}", log=log)


class _Parts:
    """A unit's own progress as parts of the whole: its first stretch of work counts, later ones are notes."""

    def __init__(self, work: Work, advanced: Advanced) -> None:
        self._work, self._advanced = work, advanced
        self._total = self._done = self._told = 0

    def start(self, label: str, total: int, done: int = 0) -> None:
        if not self._total:
            self._total, self._done = max(1, total), done
        self._tell(label)

    def advance(self, done: int = 1, note: str = "") -> None:
        self._done += done
        self._tell(note)

    def finish(self) -> None:
        self._advanced(self._work.parts - self._told, "done")

    def _tell(self, note: str) -> None:
        share = min(1.0, self._done / self._total) if self._total else 0.0
        reached = max(self._told, int(self._work.parts * share))
        new, self._told = reached - self._told, reached
        self._advanced(new, note)


@dataclass(frozen=True)
class Sequential:
    """One unit after another, here."""

    logs: Path | None = None

    @property
    def workers(self) -> int:
        """One."""
        return 1

    def run(self, units: Iterable[Work], progress: Progress) -> list[Any]:
        """Results, in order."""
        found = []
        for work in units:
            outcome = perform(work, _noted(work, progress), capture=False)
            require(work, outcome, self.logs)
            found.append(outcome.result)
        return found


@dataclass(frozen=True)
class LocalProcesses:
    """`workers` fresh processes of this machine, each with `threads` threads of torch.

    A unit whose process died is done again; killed a second time, it fails. An interrupt ends the processes at once: what
    units have committed stays, and the same command goes on from there.
    """

    workers: int
    threads: int = 1
    logs: Path | None = None

    def run(self, units: Iterable[Work], progress: Progress) -> list[Any]:
        """Results, in order."""
        pool = _Pool(list(units), self, progress)
        try:
            return pool.drain()
        finally:
            pool.end()


def prepare_processes() -> SpawnContext | ForkServerContext:
    """Begins to import what workers need, where systems can fork, and returns at once.

    A fork of this process might hang, since torch has threads in it; workers are forks of one that has imported torch and
    does nothing else, so that they begin at once and share its memory. Elsewhere each imports for itself.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lakebed.extractors.plan"])
    forkserver.ensure_running()
    return context


class _Worker:
    """A process and the pipe to it; `index` is that of the unit in hand."""

    def __init__(self, threads: int) -> None:
        context = prepare_processes()
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, threads, dict(os.environ)), daemon=True
        )
        self.process.start()
        theirs.close()
        self.index: int | None = None

    def end(self) -> None:
        """Lets an idle process go, which a closed pipe tells it; ends one at work."""
        self.pipe.close()
        if self.index is not None:
            self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Pool:
    def __init__(self, units: Sequence[Work], of: LocalProcesses, progress: Progress) -> None:
        self._units, self._of, self._progress = units, of, progress
        self._waiting = deque(range(len(units)))
        self._attempts = [0] * len(units)
        self._outcomes: dict[int, Outcome] = {}
        # Parts that were told of a unit which is to be done again are not told again.
        self._told = [0] * len(units)
        self._now = [0] * len(units)
        self._workers: list[_Worker] = []

    def drain(self) -> list[Any]:
        while True:
            self._hand_out()
            busy = {worker.pipe: worker for worker in self._workers if worker.index is not None}
            if not busy:
                break
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                self._listen(busy[pipe])
        for index in sorted(self._outcomes):
            require(self._units[index], self._outcomes[index], self._of.logs)
        return [self._outcomes[index].result for index in range(len(self._units))]

    def _hand_out(self) -> None:
        if any(outcome.error for outcome in self._outcomes.values()):
            return
        while self._waiting:
            idle = [worker for worker in self._workers if worker.index is None]
            if not idle and len(self._workers) >= self._of.workers:
                return
            if not idle:
                idle = [_Worker(self._of.threads)]
                self._workers += idle
            index = self._waiting.popleft()
            idle[0].index, self._now[index] = index, 0
            self._attempts[index] += 1
            # A process that died meanwhile is seen when it is listened to.
            try:
                idle[0].pipe.send(self._units[index])
            except OSError:
                continue

    def _listen(self, worker: _Worker) -> None:
        assert worker.index is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if isinstance(message, Outcome):
            self._outcomes[worker.index] = message
            worker.index = None
            return
        parts, note = message
        index = worker.index
        self._now[index] += parts
        new = max(0, self._now[index] - self._told[index])
        self._told[index] += new
        self._progress.advance(new, _note(self._units[index], note))

    def _bury(self, worker: _Worker) -> None:
        """A process died with a unit in hand."""
        index = worker.index
        assert index is not None
        self._workers.remove(worker)
        worker.process.join()
        if self._attempts[index] < ATTEMPTS:
            self._waiting.appendleft(index)
            return
        code = worker.process.exitcode
        self._outcomes[index] = Outcome(
            error=f"its process was ended {ATTEMPTS} times (exit status {code}), as happens when memory runs out: "
            "use fewer --workers"
        )

    def end(self) -> None:
        for worker in self._workers:
            worker.end()


def _serve(pipe: Connection, threads: int, environment: Mapping[str, str]) -> None:
    """A worker's life: one unit after another, until the parent goes. The parent decides what an interrupt means."""
    import signal

    # That of the process it is a fork of may be older.
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ended in mid-unit it still gives back the system's semaphores that libraries hold, of which users would be warned.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    set_threads(threads)
    while True:
        try:
            work: Work = pipe.recv()
            pipe.send(perform(work, lambda parts, note: pipe.send((parts, note))))
        except (EOFError, OSError):
            return


def _noted(work: Work, progress: Progress) -> Advanced:
    return lambda parts, note: progress.advance(parts, _note(work, note))


def _note(work: Work, note: str) -> str:
    return f"{work.name}: {note}" if note else work.name


def require(work: Work, outcome: Outcome, logs: Path | None) -> None:
    """Raises UnitFailed for a unit that failed, its log beside it on disk."""
    if outcome.error is None:
        return
    where = ""
    if outcome.log and logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        path = logs / f"{work.name.replace(' ', '-').replace('/', '-')}.log"
        path.write_text(outcome.log, encoding="utf-8")
        where = f" (log: {path})"
    raise UnitFailed(f"{work.name}: {outcome.error}{where}")

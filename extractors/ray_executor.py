"""Units of work on a Ray cluster: one that runs already, or one of this machine that is started for them.

Ray does again what a lost worker or machine had in hand. Workers need this version of lakebed, and must reach the lake
at the path or URI it is given here, with credentials of their own.
"""

from __future__ import annotations

import importlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import LakebedError, __version__
from .executor import Advanced, Outcome, Work, perform, require
from .progress import Progress
from .threads import set_threads

# How often a unit is begun again when its process or machine was lost. What it has committed is not done again.
_RETRIES = 3
_OBJECT_STORE = 80 << 20  # units hand over a few lines; Ray takes no less than 75 MiB
_SECONDS = 0.2


class RayMissing(LakebedError):
    """Ray is not installed."""


class RayUnavailable(LakebedError):
    """No Ray cluster at an address, or none that can be used."""


class NoRoom(LakebedError):
    """No machine of the cluster has what a worker asks for."""


@dataclass
class RayExecutor:
    """Up to `limit` units at a time (default: as many as the cluster has room for), each with `cpus`, `gpus` and
    `memory` bytes of its own, and `threads` threads of torch (default: one per CPU).

    Without an `address` Ray is started on this machine, and ends with this process or with `close`. Raises RayMissing,
    RayUnavailable, NoRoom.
    """

    address: str | None = None
    limit: int | None = None
    threads: int | None = None
    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    logs: Path | None = None
    _connected: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _ray()

    @property
    def workers(self) -> int:
        """How many units it does at a time."""
        if self.limit is not None:
            return self.limit
        ray = self._connect()
        return max(1, sum(_fitting(node, self._request()) for node in _machines(ray)))

    def run(self, units: Iterable[Work], progress: Progress) -> list[Any]:
        """Results, in order."""
        ray = self._connect()
        self._require_room(ray)
        return _Tasks(ray, list(units), self, progress).drain()

    def close(self) -> None:
        """Lets the cluster go; one that was started here ends."""
        if self._connected:
            self._connected = False
            _ray().shutdown()

    def options(self) -> dict[str, Any]:
        """What Ray is told of each task."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "memory": self.memory,
            "max_retries": _RETRIES,
        }

    def _connect(self) -> Any:
        ray = _ray()
        if ray.is_initialized():
            return ray
        # Nothing about this machine is told to anybody.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "error"}
        try:
            if self.address is not None:
                _knock(self.address)
                ray.init(address=self.address, **quiet)
            else:
                ray.init(
                    address="local",
                    num_cpus=math.ceil(self.cpus * self.limit) if self.limit else None,
                    object_store_memory=_OBJECT_STORE,
                    include_dashboard=False,
                    **quiet,
                )
        except Exception as error:
            where = f"at {self.address}" if self.address else "on this machine"
            raise RayUnavailable(
                f"no Ray cluster {where}: {_line(error)}; start one with `ray start --head`, or leave out --ray-address"
            ) from error
        self._connected = True
        return ray

    def _request(self) -> dict[str, float]:
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory or 0)}
        return {name: amount for name, amount in asked.items() if amount}

    def _require_room(self, ray: Any) -> None:
        """Ray would wait for ever for a machine that is not there."""
        machines = _machines(ray)
        if not any(_fitting(machine, self._request()) for machine in machines):
            held = "; ".join(sorted({_told(machine) for machine in machines}))
            raise NoRoom(
                f"a worker asks for {_told(self._request())}, and no machine of the cluster has as much ({held}): lower "
                "--worker-cpus, --worker-gpus or --worker-memory"
            )


class _Tasks:
    """Units that are tasks of Ray."""

    def __init__(self, ray: Any, units: list[Work], of: RayExecutor, progress: Progress) -> None:
        self._ray, self._units, self._of, self._progress = ray, units, of, progress
        self._task = ray.remote(_perform).options(**of.options())
        self._board = ray.remote(_Board).options(num_cpus=0).remote()
        self._waiting = deque(range(len(units)))
        self._pending: dict[Any, int] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._told = [0] * len(units)

    def drain(self) -> list[Any]:
        workers = self._of.workers
        try:
            while self._hand_out(workers):
                done, _ = self._ray.wait(list(self._pending), timeout=_SECONDS)
                self._listen()
                for task in done:
                    index = self._pending.pop(task)
                    self._outcomes[index] = outcome = self._outcome(task)
                    if outcome.error is None:
                        self._advance(index, self._units[index].parts, "done")
        finally:
            # After an interrupt; what units have committed stays.
            for task in self._pending:
                self._ray.cancel(task, force=True)
            self._ray.kill(self._board)
        for index in sorted(self._outcomes):
            require(self._units[index], self._outcomes[index], self._of.logs)
        return [self._outcomes[index].result for index in range(len(self._units))]

    def _hand_out(self, workers: int) -> bool:
        """Begins what there is room for, nothing after a failure; whether anything is at work."""
        failed = any(outcome.error for outcome in self._outcomes.values())
        while self._waiting and len(self._pending) < workers and not failed:
            index = self._waiting.popleft()
            threads = self._of.threads or max(1, int(self._of.cpus))
            task = self._task.remote(self._units[index], index, self._board, threads, __version__)
            self._pending[task] = index
        return bool(self._pending)

    def _listen(self) -> None:
        """Progress since the last time; work does not fail because that is lost."""
        try:
            news = self._ray.get(self._board.take.remote(), timeout=5)
        except self._ray.exceptions.RayError:
            return
        for index, (parts, note) in news.items():
            self._advance(index, parts, note)

    def _advance(self, index: int, parts: int, note: str) -> None:
        """Parts that were told of a unit which is done again are not told again."""
        new = max(0, parts - self._told[index])
        self._told[index] += new
        name = self._units[index].name
        self._progress.advance(new, f"{name}: {note}" if note else name)

    def _outcome(self, task: Any) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(task)
            return outcome
        except self._ray.exceptions.OutOfMemoryError as error:
            return Outcome(
                error="it ran out of memory: use fewer --workers, or set --worker-memory", log=str(error)
            )
        except self._ray.exceptions.WorkerCrashedError as error:
            return Outcome(error=f"its process was ended {_RETRIES + 1} times", log=str(error))
        except self._ray.exceptions.RayError as error:
            return Outcome(error=f"{type(error).__name__}: {_line(error)}", log=str(error))


class _Board:
    """An actor on which workers write how far they are: by unit the parts done, and a note."""

    def __init__(self) -> None:
        self._news: dict[int, tuple[int, str]] = {}

    def tell(self, index: int, parts: int, note: str) -> None:
        """Replaces what stood there."""
        self._news[index] = parts, note

    def take(self) -> dict[int, tuple[int, str]]:
        """What was written since the last time."""
        news, self._news = self._news, {}
        return news


def _perform(work: Work, index: int, board: Any, threads: int, version: str) -> Outcome:
    """Does one unit in a worker of Ray."""
    if version != __version__:
        return Outcome(
            error=f"its machine has lakebed {__version__}, and this one {version}: install the same"
        )
    set_threads(threads)
    return perform(work, _telling(board, index))


def _telling(board: Any, index: int) -> Advanced:
    """Sums up parts, and tells them a few times a second."""
    total, last = 0, 0.0

    def advanced(parts: int, note: str) -> None:
        nonlocal total, last
        total += parts
        if time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            board.tell.remote(index, total, note)

    return advanced


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RayMissing(f"--executor ray needs Ray ({error}): run `pip install 'lakebed[ray]'`") from error


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()


def _machines(ray: Any) -> list[Mapping[str, float]]:
    """What the machines that are alive have."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(machine: Mapping[str, float], request: Mapping[str, float]) -> int:
    """How many workers fit a machine."""
    return int(min(machine.get(name, 0) / amount for name, amount in request.items()))


def _told(held: Mapping[str, float]) -> str:
    memory = held.get("memory", 0) / (1 << 30)
    return f"{held.get('CPU', 0):g} CPUs, {held.get('GPU', 0):g} GPUs, {memory:.3g} GiB"


def _line(error: BaseException) -> str:
    """The last line of a message, where Ray says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__

"""Where units of work run: `--executor`, `--workers`, and what a worker on a Ray cluster asks for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..extractors.executor import Executor

Function = TypeVar("Function", bound=Callable[..., Any])

_GIB = 1 << 30


@dataclass(frozen=True)
class Request:
    """What is asked of a Ray cluster: its address, and of each worker CPUs, GPUs and GiB of memory."""

    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None
    memory: float | None = None


def executor_options(function: Function) -> Function:
    """`--executor`, `--workers`, `--ray-address`, `--worker-cpus`, `--worker-gpus`, `--worker-memory`."""
    amount = click.FloatRange(0, min_open=True)
    for option in (
        click.option("--worker-memory", type=amount, metavar="GIB", help="With ray: memory of each worker."),
        click.option(
            "--worker-gpus", type=amount, metavar="N", help="With ray: GPUs of each worker, or a part of one."
        ),
        click.option(
            "--worker-cpus", type=amount, metavar="N", help="With ray: CPUs of each worker [default: 1]."
        ),
        click.option(
            "--ray-address",
            metavar="HOST:PORT",
            help="With ray: a cluster that runs; auto: the one of this machine [default: one is started here].",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1),
            metavar="N",
            help="Processes that share the steps [default: none but this; with ray, as many as the cluster holds].",
        ),
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Where workers run: on this machine, or on a Ray cluster (extra ray).",
        ),
    ):
        function = option(function)
    return function


def make_executor(
    name: str, workers: int | None, threads: int | None, request: Request, logs: Path | None = None
) -> Executor | None:
    """The executor that was asked for; None: the work is done here. Each worker has `threads` threads of torch, by default
    one, or one for each of its CPUs. Logs of units that failed go to a temporary folder unless another is named. Raises
    UsageError for an option of another executor, RayMissing."""
    logs = logs or Path(tempfile.gettempdir()) / f"lakebed-{os.getpid()}"
    if name == "ray":
        from ..extractors.ray_executor import RayExecutor

        memory = None if request.memory is None else int(request.memory * _GIB)
        return RayExecutor(
            request.address, workers, threads, request.cpus or 1, request.gpus or 0, memory, logs
        )
    if any(value is not None for value in astuple(request)):
        raise click.UsageError("--ray-address and --worker-… are options of --executor ray")
    if workers is None:
        return None
    from ..extractors.executor import LocalProcesses, prepare_processes

    # Now, so that they import what they need while this process does.
    prepare_processes()
    return LocalProcesses(workers, threads or 1, logs)

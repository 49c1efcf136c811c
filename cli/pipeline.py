"""`lakebed pipeline cross-seed`: the same training from several seeds, and which head took the role in each."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .cross_seed_plan import LABELS, STAGES, CrossSeed
from .executor_options import Request, executor_options, make_executor
from .options import lake_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..extractors.executor import Executor

    Function = TypeVar("Function", bound=Callable[..., Any])

_PAIR_TYPES = click.Choice(["query_key", "support_value", "recency", "distractor"])


@click.group(epilog="Example: lakebed pipeline cross-seed --help")
def pipeline() -> None:
    """Work over several runs: train, extract and report, each unit of it once, however often it is stopped."""


def _seed_options(function: Function) -> Function:
    """What is trained, and where it goes."""
    for option in (
        click.option(
            "--base-config", required=True, metavar="CONFIG", help="A config's name, or a TOML file."
        ),
        click.option(
            "--out",
            "--run-root",
            required=True,
            metavar="DIR",
            help="Folder for manifests, winners and reports.",
        ),
        click.option(
            "--run-name", metavar="NAME", help="What runs' names begin with [default: the config's]."
        ),
        click.option(
            "--seed", "seeds", multiple=True, type=click.IntRange(0), required=True, help="A seed; repeat it."
        ),
        click.option("--end-step", type=int, required=True, metavar="N", help="Steps to train each seed."),
        click.option(
            "--layers", type=int, metavar="N", help="Scan the heads of the first N layers [default: all]."
        ),
        click.option("--heads", type=int, metavar="N", help="Scan the first N heads of each [default: all]."),
        click.option(
            "--scan-checkpoint-every",
            "scan_every",
            type=int,
            default=250,
            show_default=True,
            metavar="N",
            help="Steps between the checkpoints that are scanned.",
        ),
        click.option(
            "--probe", default="probe", show_default=True, metavar="NAME", help="Probe; built if missing."
        ),
    ):
        function = option(function)
    return function


def _scan_options(function: Function) -> Function:
    """How heads are scored, and over which window their growth is taken."""
    for option in (
        click.option("--rank", type=int, default=8, show_default=True, help="Singular directions of W_QK."),
        click.option("--window-start", type=int, required=True, help="Growth is taken from this step."),
        click.option("--window-end", type=int, required=True, help="To this one."),
        click.option(
            "--context-stage",
            metavar="STAGE",
            help="Scan every head on one stage [default: the one each reads].",
        ),
        click.option(
            "--score-query-role", default="prediction", show_default=True, help="Where is attended from."
        ),
        click.option("--support-role", default="support_value", show_default=True, help="What should win."),
        click.option(
            "--distractor-role", default="value_distractors", show_default=True, help="What should lose."
        ),
        click.option(
            "--layernorm-mode", type=click.Choice(["head_ln1", "none"]), default="head_ln1", show_default=True
        ),
        click.option(
            "--group-by",
            type=click.Choice(
                ["position_token", "query_key", "support_key", "support_value", "answer_value"]
            ),
            default="query_key",
            show_default=True,
            help="Token that the scan's events are grouped by.",
        ),
        click.option("--split", multiple=True, help="Split of the probe to scan; repeat it [default: all]."),
    ):
        function = option(function)
    return function


def _adam_options(function: Function) -> Function:
    """Which heads' growth is attributed to the updates, over which recorded steps."""
    for option in (
        click.option("--adam-start-step", type=int, help="Record from this step [default: --window-start]."),
        click.option("--adam-end-step", type=int, help="To this one [default: --window-end]."),
        click.option(
            "--adam-candidate",
            "candidates",
            multiple=True,
            type=click.Choice(LABELS),
            default=("winner",),
            show_default=True,
            help="A head by its place; repeat it.",
        ),
        click.option(
            "--record-side", type=click.Choice(["clean", "corrupted"]), default="clean", show_default=True
        ),
        click.option(
            "--route-pair-type", default="support_value", show_default=True, help="Pairs that are scored."
        ),
        click.option(
            "--route-pair-source-type",
            multiple=True,
            type=_PAIR_TYPES,
            default=("support_value",),
            show_default=True,
            help="Pairs that are built; repeat it.",
        ),
        click.option(
            "--max-route-pairs-per-type", "max_route_pairs", type=int, default=64, show_default=True
        ),
        click.option(
            "--min-route-pairs-per-type", "min_route_pairs", type=int, default=16, show_default=True
        ),
        click.option(
            "--loss-scope", type=click.Choice(["full_lm", "answer"]), default="full_lm", show_default=True
        ),
        click.option(
            "--cleanup-adam-trace",
            "cleanup",
            is_flag=True,
            help="Drop a seed's recorded steps once it has its reports.",
        ),
    ):
        function = option(function)
    return function


def _run_options(function: Function) -> Function:
    """Which stages, and on what."""
    for option in (
        click.option(
            "--stage",
            "stages",
            multiple=True,
            type=click.Choice(STAGES),
            help="A stage; repeat it. They run in this order, whatever order they are given in [default: all].",
        ),
        click.option("--overwrite", is_flag=True, help="Replace outputs that were made otherwise."),
        click.option("--dry-run", is_flag=True, help="Only say what would be done, in bytes and seconds."),
        click.option(
            "--threads",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            metavar="N",
            help="Threads of each worker.",
        ),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps."),
    ):
        function = option(function)
    return function


@pipeline.command(
    "cross-seed",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: lakebed pipeline cross-seed --lake seeds.lake --out seeds --base-config demo --seed 11 --seed 13 "
    "--seed 17 --end-step 1300 --scan-checkpoint-every 100 --window-start 300 --window-end 900 --adam-start-step 600 "
    "--adam-end-step 664",
)
@lake_option
@_seed_options
@_scan_options
@_adam_options
@executor_options
@_run_options
def cross_seed(
    lake_uri: str,
    base_config: str,
    run_name: str | None,
    stages: tuple[str, ...],
    cleanup: bool,
    overwrite: bool,
    dry_run: bool,
    executor: str,
    workers: int | None,
    ray_address: str | None,
    worker_cpus: float | None,
    worker_gpus: float | None,
    worker_memory: float | None,
    threads: int,
    **options: Any,
) -> None:
    """Does the same role form in every seed, and in which head?

    Trains each seed into a run of its own (NAME_seed_0011), scores every head at checkpoints on the stage it reads, selects
    the head whose QK separation grew most over the window, records every step of another window and splits what the updates
    did to the chosen heads into AdamW's terms. `lakebed query cross-seed` compares the seeds.

    Stages: configs, trace-scan, scan, select, trace-adam, adam. The same command again does only what is missing. Without
    --workers there is a process per core, at most one per seed; bits do not depend on it. Prints one JSON object.
    """
    from .cross_seed import Pipeline
    from .progress import Bars

    plan = _plan(lake_uri, base_config, run_name, options)
    ordered = [stage for stage in STAGES if stage in (stages or STAGES)]
    here = min(_cores(), len(plan.seeds))
    if dry_run:
        from ..extractors.threads import set_threads
        from .cross_seed_estimate import estimate, table

        set_threads(threads)
        found = estimate(plan, ordered, workers or here)
        click.echo(table(found), err=True)
        click.echo(json.dumps(found, indent=2))
        return
    reporter = _local(here if executor == "ray" else workers or here, threads, plan)
    if executor == "ray" or any((ray_address, worker_cpus, worker_gpus, worker_memory)):
        request = Request(ray_address, worker_cpus, worker_gpus, worker_memory)
        made = make_executor(executor, workers, threads, request)
        assert made is not None
    else:
        made = reporter
    with Bars() as bars:
        shown = Pipeline(plan, made, bars, overwrite, reporter).run(ordered, cleanup)
    click.echo(json.dumps(shown, indent=2))


def _plan(lake_uri: str, base_config: str, run_name: str | None, options: dict[str, Any]) -> CrossSeed:
    from ..extractors.seeds import base_config as read_base
    from ..lake.names import check_run_name

    config = read_base(base_config)
    held = json.loads(config)
    start, end = options.pop("adam_start_step"), options.pop("adam_end_step")
    layers, heads = options.pop("layers"), options.pop("heads")
    plan = CrossSeed(
        lake=lake_uri,
        config=config,
        run_name=run_name or held["run_name"],
        layers=held["model"]["n_layers"] if layers is None else layers,
        heads=held["model"]["n_heads"] if heads is None else heads,
        adam_start=options["window_start"] if start is None else start,
        adam_end=options["window_end"] if end is None else end,
        **options,
    )
    plan.check()
    for seed in plan.seeds:
        check_run_name(plan.traced_run(seed))
    return plan


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local(workers: int, threads: int, plan: CrossSeed) -> Executor:
    from ..extractors.executor import LocalProcesses, Sequential
    from ..extractors.threads import set_threads

    if workers == 1:
        set_threads(threads)
        return Sequential(plan.logs)
    return LocalProcesses(workers, threads, plan.logs)

"""`lakebed extract`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from ..lake.datasets import (
    ACTIVATIONS,
    ATTENTION,
    COMPONENT_LOGITS,
    DEFAULT_PROBE,
    HEAD_WRITES,
    INTERVENTIONS,
    QK_COORDINATES,
    READOUTS,
    Need,
)
from .executor_options import Request, executor_options, make_executor
from .intervention_options import intervention_needs
from .options import lake_option, run_option, steps_option, threads_option
from .scalar_options import OF_SCALARS, TAKERS, scalar_needs, scalar_options

if TYPE_CHECKING:
    from collections.abc import Callable

# Dataset options by name: which datasets take them, and their defaults. One need is made per combination of values.
_DATASET_OPTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str | None, ...]]] = {
    "probe": (
        (
            ACTIVATIONS,
            ATTENTION,
            READOUTS,
            HEAD_WRITES,
            COMPONENT_LOGITS,
            QK_COORDINATES,
            INTERVENTIONS,
            *OF_SCALARS,
        ),
        (DEFAULT_PROBE,),
    ),
    "layout": ((ACTIVATIONS,), ("roles",)),
    "query_role": ((ATTENTION, HEAD_WRITES), ("prediction",)),
    "head": ((QK_COORDINATES,), (None,)),
    "stage": ((QK_COORDINATES,), (None,)),
    "layernorm_mode": ((QK_COORDINATES,), ("head_ln1",)),
    "spec": ((INTERVENTIONS,), ()),
}


def _dataset_option(name: str, metavar: str, about: str) -> Callable[[Any], Any]:
    return click.option(f"--{name}", multiple=True, metavar=metavar, help=about)


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Examples: lakebed extract svd --lake demo.lake --run demo --steps 0:600:20    "
    "lakebed extract activations attention readouts --lake demo.lake --run demo --steps 0:600:100    "
    "lakebed extract qk_coordinates --head L1H0 --lake demo.lake --run demo --steps last    "
    "lakebed extract --for weight-svd-trace --for attention-geometry-trace --lake demo.lake --run demo",
)
@click.argument("datasets", nargs=-1, type=click.UNPROCESSED, metavar="[DATASET]...")
@click.option(
    "--for",
    "reports",
    multiple=True,
    metavar="REPORT",
    help="Make whatever this report still needs, given its own options; may be given several times.",
)
@lake_option
@run_option
@steps_option
@_dataset_option(
    "probe",
    "NAME",
    f"Probe that goes through the model [default: {DEFAULT_PROBE}]; NAME.corrupted: of its pairs.",
)
@_dataset_option("layout", "roles|all", "activations: at positions with a role, or at all [default: roles].")
@_dataset_option(
    "query-role", "ROLE", "attention, head_writes: where is attended from [default: prediction]."
)
@_dataset_option("head", "L2H1", "qk_coordinates: the head; required.")
@_dataset_option("stage", "STAGE", "qk_coordinates: the residual stage [default: the one the head reads].")
@_dataset_option(
    "layernorm-mode", "head_ln1|none", "qk_coordinates: through the head's LayerNorm [default] or not."
)
@_dataset_option(
    "spec", "FILE.toml", "interventions: what is changed [default: each head and MLP zeroed in turn]."
)
@scalar_options
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="TOKENS", help="Tokens per forward pass [default: 8192]."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps, for forward passes.")
@threads_option
@executor_options
def extract(
    datasets: tuple[str, ...],
    reports: tuple[str, ...],
    lake_uri: str,
    run: str,
    steps: str | None,
    batch_size: int | None,
    device: str,
    threads: int | None,
    executor: str,
    workers: int | None,
    ray_address: str | None,
    worker_cpus: float | None,
    worker_gpus: float | None,
    worker_memory: float | None,
    **options: tuple[str, ...],
) -> None:
    """Make datasets of a run, where they are missing.

    Of weights: svd, weights. Of forward passes over a probe (see `lakebed probe`): activations, attention, readouts,
    head_writes, component_logits, qk_coordinates, interventions; all that are named share one pass per step and batch.
    Of a --scalar over causal patch pairs: scalar_gradients, its values and its whole gradient. Between neighbouring steps:
    scalar_changes of a --scalar, its values at both ends; of the updates, its attributions and update_norms.
    Options may be repeated: each combination is a dataset.

    Without --steps: the steps whose weights are stored. A second call makes nothing; an interrupted one goes on.
    With --for, the report's own options may follow, as `lakebed query` takes them; several reports share one pass, and each
    takes those options that it has. With --workers the steps are shared out among processes, or with --executor ray among
    the machines of a cluster; rows and bits are the same.
    """
    if reports:
        needs = report_needs(reports, run, steps, [*_as_arguments(options), *datasets])
    else:
        stray = next((name for name in datasets if name.startswith("-")), None)
        if stray or not datasets:
            raise click.UsageError(f"No such option: {stray}" if stray else "name a DATASET, or --for REPORT")
        needs = dataset_needs(datasets, options)

    request = Request(ray_address, worker_cpus, worker_gpus, worker_memory)
    chosen = make_executor(executor, workers, threads, request)

    from ..extractors.plan import extract as run_extraction
    from ..extractors.threads import set_threads
    from ..lake import Lake
    from .progress import Bars

    set_threads(threads)
    with Lake.open(lake_uri) as lake, Bars() as bars:
        result = run_extraction(
            lake, run, needs, steps, bars, device=device, batch_size=batch_size, executor=chosen
        )
    made = {name: len(of) for name, of in result.made.items()}
    shown = {"lake": lake_uri, "run": run, "made": made, "standing": result.standing}
    click.echo(json.dumps({**shown, "rows": result.rows, "bytes": result.bytes}))


def dataset_needs(datasets: Sequence[str], options: Mapping[str, tuple[str, ...]]) -> list[Need]:
    """One need per dataset and combination of its options; raises UsageError for an option that none of them takes."""
    for name, values in options.items():
        takers = TAKERS[name] if name in TAKERS else _DATASET_OPTIONS[name][0]
        if values and not set(takers) & set(datasets):
            raise click.UsageError(f"--{name.replace('_', '-')} is an option of {', '.join(takers)}")
    needs = []
    for dataset in dict.fromkeys(datasets):
        if dataset in OF_SCALARS:
            needs += scalar_needs(dataset, options)
            continue
        if dataset == INTERVENTIONS:
            needs += intervention_needs(options)
            continue
        combinations: list[dict[str, str]] = [{}]
        for name, (takers, defaults) in _DATASET_OPTIONS.items():
            if dataset in takers:
                chosen: tuple[str | None, ...] = options[name] or defaults
                combinations = [
                    {**made, name: value} if value is not None else made
                    for made in combinations
                    for value in chosen
                ]
        needs += [Need(dataset, parameters) for parameters in combinations]
    return needs


def _as_arguments(options: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Options that `extract` and a report share, as they were typed: with --for they are the report's."""
    return [
        word
        for name, values in options.items()
        for value in values
        for word in (f"--{name.replace('_', '-')}", value)
    ]


def report_needs(names: Sequence[str], run: str, steps: str | None, arguments: Sequence[str]) -> list[Need]:
    """What reports with these command-line options read; raises UnknownReport, UsageError and InvalidOption."""
    from ..queries.registry import load_report
    from .query import read_report, report_options

    reports = {name: load_report(name) for name in names}
    options = {
        name: [option for option in report_options(report) if option.name not in ("lake", "run", "steps")]
        for name, report in reports.items()
    }
    shares = (
        _shared_out(options, arguments) if len(reports) > 1 else {name: list(arguments) for name in reports}
    )
    needs: list[Need] = []
    for name, report in reports.items():
        parser = click.Command(
            f"extract --for {name}", params=options[name], callback=lambda **values: values
        )
        values = parser.main(shares[name], standalone_mode=False)
        needs += read_report(report, {**values, "run": run, "steps": steps}).needs()
    return needs


def _shared_out(
    options: Mapping[str, Sequence[click.Parameter]], arguments: Sequence[str]
) -> dict[str, list[str]]:
    """The arguments by report: each gets the options that it has. Raises NoSuchOption for one that none has.

    An option is a switch in every report that has it, or in none: they are made from fields, and a test holds it.
    """
    shares: dict[str, list[str]] = {name: [] for name in options}
    takers: dict[str, list[str]] = {}
    switches: set[str] = set()
    for name, of in options.items():
        for option in of:
            for flag in (*option.opts, *option.secondary_opts):
                takers.setdefault(flag, []).append(name)
                if isinstance(option, click.Option) and option.is_flag:
                    switches.add(flag)
    words = iter(arguments)
    for word in words:
        flag, joined, _ = word.partition("=")
        if not flag.startswith("-"):
            raise click.UsageError(f"with --for no dataset is named, and {word!r} follows no option")
        if flag not in takers:
            raise click.NoSuchOption(flag, possibilities=get_close_matches(flag, takers))
        given = [word] if joined or flag in switches else [word, *islice(words, 1)]
        for name in takers[flag]:
            shares[name] += given
    return shares

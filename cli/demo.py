"""`lakebed demo`: from nothing to charts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .options import threads_option

RUN = "demo"
_LEAD = (
    "A small transformer learned to look values up; every training step was recorded. What follows are queries over that "
    "lake: nothing here ran the model again."
)


@click.command(epilog="Example: lakebed demo --lake demo.lake --out demo-report")
@click.option(
    "--lake", "lake_uri", default="demo.lake", show_default=True, metavar="PATH|URI", help="The lake to make."
)
@click.option(
    "--out",
    default="demo-report",
    show_default=True,
    metavar="DIR",
    help="Folder for reports and index.html.",
)
@click.option("--config", default="demo", show_default=True, metavar="CONFIG", help="What to train.")
@click.option(
    "--num-steps", type=click.IntRange(1), help="Stop early, for a quick look [default: the config's]."
)
@threads_option
def demo(lake_uri: str, out: str, config: str, num_steps: int | None, threads: int | None) -> None:
    """Train the built-in run, record every step, extract, run every report, and open the result in a browser yourself.

    Takes under two minutes on two cores. Given again, it goes on where it was. The last line on stdout is one JSON object.
    """
    from ..extractors.probes import build_probe
    from ..extractors.threads import set_threads
    from ..extractors.training import load, train
    from ..lake import Lake
    from .progress import Bars

    set_threads(threads)
    loaded = load(config)
    clock: dict[str, float] = {}
    with Lake.open_or_create(lake_uri) as lake, Bars() as bars:
        with _timed(clock, "train"):
            result = train(lake, RUN, loaded, num_steps=num_steps, progress=bars)
        with _timed(clock, "extract"):
            build_probe(lake, RUN)
            build_probe(lake, RUN, "train-probe", ("train",))
            _extract(lake, bars)
        with _timed(clock, "reports"):
            reports = _run_reports(lake_uri, _last_step(lake), Path(out), bars)
        size = sum(row["bytes"] for row in lake.summary())
    accuracy = result.metrics.get("validation_iid", {}).get("answer_accuracy")
    index = _write_index(Path(out), lake_uri, accuracy, result.step, size, clock, reports)
    click.echo(
        f"validation answer accuracy {accuracy:.3f} after {result.step} steps" if accuracy is not None else ""
    )
    click.echo(f"lake {lake_uri}, {size / 1e6:.1f} MB")
    click.echo(f"open {index}")
    shown = {
        "accuracy": accuracy,
        "steps": result.step,
        "seconds": {name: round(of, 2) for name, of in clock.items()},
    }
    paths = {name: report["markdown"] for name, report in reports.items()}
    click.echo(
        json.dumps({**shown, "lake": lake_uri, "lake_bytes": size, "index": str(index), "reports": paths})
    )


@contextmanager
def _timed(clock: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    clock[phase] = time.perf_counter() - started


# Single steps that the reports on recorded updates look at.
_WINDOW = 48


def _steps(last: int) -> dict[str, str]:
    """Steps by what a report's `demo_steps` says: about ten checkpoints, and a window in which the first head forms."""
    start = max(0, min(last - _WINDOW, last * 34 // 100))
    return {
        "checkpoints": f"0:{last}:{max(1, -(-last // 10))},last",
        "window": f"{start}:{min(last, start + _WINDOW)}",
    }


def _report(name: str, last: int) -> Any:
    from ..queries.registry import load_report

    report = load_report(name)
    return report.parse({"run": RUN, "steps": _steps(last).get(report.demo_steps), **report.demo_options})


def _names() -> list[str]:
    """Reports that one run has an answer to."""
    from ..queries.registry import load_report, report_names

    return [name for name in report_names() if load_report(name).in_demo]


def _reports(last: int) -> list[Any]:
    return [_report(name, last) for name in _names()]


def _last_step(lake: Any) -> int:
    step: int = lake.table("steps", RUN).select("step").collect()["step"].max()
    return step


def _extract(lake: Any, bars: Any) -> None:
    from ..extractors.plan import extract
    from ..lake.datasets import SVD
    from ..lake.names import canonical_json

    last = _last_step(lake)
    reports = _reports(last)
    needs = {
        canonical_json([need.dataset, dict(need.parameters)]): need
        for report in reports
        for need in report.needs()
        if report.demo_steps == "states"
    }
    # About fifty points for the charts of weights, half as many for those of forward passes; steps between anchors are
    # replayed. A report takes the steps at which everything it needs is there.
    stride = max(1, -(-last // 50))
    of_weights = [need for need in needs.values() if need.dataset == SVD]
    of_passes = [need for need in needs.values() if need not in of_weights]
    extract(lake, RUN, of_weights, f"0:{last}:{stride},last", progress=bars)
    extract(lake, RUN, of_passes, f"0:{last}:{2 * stride},last", progress=bars)
    for spacing, steps in _steps(last).items():
        updates = [need for report in reports if report.demo_steps == spacing for need in report.needs()]
        extract(lake, RUN, updates, steps, progress=bars)


def _run_reports(lake_uri: str, last: int, out: Path, bars: Any) -> dict[str, dict[str, Any]]:
    """Every report, several at a time: they share nothing but the lake."""
    import os
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    names = _names()
    bars.start("reports", len(names))
    written: dict[str, dict[str, Any]] = {}
    # Fresh processes: a fork of one in which torch has threads may hang.
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), get_context("spawn")) as pool:
        running = {pool.submit(_run_report, lake_uri, last, name, out): name for name in names}
        for done in as_completed(running):
            written[running[done]] = done.result()
            bars.advance(note=running[done])
    return {name: written[name] for name in names}


def _run_report(lake_uri: str, last: int, name: str, out: Path) -> dict[str, Any]:
    from ..lake import Lake
    from ..queries.run import run_report

    with Lake.open(lake_uri) as lake:
        return run_report(
            lake, _report(name, last), out / name, overwrite=True, chart_formats=("svg", "html")
        )


def _write_index(
    out: Path,
    lake_uri: str,
    accuracy: float | None,
    steps: int,
    size: int,
    clock: dict[str, float],
    reports: dict[str, dict[str, Any]],
) -> Path:
    from ..queries.index import write_index

    facts = {
        "validation answer accuracy": "unknown" if accuracy is None else f"{accuracy:.3f}",
        "training steps, all recorded": f"{steps:,}",
        f"lake: {lake_uri}": f"{size / 1e6:.1f} MB",
        "seconds in all": f"{sum(clock.values()):.0f}",
    }
    index = out / "index.html"
    write_index(
        index, "How a small transformer learned to look values up", _LEAD, facts, list(reports.values())
    )
    return index

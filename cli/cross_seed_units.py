"""Units of the cross-seed pipeline that write reports: each in its folder, whole or not at all, with a stamp beside it.

The stamp (`pipeline.json`) holds what the report was made from, by hash, and the hash of its files. By it a pipeline that
was stopped knows what is done, and a report of another seed, or one that was changed, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import LakebedError
from ..extractors.progress import Progress
from ..lake import Lake, Unit
from ..lake.datasets import CROSS_SEED_UPDATES, TRACE
from ..lake.errors import MissingData
from ..lake.names import content_hash, spec_id
from ..lake.steps import summarize_steps
from ..queries.output import OutputExists
from .cross_seed_plan import ADAM, SCAN, CrossSeed

STAMP = "pipeline.json"


class ForeignReport(LakebedError):
    """A report that was made from another seed's run, or otherwise than it is asked for, or was changed since."""


class TraceNotFound(LakebedError):
    """Stage adam without the recorded steps that stage trace-adam makes."""


# -- what a report is made from ------------------------------------------------------------------------------


def made_from(lake: Lake, report: str, options: Mapping[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    """What decides a report of a seed's run: the run's configuration, its states at `steps`, the probe, the options."""
    run = str(options["run"])
    lake.require_run(run)
    (config,) = lake.table("runs", run).collect()["config_hash"].to_list() or [None]
    states = dict(lake.table("steps", run).select("step", "sha256").collect().iter_rows())
    absent = [step for step in steps if step not in states]
    if absent:
        raise MissingData(
            f"run {run!r} has no checkpoint at steps {summarize_steps(absent)}: run stage trace-scan of the pipeline first"
        )
    probes = lake.table("probes", run).collect().to_dicts()
    probe = next((row["sha256"] for row in probes if row["probe"] == options["probe"]), None)
    plain = {name: list(of) if isinstance(of, tuple) else of for name, of in options.items()}
    return {
        "report": report,
        "run": run,
        "config": config,
        "states": content_hash({"states": [states[step] for step in steps]}),
        "probe": probe,
        "options": content_hash(plain),
    }


def is_made(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether the report stands in its folder, made from these inputs and unchanged."""
    try:
        check_stamp(folder, inputs)
    except (ForeignReport, FileNotFoundError):
        return False
    return True


def check_stamp(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The report's own JSON. Raises FileNotFoundError if there is none, ForeignReport if it is not what it should be."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        files, held = dict(stamp["files"]), dict(stamp["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ForeignReport(
            f"{folder} has no readable {STAMP}, which says what a report was made from: run its stage again with --overwrite"
        ) from error
    differing = [name for name in inputs if held.get(name) != inputs[name]]
    if differing:
        shown = ", ".join(
            f"{name} {_short(held.get(name))}, not {_short(inputs[name])}" for name in differing
        )
        raise ForeignReport(
            f"{folder} is a report of something else ({shown}): run its stage again with --overwrite"
        )
    for name, digest in files.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ForeignReport(
                f"{folder / name} was changed or removed since the report was written: run its stage again with --overwrite"
            )
    report: dict[str, Any] = json.loads((folder / stamp["report"]).read_text(encoding="utf-8"))
    return report


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what stands ---------------------------------------------------------------------------------------------


def is_trained(lake: Lake, plan: CrossSeed, seed: int) -> bool:
    """Whether a seed's run has every checkpoint that is scanned, and its probe."""
    run = plan.run(seed)
    held = lake.table("steps", run).select("step").collect()["step"].to_list()
    probes = lake.table("probes", run).select("probe").collect()["probe"].to_list()
    return set(plan.scan_steps) <= set(held) and plan.probe in probes


def is_scanned(lake: Lake, plan: CrossSeed, seed: int, layer: int, head: int) -> bool:
    """Whether a head's scan report stands; MissingData where its run does not."""
    options = plan.scan_report(seed, layer, head)
    return is_made(plan.scan_folder(seed, layer, head), made_from(lake, SCAN, options, plan.scan_steps))


def unrecorded(lake: Lake, plan: CrossSeed, seed: int) -> list[int]:
    """Steps of the window that no recording holds."""
    run = plan.traced_run(seed)
    held = set(lake.dataset_steps(run, TRACE)) if run in lake.runs() else set()
    return [step for step in range(plan.adam_start + 1, plan.adam_end + 1) if step not in held]


# -- units ---------------------------------------------------------------------------------------------------


def scan_head(
    progress: Progress, plan: Mapping[str, Any], seed: int, layer: int, head: int, overwrite: bool
) -> str:
    """The scan report of one head of one seed."""
    asked = CrossSeed.from_json(plan)
    options = asked.scan_report(seed, layer, head)
    folder = asked.scan_folder(seed, layer, head)
    progress.start("report", 1)
    with Lake.open(asked.lake) as lake:
        write_report(lake, SCAN, options, folder, made_from(lake, SCAN, options, asked.scan_steps), overwrite)
    progress.advance()
    return str(folder)


def window_of_seed(
    progress: Progress,
    plan: Mapping[str, Any],
    seed: int,
    candidates: Sequence[tuple[str, int, int]],
    stages: Sequence[str],
) -> dict[str, Any]:
    """What stages trace-adam and adam make in the lake for a seed: the recorded steps, and what the reports of the
    candidates (label, layer, head) read, in one pass over them."""
    from ..extractors.seeds import extract_needs, plain_needs, record_window
    from ..queries.registry import load_report

    asked = CrossSeed.from_json(plan)
    run, into = asked.run(seed), asked.traced_run(seed)
    if "trace-adam" in stages:
        window = (asked.trace_from, asked.adam_start, asked.adam_end)
        record_window(progress, asked.lake, run, into, *window, asked.probe, asked.device)
    if "adam" not in stages:
        return {"run": into}
    reports = [load_report(ADAM).parse(asked.adam_report(seed, *of)) for _, *of in candidates]
    needs = plain_needs(need for report in reports for need in report.needs())
    return extract_needs(progress, asked.lake, into, needs, str(reports[0].steps), asked.device)


def attribute_head(
    progress: Progress, plan: Mapping[str, Any], seed: int, label: str, layer: int, head: int, overwrite: bool
) -> str:
    """The attribution report of one candidate of one seed, and its sums as rows of the seed's run."""
    asked = CrossSeed.from_json(plan)
    options = asked.adam_report(seed, layer, head)
    folder = asked.adam_folder(seed, layer, head, label)
    progress.start("report", 1)
    with Lake.open(asked.lake) as lake:
        inputs = made_from(lake, ADAM, options, [asked.adam_start])
        write_report(lake, ADAM, options, folder, inputs, overwrite)
        _keep_sums(lake, asked, seed, layer, head, check_stamp(folder, inputs), inputs)
    progress.advance()
    return str(folder)


def require_trace(lake: Lake, plan: CrossSeed, seed: int) -> None:
    """Raises TraceNotFound unless every step of the window was recorded."""
    run, absent = plan.traced_run(seed), unrecorded(lake, plan, seed)
    if absent:
        raise TraceNotFound(
            f"Recorded steps not found: run {run!r} in {lake.uri} has no steps {summarize_steps(absent)} of seed {seed}, "
            "which stage trace-adam records: add --stage trace-adam, with the same --adam-start-step and --adam-end-step"
        )


def is_attributed(lake: Lake, plan: CrossSeed, seed: int, label: str, layer: int, head: int) -> bool:
    """Whether a candidate has its report, and its sums their rows."""
    options = plan.adam_report(seed, layer, head)
    if str(options["run"]) not in lake.runs():
        return False
    try:
        inputs = made_from(lake, ADAM, options, [plan.adam_start])
    except MissingData:
        return False
    made = is_made(plan.adam_folder(seed, layer, head, label), inputs)
    return made and lake.find_receipt(_sums_unit(plan, seed, layer, head, inputs)) is not None


def _sums_unit(plan: CrossSeed, seed: int, layer: int, head: int, inputs: Mapping[str, Any]) -> Unit:
    parameters = plan.adam_parameters()
    name = f"{CROSS_SEED_UPDATES}-{spec_id(parameters)}-L{layer}H{head}"
    steps = (plan.adam_start, plan.adam_end)
    return Unit(CROSS_SEED_UPDATES, plan.run(seed), name, steps, parameters, inputs)


def _keep_sums(
    lake: Lake,
    plan: CrossSeed,
    seed: int,
    layer: int,
    head: int,
    report: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> None:
    """Rows of table cross_seed_updates, so that they stay when the recorded steps are dropped."""
    unit = _sums_unit(plan, seed, layer, head, inputs)
    if lake.find_receipt(unit) is not None:
        return
    (whole,) = report["summary"]["by_rank"]
    rows = [
        {
            "spec": unit.parameters["scan"],
            "layer": layer,
            "head": head,
            "adam_spec": spec_id(unit.parameters),
            "start_step": whole["start_step"],
            "end_step": whole["end_step"],
            "component": of["component"],
            "sum_delta": of["sum_delta"],
            "sum_actual_delta": whole["sum_actual_delta"],
            "sum_first_order_delta": whole["sum_predicted_delta"],
            "mean_cosine": of["mean_cosine"],
        }
        for of in report["summary"]["by_component"]
    ]
    with lake.unit(unit) as writer:
        writer.rows("cross_seed_updates", rows)


def write_report(
    lake: Lake,
    name: str,
    options: Mapping[str, Any],
    folder: Path,
    inputs: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Runs a report into its folder, unless it stands there; raises OutputExists where another does.

    Folder and stamp come into place together, so whoever is killed leaves a report or none.
    """
    from ..queries.registry import load_report
    from ..queries.run import run_report

    if is_made(folder, inputs):
        return
    if folder.exists() and not overwrite:
        raise OutputExists(
            f"Output directory already exists and is non-empty: {folder}, made otherwise than asked for now; add "
            "--overwrite or name another --out"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        printed = run_report(lake, load_report(name).parse(options), partial)
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        stamp = {"report": Path(printed["report"]).name, "inputs": dict(inputs), "files": files}
        (partial / STAMP).write_text(json.dumps(stamp, indent=2, sort_keys=True), encoding="utf-8")
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        _move(partial, folder, inputs)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path, inputs: Mapping[str, Any]) -> None:
    """Puts a report into place; of two drivers that made the same one, the first."""
    try:
        os.rename(partial, folder)
    except OSError as error:
        if not is_made(folder, inputs):
            raise OutputExists(f"cannot put the report into {folder}: {error.strerror}") from error

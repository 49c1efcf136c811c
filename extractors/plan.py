"""Plans what is missing and makes it: each state is read or replayed once, for every dataset that wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..lake import Lake, Unit, UnitWriter
from ..lake.axis import publish
from ..lake.compact import compact_many
from ..lake.datasets import OF_INTERVALS, RECORDED, Need, need_intervals, need_steps
from ..lake.errors import MissingData
from ..lake.names import spec_id
from ..lake.steps import select_steps, summarize_steps
from .dataset import Context, Extractor, build_extractor
from .forward import ForwardExtractor, ForwardPasses, require_device
from .interval import IntervalExtractor
from .progress import Progress, Silent
from .states import State


@dataclass
class ExtractionResult:
    """What an extraction did, by dataset: steps made now, steps that stood already; rows and bytes written."""

    run: str
    made: dict[str, list[int]] = field(default_factory=dict)
    standing: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0


@dataclass
class _Work:
    """One dataset of an extraction: its extractor, the steps asked of it, and those that are not there yet."""

    extractor: Extractor
    steps: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)


def extract(
    lake: Lake,
    run: str,
    needs: Sequence[Need],
    steps: str | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
) -> ExtractionResult:
    """Makes what is needed of a run at `steps` (default: the steps whose state is stored), where it is missing.

    Datasets of forward passes share one pass per step and batch, on `device`, of about `batch_size` tokens (default:
    what suits a processor's cache). A second call makes nothing; an interrupted one goes on. Raises UnknownName,
    MissingData for a missing probe, for steps the run does not have or that only a recording could have made,
    DeviceUnavailable, InputMismatch when a unit stands that was made from another state or probe.
    """
    progress = progress or Silent()
    context = Context(lake, run, require_device(device))
    reader = context.reader
    wanted = reader.anchors() if steps is None else select_steps(steps, reader.steps)
    reader.require(wanted)
    if not wanted:
        raise MissingData(f"run {run!r} has no steps {steps or ''}; it has {summarize_steps(reader.steps)}")
    _require_recorded(lake, run, needs)
    work = _plan(context, needs, wanted)
    intervals = _plan_intervals(context, needs, wanted)
    result = ExtractionResult(run)
    for of in work:
        result.made.setdefault(of.extractor.name, [])
        standing = len(of.steps) - len(of.missing)
        result.standing[of.extractor.name] = result.standing.get(of.extractor.name, 0) + standing
    todo = sorted({step for of in work for step in of.missing})
    if work:
        progress.start(f"extracting {', '.join(result.made)}", len(todo))
    moments = any(of.extractor.needs_moments for of in work if of.missing)
    try:
        with _forward_passes(context, work, device, batch_size) as passes:
            for state in reader.iterate(todo, moments=moments):
                _make_step(context, state, work, passes, result)
                progress.advance(note=f"step {state.step}")
    finally:
        if todo:
            publish(lake, run)
    if intervals:
        _make_intervals(context, intervals, len(need_intervals(wanted)), result, progress, device)
    compact_many(
        lake, run, [name for name, made in result.made.items() if made], partial(_compacting, progress)
    )
    return result


def _compacting(progress: Progress, files: int) -> Callable[[int], None]:
    progress.start("compacting", files)
    return progress.advance


def _plan(context: Context, needs: Sequence[Need], wanted: Sequence[int]) -> list[_Work]:
    """What to make where; needs for the same dataset with the same parameters are one."""
    work: dict[tuple[str, str], _Work] = {}
    for need in needs:
        if need.dataset in RECORDED or need.dataset in OF_INTERVALS:
            continue
        extractor = build_extractor(need.dataset, need.parameters)
        of = work.setdefault((need.dataset, spec_id(dict(extractor.parameters()))), _Work(extractor))
        of.steps.update(need_steps(need, wanted))
    context.lake.receipts.refresh(context.run)
    for of in work.values():
        inputs = of.extractor.inputs(context)
        of.missing = {
            step
            for step in of.steps
            if of.extractor.wants(context, step)
            and context.lake.find_receipt(_unit(context, of.extractor, inputs, step)) is None
        }
    return list(work.values())


def _plan_intervals(
    context: Context, needs: Sequence[Need], wanted: Sequence[int]
) -> dict[tuple[str, str], tuple[IntervalExtractor, set[tuple[int, int]]]]:
    """Datasets of intervals, and which of those between neighbouring wanted steps they lack."""
    asked = [need for need in needs if need.dataset in OF_INTERVALS]
    ends = need_intervals(wanted)
    if asked and not ends:
        raise MissingData(
            f"{asked[0].dataset} of run {context.run!r} are made between two steps, and --steps leaves "
            f"{summarize_steps(wanted)}: name a later one too"
        )
    found: dict[tuple[str, str], tuple[IntervalExtractor, set[tuple[int, int]]]] = {}
    for need in asked:
        extractor = build_extractor(need.dataset, need.parameters)
        assert isinstance(extractor, IntervalExtractor)
        inputs = extractor.inputs(context)
        missing = {
            of for of in ends if context.lake.find_receipt(_unit(context, extractor, inputs, *of)) is None
        }
        found[need.dataset, spec_id(dict(extractor.parameters()))] = (extractor, missing)
    return found


def _make_intervals(
    context: Context,
    work: Mapping[tuple[str, str], tuple[IntervalExtractor, set[tuple[int, int]]]],
    asked: int,
    result: ExtractionResult,
    progress: Progress,
    device: str,
) -> None:
    """Makes what is missing; the steps a result counts are those that intervals lead to."""
    from .intervals import Intervals, IntervalWork

    for extractor, missing in work.values():
        result.made.setdefault(extractor.name, [])
        result.standing[extractor.name] = result.standing.get(extractor.name, 0) + asked - len(missing)
    if any(missing for _, missing in work.values()):
        loop = Intervals(context, [IntervalWork(*of) for of in work.values()], device)
        loop.run(progress, lambda extractor, ends, fill: _write(context, extractor, ends, result, fill))


def _forward_passes(
    context: Context, work: Sequence[_Work], device: str, batch_size: int | None
) -> AbstractContextManager[ForwardPasses | None]:
    if not any(isinstance(of.extractor, ForwardExtractor) for of in work):
        return nullcontext()
    extractors = [of.extractor for of in work if isinstance(of.extractor, ForwardExtractor) and of.missing]
    return ForwardPasses(context, extractors, device, batch_size)


def _make_step(
    context: Context,
    state: State,
    work: Sequence[_Work],
    passes: ForwardPasses | None,
    result: ExtractionResult,
) -> None:
    due = [of.extractor for of in work if state.step in of.missing]
    for extractor in due:
        if not isinstance(extractor, ForwardExtractor):
            _write(context, extractor, (state.step,), result, partial(extractor.extract, context, state))
    of_passes = [extractor for extractor in due if isinstance(extractor, ForwardExtractor)]
    if passes is not None and of_passes:
        step = state.step
        passes.run(state, of_passes, lambda of, fill: _write(context, of, (step,), result, fill))


def _write(
    context: Context,
    extractor: Extractor,
    steps: tuple[int, ...],
    result: ExtractionResult,
    fill: Callable[[UnitWriter], None],
) -> None:
    """Commits one unit: of a step, or of an interval."""
    unit = _unit(context, extractor, extractor.inputs(context), *steps)
    with context.lake.unit(unit) as writer:
        fill(writer)
    receipt = context.lake.receipts.get(context.run, writer.unit.name)
    if writer.committed and receipt is not None:
        result.rows += receipt.rows
        result.bytes += receipt.bytes
    result.made[extractor.name].append(steps[-1])


def _unit(context: Context, extractor: Extractor, inputs: Mapping[str, Any], *steps: int) -> Unit:
    parameters = dict(extractor.parameters())
    spec = spec_id(parameters)
    name = "-".join([extractor.name, *([spec] if spec else []), *(f"{step:08d}" for step in steps)])
    states = [context.reader.identity(step) for step in steps]
    made_from = {"state": states[0], **({"target": states[1]} if len(states) > 1 else {}), **inputs}
    return Unit(extractor.name, context.run, name, steps, parameters, made_from, extractor.version)


def _require_recorded(lake: Lake, run: str, needs: Iterable[Need]) -> None:
    for need in needs:
        if need.dataset in RECORDED and not lake.dataset_steps(run, need.dataset, need.parameters):
            raise MissingData(
                f"{need.dataset} of run {run!r} is recorded while training, never extracted afterwards: record steps with "
                f"`lakebed trace --lake {lake.uri} --run {run} --from-step N --num-steps N`"
            )

"""Makes what a plan found missing: each state is read or replayed once, for every dataset that wants it.

`make_piece` does so in a worker, for one piece of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..lake import Lake, Unit, UnitWriter
from ..lake.names import spec_id
from .dataset import Context, Extractor, build_extractor
from .forward import ForwardExtractor, ForwardPasses, require_device
from .interval import IntervalExtractor
from .progress import Progress
from .states import State

Ends = tuple[int, ...]


@dataclass
class ExtractionResult:
    """What an extraction did, by dataset: steps made now, steps that stood already; rows and bytes written."""

    run: str
    made: dict[str, list[int]] = field(default_factory=dict)
    standing: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0


@dataclass
class Making:
    """One dataset of an extraction: its extractor, the parameters it is built from, and what is not there yet: `(step,)`,
    or `(source, target)` of an interval."""

    extractor: Extractor
    parameters: Mapping[str, Any]
    missing: set[Ends] = field(default_factory=set)

    @property
    def of_intervals(self) -> bool:
        """Whether it is made of intervals, not of steps."""
        return isinstance(self.extractor, IntervalExtractor)

    def lack(self, context: Context, asked: set[Ends]) -> None:
        """Sets `missing` to those of `asked` that no receipt names. Raises InputMismatch."""
        inputs = self.extractor.inputs(context)
        self.missing = {
            ends
            for ends in asked
            if (self.of_intervals or self.extractor.wants(context, ends[0]))
            and context.lake.find_receipt(unit_of(context, self.extractor, inputs, *ends)) is None
        }


def make(
    context: Context,
    work: Sequence[Making],
    result: ExtractionResult,
    progress: Progress,
    device: str,
    batch_size: int | None,
) -> None:
    """Makes what is missing: steps, then intervals. The steps a result counts are those that intervals lead to."""
    of_steps = [of for of in work if not of.of_intervals]
    if of_steps:
        _make_steps(context, of_steps, result, progress, device, batch_size)
    _make_intervals(context, [of for of in work if of.of_intervals], result, progress, device)


def make_piece(
    progress: Progress,
    lake: str,
    run: str,
    work: Sequence[tuple[str, Mapping[str, Any], Sequence[Sequence[int]]]],
    device: str,
    batch_size: int | None,
) -> None:
    """Makes one piece of a plan in a worker: (dataset, parameters, steps or ends of intervals), as far as it is missing."""
    with Lake.open(lake) as opened:
        context = Context(opened, run, require_device(device))
        opened.receipts.refresh(run)
        piece = []
        for dataset, parameters, asked in work:
            made = Making(build_extractor(dataset, parameters), parameters)
            made.lack(context, {tuple(ends) for ends in asked})
            piece.append(made)
        result = ExtractionResult(run, {of.extractor.name: [] for of in piece})
        make(context, piece, result, progress, device, batch_size)


def unit_of(context: Context, extractor: Extractor, inputs: Mapping[str, Any], *steps: int) -> Unit:
    """The unit of a step, or of an interval."""
    parameters = dict(extractor.parameters())
    spec = spec_id(parameters)
    name = "-".join([extractor.name, *([spec] if spec else []), *(f"{step:08d}" for step in steps)])
    states = [context.reader.identity(step) for step in steps]
    made_from = {"state": states[0], **({"target": states[1]} if len(states) > 1 else {}), **inputs}
    return Unit(extractor.name, context.run, name, steps, parameters, made_from, extractor.version)


def _make_steps(
    context: Context,
    work: Sequence[Making],
    result: ExtractionResult,
    progress: Progress,
    device: str,
    batch_size: int | None,
) -> None:
    todo = sorted({ends[0] for of in work for ends in of.missing})
    progress.start(f"extracting {', '.join(dict.fromkeys(of.extractor.name for of in work))}", len(todo))
    moments = any(of.extractor.needs_moments for of in work if of.missing)
    with _forward_passes(context, work, device, batch_size) as passes:
        for state in context.reader.iterate(todo, moments=moments):
            _make_step(context, state, work, passes, result)
            progress.advance(note=f"step {state.step}")


def _forward_passes(
    context: Context, work: Sequence[Making], device: str, batch_size: int | None
) -> AbstractContextManager[ForwardPasses | None]:
    if not any(isinstance(of.extractor, ForwardExtractor) for of in work):
        return nullcontext()
    extractors = [of.extractor for of in work if isinstance(of.extractor, ForwardExtractor) and of.missing]
    return ForwardPasses(context, extractors, device, batch_size)


def _make_step(
    context: Context,
    state: State,
    work: Sequence[Making],
    passes: ForwardPasses | None,
    result: ExtractionResult,
) -> None:
    due = [of.extractor for of in work if (state.step,) in of.missing]
    for extractor in due:
        if not isinstance(extractor, ForwardExtractor):
            _write(context, extractor, (state.step,), result, partial(extractor.extract, context, state))
    of_passes = [extractor for extractor in due if isinstance(extractor, ForwardExtractor)]
    if passes is not None and of_passes:
        step = state.step
        passes.run(state, of_passes, lambda of, fill: _write(context, of, (step,), result, fill))


def _make_intervals(
    context: Context,
    work: Sequence[Making],
    result: ExtractionResult,
    progress: Progress,
    device: str,
) -> None:
    if not any(of.missing for of in work):
        return
    from .intervals import Intervals, IntervalWork

    due = []
    for of in work:
        assert isinstance(of.extractor, IntervalExtractor)
        due.append(IntervalWork(of.extractor, {(source, target) for source, target in of.missing}))
    loop = Intervals(context, due, device)
    loop.run(progress, lambda extractor, ends, fill: _write(context, extractor, ends, result, fill))


def _write(
    context: Context,
    extractor: Extractor,
    steps: Ends,
    result: ExtractionResult,
    fill: Callable[[UnitWriter], None],
) -> None:
    """Commits one unit: of a step, or of an interval."""
    unit = unit_of(context, extractor, extractor.inputs(context), *steps)
    with context.lake.unit(unit) as writer:
        fill(writer)
    receipt = context.lake.receipts.get(context.run, writer.unit.name)
    if writer.committed and receipt is not None:
        result.rows += receipt.rows
        result.bytes += receipt.bytes
    result.made[extractor.name].append(steps[-1])

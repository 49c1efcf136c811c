"""Plans what is missing and makes it: each state is read or replayed once, for every dataset that wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..lake import Lake, Unit
from ..lake.axis import publish
from ..lake.datasets import RECORDED, Need
from ..lake.errors import MissingData
from ..lake.names import spec_id
from ..lake.steps import select_steps, summarize_steps
from .dataset import Context, Extractor, build_extractor
from .progress import Progress, Silent


@dataclass
class ExtractionResult:
    """What an extraction did, by dataset: steps made now, steps that stood already; rows and bytes written."""

    run: str
    made: dict[str, list[int]] = field(default_factory=dict)
    standing: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0


def extract(
    lake: Lake,
    run: str,
    needs: Sequence[Need],
    steps: str | None = None,
    progress: Progress | None = None,
) -> ExtractionResult:
    """Makes what is needed of a run at `steps` (default: the steps whose state is stored), where it is missing.

    A second call makes nothing; an interrupted one goes on. Raises UnknownName, MissingData for steps the run does not
    have or that only a recording could have made, InputMismatch when a unit stands that was made from another state.
    """
    progress = progress or Silent()
    context = Context(lake, run)
    reader = context.reader
    wanted = reader.anchors() if steps is None else select_steps(steps, reader.steps)
    reader.require(wanted)
    if not wanted:
        raise MissingData(f"run {run!r} has no steps {steps or ''}; it has {summarize_steps(reader.steps)}")
    _require_recorded(lake, run, needs)
    extractors = [
        build_extractor(need.dataset, need.parameters) for need in needs if need.dataset not in RECORDED
    ]
    missing = {extractor: _missing(context, extractor, wanted) for extractor in extractors}
    result = ExtractionResult(run)
    for extractor in extractors:
        result.made[extractor.name] = []
        result.standing[extractor.name] = len(wanted) - len(missing[extractor])
    todo = sorted({step for of in missing.values() for step in of})
    progress.start(f"extracting {', '.join(extractor.name for extractor in extractors)}", len(todo))
    moments = any(extractor.needs_moments for extractor in extractors)
    try:
        for state in reader.iterate(todo, moments=moments):
            for extractor in extractors:
                if state.step in missing[extractor]:
                    _make(context, extractor, state, result)
            progress.advance(note=f"step {state.step}")
    finally:
        if todo:
            publish(lake, run)
    return result


def _make(context: Context, extractor: Extractor, state: Any, result: ExtractionResult) -> None:
    with context.lake.unit(_unit(context, extractor, state.step)) as writer:
        extractor.extract(context, state, writer)
    receipt = context.lake.receipts.get(context.run, writer.unit.name)
    if writer.committed and receipt is not None:
        result.rows += receipt.rows
        result.bytes += receipt.bytes
    result.made[extractor.name].append(state.step)


def _missing(context: Context, extractor: Extractor, steps: Sequence[int]) -> set[int]:
    context.lake.receipts.refresh(context.run)
    return {
        step
        for step in steps
        if extractor.wants(context, step)
        and context.lake.find_receipt(_unit(context, extractor, step)) is None
    }


def _unit(context: Context, extractor: Extractor, step: int) -> Unit:
    parameters = dict(extractor.parameters())
    spec = spec_id(parameters)
    name = f"{extractor.name}-{spec}-{step:08d}" if spec else f"{extractor.name}-{step:08d}"
    inputs = {"state": context.reader.identity(step)}
    return Unit(extractor.name, context.run, name, (step,), parameters, inputs, extractor.version)


def _require_recorded(lake: Lake, run: str, needs: Iterable[Need]) -> None:
    for need in needs:
        if need.dataset in RECORDED and not lake.dataset_steps(run, need.dataset, need.parameters):
            raise MissingData(
                f"{need.dataset} of run {run!r} is recorded while training, never extracted afterwards: record steps with "
                f"`lakebed trace --lake {lake.uri} --run {run} --from-step N --num-steps N`"
            )

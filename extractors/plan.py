"""Plans what is missing and has it made: here, or in pieces by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..lake import Lake
from ..lake.axis import publish
from ..lake.compact import compact_many
from ..lake.datasets import OF_INTERVALS, RECORDED, Need, need_intervals, need_steps
from ..lake.errors import MissingData
from ..lake.names import spec_id
from ..lake.steps import select_steps, summarize_steps
from .dataset import Context, build_extractor
from .forward import require_device
from .making import Ends, ExtractionResult, Making, make
from .progress import Progress, Silent

if TYPE_CHECKING:
    from .executor import Executor


def extract(
    lake: Lake,
    run: str,
    needs: Sequence[Need],
    steps: str | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    executor: Executor | None = None,
) -> ExtractionResult:
    """Makes what is needed of a run at `steps` (default: the steps whose state is stored), where it is missing.

    Datasets of forward passes share one pass per step and batch, on `device`, of about `batch_size` tokens (default:
    what suits a processor's cache). A second call makes nothing; an interrupted one goes on. Raises UnknownName,
    MissingData for a missing probe, for steps the run does not have or that only a recording could have made,
    DeviceUnavailable, InputMismatch when a unit stands that was made from another state or probe.

    With an `executor` the steps are cut into contiguous pieces, which its workers do; rows and bits are the same. Raises
    UnitFailed for what went wrong in a piece.
    """
    progress = progress or Silent()
    context = Context(lake, run, device if executor else require_device(device))
    reader = context.reader
    wanted = reader.anchors() if steps is None else select_steps(steps, reader.steps)
    reader.require(wanted)
    if not wanted:
        raise MissingData(f"run {run!r} has no steps {steps or ''}; it has {summarize_steps(reader.steps)}")
    _require_recorded(lake, run, needs)
    result = ExtractionResult(run)
    work = _plan(context, needs, wanted, result)
    try:
        if executor is None:
            make(context, work, result, progress, device, batch_size)
        else:
            from .pieces import make_in_pieces

            make_in_pieces(context, work, result, progress, device, batch_size, executor)
    finally:
        if any(of.missing and not of.of_intervals for of in work):
            publish(lake, run)
    compact_many(
        lake, run, [name for name, made in result.made.items() if made], partial(_compacting, progress)
    )
    return result


def _compacting(progress: Progress, files: int) -> Callable[[int], None]:
    progress.start("compacting", files)
    return progress.advance


def _plan(
    context: Context, needs: Sequence[Need], wanted: Sequence[int], result: ExtractionResult
) -> list[Making]:
    """What to make where; needs for the same dataset with the same parameters are one. Counts what stands."""
    between = need_intervals(wanted)
    work: dict[tuple[str, str], tuple[Making, set[Ends]]] = {}
    for need in needs:
        if need.dataset in RECORDED:
            continue
        if need.dataset in OF_INTERVALS and not between:
            raise MissingData(
                f"{need.dataset} of run {context.run!r} are made between two steps, and --steps leaves "
                f"{summarize_steps(wanted)}: name a later one too"
            )
        extractor = build_extractor(need.dataset, need.parameters)
        key = need.dataset, spec_id(dict(extractor.parameters()))
        _, asked = work.setdefault(key, (Making(extractor, need.parameters), set()))
        asked.update(
            between if need.dataset in OF_INTERVALS else ((step,) for step in need_steps(need, wanted))
        )
    context.lake.receipts.refresh(context.run)
    # Datasets of steps come first.
    for of, asked in sorted(work.values(), key=lambda item: item[0].of_intervals):
        of.lack(context, asked)
        name = of.extractor.name
        result.made.setdefault(name, [])
        result.standing[name] = result.standing.get(name, 0) + len(asked) - len(of.missing)
    return [of for of, _ in work.values()]


def _require_recorded(lake: Lake, run: str, needs: Iterable[Need]) -> None:
    for need in needs:
        if need.dataset in RECORDED and not lake.dataset_steps(run, need.dataset, need.parameters):
            raise MissingData(
                f"{need.dataset} of run {run!r} is recorded while training, never extracted afterwards: record steps with "
                f"`lakebed trace --lake {lake.uri} --run {run} --from-step N --num-steps N`"
            )

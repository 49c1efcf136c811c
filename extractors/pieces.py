"""An extraction cut into pieces that workers do: contiguous steps or intervals of all datasets that lack them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import TypeVar

from ..lake.errors import LakebedError
from .dataset import Context
from .executor import Executor, Work
from .making import Ends, ExtractionResult, Making, make_piece, unit_of
from .progress import Progress

Step = TypeVar("Step")

# Several pieces for each worker, so that none waits long for the last; none so short that its start weighs.
_EACH, _SHORTEST = 4, 8


class NotShared(LakebedError):
    """Workers finished, and what they made is not in the lake of the process that asked for it."""


def cut(steps: Sequence[Step], pieces: int, anchor: Callable[[Step], Hashable]) -> list[list[Step]]:
    """At most `pieces` contiguous runs of `steps`, of about equal length.

    A run begins where `anchor` changes if that is at most half a run away: what begins between two anchors repeats the
    replay from the first of them.
    """
    size = len(steps) / max(1, min(pieces, len(steps)))
    changes = [at for at in range(1, len(steps)) if anchor(steps[at]) != anchor(steps[at - 1])]
    cuts = {0, len(steps)}
    for piece in range(1, min(pieces, len(steps))):
        even = round(piece * size)
        near = min(changes, key=lambda at: abs(at - even), default=even)
        cuts.add(near if abs(near - even) <= size / 2 else even)
    bounds = sorted(cuts)
    return [list(steps[start:stop]) for start, stop in pairwise(bounds)]


def make_in_pieces(
    context: Context,
    work: Sequence[Making],
    result: ExtractionResult,
    progress: Progress,
    device: str,
    batch_size: int | None,
    executor: Executor,
) -> None:
    """Has `work` made by an executor. Raises UnitFailed, and NotShared where workers see another lake at the same path."""
    units: list[Work] = []
    for of_intervals in (False, True):
        part = [of for of in work if of.of_intervals == of_intervals]
        todo = sorted({ends for of in part for ends in of.missing})
        if not todo:
            continue
        count = max(executor.workers, min(_EACH * executor.workers, len(todo) // _SHORTEST))
        for piece in cut(todo, count, lambda ends: context.reader.anchor(ends[0])):
            units.append(_unit_of_work(context, part, piece, device, batch_size))
    progress.start(f"extracting {', '.join(result.made)}", sum(unit.parts for unit in units))
    if units:
        executor.run(units, progress)
        _count(context, work, result)


def _unit_of_work(
    context: Context, work: Sequence[Making], piece: Sequence[Ends], device: str, batch_size: int | None
) -> Work:
    asked = [
        (of.extractor.name, dict(of.parameters), [ends for ends in piece if ends in of.missing])
        for of in work
        if not of.missing.isdisjoint(piece)
    ]
    first, last = piece[0][0], piece[-1][-1]
    what = "intervals" if work[0].of_intervals else "steps"
    return Work.of(
        f"{what} {first} to {last}" if first != last else f"step {first}",
        make_piece,
        len(piece),
        lake=context.lake.storage.path(""),
        run=context.run,
        work=asked,
        device=device,
        batch_size=batch_size,
    )


def _count(context: Context, work: Sequence[Making], result: ExtractionResult) -> None:
    """Counts what was missing by its receipts: so a worker that died after it committed something counts too."""
    lake = context.lake
    lake.receipts.refresh(context.run)
    for of in work:
        inputs = of.extractor.inputs(context)
        for ends in of.missing:
            receipt = lake.find_receipt(unit_of(context, of.extractor, inputs, *ends))
            if receipt is None:
                raise NotShared(
                    f"workers are done, and {of.extractor.name} of step {ends[-1]} is not in {lake.uri}: they must see the "
                    "same lake, on a disk that all machines share or at a URI such as s3://bucket/my.lake"
                )
            result.rows += receipt.rows
            result.bytes += receipt.bytes
            result.made[of.extractor.name].append(ends[-1])
    for made in result.made.values():
        made.sort()

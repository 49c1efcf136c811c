"""The loop over intervals: every step is read or replayed once, and goes through the model once, as the target of one
interval and the source of the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.scalars import Passes
from ..engine.scalars.measure import PairBatch, Task, combine, measure
from ..engine.slices import SliceSums
from ..lake import UnitWriter
from .dataset import Context
from .forward import probe_of, require_device
from .interval import Interval, IntervalExtractor, Observed, ObservingExtractor, Source
from .pair_sets import PairSelection, PairSet, load_pairs, side_probe
from .probe_batches import ProbeData
from .progress import Progress
from .scalar_changes import Change, ScalarChangesExtractor
from .states import State
from .threads import thread_pool

Ends = tuple[int, int]
Commit = Callable[[IntervalExtractor, Ends, Callable[[UnitWriter], None]], None]


@dataclass
class IntervalWork:
    """One dataset of intervals, and the intervals of it that are not there yet."""

    extractor: IntervalExtractor
    missing: set[Ends] = field(default_factory=set)


class Intervals:
    """Makes intervals of one run."""

    def __init__(self, context: Context, work: Sequence[IntervalWork], device: str = "cpu") -> None:
        self._context, self._reader = context, context.reader
        self._work = [of for of in work if of.missing]
        self._ends = sorted({ends for of in self._work for ends in of.missing})
        adapter = context.adapter()
        shapes = adapter.parameter_shapes(self._reader.parameters)
        self._sums = SliceSums(shapes, adapter.slices(shapes))
        self._device = require_device(device)
        self._groups = _groups(context, self._work, self._device)

    def run(self, progress: Progress, commit: Commit) -> None:
        """Makes everything that is missing, in the order of target steps."""
        progress.start("attributing updates", len(self._ends))
        recorded = [
            target
            for source, target in self._ends
            if target == source + 1
            and self._reader.is_recorded(source, target)
            and any(of.extractor.needs_moments and (source, target) in of.missing for of in self._work)
        ]
        last_use = dict(self._ends)  # of several targets the last, since they are in order
        steps = {step for ends in self._ends for step in ends}
        sources: dict[int, Source] = {}
        with _OneAhead() as background:
            for state in self._reader.iterate(steps, moments=bool(recorded)):
                update = None
                if state.step in recorded:
                    # A stored state was read, not stepped to.
                    update = state.update or next(self._reader.updates([state.step]))
                closing = [sources[source] for source, target in self._ends if target == state.step]
                here = self._at(state, closing, state.step in last_use)
                reached = {name: weight.detach() for name, weight in here.weights.items()}
                for source in closing:
                    held = update if source.step == state.step - 1 else None
                    interval = Interval(source, state.step, reached, held, self._sums)
                    self._attribute(interval, here)
                    background.do(partial(self._write, interval, commit, progress))
                sources[state.step] = here
                sources = {step: of for step, of in sources.items() if last_use.get(step, -1) > state.step}

    def _at(self, state: State, closing: Sequence[Source], opening: bool) -> Source:
        """Puts the pairs through the model of one step: as the target of open intervals, and as the source of new ones."""
        weights = {
            name: weight.detach().float().clone().requires_grad_(opening)
            for name, weight in state.weights.items()
        }
        exp_avg, exp_avg_sq = (
            {name: of.clone() for name, of in held.items()} if opening else {}
            for held in (state.exp_avg, state.exp_avg_sq)
        )
        here = Source(state.step, weights, exp_avg, exp_avg_sq, dict(state.step_counts))
        for group in self._groups:
            tasks = []
            for of in group.work:
                tasks += self._tasks(group, of, here, closing)
            watched = [of for of in group.watchers if any(state.step in ends for ends in of.missing)]
            if tasks or watched:
                self._measure(group, weights, tasks, [of.keep_in(here.observed) for of in watched])
        for work in self._work:
            if any(source == state.step for source, _ in work.missing):
                work.extractor.open(self._context, here, self._device)
        return here

    @staticmethod
    def _tasks(group: _Group, of: _Scalar, here: Source, closing: Sequence[Source]) -> list[Task]:
        """What to evaluate of one scalar: with what was frozen at each open interval's source, and frozen here."""
        key, scalar, tasks = of.key, of.extractor.scalar, []
        cells = group.finest if of.extractor.differentiates else 0
        if any(source == here.step for source, _ in of.missing):
            tasks.append(here.tasks.setdefault(key, Task(scalar, cells=cells)))
        for source in closing:
            if (source.step, here.step) in of.missing:
                frozen = source.tasks[key].frozen
                if tasks and not cells and frozen is not None and frozen.empty:
                    # With nothing to freeze, what the next interval begins with is what this one ends with.
                    here.targets[source.step, key] = tasks[0]
                else:
                    task = here.targets[source.step, key] = Task(scalar, frozen)
                    tasks.append(task)
        return tasks

    def _measure(
        self,
        group: _Group,
        weights: Mapping[str, Tensor],
        tasks: Sequence[Task],
        observers: Sequence[Callable[[Passes], None]] = (),
    ) -> None:
        model = self._context.adapter().load_model(weights, group.device)
        for data in group.probes.values():
            data.require_fit(model)
        measure(model, weights, group.batches, tasks, observers)

    def _attribute(self, interval: Interval, target: Source) -> None:
        """Puts together what happened to every scalar."""
        ends = (interval.source_step, interval.target_step)
        for group in self._groups:
            due = [of for of in group.work if ends in of.missing]
            paths = self._along_the_path(interval, group, due)
            for of in due:
                source = interval.source.tasks[of.key]
                gradients = {"source": group.cell_means(source)} if of.extractor.differentiates else {}
                if of.key in paths:
                    gradients["path"] = paths[of.key]
                interval.changes[of.key] = Change(
                    group.pairs, source, target.targets[ends[0], of.key], gradients
                )
            for watcher in group.watchers:
                if ends in watcher.missing:
                    seen = (of.observed[watcher.key] for of in (interval.source, target))
                    interval.observed[watcher.key] = Observed(group.pairs, *seen)

    def _write(self, interval: Interval, commit: Commit, progress: Progress) -> None:
        """Splits the update, multiplies, and commits every dataset that lacks the interval."""
        ends = (interval.source_step, interval.target_step)
        for work in self._work:
            if ends in work.missing:
                commit(work.extractor, ends, partial(work.extractor.write, self._context, interval=interval))
        progress.advance(note=f"steps {ends[0]} to {ends[1]}")

    def _along_the_path(
        self, interval: Interval, group: _Group, due: Sequence[_Scalar]
    ) -> dict[str, dict[str, Tensor]]:
        """By extractor key, the mean over the straight path of the gradient of every cell's mean: Gauss-Legendre points."""
        found: dict[str, dict[str, Tensor]] = {}
        for count in {of.extractor.integrate for of in due} - {0}:
            wanted = [of for of in due if of.extractor.integrate == count]
            nodes, shares = np.polynomial.legendre.leggauss(count)
            for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
                weights = {
                    name: torch.lerp(
                        before.detach(), interval.target_weights[name], float(node)
                    ).requires_grad_()
                    for name, before in interval.source.weights.items()
                }
                tasks = {
                    of.key: Task(
                        of.extractor.scalar, interval.source.tasks[of.key].frozen, cells=group.finest
                    )
                    for of in wanted
                }
                self._measure(group, weights, list(tasks.values()))
                for key, task in tasks.items():
                    mean = found.setdefault(key, {})
                    for name, of in group.cell_means(task).items():
                        mean[name] = mean[name].add_(of, alpha=share) if name in mean else of * share
        return found


class _OneAhead:
    """One job in the background while the next is prepared: splitting an update and writing it takes as long as a pass.

    Its thread computes on one core, and leaves the others to the passes: what it does is made of small pieces, for which
    threads that wait for each other are slower than one, as soon as anything else runs.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._pool = thread_pool(1, "lakebed-attributions", 1)
        self._running: Future[None] | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Starts a job when the one before is done; raises what went wrong there."""
        self._wait()
        self._running = self._pool.submit(job)

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def __enter__(self) -> _OneAhead:
        torch.set_num_threads(max(1, self._threads - 1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)


@dataclass(frozen=True)
class _Scalar:
    """An extractor of a scalar's changes, with or without attributions, and what it lacks."""

    extractor: ScalarChangesExtractor
    key: str
    missing: set[Ends]


@dataclass(frozen=True)
class _Watcher:
    """An extractor that looks into the passes, and what it lacks."""

    extractor: ObservingExtractor
    key: str
    missing: set[Ends]

    def keep_in(self, observed: dict[str, list[Any]]) -> Callable[[Passes], None]:
        """Hands the extractor one batch after another, and keeps what it makes of them."""
        held = observed.setdefault(self.key, [])
        return lambda passes: held.append(self.extractor.observe(passes))


@dataclass(frozen=True)
class _Group:
    """Extractors that ask about the same pairs: one forward pass per record side serves them all."""

    pairs: PairSet
    probes: Mapping[str, ProbeData]
    batches: Sequence[PairBatch]
    work: Sequence[_Scalar]
    watchers: Sequence[_Watcher]
    device: str

    @property
    def finest(self) -> int:
        """Number of finest cells."""
        return int(self.pairs.finest.max()) + 1

    def cell_means(self, task: Task) -> dict[str, Tensor]:
        """Gradients of the weighted mean of every cell: `Float[cell, *parameter]` by name."""
        total = torch.zeros(self.finest, dtype=torch.float64)
        total.index_add_(0, torch.from_numpy(self.pairs.finest), task.weight)
        members = self.pairs.members().double()
        return combine(task.gradients, members / (members @ total)[:, None])


def _groups(context: Context, work: Sequence[IntervalWork], device: str) -> list[_Group]:
    scalars: dict[PairSelection, list[_Scalar]] = {}
    watchers: dict[PairSelection, list[_Watcher]] = {}
    for of in work:
        if isinstance(of.extractor, ScalarChangesExtractor):
            one = _Scalar(of.extractor, of.extractor.key, of.missing)
            scalars.setdefault(of.extractor.selection, []).append(one)
        elif isinstance(of.extractor, ObservingExtractor):
            other = _Watcher(of.extractor, of.extractor.key, of.missing)
            watchers.setdefault(of.extractor.selection, []).append(other)
    groups = []
    for selection in dict.fromkeys([*scalars, *watchers]):
        measured, watched = scalars.get(selection, []), watchers.get(selection, [])
        sides: set[str] = {side for of in measured for side in of.extractor.scalar.sides}
        sides.update(side for of in watched for side in of.extractor.sides)
        pairs = load_pairs(context, selection, sorted(sides))
        probes = {side: probe_of(context, side_probe(selection.probe, side)) for side in sorted(sides)}
        groups.append(_Group(pairs, probes, pairs.batches(probes, device), measured, watched, device))
    return groups

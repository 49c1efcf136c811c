"""Datasets of forward passes: one pass per step and batch feeds all of them; they are written while the next is computed.

A dataset is a short file with a `ForwardExtractor`: what it wants of the pass (`request`), and how that becomes rows
(`write`). Each is a unit of its own per step, with its own receipt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, reduce
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.capture import Batch, Capture, Captured, CaptureError, Request, concatenate
from ..engine.forward import Model
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE
from ..lake.errors import LakebedError, UnknownName
from . import dataset
from .probe_batches import PREDICTION, ProbeBatches, ProbeData, load_probe, make_batches
from .states import State
from .threads import thread_pool


class DeviceUnavailable(LakebedError):
    """A device that this machine does not have."""


class ForwardExtractor(dataset.Extractor):
    """A dataset of forward passes over a probe."""

    needs_moments: ClassVar[bool] = False

    def __init__(self, probe: str = DEFAULT_PROBE) -> None:
        self.probe = probe

    def parameters(self) -> Mapping[str, Any]:
        """The probe; datasets add their own."""
        return {"probe": self.probe}

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """The probe's identity: other records under the same name are refused."""
        return {"probe": probe_of(context, self.probe).sha256}

    @abstractmethod
    def request(self) -> Request:
        """What is wanted of the pass."""

    def check(self, model: Model, probe: ProbeData) -> None:
        """Raises UnknownName, listing what there is, for parameters that the model or the probe does not have."""

    @abstractmethod
    def write(self, writer: UnitWriter, step: int, captured: Captured, made: Passed) -> None:
        """Writes one step of what was captured of the whole probe."""

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes one step by a pass for this dataset alone."""
        with ForwardPasses(context, [self]) as passes:
            captured, made = passes.capture(state, [self])
            self.write(writer, state.step, captured, made)


class QueryRoleExtractor(ForwardExtractor):
    """A dataset of what heads do at the position of one role, the prediction unless another is asked for."""

    def __init__(self, probe: str = DEFAULT_PROBE, query_role: str = PREDICTION) -> None:
        super().__init__(probe)
        self.query_role = query_role

    def parameters(self) -> Mapping[str, Any]:
        """Probe and query role."""
        return {"probe": self.probe, "query_role": self.query_role}

    def check(self, model: Model, probe: ProbeData) -> None:
        """The query role must have one position in every event."""
        probe.query_positions(self.query_role)


class Passed:
    """What rows need to know of the model and the probe beside what was captured."""

    def __init__(self, batches: ProbeBatches, model: Model, candidates: Tensor) -> None:
        self.batches, self.probe = batches, batches.data
        self.candidates = candidates
        self.stages = model.stages
        self.n_layers, self.n_heads = model.n_layers, model.n_heads


Commit = Callable[[ForwardExtractor, Callable[[UnitWriter], None]], None]


def probe_of(context: dataset.Context, name: str) -> ProbeData:
    """A probe of the context's run, read once."""
    if name not in context.probes:
        context.probes[name] = load_probe(context.lake, context.run, name)
    found: ProbeData = context.probes[name]
    return found


def require_device(device: str) -> str:
    """The device, if torch can compute on it; raises DeviceUnavailable listing those it can."""
    held = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not held.get(device.split(":")[0], False):
        there = ", ".join(name for name, available in held.items() if available)
        raise DeviceUnavailable(f"no device {device!r} on this machine; there is {there}")
    return device


class ForwardPasses:
    """Runs the passes that some extractors want, step by step; a context manager that ends when everything is written.

    One step is computed while the one before it is written, so that memory holds two steps at most; the next is made ready
    meanwhile, so that cores go from the last batch of a step to the first of another.
    """

    def __init__(
        self,
        context: dataset.Context,
        extractors: Iterable[ForwardExtractor],
        device: str = "cpu",
        batch_size: int | None = None,
    ) -> None:
        self._context = context
        self._extractors = list(extractors)
        self._device, self._batch_size = require_device(device), batch_size
        self._torch_threads = torch.get_num_threads()
        self._batches: dict[str, ProbeBatches] = {}
        self._checked: set[ForwardExtractor] = set()
        self._writer: ThreadPoolExecutor | None = None
        self._workers: ThreadPoolExecutor | None = None
        self._begun: deque[Future[None]] = deque()
        self._failed = False

    def run(
        self,
        state: State,
        due: Iterable[ForwardExtractor],
        write: Commit,
    ) -> None:
        """Begins what is due at a step; `write` is called in the background, once a dataset, with what fills its unit.

        What goes wrong there ends the writing, and is raised by a later call or at the end.
        """
        by_probe: dict[str, list[ForwardExtractor]] = {}
        for extractor in due:
            by_probe.setdefault(extractor.probe, []).append(extractor)
        # A replay changes the weights of its states in place, and they are still being read then.
        weights = {name: weight.clone() for name, weight in state.weights.items()}
        for extractors in by_probe.values():
            capture, made = self._prepare(weights, extractors)
            self._wait(1)
            parts = self._begin(capture, made.batches, state.step)
            if self._writer is None:
                self._writer = thread_pool(1, "lakebed-writer", 1)
            self._begun.append(self._writer.submit(self._write, state.step, extractors, parts, made, write))

    def capture(self, state: State, extractors: list[ForwardExtractor]) -> tuple[Captured, Passed]:
        """What extractors of one probe want of one step, in the probe's order."""
        capture, made = self._prepare(state.weights, extractors)
        return _in_order(self._begin(capture, made.batches, state.step)(), made.batches), made

    def _prepare(
        self, weights: Mapping[str, Tensor], extractors: list[ForwardExtractor]
    ) -> tuple[Capture, Passed]:
        model = self._context.adapter().load_model(weights, self._device)
        probe = probe_of(self._context, extractors[0].probe)
        for extractor in extractors:
            if extractor not in self._checked:
                probe.require_fit(model)
                extractor.check(model, probe)
                self._checked.add(extractor)
        batches = self._batches_of(probe, model)
        request = reduce(Request.__or__, (extractor.request() for extractor in extractors))
        candidates = batches.batches[0].choices.candidates
        return Capture(model, candidates, request), Passed(batches, model, candidates.cpu())

    def _begin(self, capture: Capture, batches: ProbeBatches, step: int) -> Callable[[], list[Captured]]:
        """Batches side by side, a torch thread each: two threads on one batch wait for each other at every operation, and
        for the writer that shares their cores. Returns what waits for them."""

        def run(batch: Batch) -> Captured:
            try:
                return capture.run(batch)
            except CaptureError as error:
                raise CaptureError(f"step {step} of run {self._context.run!r}: {error}") from error

        workers = min(self._torch_threads, len(batches.batches)) if self._device == "cpu" else 1
        if workers == 1:
            done = [run(batch) for batch in batches.batches]
            return lambda: done
        if self._workers is None:
            each = self._torch_threads // workers
            self._workers = thread_pool(workers, "lakebed-forward", each)
            # Threads that wait for a busy core spin: what makes the next step ready has no more of them either.
            torch.set_num_threads(each)
        parts = [self._workers.submit(run, batch) for batch in batches.batches]
        return lambda: [part.result() for part in parts]

    def _batches_of(self, probe: ProbeData, model: Model) -> ProbeBatches:
        if probe.name not in self._batches:
            requests = [of.request() for of in self._extractors if of.probe == probe.name]
            merged = reduce(Request.__or__, requests)
            self._batches[probe.name] = make_batches(
                probe, model, sorted(merged.roles), sorted(merged.layouts), self._device, self._batch_size
            )
        return self._batches[probe.name]

    def _write(
        self,
        step: int,
        extractors: list[ForwardExtractor],
        parts: Callable[[], list[Captured]],
        made: Passed,
        write: Commit,
    ) -> None:
        if self._failed:
            return
        try:
            captured = _in_order(parts(), made.batches)
            for extractor in extractors:
                write(extractor, partial(extractor.write, step=step, captured=captured, made=made))
        except BaseException:
            self._failed = True
            raise

    def _wait(self, begun: int) -> None:
        """Until that many steps at most are not written yet; raises what went wrong there."""
        while len(self._begun) > begun:
            self._begun.popleft().result()

    def __enter__(self) -> ForwardPasses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            interrupted = kind is not None and not issubclass(kind, Exception)
            if interrupted and self._workers is not None:
                self._workers.shutdown(cancel_futures=True)
            # What was begun before something else failed is good.
            for pool in (self._writer, self._workers):
                if pool is not None:
                    pool.shutdown()
            torch.set_num_threads(self._torch_threads)


def _in_order(parts: list[Captured], batches: ProbeBatches) -> Captured:
    """What the batches gave, in the probe's order."""
    queries = {role: torch.from_numpy(batches.data.query_positions(role)) for role in batches.roles}
    return concatenate(parts).reordered(batches.event_order, batches.place_order, queries)


def require_stage(stage: str, model: Model) -> None:
    """Raises UnknownName listing the stages."""
    if stage not in model.stages:
        raise UnknownName(f"no stage {stage!r}; this run has {', '.join(model.stages)}")


def require_head(layer: int, head: int, model: Model) -> None:
    """Raises UnknownName listing the layers and heads."""
    if layer >= model.n_layers or head >= model.n_heads:
        raise UnknownName(
            f"no head L{layer}H{head}; this run has layers 0–{model.n_layers - 1}, heads 0–{model.n_heads - 1}"
        )

"""The recorder: attaches to a torch training loop and lays every step into the lake, exactly and in the background.

    recorder = Recorder("my.lake", "my-run", model, optimizer)
    ...                                            # the loop as it was
    recorder.close()

Per step it stores the raw gradient of every parameter and the clip coefficient that was applied; weights and moments
only every `anchor_every` steps. What lies between is replayed from the anchor with torch's own update, and the replay
runs here too, on the background thread: it yields each step's norms without touching the training thread, and at each
anchor it must equal the live model bit for bit, or the block is not written and `ReplayMismatch` is raised.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..engine.optimizer import (
    AdamReplay,
    UnsupportedOptimizer,
    check_supported,
    parameter_groups,
)
from ..engine.tap import CapturedStep, OptimizerTap, StateKind
from ..lake import Lake
from ..lake.names import canonical_json
from .runs import RecordingError, RunInfo, describe_run, model_parameters, register_run
from .threads import start_single_threaded, work_in_the_background
from .trace_block import MOMENTS
from .trace_writer import PendingStep, TraceWriter, live_state

STORES = ("exact", "full")
# Anchors then add under 5 % to the gradients' bytes, a kill costs at most this many steps, and a replay takes a blink.
ANCHOR_EVERY = 64
_STOP = object()


class Recorder:
    """Records `optimizer`'s steps on `model` as run `run` of `lake` (a Lake, or where one is or should be).

    `store="exact"` keeps gradients and anchors and takes Adam and AdamW; `store="full"` keeps weights and optimizer
    state at every step and takes any optimizer. `start_step` is the number of steps the model has behind it; a run that
    stands in the lake is continued when its last step is `start_step` and its weights are the model's. `info` adds what
    the lake should know of the run. At most `queue_steps` steps wait for the disk; then training waits.

    `annotate` adds what the optimizer cannot know of the step just taken (loss, examples, the loop's own state). Leave the
    `with` block or call `close` at the end; an interpreter that exits normally closes what was forgotten.

    Raises UnsupportedOptimizer, RecordingError, InputMismatch; and from the step after it happened, whatever went wrong
    in the background (StorageFull, ReplayMismatch).
    """

    def __init__(
        self,
        lake: Lake | str | os.PathLike[str],
        run: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        store: str = "exact",
        anchor_every: int = ANCHOR_EVERY,
        start_step: int = 0,
        info: RunInfo | None = None,
        queue_steps: int = 4,
    ) -> None:
        if store not in STORES:
            raise RecordingError(f"no store {store!r}; there are {', '.join(STORES)}")
        if anchor_every < 1:
            raise RecordingError(f"anchor_every is {anchor_every}; it must be at least 1")
        self.lake = lake if isinstance(lake, Lake) else Lake.open_or_create(lake)
        self.run = run
        self.step = start_step
        self._model, self._optimizer = model, optimizer
        self._full, self._anchor_every = store == "full", anchor_every
        self._pending: PendingStep | None = None
        self._in_block = 0
        self._error: BaseException | None = None
        self._closed = False
        replayable = not self._full or _is_adam(optimizer)
        self._tap = OptimizerTap(
            model, optimizer, self._on_step, self._want_state, replayable=replayable, record_rng=True
        )
        try:
            self._writer = self._begin(run, store, info or RunInfo())
        except BaseException:
            self._tap.detach()
            raise
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, queue_steps))
        self._alone = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"lakebed recorder {run}", daemon=True)
        start_single_threaded(self._thread, self._alone)
        atexit.register(_close_forgotten, weakref.ref(self))

    def _begin(self, run: str, store: str, info: RunInfo) -> TraceWriter:
        _, group_of = parameter_groups(self._model, self._optimizer)
        described = describe_run(info, self._optimizer, store, self._anchor_every)
        register_run(self.lake, run, described, model_parameters(self._model, group_of))
        state = live_state(self._model, self._optimizer)
        replay = None
        if not self._full:
            moments = {name: state.optimizer.get(name, {}) for name in MOMENTS}
            replay = AdamReplay(state.weights, moments["exp_avg"], moments["exp_avg_sq"], state.step_counts)
        return TraceWriter(self.lake, run, self.step, self._anchor_every, state, replay)

    # -- in the training thread --------------------------------------------------------------------------------

    def _want_state(self, when: StateKind) -> bool:
        if when == "before":
            return False
        return self._full or self._in_block + 1 == self._anchor_every

    def _on_step(self, captured: CapturedStep) -> None:
        self._raise_error()
        self._hand_over()
        self.step += 1
        self._in_block = 0 if self._in_block + 1 == self._anchor_every else self._in_block + 1
        self._pending = PendingStep(self.step, captured)

    def annotate(
        self,
        *,
        loss: float | None = None,
        token_accuracy: float | None = None,
        grad_clip_norm: float | None = None,
        split: str | None = None,
        sample_ids: Sequence[str] | None = None,
        query_event_count: int | None = None,
        loop_state: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds to the step just taken. `loop_state` is JSON-able, and what the loop needs to go on after this step; the
        state of torch's CPU generator is taken here too, so call this last, after any evaluation. Raises RecordingError
        before the first step."""
        if self._pending is None:
            raise RecordingError("annotate comes after optimizer.step(): no step was taken yet")
        given = {
            "loss": loss,
            "token_accuracy": token_accuracy,
            "grad_clip_norm": grad_clip_norm,
            "query_event_count": query_event_count,
            "batch_size": None if sample_ids is None else len(sample_ids),
        }
        self._pending.row.update({name: value for name, value in given.items() if value is not None})
        if sample_ids is not None:
            self._pending.batch = {"split": split, "sample_ids": list(sample_ids)}
        if loop_state is not None:
            self._pending.loop_state = canonical_json(dict(loop_state))
        self._pending.rng_state = torch.get_rng_state()

    def _hand_over(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        while True:
            self._raise_error()
            try:
                self._queue.put(pending, timeout=0.5)
                return
            except queue.Full:
                continue

    def _raise_error(self) -> None:
        """Ends the recording if the background failed; the caller may train on without it."""
        if self._error is not None and not self._closed:
            self._closed = True
            self._tap.detach()
            self._queue.put(_STOP)
            raise self._error

    @property
    def backlog(self) -> int:
        """Steps handed over and not yet processed; at most `queue_steps` and the one in hand."""
        return self._queue.unfinished_tasks

    # -- in the background -------------------------------------------------------------------------------------

    def _work(self) -> None:
        work_in_the_background()
        self._alone.set()
        while (pending := self._queue.get()) is not _STOP:
            try:
                if self._error is None:
                    self._writer.add(pending)
            except BaseException as error:
                self._error = error
                self._writer.discard()
            finally:
                pending.captured.release()
                self._queue.task_done()

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Writes what is left, checks it against the live model, and detaches. Harmless when called again."""
        if self._closed:
            return
        self._hand_over()
        self._closed = True
        self._tap.detach()
        self._queue.put(_STOP)
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._writer.finish(live_state(self._model, self._optimizer))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Steps taken before an error in the loop are as good as any: they are kept.
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"recording, step {self.step}"
        return f"<Recorder of run {self.run!r} in {self.lake.uri}: {state}>"


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    try:
        check_supported(optimizer)
    except UnsupportedOptimizer:
        return False
    return True


def _close_forgotten(reference: weakref.ref[Recorder]) -> None:
    recorder = reference()
    if recorder is not None:
        recorder.close()

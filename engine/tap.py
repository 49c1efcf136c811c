"""Listen to any torch training loop through its optimizer: what each step's gradients and update were."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .clipping import clip_coefficient
from .optimizer import AdamGroup, OptimizerError, UnsupportedOptimizer, check_supported, parameter_groups

StateKind = Literal["before", "after"]
Hyperparameters = dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """A private CPU copy of the weights and of the optimizer's state, all of one moment.

    ``weights`` holds every parameter of the model, trained or not, and ``optimizer`` each state tensor by
    its torch key and parameter name (``optimizer["exp_avg"]["blocks.0.ln_1.bias"]``; a parameter without
    state yet is absent). Non-tensor state stays as it is. The counter ``step`` is in ``step_counts``, 0
    before the first.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    step_counts: dict[str, int]


@dataclass(frozen=True)
class CapturedStep:
    """One optimizer step. Tensors are private CPU copies, valid until ``release``.

    ``gradients``: the gradient of each updated parameter as backward left it, before the user's clipping; a
    parameter without gradient is absent. The optimizer used ``gradients * clip_coefficient``; where no scalar
    explains what it used, the coefficient is None and ``applied`` holds it. ``groups[group_of[name]]`` are a
    parameter's hyperparameters in this step. ``step_counts`` are the optimizer's per-parameter counters after
    the step. ``index`` counts steps since the tap was attached, from 0.
    """

    index: int
    gradients: dict[str, Tensor]
    clip_coefficient: float | None
    applied: dict[str, Tensor] | None
    groups: list[AdamGroup] | list[Hyperparameters]
    group_of: dict[str, int]
    step_counts: dict[str, int]
    before: TrainingState | None = None
    after: TrainingState | None = None
    rng_before: Tensor | None = None
    rng_after: Tensor | None = None
    _release: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def release(self) -> None:
        """Hand the buffers back for a later step; the tensors of this one may then change. Callable once."""
        while self._release:
            self._release.pop()()


class OptimizerTap:
    """Calls ``on_step(CapturedStep)`` in the training thread after every step of ``optimizer``.

    Works with any training loop: gradients are copied as backward finishes them (several backward passes
    before a step accumulate, and the last sum counts), and compared at the step with what the optimizer
    uses. A gradient that no backward pass reported, or that was zeroed since, counts as it is at the step.
    Wherever a parameter has several names in the model (tied weights), the first one is used.

    ``want_state("before")`` and ``want_state("after")`` are asked once per step, before and after the update,
    and decide whether that side's weights and optimizer state are copied. ``record_rng`` adds torch's CPU
    random state as the previous step (or attaching) left it, and as this step leaves it.

    With ``replayable`` (default) only optimizers that ``AdamReplay`` can follow are accepted
    (UnsupportedOptimizer); without it any, and their groups come as plain dicts. ``on_step``'s exceptions
    reach the training loop. Costs two passes over the gradients and no lasting lock; ``detach`` (or leaving
    the ``with`` block) removes every hook. Under DistributedDataParallel the raw gradient is the local one,
    so the averaged one comes in ``applied``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        on_step: Callable[[CapturedStep], None],
        want_state: Callable[[StateKind], bool] | None = None,
        *,
        replayable: bool = True,
        record_rng: bool = False,
    ) -> None:
        if replayable:
            check_supported(optimizer)
        self._model, self._optimizer = model, optimizer
        self._on_step, self._want_state = on_step, want_state or (lambda _: False)
        self._replayable, self._record_rng = replayable, record_rng
        self._gradient_pool, self._state_pool = _BufferPool(), _BufferPool()
        self._raw = _RawGradients(self._gradient_pool)
        self._index = 0
        self._pending: _PendingStep | None = None
        self._group_key: tuple[int, ...] = ()
        self._rng = torch.get_rng_state() if record_rng else None
        self._refresh_parameters()
        self._step_hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Remove every hook; the training loop is as it was. Harmless when already detached."""
        for handle in self._step_hooks:
            handle.remove()
        self._step_hooks = []
        self._raw.detach()

    def __enter__(self) -> OptimizerTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _refresh_parameters(self) -> None:
        """Name the optimizer's parameters again if a group was added or changed."""
        key = tuple(id(parameter) for group in self._optimizer.param_groups for parameter in group["params"])
        sizes = tuple(len(group["params"]) for group in self._optimizer.param_groups)
        if (key := (*key, *sizes)) != self._group_key:
            self._parameters, self._group_of = parameter_groups(self._model, self._optimizer)
            # Every parameter of the model: one may join the optimizer between its backward and its first step.
            self._raw.attach(dict(self._model.named_parameters()))
            self._group_key = key

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._pending is not None and not self._replayable and not self._raw.seen:
            # An optimizer whose own step calls its base class's: torch calls the hooks of both, for one step.
            self._pending.nested += 1
            return
        self._refresh_parameters()
        if self._replayable and getattr(optimizer, "grad_scale", None) is not None:
            raise UnsupportedOptimizer(optimizer, "the gradient scaler divides gradients inside the step")
        pending = _PendingStep(self._step_counts())
        if self._want_state("before"):
            pending.before = self._copy_state(pending)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not self._replayable and closure is None:
            # Some optimizers change .grad as they work, so theirs is read first; Adam's never does, and
            # reading it last also sees what a closure or another hook made of it.
            self._capture_gradients(pending)
        self._pending = pending

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        pending = self._pending
        if pending is None:  # attached from inside a step
            return
        if pending.nested:
            pending.nested -= 1
            return
        self._pending = None
        if pending.gradients is None:
            self._capture_gradients(pending)
        counts = self._step_counts()
        if self._replayable:
            self._check_counters(pending, counts)
        if self._want_state("after"):
            pending.after = self._copy_state(pending)
        rng_before = self._rng
        if self._record_rng:
            self._rng = torch.get_rng_state()
        for device in {parameter.device for parameter in self._parameters.values() if parameter.is_cuda}:
            # Copies to pinned memory were queued, not awaited.
            torch.cuda.current_stream(device).synchronize()
        step = CapturedStep(
            index=self._index,
            gradients=pending.gradients or {},
            clip_coefficient=pending.coefficient,
            applied=pending.applied,
            groups=self._groups(),
            group_of=dict(self._group_of),
            step_counts=counts,
            before=pending.before,
            after=pending.after,
            rng_before=rng_before,
            rng_after=self._rng,
            _release=pending.release,
        )
        self._index += 1
        self._on_step(step)

    def _capture_gradients(self, pending: _PendingStep) -> None:
        """Settle the raw gradients and the coefficient: on the gradients' device, then one copy out."""
        used = {name: p.grad.detach() for name, p in self._parameters.items() if p.grad is not None}
        if sparse := [name for name, gradient in used.items() if gradient.is_sparse]:
            raise UnsupportedOptimizer(self._optimizer, f"the gradient of {sparse[0]} is sparse")
        raw, buffers = self._raw.take(used)
        coefficient = clip_coefficient(raw, used)
        if coefficient is None:
            # A gradient zeroed after it was seen belongs to a batch that was thrown away, not to this step.
            for name in [n for n, g in raw.items() if not bool(used[n].any()) and bool(g.any())]:
                raw[name] = buffers.copy(f"raw {name}", used[name])
            coefficient = clip_coefficient(raw, used)
        pending.coefficient = coefficient
        pending.gradients = {name: buffers.to_host(f"raw {name}", gradient) for name, gradient in raw.items()}
        if coefficient is None:
            pending.applied = {name: buffers.copy(f"used {name}", g, host=True) for name, g in used.items()}
        pending.release.append(lambda: self._gradient_pool.give_back(buffers))

    def _check_counters(self, pending: _PendingStep, after: Mapping[str, int]) -> None:
        """Adam counts exactly the parameters it found a gradient for; anything else was not what it used."""
        if getattr(self._optimizer, "grad_scale", None) is not None:
            raise UnsupportedOptimizer(
                self._optimizer, "the gradient scaler divides gradients inside the step"
            )
        for name, before in pending.step_counts.items():
            updates, gradients = after[name] - before, int(name in (pending.gradients or {}))
            if updates != gradients:
                raise OptimizerError(
                    f"{name} was updated {updates} time(s) in a step that left {gradients} gradient(s) of it: "
                    "another hook changes gradients or state after the update. Attach the tap before that hook."
                )

    def _groups(self) -> list[AdamGroup] | list[Hyperparameters]:
        groups = self._optimizer.param_groups
        if self._replayable:
            return [AdamGroup.from_param_group(self._optimizer, group) for group in groups]
        return [{k: _plain(v) for k, v in group.items() if k != "params"} for group in groups]

    def _step_counts(self) -> dict[str, int]:
        """Each parameter's ``step`` counter, 0 without one; counters on a device are fetched together."""
        state = self._optimizer.state
        counters = {
            n: state[p]["step"] for n, p in self._parameters.items() if p in state and "step" in state[p]
        }
        remote = [name for name, c in counters.items() if isinstance(c, Tensor) and c.device.type != "cpu"]
        if remote:
            fetched = torch.stack([counters[name].reshape(()) for name in remote]).tolist()
            counters.update(zip(remote, fetched, strict=True))
        return {name: int(counters.get(name, 0)) for name in self._parameters}

    def _copy_state(self, pending: _PendingStep) -> TrainingState:
        buffers = self._state_pool.take()
        weights = {n: buffers.copy(f"weight {n}", p, host=True) for n, p in self._model.named_parameters()}
        state: dict[str, dict[str, Any]] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if key == "step":
                    continue
                tensor = isinstance(value, Tensor)
                copied = buffers.copy(f"{key} {name}", value, host=True) if tensor else deepcopy(value)
                state.setdefault(key, {})[name] = copied
        pending.release.append(lambda: self._state_pool.give_back(buffers))
        return TrainingState(weights, state, self._step_counts())


@dataclass
class _PendingStep:
    """What is known of a step between the optimizer's two hooks."""

    step_counts: dict[str, int]
    gradients: dict[str, Tensor] | None = None
    coefficient: float | None = None
    applied: dict[str, Tensor] | None = None
    before: TrainingState | None = None
    after: TrainingState | None = None
    release: list[Callable[[], None]] = field(default_factory=list)
    nested: int = 0


class _Buffers:
    """Named tensors that are overwritten in place as long as shape and dtype stay the same."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, bool], Tensor] = {}

    def copy(self, key: str, source: Tensor, *, host: bool = False) -> Tensor:
        """A copy of ``source`` on its own device, or on the host (pinned and not awaited if from CUDA)."""
        held = self._held.get((key, host))
        if held is None or held.shape != source.shape or held.dtype != source.dtype:
            device = torch.device("cpu") if host else source.device
            held = torch.empty(
                source.shape, dtype=source.dtype, device=device, pin_memory=host and source.is_cuda
            )
            self._held[key, host] = held
        return held.copy_(source.detach(), non_blocking=host and source.is_cuda)

    def to_host(self, key: str, tensor: Tensor) -> Tensor:
        """``tensor`` itself where it is a host tensor, else a copy of it there."""
        return tensor if tensor.device.type == "cpu" else self.copy(key, tensor, host=True)


class _BufferPool:
    """Buffer sets in rotation: as many as steps are unreleased at once. Safe across threads."""

    def __init__(self) -> None:
        self._idle: deque[_Buffers] = deque()

    def take(self) -> _Buffers:
        try:
            return self._idle.pop()
        except IndexError:
            return _Buffers()

    def give_back(self, buffers: _Buffers) -> None:
        self._idle.append(buffers)


class _RawGradients:
    """The gradients as backward left them, by parameter name, since the last step."""

    def __init__(self, pool: _BufferPool) -> None:
        self._pool = pool
        self._buffers = pool.take()
        self._on_device = _Buffers()  # one set is enough: it is read out before the step ends
        self.seen: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def attach(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.detach()
        for name, parameter in parameters.items():
            # A frozen parameter takes no hook, yet a hook it has survives freezing: so thaw it for a moment,
            # and the first gradient after the user unfreezes it is seen.
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)
            handle = parameter.register_post_accumulate_grad_hook(self._hook(name))  # type: ignore[no-untyped-call]
            self._hooks.append(handle)
            parameter.requires_grad_(not frozen)

    def detach(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def take(self, used: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], _Buffers]:
        """The raw gradients of this step's parameters, in ``used``'s order, and the buffers they live in."""
        buffers, seen = self._buffers, self.seen
        self._buffers, self.seen = self._pool.take(), {}
        raw = {
            name: seen[name] if name in seen else buffers.copy(f"raw {name}", g) for name, g in used.items()
        }
        return raw, buffers

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        key = f"raw {name}"

        def copy(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None and not gradient.is_sparse:
                buffers = self._buffers if gradient.is_cpu else self._on_device
                self.seen[name] = buffers.copy(key, gradient.detach())

        return copy


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON has it: numbers, strings, lists; anything else by its ``repr``."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)

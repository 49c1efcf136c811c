"""What the recorder's background thread does with each captured step: replay, measure, write."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.optimizer import AdamGroup, AdamReplay, parameter_groups
from ..engine.tap import CapturedStep, TrainingState
from ..engine.update_statistics import ParameterStep, parameter_statistics
from ..lake import Lake, Unit
from ..lake.axis import publish
from ..lake.datasets import CHECKPOINT
from ..lake.names import canonical_json
from .runs import RecordingError, ReplayMismatch
from .trace_block import MOMENTS, TraceBlock, block_rows, chain_hash, state_hash, stored_array


@dataclass
class PendingStep:
    """A captured step that may still be annotated."""

    step: int
    captured: CapturedStep
    row: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] | None = None
    loop_state: str | None = None
    rng_state: Tensor | None = None
    taken_at: float = field(default_factory=time.perf_counter)


def live_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """A private copy of a model's weights and its optimizer's state, on the CPU."""
    trained, _ = parameter_groups(model, optimizer)
    tensors: dict[str, dict[str, Any]] = {}
    counts = dict.fromkeys(trained, 0)
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step":
                counts[name] = int(value)
            else:
                copied = value.detach().cpu().clone() if isinstance(value, Tensor) else value
                tensors.setdefault(key, {})[name] = copied
    weights = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    return TrainingState(weights, tensors, counts)


def state_quantities(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """Weights and every optimizer tensor of parameter shape, by quantity."""
    found: dict[str, dict[str, Tensor]] = {"weights": dict(state.weights)}
    for key, tensors in state.optimizer.items():
        shaped = {
            name: tensor
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor) and tensor.shape == state.weights[name].shape
        }
        if shaped:
            found[key] = shaped
    return found


def step_counters(counts: Mapping[str, int]) -> str:
    """The optimizer's counters as table steps has them: the commonest under "*", the others by name."""
    values = list(counts.values())
    common = max(set(values), key=values.count) if values else 0
    return canonical_json({"*": common, **{name: count for name, count in counts.items() if count != common}})


class TraceWriter:
    """Turns captured steps into blocks. With a replay the state between anchors comes from it, else from the capture."""

    def __init__(
        self,
        lake: Lake,
        run: str,
        start_step: int,
        anchor_every: int,
        state: TrainingState,
        replay: AdamReplay | None,
    ) -> None:
        self._lake, self._run = lake, run
        self._anchor_every = anchor_every
        self._replay = replay
        self._previous = state
        self._block: TraceBlock | None = None
        self._groups_json: str | None = None
        self._rng: bytes | None = None
        self._last_time = time.perf_counter()
        self._hash = self._start(start_step, state)

    def _start(self, step: int, state: TrainingState) -> str:
        """Continues the run from its last step, or writes the state a new one starts from; returns its identity."""
        self._lake.refresh()
        stored = self._lake.table("steps", self._run).collect()
        if len(stored):
            last = stored.sort("step").row(-1, named=True)
            if last["step"] != step:
                raise RecordingError(
                    f"run {self._run!r} stands at step {last['step']}, not {step}: continue it with "
                    f"start_step={last['step']} from its last state, or record under another run name"
                )
            self._check_continues(step, state)
            return str(last["sha256"])
        identity = state_hash(state.weights)
        rows = 1 if self._replay is not None else block_rows(self._anchor_every)
        write_state(self._lake, self._run, step, state, identity, rows=rows)
        return identity

    def _check_continues(self, step: int, state: TrainingState) -> None:
        quantities = state_quantities(state)
        for quantity, tensors in quantities.items():
            for name, tensor in tensors.items():
                held = torch.from_numpy(self._lake.tensor(quantity, name, self._run).read(step)).to(
                    tensor.dtype
                )
                if not torch.equal(held.view(torch.uint8), tensor.contiguous().view(torch.uint8)):
                    raise RecordingError(
                        f"the model is not run {self._run!r} at step {step}: its {quantity} {name!r} differ; load that step "
                        "first, or record under another run name"
                    )

    def add(self, pending: PendingStep) -> None:
        """One step: its rows, its gradients, and at the end of a block its state, checked and committed."""
        captured = pending.captured
        if self._block is None:
            self._block = TraceBlock(
                self._lake, self._run, pending.step, self._anchor_every, self._hash, full=self._replay is None
            )
        before, after = self._advance(captured)
        stored = captured.gradients if captured.clip_coefficient is not None else captured.applied or {}
        groups = canonical_json(
            [group.to_json() if isinstance(group, AdamGroup) else group for group in captured.groups]
        )
        self._hash = chain_hash(self._hash, stored, f"{captured.clip_coefficient!r} {groups}")
        updates = self._updates(pending, before, after)
        self._block.add_step(pending.step, stored, self._rows(pending, groups, updates))
        if self._replay is None:
            self._block.add_state(state_quantities(after))
        elif captured.after is not None:
            self._check(pending.step, captured.after)
            self._block.add_state(state_quantities(captured.after))
        if len(self._block.steps) == self._anchor_every:
            self._block.commit(self._hash)
            self._block = None

    def _advance(self, captured: CapturedStep) -> tuple[TrainingState, TrainingState]:
        if self._replay is None:
            assert captured.after is not None
            after = _private(captured.after)
            before, self._previous = self._previous, after
            return before, after
        before = _private(_replay_state(self._replay))
        gradients = captured.gradients if captured.applied is None else captured.applied
        groups = [group for group in captured.groups if isinstance(group, AdamGroup)]
        self._replay.step(gradients, captured.clip_coefficient, groups, captured.group_of)
        return before, _replay_state(self._replay)

    def _check(self, step: int, live: TrainingState) -> None:
        if self._replay is None:
            return
        moments = [live.optimizer.get(name, {}) for name in MOMENTS]
        differing = self._replay.mismatches(live.weights, moments[0], moments[1], live.step_counts)
        if differing:
            shown = ", ".join(differing[:3]) + (
                f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            )
            raise ReplayMismatch(
                f"run {self._run!r}: at step {step} the replayed state differs from the live one in {shown}: something "
                'besides the optimizer changed it; record with store="full", or keep such changes out of the recorded steps'
            )

    def _updates(
        self, pending: PendingStep, before: TrainingState, after: TrainingState
    ) -> list[Mapping[str, Any]]:
        captured = pending.captured
        return [
            {
                "step": pending.step,
                "parameter": name,
                **parameter_statistics(_parameter_step(captured, name, before, after)),
            }
            for name in captured.group_of
        ]

    def _rows(
        self, pending: PendingStep, groups: str, updates: list[Mapping[str, Any]]
    ) -> dict[str, list[Mapping[str, Any]]]:
        captured, first_in_block = pending.captured, not (self._block and self._block.steps)
        rng = pending.rng_state if pending.rng_state is not None else captured.rng_after
        rng_bytes = None if rng is None else rng.numpy().tobytes()
        first_group = captured.groups[0]
        rate = first_group.learning_rate if isinstance(first_group, AdamGroup) else first_group.get("lr")
        row = {
            "step": pending.step,
            "learning_rate": rate,
            "pre_clip_grad_norm": math.sqrt(
                sum(float(row.get("gradient_l2") or 0.0) ** 2 for row in updates)
            ),
            "clip_coefficient": captured.clip_coefficient,
            "nonfinite_gradient_entries": sum(int(row["nonfinite_gradient_entries"]) for row in updates),
            # Unchanged values are written once a block, so that each block can be read alone.
            "optimizer_groups": groups if first_in_block or groups != self._groups_json else None,
            "seconds": pending.taken_at - self._last_time,
            **pending.row,
        }
        stored = captured.after is not None
        moments = self._replay is not None or all(
            name in (captured.after or self._previous).optimizer for name in MOMENTS
        )
        step: Mapping[str, Any] = {
            "step": pending.step,
            "state": "stored" if stored else "replayed",
            "has_moments": moments,
            "sha256": self._hash,
            "learning_rate": rate,
            "optimizer_steps": step_counters(captured.step_counts),
            "loop_state": pending.loop_state,
            "rng_state": rng_bytes if first_in_block or rng_bytes != self._rng else None,
        }
        tables: dict[str, list[Mapping[str, Any]]] = {
            "training_steps": [row],
            "parameter_updates": updates,
            "steps": [step],
        }
        if pending.batch is not None:
            tables["training_batches"] = [{"step": pending.step, **pending.batch}]
        return tables

    def finish(self, live: TrainingState) -> None:
        """The run's last, perhaps partial block, with the live state as its anchor; then the arrays' lengths."""
        if self._block is not None:
            step = self._block.steps[-1]
            if self._replay is not None:
                self._check(step, live)
                self._block.add_state(state_quantities(live))
                self._block.mark_stored(step)
            self._block.commit(self._hash)
            self._block = None
        publish(self._lake, self._run)

    def discard(self) -> None:
        """Drops the block in hand."""
        if self._block is not None:
            self._block.discard()
            self._block = None


def write_state(
    lake: Lake,
    run: str,
    step: int,
    state: TrainingState,
    identity: str,
    source_uri: str | None = None,
    learning_rate: float | None = None,
    metrics: str | None = None,
    loop_state: str | None = None,
    rng_state: Tensor | None = None,
    rows: int = 1,
) -> None:
    """Weights and optimizer state of one step, as a unit of its own: the start of a run, or an imported checkpoint."""
    quantities = state_quantities(state)
    unit = Unit(CHECKPOINT, run, f"checkpoint-{step:08d}", (step,), inputs={"sha256": identity})
    if lake.find_receipt(unit) is not None:
        return
    # Before the first step Adam's moments are zero: nothing is stored, and everything is known.
    unstepped = bool(state.step_counts) and not any(state.step_counts.values())
    with lake.unit(unit) as writer:
        for quantity, tensors in quantities.items():
            block = writer.tensor_rows(quantity, [step], rows)
            for name, tensor in tensors.items():
                block.write(name, stored_array(tensor)[None])
        writer.rows(
            "steps",
            [
                {
                    "step": step,
                    "state": "stored",
                    "has_moments": unstepped or all(name in quantities for name in MOMENTS),
                    "source_uri": source_uri,
                    "sha256": identity,
                    "learning_rate": learning_rate,
                    "optimizer_steps": step_counters(state.step_counts) if state.step_counts else None,
                    "loop_state": loop_state,
                    "rng_state": None if rng_state is None else rng_state.numpy().tobytes(),
                    "metrics": metrics,
                }
            ],
        )


def _parameter_step(
    captured: CapturedStep, name: str, before: TrainingState, after: TrainingState
) -> ParameterStep:
    group = captured.groups[captured.group_of[name]]
    gradient = applied = captured.gradients.get(name)
    if captured.applied is not None:
        applied = captured.applied.get(name)
    elif gradient is not None and captured.clip_coefficient not in (None, 1.0):
        applied = gradient * captured.clip_coefficient
    moments = {
        f"{key}_{when}": state.optimizer.get(key, {}).get(name)
        for key in MOMENTS
        for when, state in (("before", before), ("after", after))
    }
    return ParameterStep(
        before.weights[name],
        after.weights[name],
        gradient,
        applied,
        group=group if isinstance(group, AdamGroup) else None,
        step_count=captured.step_counts[name],
        **moments,
    )


def _replay_state(replay: AdamReplay) -> TrainingState:
    return TrainingState(
        replay.weights, {"exp_avg": replay.exp_avg, "exp_avg_sq": replay.exp_avg_sq}, replay.step_counts
    )


def _private(state: TrainingState) -> TrainingState:
    def copied(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in tensors.items()
        }

    return TrainingState(
        copied(state.weights),
        {key: copied(tensors) for key, tensors in state.optimizer.items()},
        dict(state.step_counts),
    )

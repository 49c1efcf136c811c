"""One block of a trace on its way into the lake: gradients of some steps, and the state they lead to.

A block is a unit of work. It covers steps t0+1 … t1, holds the raw gradient of every one of them, and weights and
moments at t1 (in a full trace: at every step). The state at t0 is that of the block before, or the run's first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from ..lake import Lake, RowBlock, Unit, UnitWriter
from ..lake.datasets import TRACE

_WIDENED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq")


def stored_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as the lake stores it: half precisions widened to float32, without loss."""
    array: np.ndarray[Any, Any] = tensor.detach().to("cpu", _WIDENED.get(tensor.dtype, tensor.dtype)).numpy()
    return array


def chain_hash(previous: str, gradients: Mapping[str, Tensor], rest: str) -> str:
    """Identity of the state after a step: everything that led there, hashed onto the state before it.

    A gradient enters by its CRC-32C, which a step can afford; SHA-256 joins them.
    """
    digest = hashlib.sha256(previous.encode())
    for name, gradient in gradients.items():
        cells = np.ascontiguousarray(stored_array(gradient)).reshape(-1).view(np.uint8)
        digest.update(f"{name} {google_crc32c.value(cells)}".encode())
    digest.update(rest.encode())
    return digest.hexdigest()


def state_hash(weights: Mapping[str, Tensor]) -> str:
    """Identity of weights that nothing recorded led to."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(stored_array(tensor)).data)
    return digest.hexdigest()


class ParameterRows:
    """Rows of one quantity for every parameter, buffered until a Zarr chunk is full."""

    def __init__(self, block: RowBlock, capacity: int) -> None:
        self._block, self._capacity = block, capacity
        self._buffers: dict[str, np.ndarray[Any, Any]] = {}
        self.count = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """One step: Float[*parameter] by name; a parameter that is absent gets a row of NaN."""
        for name, tensor in tensors.items():
            if name not in self._buffers:
                self._open(name, stored_array(tensor))
        for name, buffer in self._buffers.items():
            buffer[self.count % len(buffer)] = stored_array(tensors[name]) if name in tensors else np.nan
        self.count += 1
        for name, buffer in self._buffers.items():
            if self.count % len(buffer) == 0:
                self._block.write(name, buffer, self.count - len(buffer))

    def _open(self, name: str, like: np.ndarray[Any, Any]) -> None:
        rows = min(self._block.layout(name, like.shape, like.dtype).chunk_rows, self._capacity)
        buffer = self._buffers[name] = np.full((rows, *like.shape), np.nan, like.dtype)
        for start in range(0, self.count - rows + 1, rows):
            # Absent so far: those rows are written as NaN, so that every array of the quantity has the same axis.
            self._block.write(name, buffer, start)

    def finish(self) -> None:
        """Writes what is left of the last, partial chunk."""
        for name, buffer in self._buffers.items():
            if left := self.count % len(buffer):
                self._block.write(name, buffer[:left], self.count - left)


class TraceBlock:
    """Collects the steps of one block and commits them as a unit."""

    def __init__(
        self, lake: Lake, run: str, first_step: int, capacity: int, start_hash: str, full: bool
    ) -> None:
        self.first_step = first_step
        self.capacity = capacity
        self.steps: list[int] = []
        self._lake, self._run, self._start_hash, self._full = lake, run, start_hash, full
        planned = range(first_step, first_step + capacity)
        # The last block of a run may stop early, so rows are claimed for the whole block and its steps named at the end.
        self._writer = UnitWriter(lake, Unit(TRACE, run, f"trace-{first_step:08d}"))
        self._gradient_rows = self._writer.tensor_rows("gradients", planned, block_rows(capacity))
        self._gradients = ParameterRows(self._gradient_rows, capacity)
        self._states: dict[str, tuple[RowBlock, ParameterRows]] = {}
        self._tables: dict[str, list[Mapping[str, Any]]] = {}

    def add_step(
        self, step: int, gradients: Mapping[str, Tensor], tables: Mapping[str, list[Mapping[str, Any]]]
    ) -> None:
        """One step's raw gradients and table rows."""
        self.steps.append(step)
        self._gradients.add(gradients)
        for table, rows in tables.items():
            self._tables.setdefault(table, []).extend(rows)

    def add_state(self, quantities: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights and optimizer tensors after the step added last, by quantity and parameter name."""
        for quantity, tensors in quantities.items():
            if not tensors:
                continue
            if quantity not in self._states:
                planned = (
                    range(self.first_step, self.first_step + self.capacity) if self._full else self.steps[-1:]
                )
                rows = self._writer.tensor_rows(
                    quantity, planned, block_rows(self.capacity) if self._full else 1
                )
                self._states[quantity] = rows, ParameterRows(rows, len(planned))
            self._states[quantity][1].add(tensors)

    def mark_stored(self, step: int) -> None:
        """Notes that the state of `step` is stored, not replayed."""
        self._tables["steps"] = [
            {**row, "state": "stored"} if row["step"] == step else row for row in self._tables["steps"]
        ]

    def commit(self, end_hash: str) -> None:
        """Makes the block visible, whole. `end_hash` is the identity of the state it leads to."""
        steps = tuple(self.steps)
        self._writer.unit = Unit(
            TRACE,
            self._run,
            f"trace-{steps[0]:08d}-{steps[-1]:08d}",
            steps,
            inputs={"start": self._start_hash, "end": end_hash, "full": self._full},
        )
        self._gradients.finish()
        self._gradient_rows.steps = steps
        for rows, buffered in self._states.values():
            buffered.finish()
            # A quantity that began inside the block (momentum after the first step) holds its last steps only.
            rows.steps = steps[-buffered.count :]
        for table, listed in self._tables.items():
            self._writer.rows(table, listed)
        self._writer.commit()

    def discard(self) -> None:
        """Drops the block; nothing of it was visible."""
        self._writer.discard()


def block_rows(capacity: int) -> int:
    """Rows per block of the step axis: the power of two at or above the steps of a unit."""
    return 1 << max(0, capacity - 1).bit_length()


__all__ = ["MOMENTS", "ParameterRows", "TraceBlock", "block_rows", "chain_hash", "state_hash", "stored_array"]

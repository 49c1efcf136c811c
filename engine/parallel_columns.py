"""Tensors side by side along a common first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParallelColumns:
    """Base of dataclasses whose fields are all tensors with the same first axis."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Every column through a function."""
        return type(self)(*(function(getattr(self, column.name)) for column in fields(self)))

    def cpu(self) -> Self:
        """On the CPU."""
        return self.apply(Tensor.cpu)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One after the other."""
        return cls(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(cls)))

"""Products and squares of parameter-shaped fields, summed over the parts of a model: parameters, heads, neurons.

What is summed: every parameter whole, every head's part of a projection, every neuron. Modules, projections and heads are
sums of these. Everything is accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import ParameterSlice

# Kinds that no coarser one gives.
FINEST = ("head_projection", "neuron")


@dataclass(frozen=True)
class Part:
    """One part, as a column of the sums."""

    slice_kind: str
    """parameter, head_projection or neuron."""
    slice: str
    """The parameter's name, L0H1.q_proj, or L0N17."""
    layer: int | None
    head: int | None
    neuron: int | None
    numel: int


@dataclass(frozen=True)
class _Cut:
    """A parameter, and along one axis of it the part that each index belongs to."""

    column: int
    """Column of the whole parameter."""
    axis: int | None
    index: Tensor | None
    """`Int[size of the axis]`: column of the part; one past the last for none."""

    def add(self, out: Tensor, sums: Tensor) -> None:
        """Adds `Float64[…, size of the axis]` to `Float64[…, part]`."""
        assert self.index is not None
        out[..., self.column] = sums.sum(-1)
        out.index_add_(-1, self.index, sums)


class SliceSums:
    """Sums over the parts of one model."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], slices: Sequence[ParameterSlice]) -> None:
        by_parameter: dict[str, list[ParameterSlice]] = {}
        for part in slices:
            if part.slice_kind in FINEST:
                by_parameter.setdefault(part.parameter, []).append(part)
        labels: dict[tuple[str, str], int] = {}
        parts: list[Part] = []
        layers = {part.parameter: part.layer for part in slices if part.slice_kind == "module"}
        for name, shape in shapes.items():
            labels["parameter", name] = len(parts)
            numel = int(torch.Size(shape).numel())
            parts.append(Part("parameter", name, layers.get(name), None, None, numel))
        for of in by_parameter.values():
            for part in of:
                key = (part.slice_kind, part.slice)
                numel = _numel(part)
                if key in labels:
                    held = parts[labels[key]]
                    parts[labels[key]] = Part(*key, part.layer, part.head, part.neuron, held.numel + numel)
                else:
                    labels[key] = len(parts)
                    parts.append(Part(*key, part.layer, part.head, part.neuron, numel))
        self.parts: tuple[Part, ...] = tuple(parts)
        self._cuts = {
            name: _cut(name, shape, by_parameter.get(name, ()), labels, len(parts))
            for name, shape in shapes.items()
        }

    def products(self, gradients: Mapping[str, Tensor], fields: Mapping[str, Tensor]) -> Tensor:
        """`Float[gradient, *parameter]` and `Float[field, *parameter]` by name: `Float64[gradient, field, part]`.

        A parameter without gradients counts as zero.
        """
        out = self._zeros(len(next(iter(gradients.values()))), len(next(iter(fields.values()))))
        for name, cut in self._cuts.items():
            if name not in gradients:
                continue
            a, b = _matrix(gradients[name]).double(), _matrix(fields[name]).double()
            if cut.axis is None:
                out[..., cut.column] = a.flatten(1) @ b.flatten(1).T
            elif cut.axis == 0:
                cut.add(out, torch.einsum("kij,fij->kfi", a, b))
            else:
                # As a product of matrices a column would be one; summing rows is ten times faster.
                cut.add(out, torch.stack([(b * of).sum(1) for of in a]))
        return out[..., :-1]

    def squares(self, fields: Mapping[str, Tensor]) -> Tensor:
        """`Float[field, *parameter]` by name: sums of squares, `Float64[field, part]`."""
        out = self._zeros(len(next(iter(fields.values()))))
        for name, cut in self._cuts.items():
            if name not in fields:
                continue
            squared = _matrix(fields[name]).double().square()
            if cut.axis is None:
                out[..., cut.column] = squared.flatten(1).sum(-1)
            else:
                cut.add(out, squared.sum(2 - cut.axis))
        return out[..., :-1]

    def _zeros(self, *leading: int) -> Tensor:
        return torch.zeros(*leading, len(self.parts) + 1, dtype=torch.float64)


def _matrix(values: Tensor) -> Tensor:
    """`Float[field, …]` as `Float[field, row, column]`; a vector is a column."""
    return values.reshape(values.shape[0], values.shape[1] if values.ndim > 1 else 1, -1)


def _numel(part: ParameterSlice) -> int:
    columns = (
        1 if part.column_start is None or part.column_stop is None else part.column_stop - part.column_start
    )
    return (part.row_stop - part.row_start) * columns


def _cut(
    name: str,
    shape: tuple[int, ...],
    parts: Sequence[ParameterSlice],
    labels: Mapping[tuple[str, str], int],
    nowhere: int,
) -> _Cut:
    column = labels["parameter", name]
    if not parts:
        return _Cut(column, None, None)
    by_rows = all(part.column_start in (None, 0) and part.column_stop in (None, shape[-1]) for part in parts)
    axis = 0 if by_rows else 1
    if not by_rows and any((part.row_start, part.row_stop) != (0, shape[0]) for part in parts):
        raise ValueError(f"{name} is cut into heads or neurons along both axes")
    index = torch.full((shape[axis],), nowhere)
    for part in parts:
        start, stop = (
            (part.row_start, part.row_stop) if by_rows else (part.column_start or 0, part.column_stop)
        )
        if bool((index[start:stop] != nowhere).any()):
            raise ValueError(f"{name}: two heads or neurons share an entry")
        index[start:stop] = labels[part.slice_kind, part.slice]
    return _Cut(column, axis, index)

"""Norms, products and cosines of one optimizer step, parameter by parameter.

Every number is a float64 sum over the float32 tensors of the step. The split of the update is `update_terms`'.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .optimizer import AdamGroup
from .update_terms import adam_terms

# As few calls as possible, each below the 32,768 elements at which torch starts a second thread: the recorder measures
# beside a training that has its own use for every core.
_PIECE = 32_000


@dataclass(frozen=True)
class ParameterStep:
    """What one step did to one parameter; tensors share the parameter's shape.

    `gradient` is raw, `applied` what the optimizer used; both are None when the parameter had no gradient. Moments
    are None for an optimizer without them. `step_count` is the optimizer's counter after the step.
    """

    weight_before: Tensor
    weight_after: Tensor
    gradient: Tensor | None
    applied: Tensor | None
    exp_avg_before: Tensor | None = None
    exp_avg_after: Tensor | None = None
    exp_avg_sq_before: Tensor | None = None
    exp_avg_sq_after: Tensor | None = None
    group: AdamGroup | None = None
    step_count: int = 0


Statistics = dict[str, float | int | bool | None]
Array = np.ndarray[Any, np.dtype[Any]]


# Every vector of a step whose products are taken; the first two are those whose largest entry is, too.
_VECTORS = (
    *("update", "gradient", "applied", "weight_before", "weight_after"),
    *("exp_avg_before", "exp_avg_after", "exp_avg_sq_after"),
    *(_TERMS := ("current_gradient", "momentum", "weight_decay", "residual")),
)
_LENGTHS = {
    "weight_l2_before": "weight_before",
    "weight_l2": "weight_after",
    "delta_l2": "update",
    "gradient_l2": "gradient",
    "clipped_gradient_l2": "applied",
    "exp_avg_l2": "exp_avg_after",
    "exp_avg_sq_l2": "exp_avg_sq_after",
    "current_gradient_l2": "current_gradient",
    "momentum_l2": "momentum",
    "weight_decay_l2": "weight_decay",
    "residual_l2": "residual",
}
_PRODUCTS = {
    "update_dot_weight": ("update", "weight_before", 1),
    "update_dot_negative_gradient": ("update", "gradient", -1),
    "update_dot_negative_clipped_gradient": ("update", "applied", -1),
    "gradient_dot_weight": ("gradient", "weight_before", 1),
    "gradient_dot_exp_avg_before": ("applied", "exp_avg_before", 1),
    "current_gradient_dot_update": ("current_gradient", "update", 1),
    "momentum_dot_update": ("momentum", "update", 1),
    "weight_decay_dot_update": ("weight_decay", "update", 1),
    "residual_dot_update": ("residual", "update", 1),
}
# Those that neither contain the update, which meets every vector, nor are a square.
_PAIRS = [(left, right) for left, right, _ in _PRODUCTS.values() if "update" not in (left, right)]
_COSINES = {
    "update_weight_cosine": ("update", "weight_before", 1),
    "update_gradient_cosine": ("update", "gradient", -1),
    "gradient_momentum_cosine": ("applied", "exp_avg_before", 1),
    "update_momentum_cosine": ("update", "exp_avg_after", -1),
}
_PEAKS = {"delta_max_abs": "update", "gradient_max_abs": "gradient"}


def parameter_statistics(step: ParameterStep) -> Statistics:
    """`step_statistics` of a single parameter."""
    return step_statistics([step])[0]


def step_statistics(steps: Sequence[ParameterStep]) -> list[Statistics]:
    """Rows of `parameter_updates` without their keys, one per parameter of a step, in the order given.

    Norms of NaN are NaN: a broken step is reported as it is. Cosines are None where a vector is zero or absent; the
    terms are None without an Adam group. Parameters that share hyperparameters are measured end to end in one flat
    buffer, because a small model has more parameters than work.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, step in enumerate(steps):
        dtypes = tuple((name, tensor.dtype, tensor.device) for name, tensor in _tensors(step).items())
        alike.setdefault((step.group, step.step_count, dtypes), []).append(index)
    rows: list[Statistics] = [{} for _ in steps]
    for indices in alike.values():
        members = [steps[index] for index in indices]
        for index, row in zip(indices, _measure(members), strict=True):
            rows[index] = row
    return rows


def _tensors(step: ParameterStep) -> dict[str, Tensor]:
    named = {
        "weight_before": step.weight_before,
        "weight_after": step.weight_after,
        "gradient": step.gradient,
        "applied": step.applied,
        "exp_avg_before": step.exp_avg_before,
        "exp_avg_after": step.exp_avg_after,
        "exp_avg_sq_before": step.exp_avg_sq_before,
        "exp_avg_sq_after": step.exp_avg_sq_after,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


class _Workspace(threading.local):
    """Float64[row, piece] to work in: allocated once per thread and device, since fresh memory is half the cost."""

    def __init__(self) -> None:
        self._held: dict[torch.device, Tensor] = {}

    def rows(self, device: torch.device, size: int) -> Tensor:
        held = self._held.get(device)
        if held is None or held.shape[1] < size:
            rows = len(_VECTORS) + len(_SCRATCH)
            held = self._held[device] = torch.empty(
                rows, max(size, _PIECE), dtype=torch.float64, device=device
            )
        return held[:, :size]


_SCRATCH = ("exp_avg_sq_before", "denominator", "ascent", "zero")
_workspace = _Workspace()


def _measure(members: Sequence[ParameterStep]) -> list[Statistics]:
    flat = [{name: t.detach().reshape(-1) for name, t in _tensors(step).items()} for step in members]
    explained = members[0].group is not None and "gradient" in flat[0]
    vectors = [n for n in _VECTORS if n in flat[0] or n == "update" or (explained and n in _TERMS)]
    count = len(vectors)
    products = np.zeros((len(members), count, count))
    diagonal = np.arange(1, count)
    pairs = [(vectors.index(a), vectors.index(b)) for a, b in _PAIRS if {a, b} <= set(vectors)]
    peaks = np.zeros((len(members), 2 if "gradient" in flat[0] else 1))
    for spans in _pieces([len(of["weight_before"]) for of in flat]):
        rows = _workspace.rows(members[0].weight_before.device, spans[-1].end)
        # The vectors lie together, so that one product of matrices takes all of theirs.
        piece = dict(zip((*vectors, *_SCRATCH), rows, strict=False))
        for name in flat[0]:
            parts = [flat[span.member][name][span.start : span.stop] for span in spans]
            piece[name].copy_(parts[0] if len(parts) == 1 else torch.cat(parts))
        torch.sub(piece["weight_after"], piece["weight_before"], out=piece["update"])
        if explained:
            _add_terms(piece, members[0])
        for span in spans:
            part = rows[:count, span.at : span.end]
            # torch's products: NumPy's wake OpenBLAS threads, which then spin beside the training they measure. A Gram
            # matrix of all the vectors would take twice as long as the three kinds of product that are needed.
            found = products[span.member]
            found[0] += torch.mv(part, part[0]).numpy(force=True)
            found[diagonal, diagonal] += torch.linalg.vecdot(part[1:], part[1:]).numpy(force=True)
            for left, right in pairs:
                found[left, right] += float(torch.dot(part[left], part[right]))
            for row, name in enumerate(vectors[: peaks.shape[1]]):
                low, high = torch.aminmax(piece[name][span.at : span.end])
                # NaN wins, as it should.
                peaks[span.member, row] = np.maximum(peaks[span.member, row], max(-float(low), float(high)))
    columns = _columns(products, peaks, vectors)
    return [
        _row(step, {name: values[i] for name, values in columns.items()}) for i, step in enumerate(members)
    ]


@dataclass(frozen=True)
class _Span:
    """Elements `start` to `stop` of parameter `member`, which lie in a piece from `at` on."""

    member: int
    start: int
    stop: int
    at: int

    @property
    def end(self) -> int:
        return self.at + self.stop - self.start


def _pieces(sizes: Sequence[int]) -> Iterator[list[_Span]]:
    """Every element of parameters of these sizes, end to end, in pieces of `_PIECE`."""
    spans: list[_Span] = []
    for member, size in enumerate(sizes):
        start = 0
        while start < size:
            at = spans[-1].end if spans else 0
            spans.append(_Span(member, start, min(size, start + _PIECE - at), at))
            start = spans[-1].stop
            if spans[-1].end == _PIECE:
                yield spans
                spans = []
    if spans:
        yield spans


def _add_terms(piece: dict[str, Tensor], step: ParameterStep) -> None:
    assert step.group is not None
    group, applied, zero = step.group, piece["applied"], piece["zero"]
    if step.exp_avg_before is None or step.exp_avg_sq_before is None:
        zero.zero_()
    current, momentum, decay = adam_terms(
        piece["weight_before"],
        torch.neg(applied, out=piece["ascent"]) if group.maximize else applied,
        zero if step.exp_avg_before is None else piece["exp_avg_before"],
        zero if step.exp_avg_sq_before is None else piece["exp_avg_sq_before"],
        step=step.step_count,
        rate=group.learning_rate,
        beta1=group.beta1,
        beta2=group.beta2,
        eps=group.eps,
        decay=group.weight_decay,
        decoupled=group.decoupled,
        out=[piece[name] for name in (*_TERMS[:3], "denominator")],
    )
    torch.sub(piece["update"], current, out=piece["residual"]).sub_(momentum).sub_(decay)


def _columns(products: Array, peaks: Array, vectors: Sequence[str]) -> dict[str, list[float | None]]:
    """The numbers by name, a value per parameter.

    `products` is Float64[parameter, vector, vector], right of its diagonal where it was asked for, and `peaks`
    Float64[parameter, vector] of the first vectors.
    """
    place = {name: i for i, name in enumerate(vectors)}
    lengths = np.sqrt(np.diagonal(products, axis1=1, axis2=2))

    def product(left: str, right: str, sign: int) -> Array:
        row, column = sorted((place[left], place[right]))
        return sign * products[:, row, column]

    found: dict[str, Array] = {n: lengths[:, place[of]] for n, of in _LENGTHS.items() if of in place}
    found.update({n: product(*of) for n, of in _PRODUCTS.items() if {of[0], of[1]} <= place.keys()})
    found.update({n: peaks[:, place[of]] for n, of in _PEAKS.items() if of in place})
    columns: dict[str, list[float | None]] = {name: values.tolist() for name, values in found.items()}
    for name, (left, right, sign) in _COSINES.items():
        if left in place and right in place:
            scale = lengths[:, place[left]] * lengths[:, place[right]]
            with np.errstate(invalid="ignore", divide="ignore"):
                cosine = np.clip(product(left, right, sign) / scale, -1, 1)
            columns[name] = np.where(scale == 0, None, cosine).tolist()
        else:
            columns[name] = [None] * len(products)
    return columns


def _row(step: ParameterStep, row: Statistics) -> Statistics:
    row.update(
        numel=step.weight_before.numel(),
        has_gradient=step.gradient is not None,
        optimizer_step=step.step_count,
        nonfinite_gradient_entries=_nonfinite(step, row),
    )
    if step.group is not None and step.gradient is not None:
        rate = abs(step.group.learning_rate)
        row.update(
            raw_sgd_l2=rate * _number(row["gradient_l2"]),
            clipped_sgd_l2=rate * _number(row["clipped_gradient_l2"]),
        )
    return row


def _nonfinite(step: ParameterStep, row: Statistics) -> int:
    if step.gradient is None or step.applied is None:
        return 0
    # A sum of squares is finite where every entry is, unless it overflowed: only then are they counted.
    if math.isfinite(_number(row["gradient_l2"]) + _number(row["clipped_gradient_l2"])):
        return 0
    return int((~(step.gradient.isfinite() & step.applied.isfinite())).sum())


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)

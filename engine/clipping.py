"""Which scalar, if any, turned the raw gradients into the ones the optimizer used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_BIT_PATTERN = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, except that any NaN equals any NaN. Zero signs count."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    integer = _BIT_PATTERN[left.element_size()]
    same = torch.equal(left.view(integer), right.view(integer))
    if same or not bool(left.isnan().any()):
        return same
    return bool(((left.view(integer) == right.view(integer)) | (left.isnan() & right.isnan())).all())


def clip_coefficient(raw: Mapping[str, Tensor], applied: Mapping[str, Tensor]) -> float | None:
    """Find the one scalar c with ``raw * c == applied``, bit for bit, over every gradient.

    That is what global-norm clipping (``torch.nn.utils.clip_grad_norm_``) and loss unscaling do. The norm
    itself cannot be recomputed later: a sum's last bit depends on memory alignment. Returns 1.0 for
    untouched gradients, NaN when a non-finite norm turned everything into NaN, and None when no scalar does
    it (value clipping, a coefficient per parameter, added noise, other names on the two sides). c is exact
    in the widest dtype of the gradients; should several scalars fit (few elements), any of them reproduces
    ``applied``.
    """
    if raw.keys() != applied.keys():
        return None
    if all(bits_equal(gradient, applied[name]) for name, gradient in raw.items()):
        return 1.0
    for candidate in _candidates(raw, applied):
        if all(bits_equal(gradient * candidate, applied[name]) for name, gradient in raw.items()):
            return candidate
    return None


def _candidates(raw: Mapping[str, Tensor], applied: Mapping[str, Tensor]) -> Iterator[float]:
    """Scalars that could explain the largest finite gradient: the ratio there and its nearest neighbours."""
    widest = max((g.dtype for g in raw.values()), key=lambda dtype: dtype.itemsize)
    names = [name for name, gradient in raw.items() if gradient.dtype == widest and gradient.numel()]
    peaks = torch.stack([torch.linalg.vector_norm(raw[name].detach(), torch.inf) for name in names])
    if bool(peaks.isfinite().all()):
        name = names[int(peaks.argmax())]
        magnitude = raw[name].abs()
    else:
        finite = {n: torch.where(raw[n].isfinite(), raw[n].abs(), 0) for n in names}
        name = max(finite, key=lambda n: float(finite[n].max()))
        magnitude = finite[name]
    place = int(magnitude.argmax())
    numerator, denominator = (float(side[name].reshape(-1)[place]) for side in (applied, raw))
    if denominator != 0.0 and math.isfinite(denominator):
        ratio = torch.tensor(numerator / denominator, dtype=torch.float64).to(widest)
        # One unit in the last place is one step of the bit pattern. The product was rounded once and the
        # ratio once more, so the coefficient is at most a few steps away.
        pattern = ratio.view(_BIT_PATTERN[ratio.element_size()])
        for offset in (0, 1, -1, 2, -2, 3, -3):
            yield float((pattern + offset).view(widest))
    yield from (
        0.0,
        math.nan,
    )  # an infinite norm gives 0 (and NaN where the gradient is infinite), a NaN norm NaN

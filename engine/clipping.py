"""Which scalar, if any, turned the raw gradients into the ones the optimizer used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_BIT_PATTERN = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLE = 4096


def bits_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two real tensors are equal bit for bit, except that any NaN equals any NaN. Zero signs count."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    if not left.numel():
        return True
    integer = _BIT_PATTERN[left.element_size()]
    # Several times faster than torch.equal, which compares element by element.
    low, high = torch.aminmax(torch.bitwise_xor(left.view(integer), right.view(integer)))
    if int(low) == int(high) == 0:
        return True
    # The extremes of a tensor are NaN if anything in it is, and cost a tenth of isnan().any().
    if not math.isnan(float(torch.aminmax(left).max)):
        return False
    return bool(((left.view(integer) == right.view(integer)) | (left.isnan() & right.isnan())).all())


def clip_coefficient(raw: Mapping[str, Tensor], applied: Mapping[str, Tensor]) -> float | None:
    """Find the one scalar c with ``raw * c == applied``, bit for bit, over every gradient.

    That is what global-norm clipping (``torch.nn.utils.clip_grad_norm_``) and loss unscaling do. The norm
    itself cannot be recomputed later: a sum's last bit depends on memory alignment. Returns 1.0 for untouched
    gradients, NaN when a non-finite norm turned everything into NaN, and None when no scalar does it (value
    clipping, a coefficient per parameter, added noise, other names or shapes on the two sides). c is exact in
    the widest dtype of the gradients; should several scalars fit (few elements), any of them reproduces
    ``applied``.
    """
    if raw.keys() != applied.keys():
        return None
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, gradient in raw.items():
        if gradient.shape != applied[name].shape or gradient.dtype != applied[name].dtype:
            return None
        kinds.setdefault((gradient.dtype, gradient.device), []).append(name)
    # Joined end to end: one pass over many elements costs far less than many passes over few.
    pairs = [(_join(raw, names), _join(applied, names)) for names in kinds.values()]
    if all(bits_equal(before, after) for before, after in pairs):
        return 1.0
    for candidate in _candidates(*max(pairs, key=lambda pair: (pair[0].element_size(), pair[0].numel()))):
        if all(bits_equal(before * candidate, after) for before, after in pairs):
            return candidate
    return None


def _join(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].detach().reshape(-1) for name in names])


def _candidates(before: Tensor, after: Tensor) -> Iterator[float]:
    """Scalars that could explain a large element, Float[elements] each: the ratio there and its neighbours."""
    stride = max(1, before.numel() // _SAMPLE)
    # The largest element of a sample is as good as the largest of all, unless the product underflows there.
    for sample in sorted({stride, 1}, reverse=True):
        magnitude = before[::sample].abs()
        place = sample * int(torch.where(magnitude.isfinite(), magnitude, 0).argmax())
        numerator, denominator = float(after[place]), float(before[place])
        if denominator == 0.0 or not math.isfinite(denominator):
            continue
        ratio = torch.tensor(numerator / denominator, dtype=torch.float64).to(before.dtype)
        # One unit in the last place is one step of the bit pattern. The product was rounded once and the
        # ratio once more, so the coefficient is at most a few steps away.
        pattern = ratio.view(_BIT_PATTERN[ratio.element_size()])
        for offset in (0, 1, -1, 2, -2, 3, -3):
            yield float((pattern + offset).view(before.dtype))
    # An infinite norm gives 0 (and NaN where the gradient is infinite), a NaN norm gives NaN everywhere.
    yield from (0.0, math.nan)

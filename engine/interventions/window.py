"""The positions that an intervention can reach: those from the first it edits to the prediction.

Attention is causal, so that every position before them is that of the untouched run, and so are its keys and values. A run
of one query then follows a few positions instead of its whole record.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..forward import Attended, Model
from ..scalars import Records


def window_of(records: Records, roles: Iterable[str]) -> Tensor:
    """`Int[event, place]`: consecutive positions, ending at the prediction, that hold every position of some roles.

    Those of events that need fewer may begin before the record, with negative numbers. Raises ScalarError for a role that
    cannot be patched.
    """
    first = torch.stack([records.patch_positions(role).int().argmax(-1) for role in roles]).amin(0)
    width = int((records.prediction - first).max()) + 1
    return records.prediction[:, None] - torch.arange(width - 1, -1, -1, device=first.device)


def attend_window(
    model: Model, layer: int, h: Tensor, window: Tensor, clean: Attended, row: Tensor, last: bool
) -> Tensor:
    """What heads mix at the places of a window, `Float[run, event, place, head, d_head]`; `last`: at the prediction alone.

    `h`: the stage they read, `Float[run, event, place, d_model]`; `clean`: the untouched records, `row` of each event.
    """
    start = window[:, 0]
    keys = max(0, int(start.max()))
    query, key, value = (of.transpose(2, 3) for of in model.project(layer, h, window))
    if last:
        query = query[..., -1:, :]
    # [event, head, key, d_head]: the untouched keys are the same for all runs.
    before = [of[:, :keys].index_select(0, row).transpose(1, 2) for of in (clean.key, clean.value)]
    hidden = (torch.arange(keys, device=row.device) >= start[:, None])[:, None, None]
    unseen = _unseen(window, query.shape[-2])[:, None]
    scale = query.shape[-1] ** -0.5
    mixed = []
    # Run by run, so that what comes of one does not depend, by the rounding of a larger product, on those beside it.
    for q, k, v in zip(query, key, value, strict=True):
        earlier = (q @ before[0].mT).masked_fill_(hidden, -torch.inf)
        own = (q @ k.mT).masked_fill_(unseen, -torch.inf)
        weights = torch.cat([earlier, own], -1).mul_(scale).softmax(-1)
        mixed.append(weights[..., :keys] @ before[1] + weights[..., keys:] @ v)
    return torch.stack(mixed).transpose(2, 3)


def _unseen(window: Tensor, asked: int) -> Tensor:
    """`Bool[event, query, key]`: keys after the query, and those before the record; a place always sees itself."""
    place = torch.arange(window.shape[1], device=window.device)
    query = place[-asked:, None]
    return (place > query) | ((window < 0)[:, None] & (place != query))

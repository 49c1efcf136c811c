"""Attention of every head from one query position per event, against all keys up to it; never the whole T × T matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """One query position per event, and the positions it might attend to instead of those it does attend to."""

    row: Tensor
    """`Int[event]`: row of the batch, ascending."""
    position: Tensor
    """`Int[event]`: query position."""
    roles: Tensor
    """`Float[event, role, position]`: a role's weight over its positions up to the query, adding to 1; 0 if it has none."""
    batch: int
    """Rows of the batch."""

    @cached_property
    def slot(self) -> Tensor:
        """`Int[event]`: place of an event among those of its row."""
        place = torch.arange(len(self.row), device=self.row.device)
        first = torch.searchsorted(self.row, self.row)
        return place - first

    @cached_property
    def slots(self) -> int:
        """Most events in a row."""
        return int(self.slot.max()) + 1

    @cached_property
    def place(self) -> Tensor:
        """`Int[event]`: place of an event in `[batch · slot]`."""
        return self.row * self.slots + self.slot

    def events(self, values: Tensor) -> Tensor:
        """`[batch, head, slot, …]` as `[event, head, …]`."""
        return values.transpose(1, 2).flatten(0, 1).index_select(0, self.place)

    def padded(self, values: Tensor) -> Tensor:
        """`[event, …]` as `[batch, slot, …]`, 0 where a row has fewer events."""
        out = values.new_zeros(self.batch, self.slots, *values.shape[1:])
        out[self.row, self.slot] = values
        return out

    @cached_property
    def positions(self) -> Tensor:
        """`Int[batch, slot]`."""
        return self.padded(self.position)

    @cached_property
    def padded_roles(self) -> Tensor:
        """`Float[batch, slot · role, position]`."""
        return self.padded(self.roles).flatten(1, 2)

    @cached_property
    def hidden(self) -> Tensor:
        """`Float[batch, 1, slot, key]`: -inf after the query position, else 0."""
        keys = torch.arange(self.roles.shape[-1], device=self.row.device)
        after = keys > self.positions[..., None]
        return torch.where(after, -math.inf, 0.0)[:, None]

    def lists(self, layers: Sequence[Tensor]) -> Tensor:
        """`Float[batch, head, slot, key]` per layer as `Float[value]`: by event, layer, head, key from 0 to the query."""
        rows = [self.events(layer) for layer in layers]
        stacked = torch.stack(rows, 1).flatten(1, 2)
        return stacked.reshape(-1).index_select(0, self._places(stacked.shape[1]))

    def _places(self, heads: int) -> Tensor:
        length = self.roles.shape[-1]
        if heads not in self._cache:
            keys = torch.arange(length, device=self.row.device)
            visible = (keys <= self.position[:, None])[:, None].expand(-1, heads, -1)
            self._cache[heads] = visible.reshape(-1).nonzero()[:, 0]
        return self._cache[heads]

    @cached_property
    def _cache(self) -> dict[int, Tensor]:
        return {}


@dataclass(frozen=True)
class Attended:
    """What the heads of one layer do at the query positions."""

    queries: Queries
    scores: Tensor
    """`Float[batch, head, slot, key]`: q·k/√d_head, -inf after the query."""
    probabilities: Tensor
    """`Float[batch, head, slot, key]`: their softmax."""
    values: Tensor
    """`Float[batch, head, position, d_head]`."""

    @cached_property
    def mixed(self) -> Tensor:
        """`Float[event, head, role, d_head]`: the mean value vector of each role, then the one that attention mixes."""
        queries, values = self.queries, self.values
        batch, heads, length, width = values.shape
        written = queries.events(self.probabilities @ values)
        flat = values.transpose(1, 2).reshape(batch, length, heads * width)
        means = (queries.padded_roles @ flat).reshape(batch * queries.slots, -1, heads, width)
        of_roles = means.index_select(0, queries.place).transpose(1, 2)
        return torch.cat([of_roles, written[:, :, None]], 2)


def attend(queries: Queries, query: Tensor, keys: Tensor, values: Tensor) -> Attended:
    """From `Float[batch, head, position, d_head]` of a layer, at the query positions only."""
    place = queries.positions[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    chosen = query.gather(2, place) / math.sqrt(query.shape[-1])
    scores = (chosen @ keys.transpose(-2, -1)).add_(queries.hidden)
    return Attended(queries, scores, scores.softmax(-1), values)

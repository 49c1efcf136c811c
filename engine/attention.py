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
    def hidden(self) -> Tensor:
        """`Float[batch, 1, slot, key]`: -inf after the query position, else 0."""
        keys = torch.arange(self.roles.shape[-1], device=self.row.device)
        after = keys > self.positions[..., None]
        return torch.where(after, -math.inf, 0.0)[:, None]

    @cached_property
    def at(self) -> Tensor:
        """`Int[event]`: row · length + position of the query."""
        return self.row * self.roles.shape[-1] + self.position

    @cached_property
    def padded_at(self) -> Tensor:
        """`Int[batch · slot]`: the same, padded."""
        return self.padded(self.at).flatten()

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor, Tensor]:
        """Places of every event and role, one after the other, where each of `[event · role]` starts, and their weights."""
        event, role, position = self.roles.nonzero(as_tuple=True)
        count = self.roles.shape[1]
        starts = torch.arange(len(self.row) * count, device=self.row.device)
        place = self.row[event] * self.roles.shape[-1] + position
        return place, torch.searchsorted(event * count + role, starts), self.roles[event, role, position]

    def lists(self, values: Tensor) -> Tensor:
        """`Float[layer, batch, head, slot, key]` as `Float[value]`: by event, layer, head, key from 0 to the query."""
        return values.reshape(-1).index_select(0, self._places(*values.shape[::2][:2]))

    def _places(self, layers: int, heads: int) -> Tensor:
        if (layers, heads) not in self._cache:
            shape = (layers, self.batch, heads, self.slots, self.roles.shape[-1])
            place = torch.arange(math.prod(shape), device=self.row.device).view(shape)
            of_event = place[:, self.row, :, self.slot]
            visible = torch.arange(shape[-1], device=self.row.device) <= self.position[:, None]
            self._cache[layers, heads] = of_event[visible[:, None, None].expand_as(of_event)]
        return self._cache[layers, heads]

    @cached_property
    def _cache(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def mixes(self, values: Tensor, mixed: Tensor) -> Tensor:
        """`Float[event, role, head, d_head]` of a layer's `Float[batch, head, position, d_head]`: the mean value vector of
        each role, then what attention mixes at the query."""
        events, roles, _ = self.roles.shape
        written = _by_place(mixed).index_select(0, self.at)[:, None]
        if roles:
            # A role has few positions: a matrix product with their weights would be mostly zeros.
            place, start, weight = self._bags
            means = torch.embedding_bag(
                _by_place(values), place, start, mode=0, sparse=False, per_sample_weights=weight
            )[0]
            written = torch.cat([means.view(events, roles, -1), written], 1)
        return written.view(events, roles + 1, values.shape[1], values.shape[3])


@dataclass(frozen=True)
class Attended:
    """Where the heads of every layer attend to from the query positions."""

    scores: Tensor
    """`Float[layer, batch, head, slot, key]`: q·k/√d_head, -inf after the query."""
    probabilities: Tensor
    """`Float[layer, batch, head, slot, key]`: their softmax."""


def attend(queries: Queries, query: Sequence[Tensor], keys: Sequence[Tensor]) -> Attended:
    """From `Float[batch, head, position, d_head]` of every layer, at the query positions only."""
    found = []
    for of, seen in zip(query, keys, strict=True):
        batch, heads, _, width = of.shape
        chosen = _by_place(of).index_select(0, queries.padded_at).div_(math.sqrt(width))
        found.append(chosen.view(batch, -1, heads, width).transpose(1, 2) @ seen.mT)
    scores = torch.stack(found).add_(queries.hidden)
    return Attended(scores, scores.softmax(-1))


def _by_place(values: Tensor) -> Tensor:
    """`Float[batch, head, position, d_head]` as `Float[place, head · d_head]`: a view of what a projection gave."""
    return values.transpose(1, 2).flatten(2).flatten(0, 1)

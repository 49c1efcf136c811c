"""Splits as tensors: padded once, then indexed, so that no step loops over records or events.

Shapes are written `Kind[axis, …]`: `record` or `batch` counts records, `position` tokens, `event` the query
events of the records in row-major order (record, then query). Source: definitions A.7.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .records import Record
from .vocabulary import PAD_ID

TOKEN_ROLES = ("op_write", "key_write", "value_write", "op_read", "key_read", "value_answer", "eos")
"""What a token of a stream can be. `token_role` holds places in this tuple; -1 is `<bos>` or padding."""

_STEP_ROLES = {"write": ("op", "key", "value"), "read": ("op", "key", "answer")}
_FIRST_ROLE = {"write": 0, "read": 3}


@dataclass(frozen=True)
class QueryEvents:
    """Query events as parallel columns, all `Int[event]`."""

    row: Tensor
    """Row of the batch (in an `EncodedSplit`: of the split) the event belongs to."""
    query_index: Tensor
    prediction_position: Tensor
    """Position of the read key, whose logits predict the answer."""
    answer_token: Tensor
    support_key_position: Tensor
    support_value_position: Tensor
    slot_after_write: Tensor
    writes_since_support: Tensor
    tokens_since_support: Tensor

    def __len__(self) -> int:
        return int(self.row.shape[0])

    def select(self, index: Tensor) -> QueryEvents:
        """The events at `index`, in that order."""
        return QueryEvents(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> QueryEvents:
        """The same columns on another device."""
        return QueryEvents(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    """Right-padded records, cut to the longest of them."""

    sample_ids: tuple[str, ...]
    token_ids: Tensor
    """`Int[batch, position]`, 0 (`<pad>`) beyond a record's end."""
    attention_mask: Tensor
    """`Bool[batch, position]`, true on the record's own tokens."""
    token_role: Tensor
    """`Int[batch, position]`, see `TOKEN_ROLES`."""
    events: QueryEvents
    record_index: Tensor
    """`Int[batch]`: which records of the split these are."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def targets(self) -> Tensor:
        """Next-token targets `Int[batch, position - 1]`, -100 (no target) where the target is padding."""
        return self.token_ids[:, 1:].masked_fill(~self.attention_mask[:, 1:], -100)


@dataclass(frozen=True)
class EncodedSplit:
    """A whole split as tensors; `batch` cuts any records out of it."""

    sample_ids: tuple[str, ...]
    token_ids: Tensor
    token_role: Tensor
    lengths: Tensor
    """`Int[record]`, tokens per record. Stays on the CPU, where batches are cut."""
    events: QueryEvents
    event_start: Tensor
    """`Int[record + 1]`: record `r` owns the events `event_start[r]` to `event_start[r + 1]`. On the CPU."""
    axes: dict[str, Tensor]
    """Axis name to `Int[record]`."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> Self:
        """The same split, its large tensors on another device."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            token_role=self.token_role.to(device),
            events=self.events.to(device),
        )

    def batch(self, record_index: Tensor) -> Batch:
        """The records at `record_index` (`Int[batch]`, on the CPU), in that order."""
        lengths = self.lengths[record_index]
        width = int(lengths.max())
        device = self.token_ids.device
        on_device = record_index.to(device)
        counts = self.event_start[record_index + 1] - self.event_start[record_index]
        rows = torch.repeat_interleave(torch.arange(len(record_index)), counts)
        first_of_row = torch.cumsum(counts, 0) - counts
        event_index = torch.arange(len(rows)) + (self.event_start[record_index] - first_of_row)[rows]
        return Batch(
            sample_ids=tuple(self.sample_ids[index] for index in record_index.tolist()),
            token_ids=self.token_ids[on_device, :width],
            attention_mask=(torch.arange(width) < lengths[:, None]).to(device),
            token_role=self.token_role[on_device, :width],
            events=replace(self.events.select(event_index.to(device)), row=rows.to(device)),
            record_index=record_index,
        )

    def batches(self, batch_size: int, max_batches: int | None = None) -> Iterable[Batch]:
        """Consecutive batches in file order; the last may be smaller."""
        chunks = torch.split(torch.arange(len(self)), batch_size)
        return (self.batch(chunk) for chunk in chunks[:max_batches])


def encode_records(records: Sequence[Record]) -> EncodedSplit:
    """Pad all records of a split once, and flatten their query events. Raises `ValueError` without any."""
    if not records:
        raise ValueError("no records to encode")
    lengths = np.array([len(record["token_ids"]) for record in records])
    token_ids = np.full((len(records), lengths.max()), PAD_ID)
    token_ids[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(
        [record["token_ids"] for record in records]
    )
    counts = np.array([len(record["query_events"]) for record in records])
    return EncodedSplit(
        sample_ids=tuple(record["sample_id"] for record in records),
        token_ids=torch.from_numpy(token_ids),
        token_role=torch.from_numpy(_token_roles(records, token_ids.shape, lengths)),
        lengths=torch.from_numpy(lengths),
        events=_encode_events(records, token_ids, counts),
        event_start=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        axes={
            axis: torch.tensor([record["axes"][axis] for record in records]) for axis in records[0]["axes"]
        },
    )


def collate(records: Sequence[Record]) -> Batch:
    """One batch of exactly these records, in order."""
    return encode_records(records).batch(torch.arange(len(records)))


def _token_roles(records: Sequence[Record], shape: tuple[int, ...], lengths: Any) -> Any:
    roles = np.full(shape, -1)
    cells = [
        (row, step["positions"][name], _FIRST_ROLE[step["op"]] + offset)
        for row, record in enumerate(records)
        for step in record["steps"]
        for offset, name in enumerate(_STEP_ROLES[step["op"]])
    ]
    row, position, role = np.array(cells).T
    roles[row, position] = role
    roles[np.arange(len(records)), lengths - 1] = TOKEN_ROLES.index("eos")
    return roles


def _encode_events(records: Sequence[Record], token_ids: Any, counts: Any) -> QueryEvents:
    columns = np.array(
        [
            (
                event["query_index"],
                event["positions"]["key"],
                event["positions"]["answer"],
                event["support_positions"]["key"],
                event["support_positions"]["value"],
                event["slot_after_write"],
                event["writes_since_support"],
                event["tokens_since_support"],
            )
            for record in records
            for event in record["query_events"]
        ],
        dtype=np.int64,
    ).reshape(-1, 8)
    row = np.repeat(np.arange(len(records)), counts)
    query, prediction, answer, support_key, support_value, slot, writes_since, tokens_since = columns.T
    answer_token = token_ids[row, answer]
    ordered = (
        row,
        query,
        prediction,
        answer_token,
        support_key,
        support_value,
        slot,
        writes_since,
        tokens_since,
    )
    return QueryEvents(*(torch.from_numpy(np.ascontiguousarray(column)) for column in ordered))

"""A probe as rows: tables probes, probe_examples, events, positions and activation_rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..engine.probe import Probe, ProbeEvent, ProbeRecord
from ..lake import UnitWriter
from ..lake.names import canonical_json


def write_probe(
    writer: UnitWriter,
    name: str,
    probe: Probe,
    source: str,
    *,
    parent: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    max_pairs_per_type: int | None = None,
) -> None:
    """Adds every row of one probe to a unit."""
    writer.rows(
        "probes",
        [
            {
                "probe": name,
                "source": source,
                "parent_probe": parent,
                "sha256": probe.sha256,
                "num_examples": len(probe.records),
                "num_events": probe.num_events,
                "splits": list(probe.splits),
                "vocabulary": None if probe.vocabulary is None else list(probe.vocabulary),
                "key_tokens": None if probe.key_tokens is None else list(probe.key_tokens),
                "value_tokens": None if probe.value_tokens is None else list(probe.value_tokens),
                "max_pairs_per_type": max_pairs_per_type,
                "metadata": None if metadata is None else canonical_json(dict(metadata)),
            }
        ],
    )
    writer.rows("probe_examples", _example_rows(name, probe))
    writer.rows("events", _event_rows(name, probe))
    writer.rows("positions", _columns(_POSITION_COLUMNS, _position_rows(name, probe)))
    writer.rows("activation_rows", _columns(_ACTIVATION_COLUMNS, _activation_rows(name, probe)))


_POSITION_COLUMNS = ("probe", "event", "kind", "role", "position", "token", "text")
_ACTIVATION_COLUMNS = ("probe", "layout", "row", "example", "position")


def _columns(names: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Tuples as columns: hundreds of thousands of dicts would take longer than all the rest."""
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _events(probe: Probe) -> Iterator[tuple[int, int, int, ProbeRecord, ProbeEvent]]:
    """Every event with its number, its record's number, and its place in the record."""
    number = 0
    for example, record in enumerate(probe.records):
        for query_index, event in enumerate(record.events):
            yield number, example, query_index, record, event
            number += 1


def _example_rows(name: str, probe: Probe) -> list[dict[str, Any]]:
    return [
        {
            "probe": name,
            "example": example,
            "sample_id": record.sample_id,
            "split": record.split,
            "tokens": list(record.token_ids),
            "record": None if record.source is None else canonical_json(record.source),
        }
        for example, record in enumerate(probe.records)
    ]


def _event_rows(name: str, probe: Probe) -> list[dict[str, Any]]:
    return [
        {
            "probe": name,
            "event": number,
            "example": example,
            "sample_id": record.sample_id,
            "split": record.split,
            "query_index": query_index,
            "prediction_position": event.prediction,
            "answer_token": event.answer,
            "answer": probe.text(event.answer),
            "competitors": list(event.competitors),
        }
        for number, example, query_index, record, event in _events(probe)
    ]


def _position_rows(name: str, probe: Probe) -> Iterator[tuple[Any, ...]]:
    for number, _, _, record, event in _events(probe):
        tokens = record.token_ids
        texts = [probe.text(token) for token in tokens]
        for role, positions in event.roles.items():
            for position in positions:
                yield name, number, "role", role, position, tokens[position], texts[position]
        for position, role in event.partition.items():
            yield name, number, "partition", role, position, tokens[position], texts[position]


def _activation_rows(name: str, probe: Probe) -> Iterator[tuple[Any, ...]]:
    """Layout `roles`: positions with a role in some event of their record; layout `all`: every position."""
    row = 0
    for example, record in enumerate(probe.records):
        held = {position for event in record.events for of in event.roles.values() for position in of}
        for position in sorted(held):
            yield name, "roles", row, example, position
            row += 1
    row = 0
    for example, record in enumerate(probe.records):
        for position in range(len(record.token_ids)):
            yield name, "all", row, example, position
            row += 1

"""A probe as rows: tables probes, probe_examples, events, positions and activation_rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    writer.rows("positions", _position_columns(name, probe))
    writer.rows("activation_rows", _activation_columns(name, probe))


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


def _position_columns(name: str, probe: Probe) -> dict[str, list[Any]]:
    """Columns and no row objects: there are hundreds of thousands of rows."""
    events: list[int] = []
    kinds: list[str] = []
    roles: list[str] = []
    positions: list[int] = []
    tokens: list[int] = []
    for number, _, _, record, event in _events(probe):
        before = len(positions)
        for role, held in event.roles.items():
            roles += [role] * len(held)
            positions += held
        kinds += ["role"] * (len(positions) - before)
        roles += event.partition.values()
        positions += event.partition
        kinds += ["partition"] * len(event.partition)
        tokens += [record.token_ids[position] for position in positions[before:]]
        events += [number] * (len(positions) - before)
    return {
        "probe": [name] * len(events),
        "event": events,
        "kind": kinds,
        "role": roles,
        "position": positions,
        "token": tokens,
        "text": [probe.text(token) for token in tokens],
    }


def _activation_columns(name: str, probe: Probe) -> dict[str, list[Any]]:
    """Layout `roles`: positions with a role in some event of their record; layout `all`: every position."""
    columns: dict[str, list[Any]] = {"layout": [], "row": [], "example": [], "position": []}
    for layout in ("roles", "all"):
        row = 0
        for example, record in enumerate(probe.records):
            held = _named_positions(record) if layout == "roles" else range(len(record.token_ids))
            columns["layout"] += [layout] * len(held)
            columns["row"] += range(row, row + len(held))
            columns["example"] += [example] * len(held)
            columns["position"] += held
            row += len(held)
    return {"probe": [name] * len(columns["row"]), **columns}


def _named_positions(record: ProbeRecord) -> list[int]:
    return sorted({position for event in record.events for of in event.roles.values() for position in of})

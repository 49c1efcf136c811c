"""Where the parts of a query stand in its record: named position roles, and the partition of what the query can see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import LakebedError
from .records import Record

ROLES = (
    "prediction",
    "query_key",
    "current_read_key",
    "support_key",
    "support_value",
    "support_op",
    "support_write",
    "key_distractors",
    "value_distractors",
    "all_query_relation",
)
"""Roles of an event, definitions 1 §E; `causal_prefix`, every position up to the prediction, is implied."""

WRITE_CLASSES = ("support_write", "same_key_stale_write", "other_key_write")
PARTITION_ROLES = (
    "bos",
    *(f"{of}_{part}" for of in WRITE_CLASSES for part in ("op", "key", "value")),
    *(f"prior_read_{part}" for part in ("op", "key", "answer")),
    "current_read_op",
    "current_read_key_self",
    "other",
)
"""The parts that cover each position up to the prediction exactly once, definitions 2 §B."""


class RoleError(LakebedError):
    """An event whose positions make no sense."""


def event_roles(record: Record, event: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Positions of every role of `ROLES`, each ascending and distinct.

    Distractors are the tokens of every write but the support, also of writes after the query: whoever scores keys keeps
    those up to the query position. Raises RoleError for a support after the query, or an event without a distractor.
    """
    where = f"{record['sample_id']}: query {event['query_index']}"
    prediction = int(event["positions"]["key"])
    support = event["support_positions"]
    if max(support.values()) > prediction:
        raise RoleError(
            f"{where} has its support write at {support['op']}, after the prediction at {prediction}"
        )
    others = [
        step["positions"]
        for step in record["steps"]
        if step["op"] == "write" and step["write_index"] != event["support_write_index"]
    ]
    if not others:
        raise RoleError(f"{where} has no write but its support, so no distractor")
    return {
        "prediction": (prediction,),
        "query_key": (prediction,),
        "current_read_key": (prediction,),
        "support_key": (support["key"],),
        "support_value": (support["value"],),
        "support_op": (support["op"],),
        "support_write": (support["op"], support["key"], support["value"]),
        "key_distractors": tuple(sorted(positions["key"] for positions in others)),
        "value_distractors": tuple(sorted(positions["value"] for positions in others)),
        "all_query_relation": tuple(sorted((support["key"], support["value"], prediction))),
    }


def event_partition(record: Record, event: Mapping[str, Any]) -> dict[int, str]:
    """Position to its part (`PARTITION_ROLES`), for each position from 0 to the prediction, ascending."""
    prediction = int(event["positions"]["key"])
    parts: dict[int, str] = dict.fromkeys(range(prediction + 1), "other")
    parts[0] = "bos"
    for step in record["steps"]:
        positions = step["positions"]
        if positions["op"] > prediction:
            break
        if positions["key"] == prediction:
            parts[positions["op"]] = "current_read_op"
            parts[prediction] = "current_read_key_self"
            break
        of = _write_class(step, event) if step["op"] == "write" else "prior_read"
        for part, position in positions.items():
            parts[position] = f"{of}_{part}"
    return parts


def _write_class(step: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    if step["write_index"] == event["support_write_index"]:
        return "support_write"
    return "same_key_stale_write" if step["key"] == event["key"] else "other_key_write"

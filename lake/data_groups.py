"""Groups of causal patch pairs by fields of theirs: `pair_type`, `mutation.changed_role`, … (definitions 2 §D)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import LakebedError

ALL = "__all__"
PAIR_FIELDS = (
    "pair_id",
    "pair_type",
    "split",
    "source_sample_id",
    "source_query_index",
    "clean_answer_value",
    "corrupted_answer_value",
    "clean_transfer_token",
    "corrupted_transfer_token",
    "mutation",
)


class DataGroupError(LakebedError):
    """A field that a pair does not have, or whose value cannot name a group."""


def group_values(pair: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Values of a pair's fields; dots descend into objects. Raises DataGroupError, naming the pair and what it has."""
    row = {name: pair[name] for name in PAIR_FIELDS}
    row["mutation"] = json.loads(row["mutation"])
    return {field: _value(row, field) for field in fields}


def _value(row: Mapping[str, Any], field: str) -> Any:
    held: Any = row
    for name in field.split("."):
        if not isinstance(held, Mapping) or name not in held:
            there = f"it has {', '.join(held)}" if isinstance(held, Mapping) else "it has no fields"
            raise DataGroupError(f"--data-group-field {field}: no {name!r} in pair {row['pair_id']}; {there}")
        held = held[name]
    if isinstance(held, Mapping):
        raise DataGroupError(
            f"--data-group-field {field}: an object in pair {row['pair_id']}; name one of its values, "
            + ", ".join(f"{field}.{name}" for name in held)
        )
    if isinstance(held, list) or held is None:
        what = "null" if held is None else "a list"
        raise DataGroupError(
            f"--data-group-field {field}: {what} in pair {row['pair_id']}; a group needs one value"
        )
    return held


def group_id(values: Mapping[str, Any]) -> str:
    """`field=value|field=value`; the group without values is all pairs."""
    return "|".join(f"{field}={value}" for field, value in values.items()) or ALL


def group_pairs(pairs: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Values of every group by id: all pairs first, then by values. Raises DataGroupError also where two share an id."""
    groups: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        values = group_values(pair, fields)
        held = groups.setdefault(group_id(values), values)
        if list(map(repr, held.values())) != list(map(repr, values.values())):
            raise DataGroupError(
                f"--data-group-field: the values {held} and {values} both name group {group_id(values)}"
            )
    order = sorted(groups, key=lambda name: tuple(map(_order, groups[name].values())))
    return {ALL: {}, **{name: groups[name] for name in order if groups[name]}}


def _order(value: Any) -> tuple[str, Any]:
    """Numbers by size, texts by letter."""
    return ("", value) if isinstance(value, int | float) else ("text", str(value))

"""Causal patch pairs: a query of a record, and the same record changed in one respect that decides the answer or does not.

A pair's clean side is the record itself. `find_pair` names the change, `corrupt` makes the changed record; nothing is
random. Source: definitions 1 §F.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .checks import OracleError
from .records import Plan, Query, Record
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class PairTask:
    """What the replacement of a value is chosen from: the vocabulary, and which (key, value) pairs are held out."""

    vocabulary: Vocabulary
    held_out: frozenset[tuple[str, str]]

    def replacement(self, record: Record, key: str, held_out: bool) -> str | None:
        """First value in vocabulary order, unused in the record, whose pair with `key` has this held-out status."""
        used = {write["value"] for write in record["writes"]}
        return next(
            (
                value
                for value in self.vocabulary.value_tokens
                if value not in used and ((key, value) in self.held_out) == held_out
            ),
            None,
        )

    def answer_pair_type(self, key: str, value: str) -> str:
        """`heldout` or `seen`, as a query event says it."""
        return "heldout" if (key, value) in self.held_out else "seen"


@dataclass(frozen=True)
class Pair:
    """One causal patch pair, without the corrupted record; `corrupt` makes that."""

    pair_id: str
    pair_type: str
    split: str
    source_sample_id: str
    source_query_index: int
    clean_answer_value: str
    corrupted_answer_value: str
    clean_transfer_token: str
    corrupted_transfer_token: str
    mutation: Mapping[str, Any]


@dataclass(frozen=True)
class Skip:
    """Why a query has no pair of a type."""

    reason: str


def find_pair(task: PairTask, record: Record, event: Mapping[str, Any], pair_type: str) -> Pair | Skip:
    """The pair of this type for one query event of a record. Raises ValueError naming the types for another."""
    if pair_type not in _FINDERS:
        raise ValueError(f"no pair type {pair_type!r}; there are {', '.join(_FINDERS)}")
    return _FINDERS[pair_type](task, record, event)


def _pair(
    record: Record,
    event: Mapping[str, Any],
    pair_type: str,
    suffix: str,
    corrupted_answer: str,
    mutation: dict[str, Any],
    transfer: tuple[str, str] | None = None,
) -> Pair:
    answer = event["answer_value"]
    clean_token, corrupted_token = transfer or (answer, corrupted_answer)
    return Pair(
        pair_id=f"{pair_type}:{record['sample_id']}:{event['query_index']}:{suffix}",
        pair_type=pair_type,
        split=record["split"],
        source_sample_id=record["sample_id"],
        source_query_index=event["query_index"],
        clean_answer_value=answer,
        corrupted_answer_value=corrupted_answer,
        clean_transfer_token=clean_token,
        corrupted_transfer_token=corrupted_token,
        mutation=mutation,
    )


def _writes_before(record: Record, event: Mapping[str, Any]) -> list[dict[str, Any]]:
    writes: list[dict[str, Any]] = record["writes"][: event["slot_after_write"] + 1]
    return writes


def _supports_used_before(record: Record, event: Mapping[str, Any]) -> set[int]:
    """Writes whose value an earlier read shows, so that changing them would contradict the stream."""
    return {
        other["support_write_index"]
        for other in record["query_events"]
        if other["query_index"] < event["query_index"]
    }


def _find_query_key(task: PairTask, record: Record, event: Mapping[str, Any]) -> Pair | Skip:
    latest = {write["key"]: write for write in _writes_before(record, event)}
    others = sorted(
        key
        for key, write in latest.items()
        if key != event["key"] and write["value"] != event["answer_value"]
    )
    if not others:
        return Skip("no_alternative_current_key")
    key = others[0]
    mutation = {
        "changed_role": "current_read_key",
        "clean_query_key": event["key"],
        "corrupted_query_key": key,
        "clean_support_write_index": event["support_write_index"],
        "corrupted_support_write_index": latest[key]["write_index"],
    }
    return _pair(record, event, "query_key", key, latest[key]["value"], mutation)


def _find_support_value(task: PairTask, record: Record, event: Mapping[str, Any]) -> Pair | Skip:
    support = event["support_write_index"]
    if support in _supports_used_before(record, event):
        return Skip("support_write_used_by_prior_read")
    value = task.replacement(record, event["key"], held_out=event["answer_pair_type"] == "heldout")
    if value is None:
        return Skip("no_replacement_value_for_support_pair_type")
    mutation = {
        "changed_role": "support_write_value",
        "query_key": event["key"],
        "support_write_index": support,
        "clean_support_value": event["answer_value"],
        "corrupted_support_value": value,
    }
    return _pair(record, event, "support_value", value, value, mutation)


def _find_recency(task: PairTask, record: Record, event: Mapping[str, Any]) -> Pair | Skip:
    support, key = event["support_write_index"], event["key"]
    stale = [write for write in record["writes"][:support] if write["key"] == key]
    used = _supports_used_before(record, event)
    if not stale:
        return Skip("no_same_key_stale_write")
    if support in used:
        return Skip("support_write_used_by_prior_read")
    eligible = [
        write
        for write in stale
        if write["write_index"] not in used and write["value"] != event["answer_value"]
    ]
    if not eligible:
        return Skip("same_key_stale_writes_used_by_prior_reads")
    chosen = eligible[-1]
    mutation = {
        "changed_role": "same_key_write_order_values",
        "query_key": key,
        "stale_write_index": chosen["write_index"],
        "support_write_index": support,
        "clean_latest_value": event["answer_value"],
        "corrupted_latest_value": chosen["value"],
    }
    return _pair(record, event, "recency", str(chosen["write_index"]), chosen["value"], mutation)


def _find_distractor(task: PairTask, record: Record, event: Mapping[str, Any]) -> Pair | Skip:
    others = [write for write in _writes_before(record, event) if write["key"] != event["key"]]
    if not others:
        return Skip("no_distractor_write")
    used = _supports_used_before(record, event)
    for write in reversed(others):
        index, key, value = write["write_index"], write["key"], write["value"]
        replacement = task.replacement(record, key, held_out=(key, value) in task.held_out)
        if index in used or replacement is None:
            continue
        mutation = {
            "changed_role": "distractor_write_value",
            "query_key": event["key"],
            "distractor_key": key,
            "distractor_write_index": index,
            "clean_distractor_value": value,
            "corrupted_distractor_value": replacement,
        }
        suffix = f"{index}:{replacement}"
        answer = event["answer_value"]
        return _pair(record, event, "distractor", suffix, answer, mutation, (value, replacement))
    return Skip("no_eligible_distractor_replacement")


_FINDERS: dict[str, Callable[[PairTask, Record, Mapping[str, Any]], Pair | Skip]] = {
    "query_key": _find_query_key,
    "support_value": _find_support_value,
    "recency": _find_recency,
    "distractor": _find_distractor,
}
PAIR_TYPES = tuple(_FINDERS)


# -- the two records of a pair -------------------------------------------------------------------------------


def clean_record(task: PairTask, record: Record, pair: Pair) -> Record:
    """The source record reduced to the pair's query; its tokens are those of the source."""
    return _single_query(task, record, pair, "clean", changed_values={}, read_key=None)


def corrupt(task: PairTask, record: Record, pair: Pair) -> Record:
    """The changed record reduced to the pair's query.

    Reads after the query keep their tokens, so they may contradict a changed write. Raises OracleError if the query's
    own answer, support or positions are not what replaying the new stream gives.
    """
    mutation = pair.mutation
    changed: dict[int, str] = {}
    if pair.pair_type == "support_value":
        changed = {mutation["support_write_index"]: mutation["corrupted_support_value"]}
    elif pair.pair_type == "distractor":
        changed = {mutation["distractor_write_index"]: mutation["corrupted_distractor_value"]}
    elif pair.pair_type == "recency":
        changed = {
            mutation["support_write_index"]: mutation["corrupted_latest_value"],
            mutation["stale_write_index"]: mutation["clean_latest_value"],
        }
    return _single_query(
        task, record, pair, "corrupted", changed, read_key=mutation.get("corrupted_query_key")
    )


def _single_query(
    task: PairTask,
    record: Record,
    pair: Pair,
    side: str,
    changed_values: Mapping[int, str],
    read_key: str | None,
) -> Record:
    source = record["query_events"][pair.source_query_index]
    key = read_key or source["key"]
    writes = [
        {**write, "value": changed_values.get(write["write_index"], write["value"])}
        for write in record["writes"]
    ]
    support = next(
        write for write in reversed(writes[: source["slot_after_write"] + 1]) if write["key"] == key
    )
    answer, support_index = support["value"], support["write_index"]
    lag = source["slot_after_write"] - support_index
    steps = [
        _changed_step(step, source, writes, key=key, answer=answer, support=support_index)
        for step in record["steps"]
    ]
    support_positions = next(
        step["positions"] for step in steps if step["op"] == "write" and step["write_index"] == support_index
    )
    tokens = list(record["tokens"])
    for step in steps:
        tokens[step["positions"]["key"]] = step["key"]
        tokens[step["positions"]["value" if step["op"] == "write" else "answer"]] = step["value"]
    event = {
        **source,
        "query_index": 0,
        "key": key,
        "answer_value": answer,
        "support_write_index": support_index,
        "writes_since_support": lag,
        "tokens_since_support": source["positions"]["answer"] - support_positions["value"],
        "positions": dict(source["positions"]),
        "support_positions": dict(support_positions),
        "answer_pair_type": task.answer_pair_type(key, answer),
    }
    query = Query(source["slot_after_write"], key, support_index)
    plan = Plan(tuple((write["key"], write["value"]) for write in writes), (query,))
    made = {
        **record,
        "sample_id": f"{pair.pair_id}:{side}",
        "tokens": tokens,
        "token_ids": [task.vocabulary.ids[token] for token in tokens],
        "writes": writes,
        "query_plan": [
            {
                "slot_after_write": query.slot,
                "key": key,
                "support_write_index": support_index,
                "writes_since_support": lag,
            }
        ],
        "steps": steps,
        "query_events": [event],
        "latent_program_signature": plan.signature(),
        "exact_sequence_signature": " ".join(tokens),
        "source_sample_id": pair.source_sample_id,
        "source_query_index": pair.source_query_index,
    }
    check_single_query(task, made)
    return made


def _changed_step(
    step: dict[str, Any],
    source: Mapping[str, Any],
    writes: list[dict[str, Any]],
    *,
    key: str,
    answer: str,
    support: int,
) -> dict[str, Any]:
    if step["op"] == "write":
        return {**step, "value": writes[step["write_index"]]["value"]}
    if step["step_index"] == source["step_index"]:
        return {**step, "key": key, "value": answer, "support_write_index": support}
    return step


def check_single_query(task: PairTask, record: Record) -> None:
    """Replays the tokens up to the query; raises OracleError unless answer, support and positions are what they say.

    A step's `query_index` still counts the reads of the whole stream; the event's is 0.
    """
    name, tokens = record["sample_id"], record["tokens"]
    if record["token_ids"] != [task.vocabulary.ids[token] for token in tokens]:
        raise OracleError(f"{name}: token ids are not those of its tokens")
    (event,) = record["query_events"]
    for step in record["steps"]:
        value_role = "value" if step["op"] == "write" else "answer"
        held = tokens[step["positions"]["key"]], tokens[step["positions"][value_role]]
        if held != (step["key"], step["value"]):
            raise OracleError(f"{name}: step {step['step_index']} is not what its positions hold")
    asked = record["steps"][event["step_index"]]
    if (event["key"], event["positions"]) != (asked["key"], asked["positions"]):
        raise OracleError(f"{name}: the query is not the read at step {event['step_index']}")
    writes = [step for step in record["steps"][: event["step_index"]] if step["op"] == "write"]
    latest = [step for step in writes if step["key"] == event["key"]]
    if not latest:
        raise OracleError(f"{name}: the query reads a key that was never written")
    support = latest[-1]
    answer = tokens[event["positions"]["answer"]]
    if not support["value"] == event["answer_value"] == answer:
        raise OracleError(
            f"{name}: the query is answered {answer} in the stream and {event['answer_value']} in the event, and the "
            f"latest write is {support['value']}"
        )
    if (support["write_index"], support["positions"]) != (
        event["support_write_index"],
        event["support_positions"],
    ):
        raise OracleError(f"{name}: the query's support is not the latest write to its key")

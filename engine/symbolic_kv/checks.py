"""What must hold of a benchmark before anyone trains on it; each failure aborts with its own error.

A heuristic that ignores the task must not solve it, no split may leak into another, and every stored answer
must be what replaying the stream gives. Source: definitions A.6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from .records import Record

Splits = Mapping[str, Sequence[Record]]


class BenchmarkError(ValueError):
    """A benchmark that must not be used."""


class ExhaustedError(BenchmarkError):
    """The ranges admit too few records, queries or values to draw what was asked."""


class DuplicateRecordError(BenchmarkError):
    """Two records of one split share a name or a program."""


class OracleError(BenchmarkError):
    """A stored answer, support or position is not what replaying the stream gives."""


class SplitOverlapError(BenchmarkError):
    """Two splits share a token sequence or a program."""


class HeldOutLeakError(BenchmarkError):
    """A held-out pair outside its split, or a seen answer inside it."""


class HeuristicError(BenchmarkError):
    """A heuristic that ignores the task answers too many queries."""


def check_benchmark(
    splits: Splits, held_out: frozenset[tuple[str, str]], heuristic_max_accuracy: float
) -> dict[str, Any]:
    """Run every check; returns the diagnostics (`heuristics`, `overlap`, `holdout_leakage`).

    Raises the `BenchmarkError` of the first check that fails.
    """
    for split, records in splits.items():
        check_unique(split, records)
        for record in records:
            check_oracle(record)
    return {
        "overlap": check_overlap(splits),
        "holdout_leakage": {
            split: check_held_out(split, records, held_out) for split, records in splits.items()
        },
        "heuristics": {
            split: check_heuristics(split, records, heuristic_max_accuracy)
            for split, records in splits.items()
        },
    }


def check_unique(split: str, records: Sequence[Record]) -> None:
    """Names, token sequences and programs must each be unique within a split."""
    for field in ("sample_id", "latent_program_signature", "exact_sequence_signature"):
        value, count = Counter(record[field] for record in records).most_common(1)[0]
        if count > 1:
            raise DuplicateRecordError(f"{split}: {count} records share the {field} {value}")


def check_oracle(record: Record) -> None:
    """Replay the token stream: every read must give its latest write, and every event must say so."""
    name, tokens = record["sample_id"], record["tokens"]
    if record["exact_sequence_signature"] != " ".join(tokens):
        raise OracleError(f"{name}: exact_sequence_signature is not its token stream")
    latest: dict[str, tuple[int, str, dict[str, int]]] = {}
    events = iter(record["query_events"])
    for step in record["steps"]:
        key, value, positions = step["key"], step["value"], step["positions"]
        role = "value" if step["op"] == "write" else "answer"
        if tokens[positions["key"]] != key or tokens[positions[role]] != value:
            raise OracleError(f"{name}: step {step['step_index']} is not what its positions hold")
        if step["op"] == "write":
            latest[key] = (step["write_index"], value, positions)
            continue
        _check_event(name, step, next(events, None), latest.get(key))
    if next(events, None) is not None:
        raise OracleError(f"{name}: more query events than reads")


def _check_event(
    name: str,
    step: Mapping[str, Any],
    event: Mapping[str, Any] | None,
    support: tuple[int, str, dict[str, int]] | None,
) -> None:
    if event is None or support is None:
        raise OracleError(f"{name}: step {step['step_index']} reads what was never written, or has no event")
    index, value, positions = support
    where = f"{name}: query {event['query_index']}"
    if (event["key"], event["positions"]) != (step["key"], step["positions"]):
        raise OracleError(f"{where} is not the read at step {step['step_index']}")
    if not value == step["value"] == event["answer_value"]:
        raise OracleError(f"{where} stores {event['answer_value']}, and the latest write is {value}")
    if not index == step["support_write_index"] == event["support_write_index"]:
        raise OracleError(
            f"{where} names write {event['support_write_index']}, and the latest write is {index}"
        )
    if event["support_positions"] != positions or positions["value"] >= event["positions"]["answer"]:
        raise OracleError(f"{where}: the support value is not before the answer")


def check_overlap(splits: Splits) -> dict[str, dict[str, int]]:
    """No token sequence and no program may occur in two splits. Returns the (zero) counts per pair."""
    counts: dict[str, dict[str, int]] = {}
    for field in ("exact_sequence_signature", "latent_program_signature"):
        signatures = {split: {record[field] for record in records} for split, records in splits.items()}
        for first, second in combinations(splits, 2):
            shared = signatures[first] & signatures[second]
            if shared:
                raise SplitOverlapError(
                    f"{first} and {second} share {len(shared)} {field} values, the first {min(shared)}"
                )
            counts.setdefault(f"{first}__{second}", {})[field] = len(shared)
    return counts


def check_held_out(
    split: str, records: Sequence[Record], held_out: frozenset[tuple[str, str]]
) -> dict[str, int]:
    """All answers of `heldout_pairs` are held-out pairs; elsewhere no write and no answer is."""
    answers = [
        (record["sample_id"], event["key"], event["answer_value"])
        for record in records
        for event in record["query_events"]
    ]
    writes = [
        (record["sample_id"], write["key"], write["value"])
        for record in records
        for write in record["writes"]
    ]
    wanted = split == "heldout_pairs"
    for name, key, value in answers if wanted else answers + writes:
        if ((key, value) in held_out) != wanted:
            reason = "is not held out" if wanted else "is held out"
            raise HeldOutLeakError(f"{name}: the pair {key}:{value} {reason}")
    return {
        "held_out_answers": sum((key, value) in held_out for _, key, value in answers),
        "held_out_writes": sum((key, value) in held_out for _, key, value in writes),
        "answers": len(answers),
    }


def _last_value(writes: Sequence[Mapping[str, Any]], key: str) -> str:
    return str(writes[-1]["value"])


def _first_value_of_key(writes: Sequence[Mapping[str, Any]], key: str) -> str:
    return str(next(write["value"] for write in writes if write["key"] == key))


def _most_frequent_value(writes: Sequence[Mapping[str, Any]], key: str) -> str:
    counts = Counter(str(write["value"]) for write in writes)
    return min(counts, key=lambda value: (-counts[value], value))


HEURISTICS: dict[str, Callable[[Sequence[Mapping[str, Any]], str], str]] = {
    "last_value": _last_value,
    "first_value_of_key": _first_value_of_key,
    "most_frequent_value": _most_frequent_value,
}
"""Guesses from the writes before a query and its key: the last value written, the first written for the key,
the most frequent one (ties: the lexicographically smallest)."""


def _asked(records: Sequence[Record]) -> Iterator[tuple[Sequence[Mapping[str, Any]], str, str]]:
    for record in records:
        for event in record["query_events"]:
            yield record["writes"][: event["slot_after_write"] + 1], event["key"], event["answer_value"]


def check_heuristics(split: str, records: Sequence[Record], max_accuracy: float) -> dict[str, float]:
    """Answer accuracy of each heuristic on a split; the best must not exceed `max_accuracy`."""
    asked = list(_asked(records))
    accuracy = {
        name: sum(guess(writes, key) == answer for writes, key, answer in asked) / len(asked)
        for name, guess in HEURISTICS.items()
    }
    best = max(accuracy, key=lambda name: accuracy[name])
    if accuracy[best] > max_accuracy:
        raise HeuristicError(
            f"{split}: the heuristic {best} answers {accuracy[best]:.3f} of the queries, and at most "
            f"{max_accuracy} is allowed (heuristic_max_accuracy)"
        )
    return accuracy

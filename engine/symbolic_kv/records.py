"""From a plan (writes and queries) to the stored record: token stream, positions, events, signatures."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .vocabulary import BOS, EOS, READ, WRITE, Vocabulary

Record = dict[str, Any]
"""One example of a split, exactly the fields of definitions A.3, as plain JSON values."""


class Query(NamedTuple):
    """A read planned right after write number `slot`, of `key`, answered by write number `support`."""

    slot: int
    key: str
    support: int

    @property
    def lag(self) -> int:
        """Writes between the support and the read."""
        return self.slot - self.support


@dataclass(frozen=True)
class Plan:
    """The latent program of a record: `(key, value)` per write in order, and the queries in stream order."""

    writes: tuple[tuple[str, str], ...]
    queries: tuple[Query, ...]

    def signature(self, changed_write_index: int | None = None) -> str:
        """SHA-256 (hex) that two records share only if they are the same program."""
        parts = [f"W:{key}:{value}" for key, value in self.writes]
        parts += [f"Q:{query.slot}:{query.key}:{query.support}" for query in self.queries]
        if changed_write_index is not None:
            parts.append(f"CF:{changed_write_index}")
        return hashlib.sha256("||".join(parts).encode()).hexdigest()


class _Stream:
    """The token stream of a plan while it is laid down, with the steps and query events beside it."""

    def __init__(self, plan: Plan, held_out: frozenset[tuple[str, str]]) -> None:
        self.plan, self.held_out = plan, held_out
        self.tokens = [BOS]
        self.steps: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.write_positions: list[dict[str, int]] = []

    def _lay(self, operation: str, key: str, value: str, value_role: str) -> dict[str, int]:
        start = len(self.tokens)
        self.tokens += [operation, key, value]
        return {"op": start, "key": start + 1, value_role: start + 2}

    def write(self, index: int) -> None:
        key, value = self.plan.writes[index]
        positions = self._lay(WRITE, key, value, "value")
        self.write_positions.append(positions)
        self.steps.append(
            {
                "step_index": len(self.steps),
                "op": "write",
                "write_index": index,
                "key": key,
                "value": value,
                "positions": positions,
            }
        )

    def read(self, query: Query) -> None:
        answer = self.plan.writes[query.support][1]
        positions = self._lay(READ, query.key, answer, "answer")
        support_positions = self.write_positions[query.support]
        step_index, query_index = len(self.steps), len(self.events)
        self.steps.append(
            {
                "step_index": step_index,
                "op": "read",
                "query_index": query_index,
                "key": query.key,
                "value": answer,
                "positions": positions,
                "support_write_index": query.support,
            }
        )
        self.events.append(
            {
                "query_index": query_index,
                "step_index": step_index,
                "slot_after_write": query.slot,
                "key": query.key,
                "answer_value": answer,
                "support_write_index": query.support,
                "writes_since_support": query.lag,
                "tokens_since_support": positions["answer"] - support_positions["value"],
                "positions": dict(positions),
                "support_positions": dict(support_positions),
                "answer_pair_type": "heldout" if (query.key, answer) in self.held_out else "seen",
            }
        )


def build_record(
    plan: Plan,
    vocabulary: Vocabulary,
    held_out: frozenset[tuple[str, str]],
    *,
    split: str,
    index: int,
    counterfactual_of: str | None = None,
    changed_write_index: int | None = None,
) -> Record:
    """Lay a plan down as the token stream `<bos> (W key value (R key value)*)+ <eos>` with its annotations.

    Positions are 0-based token indices. Source: definitions A.2 and A.3.
    """
    stream = _Stream(plan, held_out)
    queries_after: defaultdict[int, list[Query]] = defaultdict(list)
    for query in plan.queries:
        queries_after[query.slot].append(query)
    for write_index in range(len(plan.writes)):
        stream.write(write_index)
        for query in queries_after[write_index]:
            stream.read(query)
    tokens = [*stream.tokens, EOS]
    return {
        "sample_id": f"{split}_{index:06d}",
        "split": split,
        "tokens": tokens,
        "token_ids": [vocabulary.ids[token] for token in tokens],
        "axes": _axes(plan, len(tokens)),
        "writes": [
            {"write_index": position, "key": key, "value": value}
            for position, (key, value) in enumerate(plan.writes)
        ],
        "query_plan": [
            {
                "slot_after_write": query.slot,
                "key": query.key,
                "support_write_index": query.support,
                "writes_since_support": query.lag,
            }
            for query in plan.queries
        ],
        "steps": stream.steps,
        "query_events": stream.events,
        "latent_program_signature": plan.signature(changed_write_index),
        "exact_sequence_signature": " ".join(tokens),
        "counterfactual_of": counterfactual_of,
        "changed_write_index": changed_write_index,
    }


def _axes(plan: Plan, context_tokens: int) -> dict[str, int]:
    active_keys = len({key for key, _ in plan.writes})
    lags: Sequence[int] = [query.lag for query in plan.queries]
    return {
        "active_keys": active_keys,
        "overwrite_count": len(plan.writes) - active_keys,
        "num_queries": len(lags),
        "total_writes": len(plan.writes),
        "mean_query_lag": sum(lags) // len(lags),
        "max_query_lag": max(lags),
        "context_tokens": context_tokens,
    }

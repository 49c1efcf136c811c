"""The base benchmark, arbitrary records of the task, and what a reader of the tokens alone would say of them."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from lakebed.engine.config import load_config
from lakebed.engine.symbolic_kv import Vocabulary, generate_benchmark
from lakebed.engine.symbolic_kv.pairs import PairTask
from lakebed.engine.symbolic_kv.records import Plan, Query, build_record


@pytest.fixture(scope="session")
def formation():
    return generate_benchmark(load_config("formation").benchmark)


@st.composite
def _tasks_and_records(draw):
    """A task and a record of it: any writes with distinct values, any reads of keys written before, lags of 0 included."""
    vocabulary = Vocabulary(draw(st.integers(2, 5)), draw(st.integers(4, 24)))
    cells = [(key, value) for key in vocabulary.key_tokens for value in vocabulary.value_tokens]
    held_out = draw(st.frozensets(st.sampled_from(cells), max_size=len(cells)))
    count = draw(st.integers(2, min(9, len(vocabulary.value_tokens))))
    keys = draw(st.lists(st.sampled_from(vocabulary.key_tokens), min_size=count, max_size=count))
    values = draw(st.permutations(vocabulary.value_tokens))[:count]
    writes = tuple(zip(keys, values, strict=True))
    latest, candidates = {}, []
    for slot, key in enumerate(keys):
        latest[key] = slot
        candidates += [Query(slot, read, support) for read, support in latest.items()]
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=7))
    queries = tuple(sorted(chosen, key=lambda query: query.slot))
    record = build_record(Plan(writes, queries), vocabulary, held_out, split="train", index=3)
    return PairTask(vocabulary, held_out), record


@pytest.fixture(scope="session")
def tasks_and_records():
    """The strategy, for `data.draw`."""
    return _tasks_and_records()


class Replay:
    """What the tokens alone say: every write and read with its place, each read with the latest write to its key."""

    def __init__(self, tokens):
        self.writes, self.reads, latest = [], [], {}
        for place in range(1, len(tokens) - 1, 3):
            operation, key, value = tokens[place : place + 3]
            if operation == "W":
                latest[key] = {"index": len(self.writes), "place": place, "key": key, "value": value}
                self.writes.append(latest[key])
            else:
                read = {"place": place, "key": key, "answer": value, "support": latest[key]}
                self.reads.append(read)


@pytest.fixture(scope="session")
def replay():
    return Replay

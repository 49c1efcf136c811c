"""Drawing the splits: one `random.Random` for everything, consumed in one fixed order.

The order of the calls below is part of the definition (A.4): moving one changes every record after it, and
the tests compare the SHA-256 of all six splits.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random

from ..config import BenchmarkConfig, IntegerRange, SplitConfig
from .checks import DuplicateRecordError, ExhaustedError
from .records import Plan, Query, Record, build_record
from .vocabulary import Vocabulary

PLAN_ATTEMPTS = 256
TRIES_PER_SAMPLE = 200


class Sampler:
    """Draws held-out pairs and records; remembers the program of every record drawn so far."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        self.vocabulary = Vocabulary(config.num_keys, config.num_values)
        self.random = Random(config.seed)
        self.signatures: set[str] = set()
        self.held_out = self._draw_held_out()
        # What each key may be written with, by held-out status, in vocabulary order.
        self.allowed = {
            (key, status): [
                value for value in self.vocabulary.value_tokens if ((key, value) in self.held_out) == status
            ]
            for key in self.vocabulary.key_tokens
            for status in (False, True)
        }

    def _draw_held_out(self) -> frozenset[tuple[str, str]]:
        pairs = [(key, value) for key in self.vocabulary.key_tokens for value in self.vocabulary.value_tokens]
        self.random.shuffle(pairs)
        return frozenset(pairs[: max(1, int(len(pairs) * self.config.holdout_answer_pair_fraction))])

    def draw_split(self, split: str, settings: SplitConfig) -> list[Record]:
        """Draw the records of one split; a program already drawn in any split is dropped and drawn anew."""
        records: list[Record] = []
        for _ in range(TRIES_PER_SAMPLE * settings.num_samples):
            if len(records) == settings.num_samples:
                break
            plan = self._draw_plan(split, settings)
            signature = plan.signature()
            if signature not in self.signatures:
                self.signatures.add(signature)
                records.append(
                    build_record(plan, self.vocabulary, self.held_out, split=split, index=len(records))
                )
        if len(records) < settings.num_samples:
            raise ExhaustedError(
                f"{split}: only {len(records)} of {settings.num_samples} distinct records found in "
                f"{TRIES_PER_SAMPLE * settings.num_samples} tries; widen its ranges or ask for fewer"
            )
        return records

    def _within(self, limits: IntegerRange) -> int:
        return self.random.randint(limits.min, limits.max)

    def _draw_plan(self, split: str, settings: SplitConfig) -> Plan:
        active_keys = self._within(settings.active_keys)
        overwrites = self._within(settings.overwrite_count)
        num_queries = self._within(settings.num_queries)
        keys = self.random.sample(self.vocabulary.key_tokens, active_keys)
        for _ in range(PLAN_ATTEMPTS):
            writes = self._draw_writes(keys, overwrites, held_out=split == "heldout_pairs")
            candidates = _query_candidates(writes, active_keys, settings.query_lag)
            if len(candidates) >= num_queries:
                return Plan(tuple(writes), self._draw_queries(candidates, num_queries))
        raise ExhaustedError(
            f"{split}: no plan with {active_keys} active keys and {overwrites} overwrites leaves room for "
            f"{num_queries} queries in {PLAN_ATTEMPTS} attempts; ask for fewer queries or a wider query_lag"
        )

    def _draw_writes(self, keys: list[str], overwrites: int, held_out: bool) -> list[tuple[str, str]]:
        order = list(keys)
        self.random.shuffle(order)
        used: set[str] = set()
        writes = [(key, self._draw_value(key, used, held_out)) for key in order]
        tally = dict.fromkeys(keys, 0)
        for _ in range(overwrites):
            rested = [key for key in keys if key != writes[-1][0]]
            fewest = min(tally[key] for key in rested)
            key = self.random.choice([key for key in rested if tally[key] == fewest])
            writes.append((key, self._draw_value(key, used, held_out)))
            tally[key] += 1
        return writes

    def _draw_value(self, key: str, used: set[str], held_out: bool) -> str:
        """A value the key may be written with, none of `used`, to which it is added."""
        candidates = [value for value in self.allowed[key, held_out] if value not in used]
        if not candidates:
            status = "held-out" if held_out else "seen"
            raise ExhaustedError(f"no unused value makes a {status} pair with key {key}; raise num_values")
        value = self.random.choice(candidates)
        used.add(value)
        return value

    def _draw_queries(self, candidates: list[Query], num_queries: int) -> tuple[Query, ...]:
        by_slot: defaultdict[int, list[Query]] = defaultdict(list)
        for query in self.random.sample(candidates, num_queries):
            by_slot[query.slot].append(query)
        queries: list[Query] = []
        for slot in sorted(by_slot):
            self.random.shuffle(by_slot[slot])
            queries += by_slot[slot]
        return tuple(queries)

    def draw_counterfactuals(self, sources: list[Record], num_samples: int) -> list[Record]:
        """Copy sampled records, one queried write of each replaced, with the answers that relied on it."""
        return [
            self._draw_counterfactual(source, index)
            for index, source in enumerate(self.random.sample(sources, num_samples))
        ]

    def _draw_counterfactual(self, source: Record, index: int) -> Record:
        supports = sorted({event["support_write_index"] for event in source["query_events"]})
        changed = self.random.choice(supports)
        writes = [(write["key"], write["value"]) for write in source["writes"]]
        key = writes[changed][0]
        writes[changed] = (key, self._draw_value(key, {value for _, value in writes}, held_out=False))
        queries = [
            Query(planned["slot_after_write"], planned["key"], planned["support_write_index"])
            for planned in source["query_plan"]
        ]
        plan = Plan(tuple(writes), tuple(queries))
        signature = plan.signature(changed)
        if signature in self.signatures:
            raise DuplicateRecordError(f"counterfactual: the change drawn for {source['sample_id']} exists")
        self.signatures.add(signature)
        return build_record(
            plan,
            self.vocabulary,
            self.held_out,
            split="counterfactual",
            index=index,
            counterfactual_of=source["sample_id"],
            changed_write_index=changed,
        )


def _query_candidates(writes: list[tuple[str, str]], initial_writes: int, lag: IntegerRange) -> list[Query]:
    """Every read the lag range admits whose support is an overwrite, in stream order."""
    last_write: dict[str, int] = {}
    candidates: list[Query] = []
    for slot, (written, _) in enumerate(writes):
        last_write[written] = slot
        candidates += [
            Query(slot, key, support)
            for key, support in last_write.items()
            if support >= initial_writes and lag.min <= slot - support <= lag.max
        ]
    return candidates

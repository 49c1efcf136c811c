"""A generated benchmark: its vocabulary, its six splits, and the diagnostics of the checks it passed."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..config import BenchmarkConfig
from .checks import check_benchmark
from .records import Record
from .sampling import Sampler
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Benchmark:
    """Records of the six splits, in generation order. Treat them as read-only: every consumer shares them."""

    config: BenchmarkConfig
    vocabulary: Vocabulary
    held_out: frozenset[tuple[str, str]]
    splits: dict[str, list[Record]]
    diagnostics: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """The document stored beside a benchmark, as plain JSON values (definitions A.6)."""
        vocabulary = self.vocabulary
        return {
            "benchmark_type": self.config.benchmark_type,
            "name": self.config.name,
            "seed": self.config.seed,
            "vocabulary": {
                "tokens": list(vocabulary.tokens),
                "key_tokens": list(vocabulary.key_tokens),
                "value_tokens": list(vocabulary.value_tokens),
            },
            "holdout_pairs": sorted(f"{key}:{value}" for key, value in self.held_out),
            "splits": {split: len(records) for split, records in self.splits.items()},
            "diagnostics": self.diagnostics,
            "config": self.config.model_dump(mode="json"),
        }


def generate_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Draw the six splits of a configuration and check them; the same configuration gives the same bytes.

    Raises `BenchmarkError` (see `checks`) when the ranges admit too few records or a check fails.
    """
    with _collection_paused():
        sampler = Sampler(config)
        splits: dict[str, list[Record]] = {
            name: sampler.draw_split(name, settings) for name, settings in config.sampled_splits()
        }
        source, count = config.counterfactual.source_split, config.counterfactual.num_samples
        splits["counterfactual"] = sampler.draw_counterfactuals(splits[source], count)
        diagnostics = check_benchmark(splits, sampler.held_out, config.heuristic_max_accuracy)
    return Benchmark(config, sampler.vocabulary, sampler.held_out, splits, diagnostics)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: records are a million small dicts without a cycle among them, and
    walking them over and over takes a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def benchmark_jsonl(records: Iterable[Record]) -> str:
    """Records as JSON lines, keys sorted, separators `", "` and `": "`: the text a split is hashed as."""
    return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)

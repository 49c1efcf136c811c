"""Sampling a probe from a benchmark: a few unmodified records of each split, spread evenly over their axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random

from ... import LakebedError
from .records import Record

DEFAULT_SPLITS = ("validation_iid", "heldout_pairs", "structural_ood", "counterfactual")
DEFAULT_EXAMPLES_PER_SPLIT = 24
DEFAULT_SEED = 17


class ProbeSamplingError(LakebedError):
    """A probe that cannot be sampled as asked."""


def sample_probe(
    benchmark_splits: Mapping[str, Sequence[Record]],
    splits: Sequence[str] = DEFAULT_SPLITS,
    examples_per_split: int = DEFAULT_EXAMPLES_PER_SPLIT,
    seed: int = DEFAULT_SEED,
) -> list[Record]:
    """Records of `splits`, concatenated in that order; the same arguments give the same records.

    One random generator serves all splits, so a split's records depend on those before it. Source: definitions 1 §D.
    Raises ProbeSamplingError for no split, a doubled or unknown one, or a count below 1.
    """
    if examples_per_split < 1:
        raise ProbeSamplingError(f"examples per split is {examples_per_split}; it must be at least 1")
    if not splits:
        raise ProbeSamplingError(f"no split to sample from; there are {', '.join(benchmark_splits)}")
    doubled = [split for index, split in enumerate(splits) if split in splits[:index]]
    if doubled:
        raise ProbeSamplingError(f"split {doubled[0]!r} is named twice")
    for split in splits:
        if split not in benchmark_splits:
            raise ProbeSamplingError(f"no split {split!r}; the benchmark has {', '.join(benchmark_splits)}")
    random = Random(seed)
    return [
        record
        for split in splits
        for record in _sample_split(benchmark_splits[split], examples_per_split, random)
    ]


def _sample_split(records: Sequence[Record], limit: int, random: Random) -> list[Record]:
    """At most `limit` records, taken in turn from the groups that share all axes, rarest group first."""
    if len(records) <= limit:
        return list(records)
    by_axes: defaultdict[tuple[tuple[str, int], ...], list[Record]] = defaultdict(list)
    for record in records:
        by_axes[tuple(sorted(record["axes"].items()))].append(record)
    groups = [by_axes[axes] for axes in sorted(by_axes, key=lambda axes: (len(by_axes[axes]), axes))]
    for group in groups:
        random.shuffle(group)
    chosen: list[Record] = []
    turn = 0
    while len(chosen) < limit:
        chosen.append(groups[turn].pop())
        # An emptied group gives its turn to the one that moves into its place.
        if groups[turn]:
            turn += 1
        else:
            del groups[turn]
        if groups:
            turn %= len(groups)
    return chosen

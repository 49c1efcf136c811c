"""Dataset score_changes: how one head's scores and attention moved between two steps, key by key (definitions 2 §F1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..engine.scalars import Passes, build_scalar
from ..engine.scalars.attention_scores import AttentionScoreSeparation
from ..engine.score_changes import HeadScores, head_scores, score_changes
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, SCORE_CHANGES, score_change_parameters
from ..lake.names import spec_id
from . import dataset
from .columns import constant, texts
from .forward import probe_of
from .interval import Interval, ObservingExtractor
from .pair_sets import PairSelection, select_pairs, side_probe


class ScoreChangesExtractor(ObservingExtractor):
    """Table score_changes."""

    name = SCORE_CHANGES
    version = 1

    def __init__(self, selection: PairSelection, scalar: AttentionScoreSeparation) -> None:
        self.selection, self.scalar = selection, scalar

    def parameters(self) -> Mapping[str, Any]:
        """Head, roles, record side and pairs."""
        scalar, selection = self.scalar, self.selection
        return score_change_parameters(
            scalar.head,
            {role: getattr(scalar, role) for role in _ROLES},
            scalar.record_side,
            pair_type=selection.pair_type,
            probe=selection.probe,
            split=selection.split,
            max_pairs_per_type=selection.max_pairs_per_type,
        )

    @property
    def key(self) -> str:
        """Identity of all that."""
        return spec_id(dict(self.parameters()))

    @property
    def sides(self) -> Sequence[str]:
        """The record that is scored."""
        return self.scalar.sides

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """Identity of the probe whose records are read."""
        return {side: probe_of(context, side_probe(self.selection.probe, side)).sha256 for side in self.sides}

    def observe(self, passes: Passes) -> HeadScores:
        """The head at the query and at the keys of the roles."""
        self.scalar.check(passes.model)
        return head_scores(passes, self.scalar)

    def write(self, context: dataset.Context, writer: UnitWriter, *, interval: Interval) -> None:
        """Writes one interval."""
        seen = interval.observed[self.key]
        before: Sequence[HeadScores] = seen.source
        changes = [score_changes(*ends) for ends in zip(before, seen.target, strict=True)]
        first = np.cumsum([0, *(len(of.place) for of in before)])
        rows = torch.cat([of.rows for of in before]).cpu().numpy()
        pair = rows[:, 0] + np.repeat(first[:-1], [len(of.rows) for of in before])
        role, count = rows[:, 1], len(rows)
        pairs, scalar = seen.pairs, self.scalar
        columns = {
            "spec": constant(self.key, count),
            "scalar_head": constant(scalar.head, count),
            "record_side": constant(scalar.record_side, count),
            "source_step": np.full(count, interval.source_step),
            "target_step": np.full(count, interval.target_step),
            "split": texts(pairs.split, pair),
            "pair_type": texts(pairs.pair_type, pair),
            "pair_id": texts(pairs.pair_id, pair),
            "key_role": texts([scalar.support_key_role, scalar.distractor_key_role], role),
            "role_position_index": _index_in_group(2 * pair + role),
            "query_position": torch.cat([of.place for of in before]).cpu().numpy()[pair],
            "key_position": rows[:, 2],
            **{name: torch.cat([of[name] for of in changes]).cpu().numpy() for name in changes[0]},
        }
        writer.rows("score_changes", columns)


_ROLES = ("score_query_role", "support_key_role", "distractor_key_role")


def _index_in_group(group: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`Int[row]`, equal ones beside each other: the how manyth of its equals each is, from 0."""
    _, start, size = np.unique(group, return_index=True, return_counts=True)
    index: np.ndarray[Any, Any] = np.arange(len(group)) - np.repeat(start, size)
    return index


def build(
    head: str = "",
    record_side: str = "clean",
    score_query_role: str = "prediction",
    support_key_role: str = "",
    distractor_key_role: str = "",
    probe: str = DEFAULT_PROBE,
    pair_type: Sequence[str] = (),
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> ScoreChangesExtractor:
    """The extractor, for the registry. Raises ScalarError or UnknownName, naming what there is."""
    scalar = build_scalar(
        AttentionScoreSeparation.name,
        {
            "head": head,
            "record_side": record_side,
            "score_query_role": score_query_role,
            "support_key_role": support_key_role,
            "distractor_key_role": distractor_key_role,
        },
    )
    assert isinstance(scalar, AttentionScoreSeparation)
    return ScoreChangesExtractor(select_pairs(probe, pair_type, split, max_pairs_per_type), scalar)

"""What a head writes under four conditions, as plain data: the report and the extractor agree on these names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .datasets import DEFAULT_PROBE, select

WRITE_CONDITIONS = "write_conditions"

REAL = "real_attention_real_values"
CORRECT_SUPPORT = "correct_support_attention_real_values"
SHUFFLED_VALUES = "real_attention_shuffled_values"
CORRECT_SUPPORT_SHUFFLED_VALUES = "correct_support_attention_shuffled_values"
# Attention: the head's own, or on the support alone. Values at the support: its own, or those of the pair before.
CONDITIONS = (REAL, CORRECT_SUPPORT, SHUFFLED_VALUES, CORRECT_SUPPORT_SHUFFLED_VALUES)


def write_condition_parameters(
    roles: Mapping[str, str],
    record_side: str,
    *,
    pair_type: Sequence[str],
    probe: str = DEFAULT_PROBE,
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> dict[str, Any]:
    """Parameters of dataset write_conditions: three roles, the record that is measured, the pairs; it has every head."""
    return {
        "probe": probe,
        **select(pair_type, split, max_pairs_per_type),
        "record_side": record_side,
        **{name: roles[name] for name in ("score_query_role", "support_key_role", "distractor_key_role")},
    }

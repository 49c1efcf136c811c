"""Transfers of value codes as plain data: which query events they are fitted and judged on, and what replaces a code.

Source: definitions 4 §B, §C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .datasets import DEFAULT_PROBE

VALUE_CODE_RESCUES = "value_code_rescues"

CONTROLS = ("shuffled_answer_value", "wrong_support_value", "key_identity", "random_subspace")
SHUFFLED, WRONG, KEY, RANDOM = CONTROLS
TRUE = "true_transfer"

# The untouched run, and the one whose target code is taken away; every other run puts something in its place.
CLEAN, REMOVED = "clean", "target_subspace_removed"
ORACLE = "oracle_actual_projected"
CONTEXT_ONLY, WITH_CONTEXT = "context_only", "source_plus_context"
# Random directions of the source through the map that was fitted to its identity basis.
NOT_REFIT = f"{WITH_CONTEXT}_{RANDOM}_not_refit"

# Bases, in report order.
BASES = (
    "source_value_identity",
    "target_value_identity",
    "source_key_identity_control",
    "random_source_control",
    "prediction_context_identity",
)
SOURCE_BASIS, TARGET_BASIS, KEY_BASIS, RANDOM_BASIS, CONTEXT_BASIS = BASES

DISTRACTORS, SUPPORT_KEY = "value_distractors", "support_key"
CAUSAL_PREFIX, POSITION_TOKEN, ANSWER_VALUE = "causal_prefix", "position_token", "answer_value"

# The events of the first $max_records records, in order. Parameters: $run, $probe, $split (a list), $all_splits.
MEASURED_EVENTS = """\
WITH kept AS (
    SELECT example
    FROM probe_examples
    WHERE run = $run AND probe = $probe AND ($all_splits OR list_contains($split, split))
    ORDER BY example
    LIMIT $max_records
)
SELECT row_number() OVER (ORDER BY e.event) - 1 AS place, e.* EXCLUDE (run)
FROM events AS e
JOIN kept AS k ON k.example = e.example
WHERE e.run = $run AND e.probe = $probe
ORDER BY place"""


def eval_kinds(controls: Sequence[str], context: bool) -> list[str]:
    """What is put in the target code's place, in report order: the code itself, then transfers and their controls."""
    kinds = [ORACLE, TRUE, *controls]
    if context:
        # There is no control with context for the key: it has a basis of its own.
        kinds += [CONTEXT_ONLY, WITH_CONTEXT]
        kinds += [f"{WITH_CONTEXT}_{control}" for control in controls if control != KEY]
        kinds += [NOT_REFIT] if RANDOM in controls else []
    return kinds


def value_code_rescue_parameters(
    *,
    source_stage: str,
    target_stage: str,
    source_position_role: str,
    target_position_role: str,
    group_by: str,
    basis_rank: int,
    controls: Sequence[str] = (),
    fit_fraction: float = 0.75,
    ridge_lambda: float = 1e-4,
    random_seed: int = 0,
    context: tuple[str, str, int] | None = None,
    probe: str = DEFAULT_PROBE,
    split: Sequence[str] = (),
    max_records: int | None = None,
) -> dict[str, Any]:
    """Parameters of dataset value_code_rescues, of one rank. The order of splits and controls does not matter, nor the seed
    without control random_subspace. `context` is (stage, role, rank)."""
    return {
        "probe": probe,
        "split": sorted(set(split)),
        "max_records": max_records,
        "source_stage": source_stage,
        "source_position_role": source_position_role,
        "target_stage": target_stage,
        "target_position_role": target_position_role,
        "group_by": group_by,
        "basis_rank": basis_rank,
        "controls": [control for control in CONTROLS if control in controls],
        "context": None
        if context is None
        else dict(zip(("context_stage", "context_position_role", "context_rank"), context, strict=True)),
        "fit_fraction": float(fit_fraction),
        "ridge_lambda": float(ridge_lambda),
        "random_seed": random_seed if RANDOM in controls else 0,
    }

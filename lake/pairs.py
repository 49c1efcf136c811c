"""Which causal patch pairs a selection means: the first of each type in scan order, for extractors and reports alike.

The parameters of the statement: $run, $probe, $pair_type and $split (lists), $all_splits, $max_pairs_per_type.
"""

from __future__ import annotations

ASKED = """\
FROM pairs
WHERE run = $run AND probe = $probe AND list_contains($pair_type, pair_type)
  AND ($all_splits OR list_contains($split, split))"""

# Scan order is event by event, and within one the types in the order they were asked for.
CHOSEN = f"""\
SELECT * EXCLUDE (run, skip_reason)
{ASKED} AND pair_id IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY pair_type ORDER BY clean_event) <= $max_pairs_per_type
ORDER BY clean_event, list_position($pair_type, pair_type)"""

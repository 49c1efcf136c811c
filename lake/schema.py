"""Every table and tensor quantity of a lake, declared once: columns, types, units, keys.

`lakebed show --schema` prints this module; writers are checked against it and readers get typed, empty tables from
it when nothing was written yet. `run` is a column of every table and comes from the path, never from the file.
"""

from __future__ import annotations

from . import (
    schema_attributions,
    schema_cross_seed,
    schema_interventions,
    schema_probes,
    schema_training,
    schema_value_codes,
    schema_writes,
)
from .columns import Column, Quantity, Table

FORMAT_VERSION = 1

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        *schema_training.TABLES,
        *schema_probes.TABLES,
        *schema_attributions.TABLES,
        *schema_interventions.TABLES,
        *schema_value_codes.TABLES,
        *schema_writes.TABLES,
        *schema_cross_seed.TABLES,
    )
}

_PARAMETER_VIEW = "(run, step, parameter, row, values FLOAT[]): a matrix is one row of SQL per row of the matrix, a vector is row 0"

QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity("weights", "weights", f"parameters after `step` updates {_PARAMETER_VIEW}"),
        Quantity("gradients", "gradients", f"raw gradient that step `step` used {_PARAMETER_VIEW}"),
        Quantity("exp_avg", "exp_avg", f"Adam's first moment after `step` updates {_PARAMETER_VIEW}"),
        Quantity("exp_avg_sq", "exp_avg_sq", f"Adam's second moment after `step` updates {_PARAMETER_VIEW}"),
        Quantity(
            "svd",
            "singular_vectors",
            "singular vectors (run, step, matrix, layer, head, rank, side, values FLOAT[]); side is left or right",
        ),
        Quantity(
            "scalar_gradients",
            "scalar_gradients",
            "gradient of the mean of a scalar over its pairs (run, step, spec, parameter, row, values FLOAT[]): rows as those of "
            "weights; table scalars has the values",
        ),
        Quantity(
            "activations",
            "activation_values",
            "residual stream (run, step, probe, layout, stage, row, values FLOAT[]); table activation_rows says what a row is",
        ),
    )
}

# Derived tables: SQL over the tables above, in every session and in views.sql.
VIEWS: dict[str, tuple[str, str]] = {
    **schema_attributions.VIEWS,
    **schema_interventions.VIEWS,
    "specs": (
        "one row per distinct set of dataset parameters: spec, dataset, parameters (canonical JSON)",
        "SELECT DISTINCT run, spec, dataset, parameters FROM extractions WHERE spec <> ''",
    ),
    "attention": (
        "one row per event, head and key position: attention_patterns, unnested",
        "SELECT run, probe, step, event, layer, head, query_role, query_position, unnest(range(0, len(scores))) AS key_position, "
        "unnest(scores) AS score, unnest(probabilities) AS probability FROM attention_patterns",
    ),
    "activations": (
        "one row per stored position and stage: the residual stream there",
        "SELECT v.run, v.step, v.probe, v.layout, v.stage, r.example, r.position, v.values FROM activation_values AS v "
        "JOIN activation_rows AS r USING (run, probe, layout, row)",
    ),
    "event_roles": (
        "one row per event and role: its positions and their tokens, ascending. causal_prefix is every position up to the prediction",
        "SELECT run, probe, event, role, list(position ORDER BY position) AS positions, list(token ORDER BY position) AS tokens "
        "FROM (SELECT run, probe, event, role, position, token FROM positions WHERE kind = 'role' UNION ALL "
        "SELECT run, probe, event, 'causal_prefix', position, token FROM positions WHERE kind = 'partition') GROUP BY ALL",
    ),
}

__all__ = ["FORMAT_VERSION", "QUANTITIES", "TABLES", "VIEWS", "Column", "Quantity", "Table"]

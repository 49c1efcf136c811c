"""Interventions as plain data: what a report asks for and an extractor does is the same dictionary, and so the same spec.

An intervention is a name and its edits. Edits happen in the order of the forward pass, however they are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .datasets import DEFAULT_PROBE, select

# The run without any edit, which every unit has.
CLEAN = "clean"
# In place of a list: every head and every MLP of the model zeroed, one at a time, each by the name of its component.
ZERO_EACH = "zero_each"
FULL_RESIDUAL = "full_residual"
RANDOM_SUBSPACE = "random"
OPERATIONS = ("remove", "keep", "patch")
PATCH_SOURCES = ("clean", "counterpart")
QUERY_MODES = ("single_query", "batch_union")

Edit = Mapping[str, Any]


def zero(component: str) -> dict[str, Any]:
    """The output of a head (L0H1), an MLP (L0MLP, bias in) or a neuron (L0N17) times 0, at every position."""
    return {"zero": component}


def restore(component: str) -> dict[str, Any]:
    """The output of a component as it is in the untouched run, whatever it reads now, at every position."""
    return {"restore": component}


def attend(head: str, role: str) -> dict[str, Any]:
    """The head attends, at the prediction, to a role's positions alone and equally."""
    return {"attend": head, "role": role}


def shuffle_values(head: str, role: str) -> dict[str, Any]:
    """The head attends, at the prediction, as it does, and finds at a role's positions the values of the event before."""
    return {"shuffle_values": head, "role": role}


def edit_stage(
    stage: str,
    operation: str,
    *,
    subspace: str = FULL_RESIDUAL,
    rank: int | None = None,
    head: str | None = None,
    position_role: str | None = None,
    source: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """A residual stage z, P the projection on a subspace: remove: z − z P; keep: z P; patch: z + (z_source − z) P.

    `position_role` None is every position. `source` of a patch: the same record's untouched run (clean), or that of the
    pair's other record (counterpart). Subspace `random` is drawn from `seed`.
    """
    return {
        "stage": stage,
        "operation": operation,
        "subspace": subspace,
        "rank": rank,
        "head": head,
        "position_role": position_role,
        "source": source or ("clean" if operation == "patch" else None),
        "seed": (seed or 0) if subspace == RANDOM_SUBSPACE else None,
    }


def intervention(name: str, edits: Iterable[Edit]) -> dict[str, Any]:
    """A name, and what is changed."""
    return {"name": name, "edits": [dict(edit) for edit in edits]}


def intervention_parameters(
    interventions: Sequence[Mapping[str, Any]] | str,
    *,
    probe: str = DEFAULT_PROBE,
    record_side: str = "clean",
    pair_type: Sequence[str] = (),
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
    query_mode: str = "single_query",
    components: bool = False,
) -> dict[str, Any]:
    """Parameters of dataset interventions; the order in which interventions are named does not matter.

    With `pair_type` only the events of those causal patch pairs go through the model, on one record side; without, every
    event of the probe (`split` and `max_pairs_per_type` are then of no use). `components`: also what every component
    contributes to each logit, in every run.
    """
    pairs = select(pair_type, split, max_pairs_per_type) if pair_type else None
    listed = (
        interventions
        if isinstance(interventions, str)
        else sorted((dict(of) for of in interventions), key=lambda of: str(of["name"]))
    )
    return {
        "probe": probe,
        "record_side": record_side,
        "pairs": pairs,
        "query_mode": query_mode,
        "components": components,
        "interventions": listed,
    }

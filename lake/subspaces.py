"""Subspaces of the residual stream by name, and the parameters of scalar route_score, as reports and extractors agree on."""

from __future__ import annotations

from typing import Any, Literal, get_args

ROUTE_SCORE = "route_score"

Subspace = Literal[
    "embedding_key_identity",
    "embedding_value_identity",
    "head_qk_query",
    "head_qk_key",
    "head_ov_input",
    "head_ov_output",
    "full_residual",
]
SUBSPACES: tuple[str, ...] = get_args(Subspace)


def route_parameters(
    stage: str, subspace: str, position_role: str, rank: int | None, head: str | None
) -> dict[str, Any]:
    """Every parameter of scalar route_score; `head` is a label such as L2H1."""
    return {
        "stage": stage,
        "subspace": subspace,
        "rank": rank,
        "head": head,
        "position_role": position_role,
    }

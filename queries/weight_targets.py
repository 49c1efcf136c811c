"""Matrices of a model by name, as L2H1.W_QK, L0H3.out_proj and L1MLP.fc_in: what a run has, and which were asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..lake.errors import UnknownName
from .report import ReportFailed

# Projection or product, as the report names it -> as dataset svd does. Products stand after their factors.
MATRIX_OF = {
    "q_proj": "W_Q",
    "k_proj": "W_K",
    "v_proj": "W_V",
    "out_proj": "W_O",
    "W_QK": "W_QK",
    "W_OV": "W_OV",
    "fc_in": "W_in",
    "fc_out": "W_out",
}
_FACTORS = {"W_QK": ("q_proj", "k_proj"), "W_OV": ("v_proj", "out_proj")}
_NAME = re.compile(r"L\d+(?:H\d+\.(?:q_proj|k_proj|v_proj|out_proj|W_QK|W_OV)|MLP\.(?:fc_in|fc_out))")
FORM = "L2H1.W_QK (or W_OV, q_proj, k_proj, v_proj, out_proj) or L0MLP.fc_in (or fc_out)"


@dataclass(frozen=True)
class Target:
    """One matrix: its name and where it is."""

    name: str
    layer: int
    head: int | None
    projection: str


def check_form(names: Iterable[str]) -> None:
    """Raises ValueError unless every name is of the form of one."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"write {FORM}")


def targets_of(slices: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Those that rows of `layer`, `head` and `projection` make up, in report order: heads before the MLP of a layer."""
    held: dict[tuple[int, int | None], set[str]] = {}
    for row in slices:
        held.setdefault((row["layer"], row["head"]), set()).add(row["projection"])
    found = []
    for layer, head in sorted(held, key=lambda at: (at[0], at[1] is None, at[1] or 0)):
        label = f"L{layer}MLP" if head is None else f"L{layer}H{head}"
        for projection in MATRIX_OF:
            if held[layer, head] >= set(_FACTORS.get(projection, (projection,))):
                found.append(Target(f"{label}.{projection}", layer, head, projection))
    return found


def choose_targets(names: Sequence[str], there: Sequence[Target], run: str) -> list[Target]:
    """Those asked for, in report order; all without names. Raises UnknownName, listing what there is."""
    if not there:
        raise ReportFailed(
            f"run {run!r} does not say which parameters its heads and MLPs are made of: it was recorded without an adapter. "
            "Record it with RunInfo(adapter=..., config=...)"
        )
    held = {target.name for target in there}
    for name in names:
        if name not in held:
            heads = [target.head for target in there if target.head is not None]
            layers = f"layers 0 to {max(target.layer for target in there)}"
            raise UnknownName(
                f"no target {name!r} in run {run!r}; it has {layers}"
                + (f", heads 0 to {max(heads)}" if heads else "")
                + f": {there[0].name} … {there[-1].name}"
            )
    return [target for target in there if not names or target.name in set(names)]


__all__ = ["FORM", "MATRIX_OF", "Target", "check_form", "choose_targets", "targets_of"]

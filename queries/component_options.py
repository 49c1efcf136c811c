"""Components as options name them: embedding, L0H1, L0MLP; which a run has, and which lies after which.

A head's place in the forward pass is 2i, an MLP's 2i + 1, i being its layer: heads of one layer do not see each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..lake.errors import UnknownName
from .report import InvalidOption

if TYPE_CHECKING:
    from ..lake import Lake

EMBEDDING = "embedding"
_LABEL = re.compile(r"L(\d+)(?:(MLP)|H(\d+))")


class UnknownComponent(UnknownName):
    """A component that cannot be read, or that the run does not have."""


class NotAblatable(InvalidOption):
    """The embedding, where a component is taken away: every run needs its tokens."""


class OverlappingComponents(InvalidOption):
    """A component on both sides of an effect."""


class NotDownstream(InvalidOption):
    """A component that nothing reaches from the source."""


def component_order(label: str) -> int:
    """Place in the forward pass; -1 for the embedding. Raises UnknownComponent."""
    if label == EMBEDDING:
        return -1
    match = _LABEL.fullmatch(label)
    if match is None:
        raise UnknownComponent(
            f"cannot read component {label!r}: write a head as L0H1, an MLP as L0MLP, the token and position embedding as "
            f"{EMBEDDING}"
        )
    return 2 * int(match[1]) + (match[2] is not None)


def read_components(labels: Iterable[str]) -> tuple[str, ...]:
    """Each once, in the order given. Raises UnknownComponent for what cannot be read."""
    found = tuple(dict.fromkeys(label.strip() for label in labels))
    for label in found:
        component_order(label)
    return found


def require_ablatable(name: str, labels: Iterable[str], remedy: str = "name heads and MLPs") -> None:
    """Raises NotAblatable; `name` is the report's, or its option's."""
    if EMBEDDING in labels:
        raise NotAblatable(
            f"{name}: {EMBEDDING} cannot be zeroed, since nothing would be left of the input; {remedy}"
        )


def require_downstream(name: str, sources: Sequence[str], downstream: Sequence[str]) -> None:
    """Every downstream component must read what every source writes. Raises OverlappingComponents or NotDownstream."""
    both = [label for label in downstream if label in sources]
    if both:
        raise OverlappingComponents(
            f"{name}: {', '.join(both)} stands among the sources and among the components after them"
        )
    for source in sources:
        place = component_order(source)
        wrong = [label for label in downstream if component_order(label) <= place]
        if wrong:
            layer = place // 2
            first = f"L{layer}MLP, and " if place % 2 == 0 else ""
            raise NotDownstream(
                f"{name}: {', '.join(wrong)} cannot lie between source {source} and the answer; after {source} come {first}"
                f"the heads and MLPs of layers {layer + 1} and up"
            )


def require_components(lake: Lake, run: str, labels: Iterable[str]) -> None:
    """Raises UnknownComponent, naming the layers and heads there are."""
    layers, heads = lake.session.execute(
        "SELECT max(layer), max(head) FROM slices WHERE run = ? AND slice_kind = 'head'",
        [run],
        tables={"slices"},
    ).fetchall()[0]
    if layers is None:
        return
    for label in labels:
        match = _LABEL.fullmatch(label)
        if match and (int(match[1]) > layers or int(match[3] or 0) > heads):
            raise UnknownComponent(
                f"no component {label}; run {run!r} has {EMBEDDING}, and in each of layers 0–{layers} "
                f"heads 0–{heads} and an MLP"
            )


__all__ = [
    "EMBEDDING",
    "NotAblatable",
    "NotDownstream",
    "OverlappingComponents",
    "UnknownComponent",
    "component_order",
    "read_components",
    "require_ablatable",
    "require_components",
    "require_downstream",
]

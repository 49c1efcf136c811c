"""`--scalar NAME,key=value,…` and the pairs it is measured on: what extract attributions and scalar_gradients take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from ..lake.datasets import (
    ATTRIBUTIONS,
    DEFAULT_PROBE,
    SCALAR_CHANGES,
    SCALAR_GRADIENTS,
    UPDATE_NORMS,
    Need,
    attribution_parameters,
    scalar_change_parameters,
    scalar_gradient_parameters,
)

Function = TypeVar("Function", bound=Callable[..., Any])
NAMES = ("scalar", "pair_type", "split", "max_pairs_per_type", "integrate")
OF_SCALARS = (ATTRIBUTIONS, SCALAR_CHANGES, SCALAR_GRADIENTS)
# Those that take a scalar and pairs, and nothing else.
_PLAIN = {SCALAR_CHANGES: scalar_change_parameters, SCALAR_GRADIENTS: scalar_gradient_parameters}
TAKERS = {name: OF_SCALARS if name != "integrate" else (ATTRIBUTIONS,) for name in NAMES}


def scalar_options(function: Function) -> Function:
    """Options of the datasets of scalars. They are repeatable texts, since with --for the report reads them."""
    for name, metavar, about in reversed(
        (
            (
                "scalar",
                "NAME,key=value,…",
                "attributions, scalar_changes, scalar_gradients: scalar and parameters: qk_rank_separation,head=L1H1,…",
            ),
            (
                "pair-type",
                "TYPE",
                "attributions, scalar_changes, scalar_gradients: type of causal patch pair; required.",
            ),
            (
                "split",
                "SPLIT",
                "attributions, scalar_changes, scalar_gradients: split of the pairs [default: all].",
            ),
            (
                "max-pairs-per-type",
                "N",
                "attributions, scalar_changes, scalar_gradients: most pairs of each type [default: 64].",
            ),
            (
                "integrate",
                "N",
                "attributions: points on the path at which the gradient is taken too [default: 0].",
            ),
        )
    ):
        function = click.option(f"--{name}", multiple=True, metavar=metavar, help=about)(function)
    return function


def scalar_needs(dataset: str, options: Mapping[str, tuple[str, ...]]) -> list[Need]:
    """The dataset of every --scalar, for every probe; with attributions the norms their cosines divide by."""
    if not options["scalar"]:
        raise click.UsageError(f"{dataset} are of a scalar: name it with --scalar NAME,key=value,…")
    path = _number(options, "integrate", 0)
    needs = []
    for text in options["scalar"]:
        name, parameters = parse_scalar(text)
        for probe in options["probe"] or (DEFAULT_PROBE,):
            pairs: dict[str, Any] = {
                "pair_type": options["pair_type"],
                "probe": probe,
                "split": options["split"],
                "max_pairs_per_type": _number(options, "max_pairs_per_type", 64),
            }
            made = (
                attribution_parameters(name, parameters, integrate=path, **pairs)
                if dataset == ATTRIBUTIONS
                else _PLAIN[dataset](name, parameters, **pairs)
            )
            needs.append(Need(dataset, made))
    return [*needs, *([Need(UPDATE_NORMS)] if dataset == ATTRIBUTIONS else [])]


def parse_scalar(text: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of `NAME,key=value,…`; whole numbers are numbers."""
    name, *items = [part.strip() for part in text.split(",")]
    parameters: dict[str, Any] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and key and value):
            raise click.UsageError(f"--scalar {text}: {item!r} is not key=value")
        if key in parameters:
            raise click.UsageError(f"--scalar {text}: {key} stands twice")
        parameters[key] = int(value) if value.lstrip("-").isdigit() else value
    return name, parameters


def _number(options: Mapping[str, Sequence[str]], name: str, default: int) -> int:
    given = options[name]
    if not given:
        return default
    if len(given) > 1 or not given[0].isdigit():
        raise click.UsageError(f"--{name.replace('_', '-')} {' '.join(given)}: give one whole number")
    return int(given[0])

"""`--scalar NAME,key=value,…` and the pairs it is measured on: what `lakebed extract attributions` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from ..lake.datasets import ATTRIBUTIONS, DEFAULT_PROBE, UPDATE_NORMS, Need, attribution_parameters

Function = TypeVar("Function", bound=Callable[..., Any])
NAMES = ("scalar", "pair_type", "split", "max_pairs_per_type", "integrate")


def scalar_options(function: Function) -> Function:
    """Options of dataset attributions. They are repeatable texts, since with --for the report reads them."""
    for name, metavar, about in reversed(
        (
            (
                "scalar",
                "NAME,key=value,…",
                "attributions: the scalar and its parameters, e.g. qk_rank_separation,head=L1H1,rank=4,…",
            ),
            ("pair-type", "TYPE", "attributions: type of causal patch pair; required."),
            ("split", "SPLIT", "attributions: split of the pairs [default: all]."),
            ("max-pairs-per-type", "N", "attributions: most pairs of each type [default: 64]."),
            (
                "integrate",
                "N",
                "attributions: points on the path at which the gradient is taken too [default: 0].",
            ),
        )
    ):
        function = click.option(f"--{name}", multiple=True, metavar=metavar, help=about)(function)
    return function


def scalar_needs(options: Mapping[str, tuple[str, ...]]) -> list[Need]:
    """The attributions of every --scalar, for every probe, and the norms their cosines divide by."""
    if not options["scalar"]:
        raise click.UsageError("attributions are of a scalar: name it with --scalar NAME,key=value,…")
    needs = [
        Need(
            ATTRIBUTIONS,
            attribution_parameters(
                *parse_scalar(text),
                pair_type=options["pair_type"],
                probe=probe,
                split=options["split"],
                max_pairs_per_type=_number(options, "max_pairs_per_type", 64),
                integrate=_number(options, "integrate", 0),
            ),
        )
        for text in options["scalar"]
        for probe in options["probe"] or (DEFAULT_PROBE,)
    ]
    return [*needs, Need(UPDATE_NORMS)]


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

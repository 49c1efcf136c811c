"""Sentences that reports on recorded steps share: how far a scalar moved, and which term of the updates carried it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .markdown import number, percent

if TYPE_CHECKING:
    from .results import Results


def moved_by_terms(what: str, of: dict[str, Any], results: Results, when: str = "") -> str:
    """How far something moved, and what each term that adds up gave; `of` is a row of view `scalar_summary`."""
    momentum, gradient, decay = (
        _part(results, of["label"], name)
        for name in ("adam_historical_momentum", "adam_current_gradient", "weight_decay")
    )
    change = of["sum_actual_delta"]
    return (
        f"**{what} {'grew' if change > 0 else 'fell'} by {number(abs(change))}** over {of['num_intervals']:,} recorded "
        f"steps, {of['start_step']} to {of['end_step']} (in {of['growing_intervals']} of them it grew{when}): carried "
        f"momentum gave {momentum}, the current gradient {gradient}, weight decay {decay}, as shares of the first order "
        f"{number(of['sum_predicted_delta'])}."
    )


def beside_the_terms(scalars: Sequence[dict[str, Any]], results: Results) -> str:
    """What SGD would have done, and how exact it all is: of one or more rows of view `scalar_summary`, in their order."""
    raw, clipped = (
        _listed(_part(results, of["label"], name) for of in scalars) for name in ("raw_sgd", "clipped_sgd")
    )
    errors = _listed(percent(of["mean_relative_error"]) for of in scalars)
    residuals = _listed(number(of["sum_reconstructed_adamw_residual"], 2) for of in scalars)
    first = scalars[0]
    return (
        f"Plain SGD at the same learning rate would have given {raw} along these gradients, clipped SGD {clipped}; clipping "
        f"acted in {first['clipped_intervals']} of {first['num_intervals']} steps. First order is {errors} off per step on "
        f"average, and what float32 rounding left of the split is {residuals}."
    )


def _part(results: Results, label: str, component: str) -> str:
    row = results.first(
        "SELECT sum_delta, share_of_first_order FROM component_summary WHERE label = $label AND component = $component",
        label=label,
        component=component,
    )
    assert row is not None
    share = row["share_of_first_order"]
    return number(row["sum_delta"], 3) + ("" if share is None else f" ({percent(share)})")


def _listed(parts: Iterable[str]) -> str:
    *before, last = parts
    return f"{', '.join(before)} and {last}" if before else last

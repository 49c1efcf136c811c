"""Sentences and tables that reports on recorded steps share: how far a scalar moved, and which term of the updates
carried it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .markdown import number, percent
from .report import TextTable

if TYPE_CHECKING:
    from .results import Results

COMPONENT_TABLE = TextTable(
    "component_summary",
    "Sums over the window",
    {
        "scalar": "label",
        "component": "component",
        "Σ change": "sum_delta",
        "share of the actual change": "share_of_actual",
        "share of its first order": "share_of_first_order",
        "mean cosine with the gradient": "mean_cosine",
        "mean norm": "mean_l2_norm",
    },
    about="Current gradient, historical momentum and weight decay add up to the first order of the actual update; raw and "
    "clipped SGD stand beside that sum.",
)
EXACTNESS_TABLE = TextTable(
    "scalar_summary",
    "How exact it is",
    {
        "scalar": "label",
        "steps": "num_intervals",
        "Σ actual change": "sum_actual_delta",
        "Σ first order": "sum_predicted_delta",
        "Σ rounding residual": "sum_reconstructed_adamw_residual",
        "mean relative error of the first order": "mean_relative_error",
        "signs that match": "sign_matches",
        "clipped steps": "clipped_intervals",
    },
)


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

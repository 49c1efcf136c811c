"""Sentences that reports on intervals share: how well gradient times update explains a change, and what carried it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .markdown import number, percent

if TYPE_CHECKING:
    from .results import Results


def movement(what: str, change: float, start: int, end: int, fastest: dict[str, Any], grew: str) -> str:
    """How far something moved, and when it did so fastest: `fastest` has source_step, target_step and actual_delta."""
    delta = fastest["actual_delta"]
    return (
        f"**{what} {'grew' if change > 0 else 'fell'} by {number(abs(change))}** between steps {start} and {end}, fastest "
        f"from {fastest['source_step']} to {fastest['target_step']} ({'+' if delta > 0 else ''}{number(delta)}); it grew in "
        f"{grew}."
    )


def explained(of: dict[str, Any]) -> str:
    """How far the first order, and the integral where there is one, is off; `of` is a row of view `interval_summary`."""
    text = (
        f"Gradient times update, taken at each source, gives {number(of['sum_predicted_delta'])}: a mean relative error of "
        f"{percent(of['mean_relative_error'])} per interval, the sign right in {of['sign_matches']} of {of['num_intervals']}"
    )
    if of["sum_integrated_delta"] is None:
        return f"{text}."
    return (
        f"{text}. Integrated along the path it gives {number(of['sum_integrated_delta'])}, "
        f"{percent(of['mean_integrated_relative_error'])} off."
    )


def carried(results: Results, label: str, what: str = "it") -> str:
    """The largest modules and heads of one scalar, from view `summed_contributions`; empty if neither was decomposed."""
    parts = []
    for partition, name in (("module_blocks", "module"), ("attention_heads", "head")):
        top = results.rows(
            "SELECT group_id, contribution, share_of_actual FROM summed_contributions WHERE label = $label AND "
            "partition_name = $partition ORDER BY abs(contribution) DESC, group_id LIMIT 3",
            label=label,
            partition=partition,
        )
        if top:
            listed = ", ".join(
                f"`{row['group_id'].split(':', 1)[1]}` {number(row['contribution'], 3)} ({percent(row['share_of_actual'])})"
                for row in top
            )
            parts.append(f"by {name}: {listed}")
    return f"Most of {what}, {'; '.join(parts)} (share of the actual change)." if parts else ""

"""What ov-write-progress-report says of its rows, in sentences."""

from __future__ import annotations

from typing import Any

from .markdown import number, percent
from .results import Results


def findings(results: Results, side: str) -> list[str]:
    """Of views `heads` and `correlation_rows`: whose write from the support grew most, what made it grow, what the
    conditions do to it, and which write scalar tracks the answer."""
    heads = results.rows("FROM heads")
    return [
        _grew(heads[0], results, side),
        _made_by(heads[0]),
        _conditions(heads[0]),
        *_others(heads),
        _tracked(results, heads[0]["head_label"]),
    ]


def warnings(results: Results) -> list[str]:
    """Of view `shuffled_to_itself` and the number of steps."""
    lines = []
    if len(results.steps) == 3:
        lines.append("There are two intervals, between which every correlation is +1 or -1: it says nothing.")
    found = results.first("FROM shuffled_to_itself")
    assert found is not None
    if found["same_answer"]:
        lines.append(
            f"In {found['same_answer']:,} of {found['pairs']:,} pairs the shuffled values come from a pair with the same "
            "answer: there shuffling leaves the right value in place."
        )
    return lines


def _grew(head: dict[str, Any], results: Results, side: str) -> str:
    rose = "rose" if head["last_margin"] > head["first_margin"] else "fell"
    title = f"**{head['head_label']}'s write from the support grew most**"
    if head["change"] <= 0:
        title = f"**No head's write from the support grew; {head['head_label']}'s fell least**"
    elif rose == "rose" and (head["correlation"] or 0) > 0:
        title = f"**{head['head_label']}'s write from the support grew with the answer**"
    together = (
        f"interval by interval ({head['num_points']}) the two move together with r = {number(head['correlation'], 2)}"
        if head["correlation"] is not None
        else f"interval by interval they cannot be held against each other ({head['reason'].replace('_', ' ')})"
    )
    return (
        f"{title}: from step {results.steps[0]} to {results.steps[-1]} attention mass on it times OV value margin went "
        f"{number(head['first_product'], 3)} → {number(head['last_product'], 3)}, while the answer's margin {rose}, "
        f"{number(head['first_margin'], 3)} → {number(head['last_margin'], 3)} (mean over {side} records); {together}."
    )


def _made_by(head: dict[str, Any]) -> str:
    attention, ov_map = head["by_attention"], head["by_ov_map"]
    sizes = abs(attention) + abs(ov_map)
    larger = "Its attention" if abs(attention) > abs(ov_map) else "Its OV map"
    share = max(abs(attention), abs(ov_map)) / sizes if sizes else None
    return (
        f"**{larger} did more of it** ({percent(share)} of the sizes of both): {_signed(attention)} by attention "
        f"({number(head['first_mass'], 3)} → {number(head['last_mass'], 3)}), {_signed(ov_map)} by the OV map "
        f"({number(head['first_map'], 3)} → {number(head['last_map'], 3)})."
    )


def _conditions(head: dict[str, Any]) -> str:
    """What replaced attention and replaced values do to the whole write, at the last checkpoint."""
    real, support, shuffled = head["last_write"], head["last_map"], head["last_shuffled"]
    useful = (
        "makes the write favour the answer" if support > 0 else "does not make the write favour the answer"
    )
    if real > 0:
        useful = "strengthens it" if support > real else "does not strengthen it"
    return (
        f"At the end the whole write of {head['head_label']} has a value margin of {number(real, 3)} logits. Attention "
        f"on the support alone {useful} ({number(support, 3)}); with another pair's values there it is "
        f"{number(shuffled, 3)}, so that {number(real - shuffled, 3)} hang on the support's own values; with both, "
        f"{number(head['last_shuffled_map'], 3)}."
    )


def _others(heads: list[dict[str, Any]]) -> list[str]:
    if len(heads) == 1:
        return []
    listed = ", ".join(f"{of['head_label']} {_signed(of['change'])}" for of in heads[1:6])
    more = f" and {len(heads) - 6} more" if len(heads) > 6 else ""
    return [f"Of the other heads it changed by: {listed}{more}."]


def _tracked(results: Results, head: str) -> str:
    best = results.first(
        "SELECT * FROM correlation_rows WHERE record_side = $side AND condition = $condition AND head_label = $head AND "
        "output_delta_metric = 'delta_fixed_source_competitor_margin' AND status = 'computed' ORDER BY correlation DESC, "
        "write_delta_metric LIMIT 1",
        side=results.parameters["record_side"][0],
        condition=results.parameters["conditions"][0],
        head=head,
    )
    if best is None:
        return "No write scalar can be held against the answer over the intervals."
    return (
        f"Of {head}'s eight write scalars `{best['write_delta_metric'].removeprefix('delta_')}` tracks the margin against a "
        f"fixed competitor best, r = {number(best['correlation'], 2)} over {best['num_points']} intervals."
    )


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value, 3)}"

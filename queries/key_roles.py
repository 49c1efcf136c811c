"""The key rule of score reports (definitions: part 1, E and part 2, A3), and what is refused under it.

The query is one position. Support and distractors are keys of that query, so only their positions up to it count: the
roles themselves also list writes that come after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import ReportFailed

if TYPE_CHECKING:
    from .results import Results


def check_key_rule(results: Results, query_role: str, support_role: str, distractor_role: str) -> None:
    """Raises ReportFailed, counting events, unless every event has one query, a support and a distractor.

    Section `key_rule` must have a row per event: sample_id, query_index, prediction_position, query_positions,
    query_position (the first of them), support_positions and distractor_positions (those up to the query).
    """
    name = results.report.report_name()
    if not results.value("SELECT count(*) FROM key_rule"):
        raise ReportFailed(f"{name}: there is no event to score")
    _refuse(
        results,
        "len(query_positions) <> 1",
        f"{name}: the query must be exactly one position, and role {query_role!r} is not",
    )
    _refuse(
        results,
        "query_position > prediction_position",
        f"{name}: Intervention positions must be in the causal prefix, and role {query_role!r} lies after the prediction",
    )
    for what, role in (("support", support_role), ("distractor", distractor_role)):
        _refuse(
            results,
            f"len({what}_positions) = 0",
            f"{name}: {what} role {role!r} has no position up to the query",
        )


def _refuse(results: Results, condition: str, message: str) -> None:
    found = results.first(
        f"SELECT count(*) FILTER ({condition}) AS refused, count(*) AS events, "
        f"any_value(sample_id || ' query ' || query_index) FILTER ({condition}) AS example FROM key_rule"
    )
    if found is not None and found["refused"]:
        raise ReportFailed(
            f"{message} in {found['refused']:,} of {found['events']:,} events (such as {found['example']})"
        )

"""The key rule of score reports (definitions: part 1, E and part 2, A3), and what is refused under it.

The query is one position. Support and distractors are keys of that query, so only their positions up to it count: the
roles themselves also list writes that come after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import ReportFailed

if TYPE_CHECKING:
    from .results import Results

# Of the records in `pair_sides` (see `pair_selection`), by the options score_query_role, support_key_role and
# distractor_key_role.
KEY_RULE = """\
-- Where query, support and distractors of each measured record stand.
-- view: places
SELECT
    p.probe AS side_probe, p.event AS side_event, CASE p.kind WHEN 'partition' THEN 'causal_prefix' ELSE p.role END AS place,
    p.position
FROM positions AS p
JOIN (SELECT DISTINCT side_probe, side_event FROM pair_sides) AS s ON s.side_probe = p.probe AND s.side_event = p.event
WHERE
    p.run = $run AND CASE p.kind WHEN 'partition' THEN 'causal_prefix' ELSE p.role END
      IN ($score_query_role, $support_key_role, $distractor_key_role)

-- The key rule: of support and distractors only the positions up to the query are keys of that query.
-- view: key_rule
WITH lists AS (
    SELECT
        side_probe, side_event,
        list(position ORDER BY position) FILTER (place = $score_query_role) AS query_positions,
        list(position ORDER BY position) FILTER (place = $support_key_role) AS supports,
        list(position ORDER BY position) FILTER (place = $distractor_key_role) AS distractors
    FROM places
    GROUP BY side_probe, side_event
)
SELECT
    s.side_probe, s.side_event, e.sample_id, e.query_index, e.prediction_position,
    coalesce(l.query_positions, []) AS query_positions,
    l.query_positions[1] AS query_position,
    coalesce(list_filter(l.supports, lambda p: p <= l.query_positions[1]), []) AS support_positions,
    coalesce(list_filter(l.distractors, lambda p: p <= l.query_positions[1]), []) AS distractor_positions
FROM (SELECT DISTINCT side_probe, side_event FROM pair_sides) AS s
JOIN events AS e ON e.run = $run AND e.probe = s.side_probe AND e.event = s.side_event
LEFT JOIN lists AS l ON l.side_probe = s.side_probe AND l.side_event = s.side_event
ORDER BY s.side_probe, s.side_event

"""


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

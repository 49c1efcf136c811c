"""Sums over the intervals of a `DecomposedReport`: by scalar, by group of parameters, and what its charts draw.

They read view `labels` of the report: spec, label, position (of the label in the report's order) and record_side. What is
summed are all pairs of the first record side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results import Results

DECOMPOSED_SUMMARY = """\
-- All pairs, an interval and scalar per row.
-- view: pooled_metrics
SELECT s.label, s.position, s.record_side, i.step_gap, m.*
FROM metrics AS m
JOIN labels AS s USING (spec)
JOIN intervals AS i USING (source_step, target_step)
WHERE m.split = '__all__' AND m.pair_type = '__all__'
ORDER BY s.position, list_position($record_side, s.record_side), m.source_step

-- view: primary_metrics
SELECT * FROM pooled_metrics WHERE record_side = $record_side[1] ORDER BY position, source_step

-- Every cell and group, with what is said of it whatever the scalar is.
-- view: cell_contributions
SELECT
  s.label, s.position, s.record_side,
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  m.split, m.pair_type, m.num_pairs, m.source_value, m.target_value, m.actual_delta,
  m.predicted_delta AS global_predicted_delta, m.residual AS global_residual, m.relative_error AS global_relative_error,
  g.* EXCLUDE (selections),
  d.* EXCLUDE (spec, source_step, target_step, split, pair_type, group_id),
  d.predicted_delta_contribution / g.num_selected_parameters AS contribution_per_parameter
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS s USING (spec)
JOIN group_contributions AS d ON d.spec = m.spec AND d.source_step = m.source_step AND d.target_step = m.target_step
  AND d.split = m.stored_split AND d.pair_type = m.stored_pair_type
JOIN groups AS g USING (group_id)
ORDER BY
  i.source_step, list_position($record_side, s.record_side), s.position, m.split, m.pair_type, g.group_kind, g.group_id

-- By scalar.
-- view: interval_summary
SELECT
  label, position,
  count(*) AS num_intervals,
  fsum(actual_delta) AS sum_actual_delta,
  fsum(predicted_delta) AS sum_predicted_delta,
  fsum(integrated_delta) AS sum_integrated_delta,
  favg(relative_error) AS mean_relative_error,
  favg(integrated_relative_error) AS mean_integrated_relative_error,
  fsum(abs(residual)) / nullif(fsum(abs(actual_delta)), 0) AS error_over_change,
  fsum(abs(actual_delta - integrated_delta)) / nullif(fsum(abs(actual_delta)), 0) AS integrated_error_over_change,
  count(*) FILTER (sign_match) AS sign_matches,
  count(*) FILTER (actual_delta > 0) AS growing_intervals,
  arg_min(source_value, source_step) AS first_value,
  arg_max(target_value, source_step) AS last_value
FROM primary_metrics
GROUP BY label, position
ORDER BY position

-- Of each interval; groups that hold all the others, or are a parameter, apart.
-- view: primary_contributions
SELECT
  label, position, source_step, target_step, actual_delta, group_id, group_kind, partition_name, num_selected_parameters,
  predicted_delta_contribution, integrated_delta_contribution
FROM cell_contributions
WHERE record_side = $record_side[1] AND split = '__all__' AND pair_type = '__all__'
  AND group_kind NOT IN ('global_all', 'parameter_tensor')

-- view: summed_contributions
SELECT
  label, position, group_id, partition_name,
  fsum(predicted_delta_contribution) AS first_order_contribution,
  fsum(integrated_delta_contribution) AS integrated_contribution,
  coalesce(fsum(integrated_delta_contribution), fsum(predicted_delta_contribution)) AS contribution,
  coalesce(fsum(integrated_delta_contribution), fsum(predicted_delta_contribution)) / nullif(fsum(actual_delta), 0)
    AS share_of_actual,
  any_value(num_selected_parameters) AS num_selected_parameters
FROM primary_contributions
GROUP BY label, position, group_id, partition_name

-- Within a partition contributions add up; across partitions they overlap.
-- view: largest_contributions
SELECT * FROM summed_contributions
QUALIFY row_number() OVER (PARTITION BY label ORDER BY abs(contribution) DESC, group_id) <= $top_k_groups
ORDER BY position, abs(contribution) DESC, group_id

-- The first of them, for the page.
-- view: carriers
SELECT * FROM largest_contributions
QUALIFY row_number() OVER (PARTITION BY label ORDER BY abs(contribution) DESC, group_id) <= 10
ORDER BY position, abs(contribution) DESC, group_id

-- Of the first scalar, each kind of group on its own.
-- view: top_groups
SELECT replace(partition_name, '_', ' ') AS partition, split_part(group_id, ':', 2) AS name, contribution
FROM summed_contributions
WHERE position = 1
QUALIFY row_number() OVER (PARTITION BY partition_name ORDER BY abs(contribution) DESC, group_id) <= 12
ORDER BY list_position(
  ['module_blocks', 'attention_heads', 'attention_head_projections', 'attention_projections', 'mlp_neurons'], partition_name
), abs(contribution) DESC, group_id

-- Running sums of the actual changes, from zero.
-- view: ledger
SELECT target_step AS step, label AS series, fsum(actual_delta) OVER (PARTITION BY label ORDER BY target_step) AS value
FROM primary_metrics
UNION ALL
SELECT min(source_step), label, 0 FROM primary_metrics GROUP BY label
ORDER BY series, step

-- view: actual_vs_predicted
SELECT
  format('{}→{}, {}', source_step, target_step, label) AS interval, label AS series,
  predicted_delta AS x, actual_delta AS y
FROM primary_metrics
ORDER BY position, source_step

-- view: relative_error
SELECT step, label || ', ' || kind AS series, value
FROM (
  UNPIVOT (
    SELECT
      target_step AS step, position, label, relative_error AS "first order", integrated_relative_error AS integrated
    FROM primary_metrics
  ) ON "first order", integrated INTO NAME kind VALUE value
)
ORDER BY position, kind, step
"""


def interval_facts(results: Results, top: int) -> dict[str, Any]:
    """The summary of a report on intervals (definitions 2 §E): which, how well explained, what carried the last one."""
    ends = results.rows("SELECT DISTINCT source_step, target_step FROM intervals ORDER BY source_step")
    last = ends[-1]["target_step"]
    quality = results.first(
        "SELECT favg(sign_match::INTEGER) AS all_all_sign_match_fraction, "
        "favg(absolute_error) AS all_all_mean_absolute_error, favg(relative_error) AS all_all_mean_relative_error, "
        "max(relative_error) AS all_all_worst_relative_error FROM pooled_metrics"
    )
    of_last = (
        "SELECT label, group_id, group_kind, predicted_delta_contribution, integrated_delta_contribution "
        "FROM primary_contributions WHERE target_step = $last AND {} ORDER BY {}, position, group_id LIMIT $top"
    )
    value = "predicted_delta_contribution"
    wanted = {
        "positive": (f"{value} > 0", f"{value} DESC"),
        "negative": (f"{value} < 0", value),
        "abs": ("true", f"abs({value}) DESC"),
    }
    return {
        "num_intervals": len(ends),
        "intervals": [f"{of['source_step']}->{of['target_step']}" for of in ends],
        "target_steps": [of["target_step"] for of in ends],
        "final_target_step": last,
        **(quality or {}),
        **{
            f"final_top_{name}_contributions": results.rows(of_last.format(*clauses), last=last, top=top)
            for name, clauses in wanted.items()
        },
    }

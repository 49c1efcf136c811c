-- rows: scalar_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role, s.record_side,
  v.split, v.pair_type, v.pair_id, p.source_sample_id, p.source_query_index,
  k.query_position, k.support_positions, k.distractor_positions,
  len(k.support_positions) AS num_support_positions, len(k.distractor_positions) AS num_distractor_positions,
  e.answer_token AS answer_token_id,
  v.answer_correct_source = 1 AS source_answer_correct, v.answer_correct_target = 1 AS target_answer_correct,
  v.best_wrong_token_source::INTEGER AS source_best_wrong_token_id,
  v.best_wrong_token_target::INTEGER AS target_best_wrong_token_id,
  s.scalar_name, v.value_source AS source_value, v.value_target AS target_value,
  v.value_target - v.value_source AS actual_delta
FROM pair_scalars AS v
JOIN labels AS s USING (spec)
JOIN intervals AS i USING (source_step, target_step)
JOIN pair_sides AS p ON p.pair_id = v.pair_id AND p.record_side = s.record_side
JOIN key_rule AS k ON k.side_probe = p.side_probe AND k.side_event = p.side_event
JOIN events AS e ON e.run = $run AND e.probe = p.side_probe AND e.event = p.side_event
ORDER BY i.source_step, list_position($record_side, s.record_side), s.position, v.pair_id

-- rows: metric_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role, s.record_side, s.scalar_name,
  m.source_value AS source_objective_value, m.source_value_abs_mean AS source_objective_value_abs_mean,
  m.source_value_std AS source_objective_value_std, m.num_pairs AS num_entries, m.num_pairs AS num_unique_pairs,
  c.* EXCLUDE (spec, source_step, target_step, split, pair_type),
  m.* EXCLUDE (spec, source_step, target_step, source_value_abs_mean, stored_split, stored_pair_type)
    RENAME (gradient_l2_norm AS scalar_gradient_l2_norm, update_gradient_cosine AS update_scalar_gradient_cosine,
      zero_gradient_parameter_count AS zero_scalar_gradient_parameter_count,
      zero_gradient_parameter_names AS zero_scalar_gradient_parameter_names)
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS s USING (spec)
JOIN cell_scalars AS c USING (spec, source_step, target_step, split, pair_type)
ORDER BY i.source_step, list_position($record_side, s.record_side), s.position, m.split, m.pair_type

-- rows: decomposition_rows
SELECT
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role, label AS scalar_name,
  * EXCLUDE (label, position)
    RENAME (gradient_l2_norm AS scalar_gradient_l2_norm, update_gradient_cosine AS update_scalar_gradient_cosine)
FROM cell_contributions
ORDER BY
  source_step, list_position($record_side, record_side), position, split, pair_type, group_kind, group_id

-- rows: group_rows
SELECT
  * RENAME (group_layer AS layer, group_head AS head, group_projection AS projection, group_neuron AS neuron)
FROM groups
ORDER BY group_kind, group_id

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
ORDER BY scan_order

-- What each region did to each scalar over all intervals: integrated where that was asked for.
-- view: region_sums
WITH summed AS (
  SELECT
    m.label, m.position, r.region, r.place, fsum(r.actual_update) AS contribution,
    any_value(m.sum_actual_delta) AS sum_actual_delta
  FROM (
    SELECT *, fsum(actual_delta) OVER (PARTITION BY label) AS sum_actual_delta FROM primary_metrics
  ) AS m
  JOIN region_contributions AS r ON r.spec = m.spec AND r.source_step = m.source_step AND r.target_step = m.target_step
    AND r.split = m.stored_split AND r.pair_type = m.stored_pair_type
    AND r.point = CASE WHEN m.integrated_delta IS NULL THEN 'source' ELSE 'path' END
  GROUP BY m.label, m.position, r.region, r.place
)
SELECT
  label, position, region, place, contribution,
  contribution / nullif(sum_actual_delta, 0) AS share_of_actual,
  contribution / nullif(fsum(abs(contribution)) OVER (PARTITION BY label), 0) AS share_of_all_pushes
FROM summed
ORDER BY position, place

-- The regions beside each other, a scalar per row.
-- view: region_table
PIVOT (SELECT label, position, region, contribution FROM region_sums)
ON region IN ('W_Q', 'W_K', 'W_V', 'W_O', 'other attention', 'MLPs', 'embeddings', 'LayerNorms')
USING any_value(contribution)
GROUP BY label, position
ORDER BY position

-- view: scalar_table
SELECT * FROM interval_summary JOIN region_table USING (label, position) ORDER BY position

-- view: explained
SELECT s.*, c.switches
FROM interval_summary AS s
JOIN (
  SELECT scalar_name AS label, favg(competitor_switch_fraction) AS switches
  FROM metric_rows
  WHERE split = '__all__' AND pair_type = '__all__' AND record_side = $record_side[1]
  GROUP BY scalar_name
) AS c USING (label)
ORDER BY s.position

-- view: unit_ledger
SELECT l.*, s.unit
FROM ledger AS l
JOIN (SELECT DISTINCT label, position, unit FROM labels) AS s ON s.label = l.series
ORDER BY s.unit, s.position, l.step

-- view: unit_scatter
SELECT split_part(a.interval, ',', 1) AS interval, a.series, a.x, a.y, s.unit
FROM actual_vs_predicted AS a
JOIN (SELECT DISTINCT label, position, unit FROM labels) AS s ON s.label = a.series
ORDER BY s.unit, s.position, a.x

-- view: region_grid
SELECT label AS row, region AS column, share_of_all_pushes AS value FROM region_sums ORDER BY position, place

-- The largest change first, in standard deviations over the pairs at the end: scalars have different units.
-- view: movers
SELECT
  s.*, s.label NOT IN ('answer_margin', 'negative_answer_loss') AS of_the_head,
  s.sum_actual_delta / nullif(e.target_value_std, 0) AS standardized_change,
  f.source_step AS fastest_source_step, f.target_step AS fastest_target_step, f.actual_delta AS fastest_delta
FROM interval_summary AS s
JOIN (SELECT label, arg_max(target_value_std, source_step) AS target_value_std FROM primary_metrics GROUP BY label) AS e
  USING (label)
JOIN (
  SELECT label, source_step, target_step, actual_delta
  FROM primary_metrics
  QUALIFY row_number() OVER (PARTITION BY label ORDER BY abs(actual_delta) / step_gap DESC, source_step) = 1
) AS f USING (label)
ORDER BY abs(standardized_change) DESC NULLS LAST, s.position

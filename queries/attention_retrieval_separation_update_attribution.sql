-- What a change of score is the sum of, key by key, and each key's share in its pair's separation: a mean over support keys
-- less a mean over distractor keys.
-- view: key_changes
SELECT
  c.* EXCLUDE (run, spec, scalar_head),
  c.target_score - c.source_score AS actual_score_delta,
  c.target_attention - c.source_attention AS actual_attention_delta,
  CASE c.key_role WHEN $support_key_role THEN 1.0 ELSE -1.0 END
    / count(*) OVER (PARTITION BY c.spec, c.source_step, c.target_step, c.pair_id, c.key_role) AS weight
FROM score_changes AS c
JOIN intervals AS i USING (source_step, target_step)
WHERE c.run = $run AND list_contains($score_spec, c.spec)
ORDER BY c.source_step, list_position($record_side, c.record_side), c.pair_id, c.key_role, c.key_position

-- The same sums for the separation of every cell of pairs.
-- view: cell_parts
SELECT
  c.source_step, c.target_step, c.record_side, p.split, p.pair_type,
  fsum(COLUMNS([
    'actual_score_delta', 'q_vector_delta_source_key', 'source_query_k_vector_delta', 'qk_vector_cross',
    'q_input_source_key', 'q_weight_source_key', 'q_bias_source_key', 'q_weight_input_cross_source_key',
    'source_query_k_input', 'source_query_k_weight', 'source_query_k_bias', 'source_query_k_weight_input_cross'
  ]) * c.weight) / count(DISTINCT c.pair_id)
FROM key_changes AS c
JOIN cell_pairs AS p ON p.pair_id = c.pair_id
GROUP BY c.source_step, c.target_step, c.record_side, p.split, p.pair_type
ORDER BY ALL

-- rows: metric_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  $support_key_role || '-minus-mean-' || $distractor_key_role AS score_key_role,
  $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role, s.record_side, s.score_component,
  'retrieval_separation' AS objective,
  m.* EXCLUDE (spec, source_step, target_step, stored_split, stored_pair_type)
    RENAME (
      source_value_std AS source_objective_value_std, source_value_abs_mean AS source_objective_value_abs_mean,
      gradient_l2_norm AS score_gradient_l2_norm, update_gradient_cosine AS update_score_gradient_cosine,
      zero_gradient_parameter_count AS zero_score_gradient_parameter_count,
      zero_gradient_parameter_names AS zero_score_gradient_parameter_names
    ),
  m.source_value AS source_objective_value, m.num_pairs AS num_unique_pairs,
  c.num_scores, c.num_support_scores, c.num_distractor_scores, c.support_scores_per_pair_mean,
  c.distractor_scores_per_pair_mean, c.support_delta_mean, c.distractor_delta_mean,
  p.actual_score_delta AS actual_total_score_delta_mean,
  p.q_vector_delta_source_key AS actual_q_side_delta_mean,
  p.source_query_k_vector_delta AS actual_k_side_delta_mean,
  p.qk_vector_cross AS actual_qk_cross_delta_mean,
  c.source_attention_mean, c.target_attention_mean,
  c.target_attention_mean - c.source_attention_mean AS actual_attention_delta_mean
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS s USING (spec)
JOIN cell_separations AS c USING (spec, source_step, target_step, split, pair_type)
JOIN cell_parts AS p ON p.source_step = m.source_step AND p.target_step = m.target_step AND p.record_side = s.record_side
  AND p.split = m.split AND p.pair_type = m.pair_type
ORDER BY i.source_step, list_position($record_side, s.record_side), s.position, m.split, m.pair_type

-- rows: decomposition_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  $support_key_role || '-minus-mean-' || $distractor_key_role AS score_key_role,
  $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role, s.record_side, s.score_component,
  'retrieval_separation' AS objective,
  m.split, m.pair_type, m.num_pairs, m.source_value, m.target_value, m.actual_delta,
  m.predicted_delta AS global_predicted_delta, m.residual AS global_residual, m.relative_error AS global_relative_error,
  g.* EXCLUDE (selections),
  d.* EXCLUDE (spec, source_step, target_step, split, pair_type, group_id)
    RENAME (gradient_l2_norm AS score_gradient_l2_norm, update_gradient_cosine AS update_score_gradient_cosine),
  d.predicted_delta_contribution / g.num_selected_parameters AS contribution_per_parameter
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS s USING (spec)
JOIN group_contributions AS d ON d.spec = m.spec AND d.source_step = m.source_step AND d.target_step = m.target_step
  AND d.split = m.stored_split AND d.pair_type = m.stored_pair_type
JOIN groups AS g USING (group_id)
ORDER BY
  i.source_step, list_position($record_side, s.record_side), s.position, m.split, m.pair_type, g.group_kind, g.group_id

-- rows: group_rows
SELECT * FROM groups ORDER BY group_kind, group_id

-- rows: score_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  c.key_role AS score_key_role, c.record_side, c.split, c.pair_type, c.pair_id, p.source_sample_id, p.source_query_index,
  c.* EXCLUDE (source_step, target_step, key_role, record_side, split, pair_type, pair_id, weight),
  c.actual_attention_delta - c.softmax_first_order_attention_delta AS softmax_residual,
  c.actual_score_delta + c.score_reconstruction_error AS reconstructed_score_delta,
  c.q_input_source_key + c.q_weight_source_key + c.q_bias_source_key
    + c.source_query_k_input + c.source_query_k_weight + c.source_query_k_bias AS linear_score_delta,
  c.q_weight_input_cross_source_key + c.source_query_k_weight_input_cross AS internal_weight_input_cross_delta
FROM key_changes AS c
JOIN intervals AS i USING (source_step, target_step)
JOIN chosen_pairs AS p ON p.pair_id = c.pair_id
ORDER BY i.source_step, list_position($record_side, c.record_side), c.pair_id, c.key_role <> $support_key_role, c.key_position

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
ORDER BY scan_order

-- How far the nine parts are from what the passes measured.
-- view: reconstruction
SELECT
  source_step, target_step,
  max(abs(score_reconstruction_error)) AS score_error,
  max(q_delta_reconstruction_error) AS query_error,
  max(k_delta_reconstruction_error) AS key_error
FROM key_changes
GROUP BY ALL
ORDER BY ALL

-- All pairs of the first record side: what moved its separation, interval by interval.
-- view: side_changes
SELECT p.*, i.step_gap
FROM cell_parts AS p
JOIN intervals AS i USING (source_step, target_step)
WHERE p.split = '__all__' AND p.pair_type = '__all__' AND p.record_side = $record_side[1]
ORDER BY p.source_step

-- view: side_summary
WITH sums AS (
  SELECT
    count(*) AS num_intervals,
    fsum(actual_score_delta) AS sum_actual,
    fsum(q_vector_delta_source_key) AS sum_q_side,
    fsum(source_query_k_vector_delta) AS sum_k_side,
    fsum(qk_vector_cross) AS sum_cross,
    count(*) FILTER (actual_score_delta > 0) AS growing_intervals,
    count(*) FILTER (abs(q_vector_delta_source_key) > abs(source_query_k_vector_delta)) AS q_side_larger
  FROM side_changes
)
SELECT
  s.*, f.source_step AS fastest_source_step, f.target_step AS fastest_target_step, f.actual_score_delta AS fastest_delta
FROM sums AS s, side_changes AS f
-- The way it went as a whole.
ORDER BY (CASE WHEN s.sum_actual < 0 THEN -1 ELSE 1 END) * f.actual_score_delta / f.step_gap DESC, f.source_step
LIMIT 1

-- The parts by interval, under names for readers.
-- view: named_parts
SELECT source_step, target_step, place, side, part, value
FROM (
  UNPIVOT (
    SELECT
      source_step, target_step, q_input_source_key, q_weight_source_key, q_bias_source_key, q_weight_input_cross_source_key,
      source_query_k_input, source_query_k_weight, source_query_k_bias, source_query_k_weight_input_cross, qk_vector_cross
    FROM side_changes
  ) ON COLUMNS(* EXCLUDE (source_step, target_step)) INTO NAME name VALUE value
)
JOIN (
  VALUES
    ('q_input_source_key', 1, 'query side', 'query: its input'),
    ('q_weight_source_key', 2, 'query side', 'query: W_Q'),
    ('q_bias_source_key', 3, 'query side', 'query: b_Q'),
    ('q_weight_input_cross_source_key', 4, 'query side', 'query: W_Q × input'),
    ('source_query_k_input', 5, 'key side', 'keys: their input'),
    ('source_query_k_weight', 6, 'key side', 'keys: W_K'),
    ('source_query_k_bias', 7, 'key side', 'keys: b_K'),
    ('source_query_k_weight_input_cross', 8, 'key side', 'keys: W_K × input'),
    ('qk_vector_cross', 9, 'both at once', 'query × keys')
) AS names (name, place, side, part) USING (name)
ORDER BY source_step, place

-- view: part_summary
SELECT
  side, part, fsum(value) AS sum_delta,
  fsum(value) / nullif((SELECT sum_actual FROM side_summary), 0) AS share_of_actual,
  fsum(abs(value)) AS sum_of_sizes
FROM named_parts
GROUP BY side, part, place
ORDER BY place

-- The parts over up to 60 windows, biases with their weights.
-- view: stacked_parts
WITH placed AS (
  SELECT
    source_step, target_step,
    (row_number() OVER (ORDER BY source_step) - 1) * least(60, count(*) OVER ()) // count(*) OVER () AS time_window
  FROM side_changes
),
windows AS (
  SELECT time_window, min(source_step) AS start_step, max(target_step) AS end_step FROM placed GROUP BY time_window
)
SELECT w.start_step, w.end_step, regexp_replace(n.part, '[Wb]_([QK])$', 'W_\1 and b_\1') AS part, fsum(n.value) AS value
FROM named_parts AS n
JOIN placed AS p USING (source_step, target_step)
JOIN windows AS w USING (time_window)
GROUP BY ALL
ORDER BY w.start_step, min(n.place)

-- Running sums of the sides, over the attention that came of them.
-- view: sides
WITH moved AS (
  UNPIVOT (
    SELECT
      target_step AS step, actual_score_delta AS "score separation", q_vector_delta_source_key AS "query side",
      source_query_k_vector_delta AS "key side", qk_vector_cross AS "both at once"
    FROM side_changes
  ) ON COLUMNS(* EXCLUDE (step)) INTO NAME series VALUE value
),
attended AS (
  SELECT DISTINCT unnest([source_step, target_step]) AS step, unnest([source_attention_mean, target_attention_mean]) AS value
  FROM metric_rows
  WHERE split = '__all__' AND pair_type = '__all__' AND record_side = $record_side[1]
    AND score_component = $score_component[1]
)
SELECT 1 AS place, step, 'change' AS panel, series, fsum(value) OVER (PARTITION BY series ORDER BY step) AS value FROM moved
UNION ALL
SELECT 1, (SELECT min(source_step) FROM side_changes), 'change', series, 0 FROM (SELECT DISTINCT series FROM moved)
UNION ALL
SELECT 2, step, 'attention', 'support − distractors', any_value(value) FROM attended GROUP BY step
ORDER BY place, series, step

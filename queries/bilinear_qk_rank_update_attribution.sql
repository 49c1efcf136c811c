-- rows: metric_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  m.split, m.pair_type, 'rank_bilinear_qk_retrieval_separation' AS objective,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role, s.record_side,
  s.rank, $context_stage AS context_stage, $layernorm_mode AS layernorm_mode,
  m.source_value, m.target_value, m.actual_delta, m.actual_delta_abs_mean, m.actual_delta_std,
  m.predicted_delta, m.residual, m.absolute_error, m.relative_error, m.predicted_relative_error,
  m.relative_error_denominator, m.predicted_relative_error_denominator, m.sign_match,
  m.integrated_delta, m.integrated_relative_error, m.predicted_delta_counting_aliases,
  c.support_delta_mean, c.distractor_delta_mean, c.max_margin_delta_mean, c.support_beats_all_delta_mean,
  m.num_pairs, c.num_scores, c.num_support_scores, c.num_distractor_scores,
  m.parameter_delta_l2_norm, m.gradient_l2_norm AS score_gradient_l2_norm,
  m.update_gradient_cosine AS update_score_gradient_cosine, m.num_parameters,
  m.zero_gradient_parameter_count AS zero_score_gradient_parameter_count,
  m.zero_gradient_parameter_names AS zero_score_gradient_parameter_names,
  p.* EXCLUDE (spec, source_step, target_step)
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS s USING (spec)
JOIN spectra AS p USING (spec, source_step, target_step)
JOIN cell_separations AS c USING (spec, source_step, target_step, split, pair_type)
ORDER BY i.source_step, s.rank, list_position($record_side, s.record_side), m.split, m.pair_type

-- rows: decomposition_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  m.split, m.pair_type, 'rank_bilinear_qk_retrieval_separation' AS objective,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label, $score_query_role AS score_query_role,
  $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role, s.record_side,
  s.rank, $context_stage AS context_stage, $layernorm_mode AS layernorm_mode, m.num_pairs,
  g.group_id, g.group_kind, g.component_type, g.partition_name, g.group_layer, g.group_head, g.group_projection,
  g.group_neuron, g.selection_count, g.num_selected_parameters, g.notes,
  d.predicted_delta_contribution, d.integrated_delta_contribution,
  d.predicted_delta_contribution / g.num_selected_parameters AS contribution_per_parameter,
  d.parameter_delta_l2_norm, d.gradient_l2_norm AS score_gradient_l2_norm,
  d.update_gradient_cosine AS update_score_gradient_cosine,
  m.actual_delta, m.predicted_delta AS global_predicted_delta, m.residual AS global_residual,
  m.relative_error AS global_relative_error
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS s USING (spec)
JOIN group_contributions AS d ON d.spec = m.spec AND d.source_step = m.source_step AND d.target_step = m.target_step
  AND d.split = m.stored_split AND d.pair_type = m.stored_pair_type
JOIN groups AS g USING (group_id)
ORDER BY i.source_step, s.rank, list_position($record_side, s.record_side), m.split, m.pair_type, g.group_kind, g.group_id

-- rows: score_rows
SELECT
  v.source_step, v.target_step, s.rank, s.record_side, v.split, v.pair_type, v.pair_id,
  v.value_source AS source_rank_match_separation, v.value_target AS target_rank_match_separation,
  v.value_target - v.value_source AS rank_match_separation_delta,
  v.support_score_mean_source AS source_support_score_mean, v.support_score_mean_target AS target_support_score_mean,
  v.distractor_score_mean_source AS source_distractor_score_mean,
  v.distractor_score_mean_target AS target_distractor_score_mean,
  v.max_margin_source AS source_rank_match_max_margin, v.max_margin_target AS target_rank_match_max_margin,
  v.support_beats_all_source = 1 AS source_support_beats_all_distractors,
  v.support_beats_all_target = 1 AS target_support_beats_all_distractors
FROM pair_separations AS v
JOIN labels AS s USING (spec)
ORDER BY v.source_step, s.rank, list_position($record_side, s.record_side), v.pair_id

-- rows: group_rows
SELECT * FROM groups ORDER BY group_kind, group_id

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
ORDER BY scan_order

-- Over all pairs of the first record side, by rank.
-- view: rank_summary
SELECT s.*, d.rank, d.sum_support_delta, d.sum_distractor_delta
FROM interval_summary AS s
JOIN (
  SELECT
    'rank ' || rank AS label, rank,
    fsum(support_delta_mean) AS sum_support_delta,
    fsum(distractor_delta_mean) AS sum_distractor_delta
  FROM metric_rows
  WHERE split = '__all__' AND pair_type = '__all__' AND record_side = $record_side[1]
  GROUP BY rank
) AS d USING (label)
ORDER BY list_position($rank, d.rank)

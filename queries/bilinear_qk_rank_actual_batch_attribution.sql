-- rows: route_rows
SELECT
  t.source_step, t.target_step, t.step_gap, t.source_checkpoint, t.target_checkpoint, t.trace_learning_rate AS learning_rate,
  o.split AS route_split, o.pair_type AS route_pair_type, 'rank_bilinear_qk_retrieval_separation' AS objective,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label,
  $score_query_role AS score_query_role, $support_key_role AS support_key_role,
  $distractor_key_role AS distractor_key_role, l.record_side,
  l.rank, $context_stage AS context_stage, $layernorm_mode AS layernorm_mode,
  o.source_value AS source_rank_match_score, o.target_value AS target_rank_match_score,
  o.actual_delta AS actual_rank_match_delta,
  o.predicted_delta AS actual_update_predicted_rank_match_delta,
  o.predicted_delta_counting_aliases AS actual_update_predicted_rank_match_delta_counting_aliases,
  o.residual AS actual_update_rank_match_residual,
  o.relative_error AS actual_update_rank_match_relative_error,
  o.sign_match AS actual_update_rank_match_sign_match,
  c.source_support_score_mean, c.target_support_score_mean,
  c.source_distractor_score_mean, c.target_distractor_score_mean,
  c.target_support_score_mean - c.source_support_score_mean AS support_score_delta_mean,
  c.target_distractor_score_mean - c.source_distractor_score_mean AS distractor_score_delta_mean,
  o.num_pairs AS num_route_pairs, c.num_scores AS num_route_scores,
  o.parameter_delta_l2_norm, o.gradient_l2_norm AS rank_gradient_l2_norm,
  o.update_gradient_cosine AS actual_update_rank_gradient_cosine, o.num_parameters,
  o.zero_gradient_parameter_count AS zero_rank_gradient_parameter_count,
  o.zero_gradient_parameter_names AS zero_rank_gradient_parameter_names,
  p.* EXCLUDE (spec, source_step, target_step)
FROM objective AS o
JOIN labels AS l USING (spec)
JOIN traced_steps AS t USING (source_step, target_step)
JOIN cell_separations AS c USING (spec, source_step, target_step, split, pair_type)
JOIN spectra AS p USING (spec, source_step, target_step)
ORDER BY t.source_step, l.position

-- rows: actual_batch_rows
SELECT
  r.source_step, r.target_step, r.step_gap, r.source_checkpoint, r.target_checkpoint, r.learning_rate,
  r.route_split, r.route_pair_type, r.objective, r.head_layer, r.head, r.head_label, r.score_query_role, r.support_key_role,
  r.distractor_key_role, r.record_side, r.rank, r.context_stage, r.layernorm_mode,
  r.source_rank_match_score, r.target_rank_match_score, r.actual_rank_match_delta,
  r.actual_update_predicted_rank_match_delta, r.actual_update_rank_match_residual,
  r.actual_update_rank_match_relative_error, r.actual_update_rank_match_sign_match,
  'actual_batch' AS data_group_id, {'batch_source': 'optimizer_trace'} AS data_group_values,
  'actual_batch' AS loss_side, $loss_scope AS loss_scope, b.loss, b.loss_num_records, b.loss_num_tokens,
  s.loss_gradient_l2_norm, s.gradient_l2_norm AS rank_gradient_l2_norm, r.parameter_delta_l2_norm,
  -s.support AS loss_dot_rank_gradient, s.support AS negative_loss_dot_rank_gradient,
  s.support_cosine AS loss_negative_rank_gradient_cosine,
  s.sgd_equivalent AS sgd_equivalent_rank_match_delta_linearized,
  -s.loss_reduction AS loss_dot_actual_update, s.loss_reduction AS negative_loss_dot_actual_update,
  s.loss_reduction AS loss_reduction_under_actual_update_linearized,
  s.loss_reduction_cosine AS loss_negative_actual_update_cosine,
  -s.support_cosine AS loss_rank_gradient_cosine, -s.loss_reduction_cosine AS loss_actual_update_cosine,
  b.* EXCLUDE (source_step, target_step, loss, loss_num_records, loss_num_tokens)
FROM route_rows AS r
JOIN labels AS l USING (rank)
JOIN supports AS s USING (spec, source_step, target_step)
JOIN actual_batches AS b USING (source_step, target_step)
ORDER BY r.source_step, l.position

-- rows: route_pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
WHERE $route_split IN ('__all__', split) AND $route_pair_type IN ('__all__', pair_type)
ORDER BY scan_order

-- By rank and data group, the groups that support the score most first.
-- view: data_group_summary
SELECT
  s.* EXCLUDE (position), {'batch_source': 'optimizer_trace'} AS data_group_values
FROM batch_summary AS s
QUALIFY row_number() OVER (PARTITION BY label ORDER BY abs(sum_support) DESC, data_group_id) <= $top_k_data_groups
ORDER BY position, abs(sum_support) DESC, data_group_id

-- The steps whose batch stood most for or against the score, by rank.
-- view: top_steps
SELECT
  'rank ' || rank AS label, source_step, target_step, negative_loss_dot_rank_gradient AS support,
  loss_negative_rank_gradient_cosine AS cosine, actual_rank_match_delta AS actual_delta, loss
FROM actual_batch_rows
QUALIFY row_number() OVER (PARTITION BY rank ORDER BY abs(support) DESC NULLS LAST, source_step) <= 10
ORDER BY list_position($rank, rank), abs(support) DESC, source_step

-- Running sums. What the batch stands for has no step size in it, so it is a panel of its own.
-- view: ledger
WITH each AS (
  UNPIVOT (
    SELECT
      rank, target_step, actual_rank_match_delta AS "actual change",
      actual_update_predicted_rank_match_delta AS "first order of the update",
      sgd_equivalent_rank_match_delta_linearized AS "SGD-equivalent", negative_loss_dot_rank_gradient AS support
    FROM actual_batch_rows
  ) ON "actual change", "first order of the update", "SGD-equivalent", support INTO NAME series VALUE value
)
SELECT
  target_step AS step,
  format('rank {}, {}', rank, CASE series WHEN 'support' THEN 'support' ELSE 'change' END) AS panel,
  series,
  fsum(value) OVER (PARTITION BY rank, series ORDER BY target_step) AS value
FROM each
ORDER BY list_position($rank, rank), series = 'support', series, step

-- view: loss_reduction
SELECT
  target_step AS step, part AS panel, part AS series,
  CASE part
    WHEN 'loss of the batch' THEN value
    ELSE fsum(value) OVER (PARTITION BY part ORDER BY target_step)
  END AS value
FROM (
  UNPIVOT (
    SELECT target_step, loss_reduction_under_actual_update_linearized AS "Σ reduction by the update", loss AS "loss of the batch"
    FROM actual_batch_rows
    WHERE rank = $rank[1]
  ) ON "Σ reduction by the update", "loss of the batch" INTO NAME part VALUE value
)
ORDER BY panel DESC, step

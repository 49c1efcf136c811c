-- rows: metric_rows
SELECT
  t.source_step, t.target_step, t.step_gap, t.source_checkpoint, t.target_checkpoint, t.trace_learning_rate AS learning_rate,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label,
  $score_query_role AS score_query_role, $support_key_role AS support_key_role,
  $distractor_key_role AS distractor_key_role, $record_side[1] AS record_side,
  l.rank, $context_stage AS context_stage, $layernorm_mode AS layernorm_mode,
  o.pair_type AS route_pair_type, o.split AS route_split, o.num_pairs,
  $loss_scope AS loss_scope, b.loss, b.loss_num_records, b.loss_num_tokens, b.loss_delta_vs_optimizer_trace,
  b.optimizer_trace_dir, b.optimizer_trace_batch_step, b.actual_batch_sample_count, b.actual_batch_query_event_count,
  o.source_value AS source_rank_match_score, o.target_value AS target_rank_match_score,
  o.actual_delta AS actual_rank_match_delta,
  o.predicted_delta AS actual_update_predicted_rank_match_delta,
  o.predicted_delta_counting_aliases AS actual_update_predicted_rank_match_delta_counting_aliases,
  o.relative_error AS actual_update_rank_match_relative_error,
  o.sign_match AS actual_update_rank_match_sign_match,
  g.raw_sgd AS raw_sgd_rank_delta, g.clipped_sgd AS clipped_sgd_rank_delta,
  g.adam_current_gradient AS adam_current_gradient_rank_delta,
  g.adam_historical_momentum AS adam_historical_momentum_rank_delta,
  g.adam_preconditioned AS adam_preconditioned_rank_delta,
  g.weight_decay AS weight_decay_rank_delta,
  g.reconstructed_adamw_update AS reconstructed_adamw_rank_delta,
  r.* EXCLUDE (spec, source_step, target_step),
  o.parameter_delta_l2_norm, p.* EXCLUDE (spec, source_step, target_step),
  t.raw_gradient_l2_norm, t.trace_pre_clip_grad_norm, t.grad_clip_norm, t.clip_coefficient, t.clipped_gradient_l2_norm,
  t.adam_state_step_min, t.adam_state_step_max, t.adam_eps_values, t.adam_beta_values, t.adam_weight_decay_values,
  t.trace_learning_rate, t.stored_optimizer_group_lr_values, t.stored_optimizer_group_lr_matches_trace
FROM objective AS o
JOIN labels AS l USING (spec)
JOIN traced_steps AS t USING (source_step, target_step)
JOIN actual_batches AS b USING (source_step, target_step)
JOIN global_components AS g USING (spec, source_step, target_step)
JOIN reconstructions AS r USING (spec, source_step, target_step)
JOIN spectra AS p USING (spec, source_step, target_step)
ORDER BY t.source_step, l.position

-- rows: component_rows
SELECT
  m.*, c.component, c.component_delta AS component_rank_delta, c.component_l2_norm,
  c.gradient_l2_norm AS rank_gradient_l2_norm, c.component_gradient_cosine AS component_rank_gradient_cosine,
  c.component_fraction_of_actual_update_prediction
FROM metric_rows AS m
JOIN labels AS l USING (rank)
JOIN components AS c USING (spec, source_step, target_step)
WHERE c.group_id = 'global:all_named_parameters'
ORDER BY m.source_step, l.position, list_position($components, c.component)

-- rows: route_pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
WHERE $route_split IN ('__all__', split) AND $route_pair_type IN ('__all__', pair_type)
ORDER BY scan_order

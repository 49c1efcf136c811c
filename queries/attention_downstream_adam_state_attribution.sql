-- rows: metric_rows
SELECT
  t.source_step, t.target_step, t.step_gap, t.source_checkpoint, t.target_checkpoint, t.trace_learning_rate AS learning_rate,
  $head_layer::INTEGER AS head_layer, $head::INTEGER AS head, $head_label AS head_label,
  $score_query_role AS score_query_role, $support_key_role AS support_key_role,
  $distractor_key_role AS distractor_key_role, l.record_side, o.pair_type AS objective_pair_type,
  o.split AS objective_route_split, l.scalar_name, o.num_pairs, o.num_pairs AS num_entries, o.num_pairs AS num_unique_pairs,
  b.optimizer_trace_dir, b.optimizer_trace_batch_step, $loss_scope AS loss_scope, b.loss, b.loss_num_records,
  b.loss_num_tokens, b.loss_delta_vs_optimizer_trace, b.actual_batch_sample_count, b.actual_batch_query_event_count,
  o.source_value, o.target_value, o.actual_delta AS actual_scalar_delta,
  o.source_value AS source_objective_value, o.source_value_abs_mean AS source_objective_value_abs_mean,
  o.source_value_std AS source_objective_value_std,
  c.source_accuracy, c.target_accuracy, c.competitor_switch_fraction,
  o.predicted_delta AS actual_update_predicted_scalar_delta,
  o.predicted_delta_counting_aliases AS actual_update_predicted_scalar_delta_counting_aliases,
  o.relative_error AS actual_update_scalar_relative_error, o.sign_match AS actual_update_scalar_sign_match,
  g.raw_sgd AS raw_sgd_scalar_delta, g.clipped_sgd AS clipped_sgd_scalar_delta,
  g.adam_current_gradient AS adam_current_gradient_scalar_delta,
  g.adam_historical_momentum AS adam_historical_momentum_scalar_delta,
  g.adam_preconditioned AS adam_preconditioned_scalar_delta, g.weight_decay AS weight_decay_scalar_delta,
  g.reconstructed_adamw_update AS reconstructed_adamw_scalar_delta,
  r.* EXCLUDE (spec, source_step, target_step),
  o.parameter_delta_l2_norm, o.gradient_l2_norm AS scalar_gradient_l2_norm,
  o.update_gradient_cosine AS actual_update_scalar_gradient_cosine,
  o.zero_gradient_parameter_count AS zero_scalar_gradient_parameter_count,
  o.zero_gradient_parameter_names AS zero_scalar_gradient_parameter_names,
  t.raw_gradient_l2_norm, t.trace_pre_clip_grad_norm, t.grad_clip_norm, t.clip_coefficient, t.clipped_gradient_l2_norm,
  t.adam_state_step_min, t.adam_state_step_max, t.adam_eps_values, t.adam_beta_values, t.adam_weight_decay_values,
  t.trace_learning_rate, t.stored_optimizer_group_lr_values, t.stored_optimizer_group_lr_matches_trace
FROM objective AS o
JOIN labels AS l USING (spec)
JOIN traced_steps AS t USING (source_step, target_step)
JOIN actual_batches AS b USING (source_step, target_step)
JOIN global_components AS g USING (spec, source_step, target_step)
JOIN reconstructions AS r USING (spec, source_step, target_step)
JOIN cell_scalars AS c USING (spec, source_step, target_step, split, pair_type)
ORDER BY t.source_step, l.position

-- rows: component_rows
SELECT
  m.* EXCLUDE (num_pairs, num_entries, num_unique_pairs),
  c.component, c.group_id AS parameter_group_id, g.group_kind AS parameter_group_kind, g.component_type, g.partition_name,
  g.group_layer, g.group_head, g.group_projection, g.selection_count, g.num_selected_parameters, g.notes,
  c.component_delta AS component_scalar_delta,
  c.actual_update_predicted_delta AS actual_update_predicted_scalar_delta_for_group,
  c.component_l2_norm, c.gradient_l2_norm AS scalar_gradient_l2_norm,
  c.component_gradient_cosine AS component_scalar_gradient_cosine,
  c.component_fraction_of_actual_update_prediction AS component_fraction_of_actual_update_prediction_for_group,
  c.component_delta / nullif(o.predicted_delta, 0) AS component_fraction_of_global_actual_update_prediction
FROM (
  SELECT
    source_step, target_step, step_gap, source_checkpoint, target_checkpoint, learning_rate, head_layer, head, head_label,
    score_query_role, support_key_role, distractor_key_role, record_side, optimizer_trace_dir, objective_pair_type,
    objective_route_split, scalar_name, num_pairs, num_entries, num_unique_pairs
  FROM metric_rows
) AS m
JOIN labels AS l USING (scalar_name, record_side)
JOIN objective AS o USING (spec, source_step, target_step)
JOIN components AS c USING (spec, source_step, target_step)
JOIN groups AS g USING (group_id)
WHERE list_contains($parameter_group, c.group_id)
ORDER BY
  m.source_step, l.position, list_position($components, c.component), list_position($parameter_group, c.group_id)

-- rows: group_rows
SELECT * RENAME (group_neuron AS neuron)
FROM groups
WHERE list_contains($parameter_group, group_id)
ORDER BY list_position($parameter_group, group_id)

-- rows: route_pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
WHERE $objective_split IN ('__all__', split) AND $objective_pair_type IN ('__all__', pair_type)
ORDER BY scan_order

-- Sums over the window, by scalar, group and component.
-- view: group_summary
SELECT
  l.position, r.scalar_name, r.component, r.parameter_group_id,
  fsum(r.component_scalar_delta) AS sum_delta,
  favg(coalesce(r.component_scalar_gradient_cosine, 0)) AS mean_cosine,
  favg(r.component_fraction_of_global_actual_update_prediction) AS mean_fraction_of_global
FROM component_rows AS r
JOIN labels AS l USING (scalar_name, record_side)
GROUP BY l.position, r.scalar_name, r.component, r.parameter_group_id
ORDER BY
  l.position, list_position($parameter_group, r.parameter_group_id), list_position($components, r.component)

-- view: largest_groups
SELECT * EXCLUDE (position)
FROM group_summary
ORDER BY abs(sum_delta) DESC, position, parameter_group_id, component
LIMIT 24

-- A group's terms beside each other.
-- view: group_table
WITH pivoted AS (
  PIVOT (SELECT position, scalar_name, parameter_group_id, component, sum_delta FROM group_summary)
  ON component IN ('raw_sgd', 'adam_current_gradient', 'adam_historical_momentum', 'weight_decay',
    'reconstructed_adamw_update')
  USING any_value(sum_delta)
  GROUP BY position, scalar_name, parameter_group_id
)
SELECT
  p.*, p.reconstructed_adamw_update / nullif(s.sum_predicted_delta, 0) AS share_of_first_order
FROM pivoted AS p
JOIN scalar_summary AS s ON s.label = p.scalar_name
ORDER BY p.position, list_position($parameter_group, p.parameter_group_id)

-- The terms that add up, by region of the model.
-- view: region_terms
WITH summed AS (
  UNPIVOT (
    SELECT
      l.label, l.position, r.region, r.place,
      fsum(r.adam_current_gradient) AS adam_current_gradient,
      fsum(r.adam_historical_momentum) AS adam_historical_momentum,
      fsum(r.weight_decay) AS weight_decay
    FROM objective AS o
    JOIN labels AS l USING (spec)
    JOIN region_contributions AS r ON r.spec = o.spec AND r.source_step = o.source_step AND r.target_step = o.target_step
      AND r.split = o.stored_split AND r.pair_type = o.stored_pair_type AND r.point = 'source'
    GROUP BY l.label, l.position, r.region, r.place
  ) ON adam_current_gradient, adam_historical_momentum, weight_decay INTO NAME term VALUE contribution
)
SELECT * FROM summed
ORDER BY position, list_position($components, term), place

-- view: region_grid
SELECT
  format('{}: {}', label, CASE term
    WHEN 'adam_current_gradient' THEN 'gradient' WHEN 'adam_historical_momentum' THEN 'momentum' ELSE 'decay' END) AS row,
  region AS column,
  contribution / nullif(max(abs(contribution)) OVER (PARTITION BY label), 0) AS value
FROM region_terms
ORDER BY position, list_position($components, term), place

-- The step from which on at least half of the window's change was made.
-- view: half_way
WITH so_far AS (
  SELECT
    spec, target_step, fsum(actual_delta) OVER (PARTITION BY spec ORDER BY target_step) AS made,
    fsum(actual_delta) OVER (PARTITION BY spec) AS total
  FROM objective
),
short AS (
  SELECT spec, coalesce(max(target_step) FILTER (sign(total) * made < abs(total) / 2), -1) AS last_short
  FROM so_far
  GROUP BY spec
)
SELECT l.label, min(f.target_step) AS half_way_step
FROM so_far AS f
JOIN short AS s USING (spec)
JOIN labels AS l USING (spec)
WHERE f.target_step > s.last_short
GROUP BY l.label

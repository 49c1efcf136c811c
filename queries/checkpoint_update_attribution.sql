-- rows: metric_rows
SELECT * EXCLUDE (spec, position, route_label, domain, head_layer, head)
FROM route_metrics
ORDER BY source_step, split, pair_type

-- rows: decomposition_rows
SELECT
  i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  m.split, m.pair_type, l.stage, l.subspace_name, l.subspace_type, l.head_label, l.rank, l.position_role, m.num_pairs,
  m.source_value AS source_route_score, m.target_value AS target_route_score, m.actual_delta,
  m.predicted_delta AS global_predicted_delta, m.residual AS global_residual, m.relative_error AS global_relative_error,
  g.group_id, g.group_kind, g.component_type, g.partition_name, g.group_layer, g.group_head, g.group_projection,
  g.group_neuron, g.selection_count, g.num_selected_parameters,
  d.predicted_delta_contribution, d.integrated_delta_contribution,
  d.parameter_delta_l2_norm, d.gradient_l2_norm AS route_gradient_l2_norm,
  d.update_gradient_cosine AS update_route_gradient_cosine,
  d.predicted_delta_contribution / g.num_selected_parameters AS contribution_per_parameter, g.notes
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS l USING (spec)
JOIN group_contributions AS d ON d.spec = m.spec AND d.source_step = m.source_step AND d.target_step = m.target_step
  AND d.split = m.stored_split AND d.pair_type = m.stored_pair_type
JOIN groups AS g USING (group_id)
ORDER BY i.source_step, m.split, m.pair_type, g.group_kind, g.group_id

-- rows: group_rows
SELECT
  group_id, group_kind, component_type, partition_name, group_layer AS layer, group_head AS head,
  group_projection AS projection, group_neuron AS neuron, num_selected_parameters, selection_count, selections, notes
FROM groups
ORDER BY group_kind, group_id

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
ORDER BY scan_order

-- Interval by interval, all pairs.
-- view: interval_table
SELECT
  source_step, target_step, source_route_score, target_route_score, actual_delta, predicted_delta, integrated_delta,
  relative_error, source_transfer_margin_clean_mean - source_transfer_margin_corrupted_mean AS source_margin_gap,
  source_route_score / nullif(source_transfer_margin_clean_mean - source_transfer_margin_corrupted_mean, 0)
    AS source_recovery
FROM metric_rows
WHERE split = '__all__' AND pair_type = '__all__'
ORDER BY source_step

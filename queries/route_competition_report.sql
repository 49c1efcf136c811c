-- The pairs of the second domain, chosen as those of the first are.
-- view: train_pairs
@TRAIN_PAIRS@

-- view: domains
SELECT unnest(['eval', 'train']) AS domain, unnest($product_spec) AS product_spec

-- Gradient of a group's loss, times itself, the update, and each route's gradient; over all parameters, a tied one once.
-- view: products
SELECT p.spec AS product_spec, p.source_step, p.target_step, p.data_group, p.factor, fsum(p.product) AS product
FROM gradient_products AS p
JOIN intervals AS i USING (source_step, target_step)
WHERE p.run = $run AND list_contains($product_spec, p.spec)
GROUP BY ALL
ORDER BY ALL

-- view: group_losses
SELECT
  d.domain, g.source_step, g.target_step, g.data_group, g.data_group_values, g.loss_side, g.loss, g.num_records, g.num_tokens,
  s.product AS loss_squared, u.product AS loss_dot_update, d.product_spec,
  row_number() OVER (PARTITION BY d.domain, g.source_step, g.target_step ORDER BY g.rowid) AS group_position
FROM (SELECT *, row_number() OVER () AS rowid FROM data_group_losses WHERE run = $run) AS g
JOIN intervals AS i USING (source_step, target_step)
JOIN domains AS d ON d.product_spec = g.spec
JOIN products AS s ON s.product_spec = g.spec AND s.source_step = g.source_step AND s.target_step = g.target_step
  AND s.data_group = g.data_group AND s.factor = 'loss'
JOIN products AS u ON u.product_spec = g.spec AND u.source_step = g.source_step AND u.target_step = g.target_step
  AND u.data_group = g.data_group AND u.factor = 'update'

-- The one cell of each domain that the routes are scored on.
-- rows: route_rows
SELECT * EXCLUDE (spec, position)
FROM route_metrics
WHERE split = '__all__' AND pair_type = $route_pair_type
ORDER BY source_step, domain, position

-- rows: data_rows
SELECT
  r.source_step, r.target_step, r.step_gap, r.source_checkpoint, r.target_checkpoint, r.learning_rate,
  r.split AS route_split, r.pair_type AS route_pair_type, r.route_label, r.domain, r.stage, r.subspace_name,
  r.subspace_type, r.head_label, r.head_layer, r.head, r.rank, r.position_role,
  g.data_group AS data_group_id, g.data_group_values::JSON AS data_group_values, g.loss_side, g.loss,
  g.num_records AS loss_num_records,
  g.num_tokens AS loss_num_tokens,
  r.source_route_score, r.target_route_score, r.actual_delta AS actual_route_delta,
  r.predicted_delta AS actual_update_predicted_route_delta, r.residual AS actual_update_route_residual,
  r.relative_error AS actual_update_route_relative_error, r.sign_match AS actual_update_route_sign_match,
  sqrt(g.loss_squared) AS loss_gradient_l2_norm, r.route_gradient_l2_norm, r.parameter_delta_l2_norm,
  p.product AS loss_dot_route_gradient, -p.product AS negative_loss_dot_route_gradient,
  -p.product / nullif(sqrt(g.loss_squared) * r.route_gradient_l2_norm, 0) AS loss_negative_route_gradient_cosine,
  p.product / nullif(sqrt(g.loss_squared) * r.route_gradient_l2_norm, 0) AS loss_route_gradient_cosine,
  -r.learning_rate * p.product AS local_sgd_route_delta_linearized,
  g.loss_dot_update AS loss_dot_actual_update, -g.loss_dot_update AS negative_loss_dot_actual_update,
  g.loss_dot_update AS loss_delta_under_actual_update_linearized,
  -g.loss_dot_update AS loss_reduction_under_actual_update_linearized,
  -g.loss_dot_update / nullif(sqrt(g.loss_squared) * r.parameter_delta_l2_norm, 0) AS loss_negative_actual_update_cosine,
  g.loss_dot_update / nullif(sqrt(g.loss_squared) * r.parameter_delta_l2_norm, 0) AS loss_actual_update_cosine
FROM route_metrics AS r
JOIN group_losses AS g USING (domain, source_step, target_step)
JOIN products AS p ON p.product_spec = g.product_spec AND p.source_step = r.source_step AND p.target_step = r.target_step
  AND p.data_group = g.data_group AND p.factor = r.spec
WHERE r.split = '__all__' AND r.pair_type = $route_pair_type
ORDER BY r.source_step, r.domain, r.position, g.group_position

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM (
  SELECT 'eval' AS domain, * FROM listed_pairs
  UNION ALL
  SELECT
    'train', pair_id, pair_type, split, source_sample_id, source_query_index, clean_answer_value,
    corrupted_answer_value, clean_transfer_token, corrupted_transfer_token, mutation,
    row_number() OVER (ORDER BY clean_event, pair_type)
  FROM train_pairs
)
ORDER BY domain, scan_order

-- A route per row: the last interval, all pairs.
-- view: combined_rows
SELECT
  route_label, any_value(stage) AS stage, any_value(subspace_name) AS subspace_name, any_value(rank) AS rank,
  any_value(head_label) AS head_label, any_value(position_role) AS position_role,
  @COMBINED@,
  any_value(local_sgd_route_delta_linearized) FILTER (domain = 'train') AS train_local_sgd_route_delta
FROM data_rows
WHERE data_group_id = '__all__' AND source_step = (SELECT max(source_step) FROM intervals)
GROUP BY route_label
ORDER BY train_route_support DESC, route_label

-- Over all intervals.
-- view: route_sums
SELECT
  route_label, domain, count(*) AS num_intervals, fsum(actual_route_delta) AS sum_actual_delta,
  fsum(actual_update_predicted_route_delta) AS sum_predicted_delta,
  fsum(negative_loss_dot_route_gradient) AS sum_support,
  count(*) FILTER (negative_loss_dot_route_gradient > 0) AS supporting_intervals,
  favg(loss_negative_route_gradient_cosine) AS mean_support_cosine
FROM data_rows
WHERE data_group_id = '__all__'
GROUP BY route_label, domain
ORDER BY domain, sum_support DESC, route_label

-- view: eval_deltas
SELECT route_label, eval_actual_delta FROM combined_rows ORDER BY eval_actual_delta DESC, route_label

-- A point per route and interval.
-- view: eval_changes
SELECT
  format('{}, {}→{}', route_label, source_step, target_step) AS label, route_label AS series, predicted_delta AS x,
  actual_delta AS y
FROM route_rows
WHERE domain = 'eval'

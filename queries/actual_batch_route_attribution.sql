-- rows: rows
SELECT
  t.source_step, t.target_step, t.step_gap, t.source_checkpoint, t.target_checkpoint, t.trace_learning_rate AS learning_rate,
  l.label AS route_label, o.split AS route_split, o.pair_type AS route_pair_type,
  l.stage, l.subspace_name, l.subspace_type, l.head_label, l.head_layer, l.head, l.rank, l.position_role, o.num_pairs,
  'actual_batch' AS data_group_id, {'optimizer_trace_step': t.recorded_step} AS data_group_values,
  'actual_batch' AS loss_side, b.loss, b.loss_num_records, b.loss_num_tokens,
  o.source_value AS source_route_score, o.target_value AS target_route_score, o.actual_delta AS actual_route_delta,
  o.predicted_delta AS actual_update_predicted_route_delta,
  o.predicted_delta_counting_aliases AS actual_update_predicted_route_delta_counting_aliases,
  o.residual AS actual_update_route_residual, o.relative_error AS actual_update_route_relative_error,
  o.sign_match AS actual_update_route_sign_match,
  s.loss_gradient_l2_norm, s.gradient_l2_norm AS route_gradient_l2_norm, o.parameter_delta_l2_norm,
  -s.support AS loss_dot_route_gradient, s.support AS negative_loss_dot_route_gradient,
  s.support_cosine AS loss_negative_route_gradient_cosine, s.sgd_equivalent AS local_sgd_route_delta_linearized,
  -s.loss_reduction AS loss_dot_actual_update, s.loss_reduction AS negative_loss_dot_actual_update,
  -s.loss_reduction AS loss_delta_under_actual_update_linearized,
  s.loss_reduction AS loss_reduction_under_actual_update_linearized,
  s.loss_reduction_cosine AS loss_negative_actual_update_cosine,
  -s.support_cosine AS loss_route_gradient_cosine, -s.loss_reduction_cosine AS loss_actual_update_cosine,
  b.* EXCLUDE (source_step, target_step, loss, loss_num_records, loss_num_tokens)
FROM objective AS o
JOIN labels AS l USING (spec)
JOIN traced_steps AS t USING (source_step, target_step)
JOIN supports AS s USING (spec, source_step, target_step)
JOIN actual_batches AS b USING (source_step, target_step)
ORDER BY t.source_step, l.position

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
WHERE $route_pair_type IN ('__all__', pair_type)
ORDER BY scan_order

-- What the batches asked of a route, and what the updates did: one row per route.
-- view: route_summary
SELECT
  b.label, b.num_intervals, b.supporting_intervals, b.sum_support, b.mean_support_cosine, b.sum_sgd_equivalent,
  b.sgd_equivalent_share_of_actual, s.sum_actual_delta, s.sum_predicted_delta,
  s.sum_actual_delta - s.sum_predicted_delta AS sum_residual, b.sum_loss_reduction, b.mean_loss_reduction_cosine,
  s.sign_matches / b.num_intervals AS sign_match_fraction, s.growing_intervals, s.mean_relative_error, b.mean_loss,
  (SELECT max(abs(loss_delta_vs_optimizer_trace)) FROM rows) AS max_abs_loss_mismatch
FROM batch_summary AS b
JOIN scalar_summary AS s USING (label)
ORDER BY b.position

-- Running sums. Support has no step size in it, so its panel has its own scale.
-- view: ledger
WITH each AS (
  UNPIVOT (
    SELECT route_label, target_step, actual_route_delta AS "actual change", negative_loss_dot_route_gradient AS support
    FROM rows
  ) ON "actual change", support INTO NAME kind VALUE value
)
SELECT
  e.target_step AS step, e.kind AS panel, e.route_label AS series,
  fsum(e.value) OVER (PARTITION BY e.kind, e.route_label ORDER BY e.target_step) AS value
FROM each AS e
JOIN labels AS l ON l.label = e.route_label
ORDER BY e.kind, l.position, step

-- A point per step: what the batch asked for, and what the update did.
-- view: asked_and_done
SELECT
  format('{}→{}', source_step, target_step) AS step, route_label AS series,
  local_sgd_route_delta_linearized AS x, actual_route_delta AS y
FROM rows
WHERE local_sgd_route_delta_linearized IS NOT NULL

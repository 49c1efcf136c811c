-- Routes' changes by interval and pair; of whichever record, they are the same.
-- arrays: closures

-- view: features
SELECT * FROM (SELECT closure AS observation, unnest(labels) AS label, unnest(deltas) AS value FROM closures)
WHERE $all_labels OR list_contains($route_label_wanted, label)
ORDER BY observation, label

-- arrays: fits

-- view: deltas
SELECT
  source_step, target_step, pair_id,
  map_from_entries(
    list_filter(list_zip(labels, deltas), lambda of: $all_labels OR list_contains($route_label_wanted, of[1]))
  ) AS route_score_deltas
FROM closures

-- view: predictions
SELECT switch_bucket, unnest(observations) AS observation, unnest(predicted) AS predicted FROM fits

-- rows: closure_rows
SELECT
  c.source_step, c.target_step, c.target_step - c.source_step AS step_gap, c.pair_id,
  c.pair_id || '::' || c.margin_side AS interval_pair_id, c.split, c.pair_type, c.margin_side, p.switch_bucket,
  c.competitor_switched, c.scalar_name, c.source_scalar, c.target_scalar,
  c.target_scalar - c.source_scalar AS actual_scalar_delta, d.route_score_deltas, p.predicted AS predicted_scalar_delta,
  c.target_scalar - c.source_scalar - p.predicted AS closure_residual
FROM predictions AS p
JOIN changes AS c USING (observation)
JOIN deltas AS d USING (source_step, target_step, pair_id)
ORDER BY c.observation, list_position($switch_bucket, p.switch_bucket)

-- rows: coefficient_rows
SELECT
  scalar_name, switch_bucket, unnest(labels) AS route_label, unnest(coefficients) AS coefficient,
  unnest(means) AS mean_route_score_delta, unnest(contributions) AS mean_contribution
FROM fits
ORDER BY list_position($scalar, scalar_name), list_position($switch_bucket, switch_bucket), route_label

-- Best first; those without variation to explain before all others.
-- view: scalar_bucket_summaries
SELECT
  f.scalar_name, f.switch_bucket, f.num_observations,
  (
    SELECT favg(r.competitor_switched::INTEGER) FROM closure_rows AS r
    WHERE r.scalar_name = f.scalar_name AND r.switch_bucket = f.switch_bucket
  ) AS competitor_switch_fraction,
  f.mean_actual_margin_delta AS mean_actual_scalar_delta, f.mean_predicted_margin_delta AS mean_predicted_scalar_delta,
  f.mean_residual, f.mean_abs_residual, f.r_squared, f.intercept, f.matrix_rank, f.num_parameters, f.rank_deficient,
  f.condition_number
FROM fits AS f
ORDER BY f.r_squared DESC NULLS FIRST, list_position($scalar, f.scalar_name), list_position($switch_bucket, f.switch_bucket)

-- Of the first bucket, which is all unless others were asked for.
-- view: route_contributions
SELECT scalar_name, switch_bucket, route_label, coefficient, mean_route_score_delta, mean_contribution
FROM coefficient_rows
WHERE switch_bucket = $switch_bucket[1]
ORDER BY list_position($scalar, scalar_name), abs(mean_contribution) DESC, route_label

-- view: r_squared_chart
SELECT replace(scalar_name, '_', ' ') AS scalar, r_squared
FROM scalar_bucket_summaries
WHERE switch_bucket = $switch_bucket[1] AND r_squared IS NOT NULL

-- view: abs_residual_chart
SELECT replace(scalar_name, '_', ' ') AS scalar, mean_abs_residual
FROM scalar_bucket_summaries
WHERE switch_bucket = $switch_bucket[1]
ORDER BY mean_abs_residual, scalar

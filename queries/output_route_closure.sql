-- Components' DLAs at both ends.
-- view: components
SELECT
  c.observation, d.component AS label,
  any_value(d.dla) FILTER (d.endpoint_kind = 'source') AS source_dla,
  any_value(d.dla) FILTER (d.endpoint_kind = 'target') AS target_dla
FROM endpoint_dlas AS d
JOIN changes AS c USING (source_step, target_step, pair_id, margin_side, scalar_name)
GROUP BY c.observation, d.component
ORDER BY c.observation, label

-- arrays: fits

-- view: maps
SELECT
  observation,
  map_from_entries(list_transform(held, lambda of: (of.label, of.target_dla - of.source_dla))) AS component_deltas,
  map_from_entries(list_transform(held, lambda of: (of.label, of.source_dla))) AS source_values,
  map_from_entries(list_transform(held, lambda of: (of.label, of.target_dla))) AS target_values
FROM (SELECT observation, list(components ORDER BY label) AS held FROM components GROUP BY observation)

-- view: predictions
SELECT switch_bucket, unnest(observations) AS observation, unnest(predicted) AS predicted FROM fits

-- rows: closure_rows
SELECT
  c.source_step, c.target_step, c.target_step - c.source_step AS step_gap, c.pair_id,
  c.pair_id || '::' || c.margin_side AS interval_pair_id, c.split, c.pair_type, c.margin_side, p.switch_bucket,
  c.competitor_switched, c.scalar_name, c.source_scalar, c.target_scalar,
  c.target_scalar - c.source_scalar AS actual_scalar_delta, m.component_deltas, p.predicted AS predicted_scalar_delta,
  c.target_scalar - c.source_scalar - p.predicted AS closure_residual
FROM predictions AS p
JOIN changes AS c USING (observation)
JOIN maps AS m USING (observation)
ORDER BY c.observation, list_position($switch_bucket, p.switch_bucket)

-- rows: endpoint_component_rows
SELECT
  c.source_step, c.target_step, c.pair_id, c.margin_side, c.scalar_name, k.endpoint_kind,
  CASE k.endpoint_kind WHEN 'source' THEN c.source_step ELSE c.target_step END AS step,
  format('step_{:06d}', step) AS checkpoint,
  CASE k.endpoint_kind WHEN 'source' THEN c.source_scalar ELSE c.target_scalar END AS scalar_value_recomputed,
  CASE k.endpoint_kind WHEN 'source' THEN m.source_values ELSE m.target_values END AS component_values
FROM changes AS c
JOIN maps AS m USING (observation)
CROSS JOIN (SELECT unnest(['source', 'target']) AS endpoint_kind) AS k
ORDER BY c.observation, k.endpoint_kind

-- rows: coefficient_rows
SELECT
  scalar_name, switch_bucket, unnest(labels) AS component, unnest(coefficients) AS coefficient,
  unnest(means) AS mean_component_delta, unnest(contributions) AS mean_contribution, fit_intercept, num_observations,
  matrix_rank, num_parameters, rank_deficient, condition_number, r_squared, mean_abs_residual, lake_id, $run AS run,
  $probe AS probe
FROM fits
ORDER BY list_position($scalar, scalar_name), list_position($switch_bucket, switch_bucket), component

-- rows: pair_rows
SELECT
  pair_id, pair_type, split, source_sample_id, source_query_index, clean_answer_value, corrupted_answer_value,
  clean_transfer_token, corrupted_transfer_token, mutation
FROM chosen_pairs
ORDER BY clean_event, list_position($pair_type, pair_type)

-- view: summary
SELECT
  r.scalar_name, r.switch_bucket, count(*) AS num_observations,
  favg(r.competitor_switched::INTEGER) AS competitor_switch_fraction,
  r_squared(r.actual_scalar_delta, r.predicted_scalar_delta) AS r_squared, any_value(f.r_squared) AS fit_r_squared,
  favg(r.actual_scalar_delta) AS mean_actual_delta, favg(r.predicted_scalar_delta) AS mean_predicted_delta,
  favg(r.closure_residual) AS mean_residual, favg(abs(r.closure_residual)) AS mean_abs_residual,
  any_value(f.intercept) AS intercept, any_value(f.matrix_rank) AS matrix_rank,
  any_value(f.num_parameters) AS num_parameters, any_value(f.rank_deficient) AS rank_deficient,
  any_value(f.condition_number) AS condition_number
FROM closure_rows AS r
JOIN fits AS f USING (scalar_name, switch_bucket)
GROUP BY r.scalar_name, r.switch_bucket
ORDER BY list_position($switch_bucket, r.switch_bucket), r_squared DESC NULLS LAST, r.scalar_name

-- The largest of each fit.
-- view: top_contributions
SELECT scalar_name, switch_bucket, component, coefficient, mean_component_delta, mean_contribution
FROM coefficient_rows
QUALIFY
  row_number() OVER (PARTITION BY scalar_name, switch_bucket ORDER BY abs(mean_contribution) DESC, component)
  <= $top_k_components
ORDER BY
  list_position($scalar, scalar_name), list_position($switch_bucket, switch_bucket), abs(mean_contribution) DESC, component

-- Of the first bucket, which is all unless others were asked for.
-- view: contribution_table
SELECT * FROM top_contributions WHERE switch_bucket = $switch_bucket[1] AND list_contains($scalar[:2], scalar_name)

-- view: contribution_chart
SELECT replace(scalar_name, '_', ' ') AS panel, component, mean_contribution
FROM top_contributions
WHERE switch_bucket = $switch_bucket[1] AND list_contains($scalar[:4], scalar_name)
ORDER BY list_position($scalar, scalar_name), abs(mean_contribution) DESC, component

-- view: r_squared_chart
SELECT replace(scalar_name, '_', ' ') AS scalar, replace(switch_bucket, '_', ' ') AS bucket, r_squared
FROM summary
ORDER BY list_position($scalar, scalar_name), list_position($switch_bucket, switch_bucket)

-- view: scatter_chart
SELECT
  replace(scalar_name, '_', ' ') AS panel, format('{}→{}, {}', source_step, target_step, pair_id) AS label,
  CASE WHEN competitor_switched THEN 'changes' ELSE 'stays' END AS competitor,
  predicted_scalar_delta AS x, actual_scalar_delta AS y
FROM closure_rows
WHERE switch_bucket = $switch_bucket[1] AND list_contains($scalar[:4], scalar_name)
ORDER BY list_position($scalar, scalar_name), source_step, pair_id

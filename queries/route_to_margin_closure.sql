-- arrays: fits

-- Lists of a fit taken apart.
-- view: predictions
SELECT unnest(observations) AS observation, unnest(predicted) AS predicted FROM fits

-- view: deltas
SELECT observation, map_from_entries(list((label, value) ORDER BY label)) AS route_score_deltas
FROM lake_features
GROUP BY observation

-- rows: closure_rows
SELECT
  o.* EXCLUDE (observation), d.route_score_deltas, p.predicted AS predicted_margin_delta,
  o.actual_margin_delta - p.predicted AS closure_residual, (SELECT lake_id FROM fits) AS lake_id, $run AS run, $probe AS probe
FROM lake_observations AS o
JOIN predictions AS p USING (observation)
JOIN deltas AS d USING (observation)
ORDER BY o.observation

-- rows: margin_rows
SELECT
  m.step, format('step_{:06d}', m.step) AS checkpoint, m.pair_id, m.split, m.pair_type, m.record_side,
  $response AS target_scalar, m.* EXCLUDE (step, pair_id, split, pair_type, record_side, scan_order)
FROM margins AS m
ORDER BY m.step, m.scan_order

-- An inner checkpoint stands twice, with the basis of its own interval and with that of the one before.
-- rows: route_rows
WITH ends AS (
  SELECT
    source_step AS step, source_step, target_step, 'source' AS endpoint_kind, position, route_label, pair_id,
    source_clean AS transfer_margin_clean, source_corrupted AS transfer_margin_corrupted,
    source_patched AS transfer_margin_patched, source_route_score AS route_score
  FROM route_values
  UNION ALL
  SELECT
    target_step, source_step, target_step, 'target', position, route_label, pair_id, target_clean, target_corrupted,
    target_patched, target_route_score
  FROM route_values
)
SELECT
  e.step, format('step_{:06d}', e.step) AS checkpoint, e.route_label, e.source_step, e.target_step, e.endpoint_kind,
  e.source_step AS basis_step, p.pair_id, p.pair_type, p.split, p.source_sample_id, p.source_query_index,
  p.clean_answer_value, p.corrupted_answer_value, p.clean_transfer_token, p.corrupted_transfer_token,
  e.transfer_margin_clean, e.transfer_margin_corrupted, e.transfer_margin_patched, e.route_score
FROM ends AS e
JOIN entering_pairs AS p USING (pair_id)
ORDER BY e.source_step, e.endpoint_kind, e.position, p.scan_order

-- rows: coefficient_rows
SELECT
  f.route_label, f.coefficient, f.mean_route_score_delta, f.mean_contribution, l.stage, l.subspace_name, l.position_role,
  l.rank, l.head_layer, l.head
FROM (
  SELECT
    unnest(labels) AS route_label, unnest(coefficients) AS coefficient, unnest(means) AS mean_route_score_delta,
    unnest(contributions) AS mean_contribution
  FROM fits
) AS f
JOIN labels AS l ON l.label = f.route_label
ORDER BY f.route_label

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
ORDER BY scan_order

-- With the coefficients of all intervals together.
-- view: interval_rows
SELECT
  source_step, target_step, count(*) AS num_observations,
  favg(actual_margin_delta) AS actual_margin_delta_mean, favg(predicted_margin_delta) AS predicted_margin_delta_mean,
  favg(closure_residual) AS closure_residual_mean, favg(abs(closure_residual)) AS closure_abs_residual_mean,
  r_squared(actual_margin_delta, predicted_margin_delta) AS r_squared
FROM closure_rows
GROUP BY source_step, target_step
ORDER BY source_step

-- The routes by what they carry of the mean change.
-- view: route_contributions
SELECT
  route_label, coefficient, mean_route_score_delta, mean_contribution,
  mean_contribution / nullif((SELECT mean_actual_margin_delta FROM fits), 0) AS share_of_mean_change,
  stage, subspace_name, rank, 'L' || head_layer || 'H' || head AS head_label, position_role
FROM coefficient_rows
ORDER BY abs(mean_contribution) DESC, route_label

-- view: actual_vs_predicted
SELECT pair_type AS series, predicted_margin_delta AS x, actual_margin_delta AS y FROM closure_rows

-- view: interval_trajectory
SELECT target_step AS step, 'actual' AS series, actual_margin_delta_mean AS value FROM interval_rows
UNION ALL
SELECT target_step, 'predicted', predicted_margin_delta_mean FROM interval_rows
UNION ALL
SELECT target_step, 'mean |residual|', closure_abs_residual_mean FROM interval_rows
ORDER BY series, step

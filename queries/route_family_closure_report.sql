-- arrays: fits

-- view: family_features
SELECT f.position, f.family_label, x.observation, x.label, x.value
FROM fits AS f
JOIN features AS x ON list_contains(f.labels, x.label)

-- view: family_deltas
SELECT position, observation, map_from_entries(list((label, value) ORDER BY label)) AS route_score_deltas
FROM family_features
GROUP BY position, observation

-- view: predictions
SELECT position, family_label, labels, unnest(observations) AS observation, unnest(predicted) AS predicted FROM fits

-- rows: closure_rows
SELECT
  p.family_label, p.labels AS family_route_labels, c.* EXCLUDE (observation, labels, deltas), d.route_score_deltas,
  p.predicted AS predicted_margin_delta, c.actual_margin_delta - p.predicted AS closure_residual
FROM predictions AS p
JOIN closures AS c USING (observation)
JOIN family_deltas AS d ON d.position = p.position AND d.observation = p.observation
ORDER BY p.position, c.observation

-- rows: coefficient_rows
SELECT * EXCLUDE (position) FROM (
  SELECT
    position, family_label, unnest(labels) AS route_label, unnest(coefficients) AS coefficient,
    unnest(means) AS mean_route_score_delta, unnest(contributions) AS mean_contribution
  FROM fits
)
ORDER BY position, route_label

-- rows: family_summary_rows
SELECT
  family_label, labels AS route_labels, len(labels) AS num_routes, num_observations, mean_actual_margin_delta,
  mean_predicted_margin_delta, mean_residual, mean_abs_residual, r_squared, fit::JSON AS fit
FROM fits
ORDER BY position

-- rows: interval_rows
SELECT
  r.family_label, r.source_step, r.target_step, count(*) AS num_observations, favg(r.actual_margin_delta) AS actual_mean,
  favg(r.predicted_margin_delta) AS predicted_mean, favg(r.closure_residual) AS residual_mean,
  favg(abs(r.closure_residual)) AS abs_residual_mean,
  r_squared(r.actual_margin_delta, r.predicted_margin_delta) AS r_squared
FROM closure_rows AS r
JOIN fits AS f USING (family_label)
GROUP BY f.position, r.family_label, r.source_step, r.target_step
ORDER BY f.position, r.source_step

-- The families, best first; those without variation to explain before all others.
-- view: families_by_r_squared
SELECT
  family_label, len(labels) AS num_routes, r_squared, mean_abs_residual, mean_actual_margin_delta,
  mean_predicted_margin_delta, matrix_rank, num_parameters, rank_deficient, condition_number
FROM fits
ORDER BY r_squared DESC NULLS FIRST, position

-- What a family adds to another that it has all routes of.
-- view: additions
SELECT
  large.family_label AS family_label, small.family_label AS within, len(large.labels) - len(small.labels) AS more_routes,
  large.r_squared - small.r_squared AS r_squared_gain, small.mean_abs_residual - large.mean_abs_residual AS residual_drop
FROM fits AS large
JOIN fits AS small ON list_has_all(large.labels, small.labels) AND len(large.labels) > len(small.labels)
ORDER BY large.position, small.position

-- view: families_by_residual
SELECT family_label, mean_abs_residual FROM fits ORDER BY mean_abs_residual, position

-- view: r_squared_bars
SELECT family_label, r_squared FROM families_by_r_squared WHERE r_squared IS NOT NULL

-- view: actual_vs_predicted
SELECT
  'actual change, ' || family_label AS family, pair_type AS series, predicted_margin_delta AS x, actual_margin_delta AS y
FROM closure_rows

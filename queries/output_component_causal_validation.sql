-- Both runs of each component, and its DLA in the untouched one.
-- rows: validation_rows
SELECT
  i.source_step, i.target_step, i.pair_id, i.margin_side, i.scalar_name, i.endpoint_kind, i.step,
  format('step_{:06d}', i.step) AS checkpoint, i.pair_type, i.split, a.intervention AS component,
  i.answer_token AS answer_target_id, i.source_wrong AS source_best_wrong_token_id,
  i.target_wrong AS target_best_wrong_token_id, i.value AS baseline_scalar, a.value AS ablated_scalar,
  i.value - a.value AS causal_effect, d.dla AS dla_contribution, i.value - a.value - d.dla AS causal_minus_dla,
  sign(i.value - a.value) = sign(d.dla) AS sign_match
FROM endpoint_values AS i
JOIN endpoint_values AS a USING (source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind)
JOIN endpoint_dlas AS d USING (source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind)
WHERE i.intervention = 'clean' AND d.intervention = 'clean' AND a.intervention = d.component
ORDER BY
  i.source_step, i.endpoint_kind, i.pair_id, i.margin_side, list_position($scalar, i.scalar_name),
  list_position($dla_component, a.intervention)

-- rows: summary_rows
SELECT
  scalar_name, endpoint_kind, component, count(*) AS num_observations, favg(baseline_scalar) AS mean_baseline_scalar,
  favg(ablated_scalar) AS mean_ablated_scalar, favg(causal_effect) AS mean_causal_effect,
  favg(abs(causal_effect)) AS mean_abs_causal_effect, favg(dla_contribution) AS mean_dla_contribution,
  favg(abs(dla_contribution)) AS mean_abs_dla_contribution, favg(causal_minus_dla) AS mean_causal_minus_dla,
  favg(abs(causal_minus_dla)) AS mean_abs_causal_minus_dla, favg(sign_match::INTEGER) AS sign_match_fraction,
  r_squared(causal_effect, dla_contribution) AS causal_vs_dla_r_squared,
  pearson(causal_effect, dla_contribution) AS causal_vs_dla_correlation
FROM validation_rows
GROUP BY scalar_name, endpoint_kind, component
ORDER BY
  list_position($scalar, scalar_name), endpoint_kind, abs(mean_causal_effect) DESC, list_position($dla_component, component)

-- rows: pair_rows
SELECT
  pair_id, pair_type, split, source_sample_id, source_query_index, clean_answer_value, corrupted_answer_value,
  clean_transfer_token, corrupted_transfer_token, mutation
FROM chosen_pairs
ORDER BY clean_event, list_position($pair_type, pair_type)

-- What charts and findings are about: target ends, or source ends where those alone were asked for.
-- view: shown_end
SELECT CASE WHEN list_contains($endpoint_kinds, 'target') THEN 'target' ELSE 'source' END AS endpoint_kind

-- view: agreement
SELECT
  scalar_name, count(*) AS num_observations, favg(sign_match::INTEGER) AS sign_match_fraction,
  r_squared(causal_effect, dla_contribution) AS r_squared, pearson(causal_effect, dla_contribution) AS correlation
FROM validation_rows
JOIN shown_end USING (endpoint_kind)
GROUP BY scalar_name
ORDER BY list_position($scalar, scalar_name)

-- view: top_summary
SELECT *
FROM summary_rows
ORDER BY abs(mean_causal_effect) DESC, scalar_name, endpoint_kind, component
LIMIT $markdown_top_k_rows

-- Means over pairs, at each step.
-- view: causal_vs_dla_chart
SELECT
  replace(v.scalar_name, '_', ' ') AS panel, v.component, format('{}, {}', v.component, v.step) AS label,
  favg(v.dla_contribution) AS x, favg(v.causal_effect) AS y
FROM validation_rows AS v
JOIN shown_end USING (endpoint_kind)
GROUP BY v.scalar_name, v.component, v.step
ORDER BY list_position($scalar, v.scalar_name), list_position($dla_component, v.component), v.step

-- view: top_effects_chart
SELECT replace(scalar_name, '_', ' ') AS panel, component, quantity, value
FROM (
  SELECT
    scalar_name, component, abs(mean_causal_effect) AS size, unnest(['lost when zeroed', 'DLA']) AS quantity,
    unnest([mean_causal_effect, mean_dla_contribution]) AS value
  FROM summary_rows
  JOIN shown_end USING (endpoint_kind)
)
ORDER BY list_position($scalar, scalar_name), size DESC, component, quantity DESC

-- What a downstream component's DLA loses when the source is zeroed: each run with its own write and its own gradient.
-- rows: downstream_rows
SELECT
  i.source_step, i.target_step, i.pair_id, i.margin_side, i.scalar_name, i.endpoint_kind, i.step,
  format('step_{:06d}', i.step) AS checkpoint, a.intervention AS source_component, i.component AS downstream_component,
  i.dla AS baseline_downstream_dla, a.dla AS ablated_downstream_dla, i.dla - a.dla AS mediated_effect
FROM endpoint_dlas AS i
JOIN endpoint_dlas AS a USING (source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind, component)
WHERE i.intervention = 'clean' AND a.intervention <> 'clean' AND list_contains($downstream_component, i.component)
ORDER BY
  i.source_step, i.endpoint_kind, i.pair_id, i.margin_side, list_position($scalar, i.scalar_name),
  list_position($source_component, a.intervention), list_position($downstream_component, i.component)

-- view: mediated
SELECT
  source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind, source_component,
  fsum(mediated_effect) AS mediated_downstream_sum,
  map_from_entries(list((downstream_component, mediated_effect) ORDER BY downstream_component)) AS mediated_by_component
FROM downstream_rows
GROUP BY source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind, source_component

-- rows: source_rows
SELECT
  i.source_step, i.target_step, i.pair_id, i.margin_side, i.scalar_name, i.endpoint_kind, i.step,
  format('step_{:06d}', i.step) AS checkpoint, i.pair_type, i.split, a.intervention AS source_component,
  i.value AS baseline_scalar, a.value AS source_ablated_scalar, i.value - a.value AS total_causal_effect,
  d.dla AS direct_source_dla, m.mediated_downstream_sum, d.dla + m.mediated_downstream_sum AS direct_plus_mediated,
  i.value - a.value - (d.dla + m.mediated_downstream_sum) AS mediation_residual, m.mediated_by_component
FROM endpoint_values AS i
JOIN endpoint_values AS a USING (source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind)
JOIN endpoint_dlas AS d USING (source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind)
JOIN mediated AS m USING (source_step, target_step, pair_id, margin_side, scalar_name, endpoint_kind)
WHERE
  i.intervention = 'clean' AND d.intervention = 'clean' AND a.intervention = d.component
  AND m.source_component = d.component
ORDER BY
  i.source_step, i.endpoint_kind, i.pair_id, i.margin_side, list_position($scalar, i.scalar_name),
  list_position($source_component, a.intervention)

-- rows: source_summary_rows
SELECT
  scalar_name, endpoint_kind, source_component, count(*) AS num_observations,
  favg(total_causal_effect) AS mean_total_causal_effect, favg(abs(total_causal_effect)) AS mean_abs_total_causal_effect,
  favg(direct_source_dla) AS mean_direct_source_dla, favg(mediated_downstream_sum) AS mean_mediated_downstream_sum,
  favg(direct_plus_mediated) AS mean_direct_plus_mediated, favg(mediation_residual) AS mean_mediation_residual,
  favg(abs(mediation_residual)) AS mean_abs_mediation_residual,
  CASE WHEN abs(mean_total_causal_effect) > 1e-12 THEN mean_direct_plus_mediated / mean_total_causal_effect END
    AS mean_explained_fraction,
  favg((sign(total_causal_effect) = sign(direct_plus_mediated))::INTEGER) AS sign_match_fraction,
  r_squared(total_causal_effect, direct_plus_mediated) AS total_vs_direct_plus_mediated_r_squared,
  pearson(total_causal_effect, direct_plus_mediated) AS total_vs_direct_plus_mediated_correlation
FROM source_rows
GROUP BY scalar_name, endpoint_kind, source_component
ORDER BY list_position($scalar, scalar_name), endpoint_kind, list_position($source_component, source_component)

-- rows: downstream_summary_rows
SELECT
  scalar_name, endpoint_kind, source_component, downstream_component, count(*) AS num_observations,
  favg(baseline_downstream_dla) AS mean_baseline_downstream_dla,
  favg(ablated_downstream_dla) AS mean_ablated_downstream_dla, favg(mediated_effect) AS mean_mediated_effect,
  favg(abs(mediated_effect)) AS mean_abs_mediated_effect
FROM downstream_rows
GROUP BY scalar_name, endpoint_kind, source_component, downstream_component
ORDER BY
  list_position($scalar, scalar_name), endpoint_kind, list_position($source_component, source_component),
  list_position($downstream_component, downstream_component)

-- rows: pair_rows
SELECT
  pair_id, pair_type, split, source_sample_id, source_query_index, clean_answer_value, corrupted_answer_value,
  clean_transfer_token, corrupted_transfer_token, mutation
FROM chosen_pairs
ORDER BY clean_event, list_position($pair_type, pair_type)

-- What charts and findings are about: target ends, or source ends where those alone were asked for.
-- view: shown_end
SELECT CASE WHEN list_contains($endpoint_kinds, 'target') THEN 'target' ELSE 'source' END AS endpoint_kind

-- view: top_sources
SELECT *
FROM source_summary_rows
ORDER BY abs(mean_total_causal_effect) DESC, scalar_name, endpoint_kind, source_component
LIMIT $markdown_top_k_rows

-- view: top_downstream
SELECT *
FROM downstream_summary_rows
ORDER BY abs(mean_mediated_effect) DESC, scalar_name, endpoint_kind, source_component, downstream_component
LIMIT $markdown_top_k_rows

-- view: source_chart
SELECT replace(scalar_name, '_', ' ') AS panel, source_component, quantity, value
FROM (
  SELECT
    scalar_name, source_component, abs(mean_total_causal_effect) AS size,
    unnest(['total', 'direct DLA', 'mediated sum']) AS quantity, unnest([1, 2, 3]) AS place,
    unnest([mean_total_causal_effect, mean_direct_source_dla, mean_mediated_downstream_sum]) AS value
  FROM (
    SELECT * FROM source_summary_rows JOIN shown_end USING (endpoint_kind)
    ORDER BY abs(mean_total_causal_effect) DESC, scalar_name, source_component
    LIMIT $plot_top_k_rows
  )
)
ORDER BY list_position($scalar, scalar_name), size DESC, source_component, place

-- view: downstream_chart
SELECT
  replace(scalar_name, '_', ' ') AS panel, source_component || ' → ' || downstream_component AS label,
  mean_mediated_effect AS value
FROM (
  SELECT * FROM downstream_summary_rows JOIN shown_end USING (endpoint_kind)
  ORDER BY abs(mean_mediated_effect) DESC, scalar_name, source_component, downstream_component
  LIMIT $plot_top_k_rows
)
ORDER BY list_position($scalar, scalar_name), abs(value) DESC, label

-- Heads in the order in which their separation grew.
-- view: labels
SELECT a.spec, a.scalar_parameters->>'$.head' AS label, row_number() OVER (ORDER BY g.growth DESC, a.spec) AS position
FROM attributed_scalars AS a
JOIN (SELECT spec, fsum(actual_delta) AS growth FROM objective GROUP BY spec) AS g USING (spec)
ORDER BY position

-- The quarter of the window in which each head's separation grew most.
-- view: fastest_stretches
WITH numbered AS (
  SELECT
    spec, source_step, target_step, actual_delta,
    fsum(actual_delta) OVER (PARTITION BY spec ORDER BY source_step) AS so_far,
    row_number() OVER (PARTITION BY spec ORDER BY source_step) AS number,
    count(*) OVER (PARTITION BY spec) AS steps
  FROM objective
)
SELECT
  a.spec, a.source_step AS fastest_from, b.target_step AS fastest_to, b.so_far - a.so_far + a.actual_delta AS fastest_growth
FROM numbered AS a
JOIN numbered AS b ON b.spec = a.spec AND b.number = a.number + greatest(1, a.steps // 4) - 1
QUALIFY row_number() OVER (PARTITION BY a.spec ORDER BY fastest_growth DESC, a.source_step) = 1

-- rows: step_rows
SELECT
  l.label AS head_label, t.source_step, t.target_step, t.trace_learning_rate AS learning_rate, t.trace_loss AS loss,
  t.clip_coefficient, o.num_pairs, o.source_value, o.target_value, o.actual_delta, o.predicted_delta, o.relative_error,
  o.sign_match, g.* EXCLUDE (spec, source_step, target_step), r.reconstructed_adamw_residual,
  o.gradient_l2_norm, o.parameter_delta_l2_norm, o.update_gradient_cosine
FROM objective AS o
JOIN labels AS l USING (spec)
JOIN traced_steps AS t USING (source_step, target_step)
JOIN global_components AS g USING (spec, source_step, target_step)
JOIN reconstructions AS r USING (spec, source_step, target_step)
ORDER BY l.position, t.source_step

-- What each part of the model did to each head's separation, term by term.
-- rows: group_rows
SELECT
  l.label AS head_label, p.group_kind, c.group_id, c.component, fsum(c.component_delta) AS sum_delta,
  fsum(c.actual_update_predicted_delta) AS sum_actual_update
FROM components AS c
JOIN labels AS l USING (spec)
JOIN (SELECT DISTINCT group_id, group_kind FROM group_parts) AS p USING (group_id)
GROUP BY l.label, l.position, p.group_kind, c.group_id, c.component
ORDER BY l.position, p.group_kind, c.group_id, list_position($components, c.component)

-- rows: head_rows
SELECT
  h.label AS head_label, l.position, h.num_intervals, h.start_step, h.end_step, h.sum_actual_delta, h.sum_predicted_delta,
  s.* EXCLUDE (label), s.adam_historical_momentum / nullif(h.sum_predicted_delta, 0) AS momentum_share,
  s.adam_current_gradient / nullif(h.sum_predicted_delta, 0) AS current_gradient_share,
  s.weight_decay / nullif(h.sum_predicted_delta, 0) AS weight_decay_share,
  s.raw_sgd / nullif(h.sum_predicted_delta, 0) AS raw_sgd_share,
  f.fastest_from, f.fastest_to, f.fastest_growth, h.growing_intervals, h.sign_matches, h.mean_relative_error,
  h.sum_reconstructed_adamw_residual, h.clipped_intervals
FROM scalar_summary AS h
JOIN labels AS l USING (label)
JOIN fastest_stretches AS f USING (spec)
JOIN (
  PIVOT (SELECT label, component, sum_delta FROM component_summary)
  ON component IN (
    'raw_sgd', 'clipped_sgd', 'adam_current_gradient', 'adam_historical_momentum', 'adam_preconditioned', 'weight_decay',
    'reconstructed_adamw_update'
  ) USING any_value(sum_delta)
) AS s USING (label)
ORDER BY l.position

-- view: growth
SELECT
  o.target_step AS step, l.label AS series,
  fsum(o.actual_delta) OVER (PARTITION BY o.spec ORDER BY o.target_step) AS value
FROM objective AS o
JOIN labels AS l USING (spec)
ORDER BY l.position, step

-- view: first_ledger
SELECT step, series, value FROM ledger WHERE panel = (SELECT label FROM labels WHERE position = 1)

-- Where the head that grew most got it from, by term.
-- view: first_parts
SELECT
  replace(group_kind, '_', ' ') AS partition, split_part(group_id, ':', 2) AS name, replace(component, '_', ' ') AS term,
  sum_delta AS value
FROM group_rows
WHERE head_label = (SELECT label FROM labels WHERE position = 1)
  AND component IN ('adam_current_gradient', 'adam_historical_momentum')
  AND group_kind IN ('module_block', 'attention_head')
QUALIFY dense_rank() OVER (PARTITION BY group_kind ORDER BY abs(sum_actual_update) DESC, group_id) <= 8
ORDER BY group_kind DESC, abs(sum_actual_update) DESC, group_id, term

-- Hyperparameters are written where they changed.
-- view: recorded_steps
SELECT * FROM (
    SELECT
        step, learning_rate, clip_coefficient,
        last_value(optimizer_groups IGNORE NULLS) OVER (ORDER BY step) AS optimizer_groups
    FROM training_steps
    WHERE run = $run
)
WHERE list_contains($steps, step)
ORDER BY step

-- view: update_counters
SELECT step, parameter, optimizer_step, has_gradient
FROM parameter_updates
WHERE run = $run AND list_contains($steps, step)
ORDER BY step, parameter

-- view: weight_slices
SELECT
    s.layer, s.head, split_part(s.slice, '.', 2) AS projection, s.parameter, p.shape, p.optimizer_group,
    s.row_start, s.row_stop, s.column_start, s.column_stop
FROM slices AS s
JOIN parameters AS p ON p.run = s.run AND p.parameter = s.parameter
WHERE
    s.run = $run AND s.column_start IS NOT NULL
    AND (s.slice_kind = 'head_projection' OR (s.slice_kind = 'projection' AND s.slice SIMILAR TO '.*[.]fc_(in|out)'))
ORDER BY s.layer, s.head NULLS LAST, p.position, s.row_start, s.column_start

-- arrays: targets

-- arrays: spectra

-- view: measured
SELECT
    s.source_step, s.source_step + 1 AS target_step, s.target AS number, t.target, t.layer, t.head, t.projection,
    t.is_product,
    s.field AS source_kind,
    list_position($all_fields, s.field) AS field_position,
    CASE
        WHEN NOT t.is_product THEN 'parameter_field'
        WHEN s.field = 'weight' THEN 'exact_weight'
        ELSE 'first_order_functional_field'
    END AS functional_matrix_mode,
    s.matrix_rows, s.matrix_columns AS matrix_cols,
    s.fro_norm, s.max_abs, s.singular_values[1] AS top_singular_value,
    s.singular_value_count, s.singular_value_sum, s.singular_value_sq_sum,
    effective_rank(s.singular_value_sum, s.singular_value_sq_sum) AS effective_rank,
    s.top3_sum / nullif(s.singular_value_sum, 0) AS spectral_mass_top3,
    CASE WHEN isfinite(s.cosine) THEN s.cosine END AS top_direction_update_cosine,
    CASE WHEN isfinite(s.share) THEN s.share END AS update_top_direction_share,
    s.singular_values, s."left" AS left_vectors, s."right" AS right_vectors, t.matrix
FROM spectra AS s
JOIN targets AS t ON t.number = s.target
ORDER BY s.source_step, s.target, field_position

-- rows: metric
SELECT
    m.source_step, m.target_step, 1 AS step_gap, r.learning_rate, r.clip_coefficient,
    m.target, m.layer, m.head, m.projection, m.source_kind, m.functional_matrix_mode, m.matrix_rows, m.matrix_cols,
    m.fro_norm, m.max_abs, m.top_singular_value, m.singular_value_count, m.singular_value_sum, m.singular_value_sq_sum,
    m.effective_rank, m.spectral_mass_top3, m.top_direction_update_cosine, m.update_top_direction_share
FROM measured AS m
JOIN recorded_steps AS r ON r.step = m.target_step
ORDER BY m.source_step, m.number, m.field_position

-- rows: singular_value
SELECT
    source_step, target_step, target, source_kind, functional_matrix_mode, rank AS singular_value_rank,
    singular_values[rank] AS singular_value, singular_value_count
FROM (SELECT *, unnest(range(1, len(singular_values) + 1)) AS rank FROM measured)
ORDER BY source_step, number, field_position, rank

-- A zero matrix has no directions.
-- rows: singular_vector
SELECT
    source_step, target_step, target, source_kind, functional_matrix_mode, rank AS singular_value_rank, side AS vector_side,
    vector_label(matrix, side) AS vector_label,
    CASE side WHEN 'left' THEN matrix_rows ELSE matrix_cols END AS vector_dim,
    CASE side
        WHEN 'left' THEN left_vectors[(rank - 1) * matrix_rows + 1:rank * matrix_rows]
        ELSE right_vectors[(rank - 1) * matrix_cols + 1:rank * matrix_cols]
    END AS vector
FROM (
    SELECT *, unnest(['left', 'right']) AS side
    FROM (SELECT *, unnest(range(1, len(left_vectors) // matrix_rows + 1)) AS rank FROM measured)
    WHERE top_singular_value > 0
)
ORDER BY source_step, number, field_position, rank, side

-- rows: summary
SELECT
    any_value(target) AS target, any_value(layer) AS layer, any_value(head) AS head,
    any_value(projection) AS projection, source_kind,
    any_value(functional_matrix_mode) AS functional_matrix_mode,
    count(*) AS num_intervals, min(source_step) AS first_source_step, max(source_step) AS last_source_step,
    any_value(singular_value_count) AS singular_value_count,
    arg_min_null(effective_rank, source_step) AS first_effective_rank,
    arg_max_null(effective_rank, source_step) AS last_effective_rank,
    last_effective_rank - first_effective_rank AS delta_effective_rank,
    arg_min_null(spectral_mass_top3, source_step) AS first_spectral_mass_top3,
    arg_max_null(spectral_mass_top3, source_step) AS last_spectral_mass_top3,
    last_spectral_mass_top3 - first_spectral_mass_top3 AS delta_spectral_mass_top3,
    arg_min(fro_norm, source_step) AS first_fro_norm,
    arg_max(fro_norm, source_step) AS last_fro_norm,
    last_fro_norm - first_fro_norm AS delta_fro_norm,
    arg_min(max_abs, source_step) AS first_max_abs,
    arg_max(max_abs, source_step) AS last_max_abs,
    last_max_abs - first_max_abs AS delta_max_abs,
    arg_min(top_singular_value, source_step) AS first_top_singular_value,
    arg_max(top_singular_value, source_step) AS last_top_singular_value,
    last_top_singular_value - first_top_singular_value AS delta_top_singular_value,
    list_avg(list(effective_rank ORDER BY source_step)) AS mean_effective_rank,
    list_avg(list(spectral_mass_top3 ORDER BY source_step)) AS mean_spectral_mass_top3,
    list_avg(list(top_direction_update_cosine ORDER BY source_step)) AS mean_top_direction_update_cosine,
    list_avg(list(update_top_direction_share ORDER BY source_step)) AS mean_update_top_direction_share
FROM measured
GROUP BY number, source_kind
ORDER BY number, any_value(field_position)

-- Second moments have no negative entry, so their first direction is large whatever was learned. A multiple of another field
-- has its spectrum, and is left out.
-- view: top_concentrated
SELECT
    *, mean_effective_rank / singular_value_count AS effective_rank_share,
    source_kind IN ('sqrt_exp_avg_sq', 'adam_denominator') AS is_second_moment
FROM summary
WHERE
    mean_effective_rank IS NOT NULL
    AND NOT (source_kind = 'clipped_sgd' AND list_contains($source_kind, 'raw_sgd'))
    AND NOT (source_kind = 'bias_corrected_exp_avg' AND list_contains($source_kind, 'exp_avg'))
    AND NOT (source_kind = 'weight_decay' AND list_contains($source_kind, 'weight'))
ORDER BY is_second_moment, effective_rank_share, target, source_kind
LIMIT $markdown_top_k_rows

-- view: field_means
SELECT
    source_kind, count(*) AS spectra,
    list_avg(list(effective_rank / singular_value_count ORDER BY source_step, number)) AS effective_rank_share,
    list_avg(list(spectral_mass_top3 ORDER BY source_step, number)) AS spectral_mass_top3,
    list_avg(list(fro_norm ORDER BY source_step, number)) AS fro_norm,
    list_avg(list(top_direction_update_cosine ORDER BY source_step, number)) AS top_direction_update_cosine,
    list_avg(list(update_top_direction_share ORDER BY source_step, number)) AS update_top_direction_share
FROM measured
GROUP BY source_kind
ORDER BY any_value(field_position)

-- The parts that add up to the update; the error is what they have too much.
-- view: parts
SELECT
    source_step, number, target, is_product, effective_rank,
    CASE source_kind
        WHEN 'adam_current_gradient' THEN 'current gradient'
        WHEN 'adam_historical_momentum' THEN 'carried momentum'
        WHEN 'weight_decay' THEN 'weight decay'
        ELSE 'rounding'
    END AS part,
    CASE source_kind WHEN 'reconstruction_error' THEN -1 ELSE 1 END * update_top_direction_share AS share
FROM measured
WHERE
    source_kind IN ('adam_current_gradient', 'adam_historical_momentum', 'weight_decay', 'reconstruction_error')
    AND update_top_direction_share IS NOT NULL

-- view: carriers
SELECT
    target,
    list_avg(list(share ORDER BY source_step) FILTER (part = 'current gradient')) AS current_gradient,
    list_avg(list(share ORDER BY source_step) FILTER (part = 'carried momentum')) AS momentum,
    list_avg(list(share ORDER BY source_step) FILTER (part = 'weight decay')) AS weight_decay,
    list_avg(list(share ORDER BY source_step) FILTER (part = 'rounding')) AS rounding
FROM parts
GROUP BY number, target
ORDER BY number

-- view: top_carriers
FROM carriers LIMIT $markdown_top_k_rows

-- An interval is one step wide; in a chart it reaches to the next one.
-- view: chart_intervals
SELECT
    source_step,
    coalesce(
        lead(source_step) OVER steps, 2 * source_step - lag(source_step) OVER steps, source_step + 1
    ) AS end_step
FROM (SELECT DISTINCT source_step FROM measured)
WINDOW steps AS (ORDER BY source_step)
ORDER BY source_step

-- view: rank_chart
SELECT source_step AS step, target, effective_rank / singular_value_count AS effective_rank_share
FROM measured
WHERE source_kind = 'actual_parameter_delta'
ORDER BY number, source_step

-- What is a multiple of another field has its spectrum, and is not drawn.
-- view: field_chart
SELECT
    source_step AS step, source_kind,
    list_avg(list(effective_rank / singular_value_count ORDER BY number)) AS effective_rank_share
FROM measured
WHERE
    source_kind IN (
        'weight', 'exp_avg', 'sqrt_exp_avg_sq', 'raw_sgd', 'adam_current_gradient', 'adam_historical_momentum',
        'adam_preconditioned', 'actual_parameter_delta'
    )
GROUP BY source_step, source_kind
ORDER BY min(field_position), source_step

-- view: part_chart
SELECT i.source_step AS start_step, i.end_step, p.part, list_avg(list(p.share ORDER BY p.number)) AS share
FROM parts AS p
JOIN chart_intervals AS i ON i.source_step = p.source_step
GROUP BY i.source_step, i.end_step, p.part
ORDER BY i.source_step, list_position(['carried momentum', 'current gradient', 'weight decay', 'rounding'], p.part)

-- view: momentum_chart
SELECT i.source_step AS start_step, i.end_step, p.target, p.share
FROM parts AS p
JOIN chart_intervals AS i ON i.source_step = p.source_step
WHERE p.part = 'carried momentum' AND p.is_product = (SELECT bool_or(is_product) FROM targets)
ORDER BY p.number, i.source_step

-- view: whole
SELECT
    count(DISTINCT source_step) AS intervals, min(source_step) AS first_step, max(target_step) AS last_step,
    count(DISTINCT number) AS targets, count(DISTINCT source_kind) AS fields,
    count(*) FILTER (top_singular_value = 0) AS zero_spectra
FROM measured

-- view: rounding
SELECT e.target, e.source_step, e.fro_norm / nullif(a.fro_norm, 0) AS relative_error
FROM measured AS e
JOIN measured AS a ON a.source_step = e.source_step AND a.number = e.number
WHERE e.source_kind = 'reconstruction_error' AND a.source_kind = 'actual_parameter_delta'
QUALIFY row_number() OVER (ORDER BY relative_error DESC NULLS LAST, e.source_step, e.number) = 1

-- First and last means the first and last step of each series; a series is one matrix of one layer and head.
-- view: spectra
WITH sorted AS (
    SELECT
        step, layer, head, matrix AS matrix_name, list(singular_value ORDER BY rank) AS sigma
    FROM singular_values
    WHERE run = $run AND list_contains($steps, step) AND list_contains($matrix, matrix)
    GROUP BY step, layer, head, matrix
)
SELECT
    step, layer, head,
    CASE WHEN head IS NULL THEN 'mlp' ELSE 'attention_head' END AS component_type,
    matrix_name,
    matrix_label(layer, head, matrix_name) AS matrix_label,
    sigma,
    sigma[1] AS sigma1,
    effective_rank(list_sum(sigma), list_sum(list_transform(sigma, lambda s: s * s))) AS effective_rank,
    list_sum(sigma[1:3]) / nullif(list_sum(sigma), 0) AS top3,
    len(sigma) AS singular_value_count
FROM sorted
ORDER BY step, layer, head NULLS LAST, matrix_position(matrix_name)

-- rows: matrix_summary
WITH ends AS (
    SELECT
        layer, head, component_type, matrix_name, matrix_label,
        min(step) AS start_step, max(step) AS end_step,
        min_by(sigma1, step) AS s0, max_by(sigma1, step) AS s1,
        min_by(effective_rank, step) AS e0, max_by(effective_rank, step) AS e1,
        min_by(top3, step) AS m0, max_by(top3, step) AS m1,
        max_by(singular_value_count, step) AS singular_value_count
    FROM spectra
    GROUP BY ALL
)
SELECT
    layer, head, component_type, matrix_name, matrix_label, start_step, end_step,
    s0 AS start_singular_value_rank1, s1 AS end_singular_value_rank1,
    s1 - s0 AS singular_value_rank1_delta,
    (s1 - s0) / nullif(abs(s0), 0) AS singular_value_rank1_relative_delta,
    e0 AS start_effective_rank, e1 AS end_effective_rank, e1 - e0 AS effective_rank_delta,
    m0 AS start_spectral_mass_top3, m1 AS end_spectral_mass_top3, m1 - m0 AS spectral_mass_top3_delta,
    (s1 - s0) * positive_part(m1 - m0) AS selective_concentration_score,
    singular_value_count
FROM ends
ORDER BY singular_value_rank1_delta DESC NULLS LAST, layer, head NULLS LAST, matrix_position(matrix_name)

-- view: vectors
SELECT
    s.step, s.layer, s.head, s.component_type, s.matrix_name, s.matrix_label,
    v.rank AS singular_value_rank, v.side AS vector_side, v."values" AS vector,
    s.sigma[v.rank] AS singular_value,
    lag(s.step) OVER series AS previous_step,
    lag(v."values") OVER series AS previous_vector,
    last_value(v."values") OVER (series ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) AS final_vector,
    last_value(s.step) OVER (series ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) AS final_step
FROM singular_vectors AS v
JOIN spectra AS s
    ON s.step = v.step AND s.layer = v.layer AND s.head IS NOT DISTINCT FROM v.head AND s.matrix_name = v.matrix
WHERE v.run = $run AND list_contains($steps, v.step) AND list_contains($matrix, v.matrix) AND v.rank <= $max_vector_rank
WINDOW series AS (PARTITION BY s.matrix_name, s.layer, s.head, v.rank, v.side ORDER BY s.step)

-- A direction may keep its place while ranks swap: the earlier direction that is nearest, whatever its rank.
-- view: nearest_previous
WITH pairs_of_ranks AS (
    SELECT
        now.step, now.layer, now.head, now.matrix_name, now.vector_side, now.singular_value_rank,
        before.singular_value_rank AS earlier_rank,
        abs_cosine(now.vector, before.vector) AS cosine
    FROM vectors AS now
    JOIN vectors AS before
        ON before.step = now.previous_step AND before.matrix_name = now.matrix_name AND before.layer = now.layer
        AND before.head IS NOT DISTINCT FROM now.head AND before.vector_side = now.vector_side
)
SELECT
    step, layer, head, matrix_name, vector_side, singular_value_rank,
    arg_max(earlier_rank, (cosine, -earlier_rank)) AS adjacent_best_rank,
    max(cosine) AS adjacent_best_abs_cosine
FROM pairs_of_ranks
GROUP BY step, layer, head, matrix_name, vector_side, singular_value_rank

-- A vector's |cos| with itself is 1, to the last digit too; NaN stays.
-- rows: vector_alignment
WITH cosines AS (
    SELECT
        *, abs_cosine(vector, previous_vector) AS a, abs_cosine(vector, final_vector) AS rounded,
        CASE WHEN step = final_step AND isfinite(rounded) THEN 1.0::DOUBLE ELSE rounded END AS f
    FROM vectors
)
SELECT
    c.step, format('step_{:06d}', c.step) AS checkpoint_name,
    c.layer, c.head, c.component_type, c.matrix_name, c.matrix_label, c.singular_value_rank, c.vector_side,
    vector_label(c.matrix_name, c.vector_side) AS vector_label,
    c.previous_step,
    c.a AS adjacent_abs_cosine, 1 - c.a AS adjacent_rotation,
    c.f AS final_abs_cosine, 1 - c.f AS final_rotation_remaining,
    c.singular_value,
    n.adjacent_best_rank, n.adjacent_best_abs_cosine
FROM cosines AS c
LEFT JOIN nearest_previous AS n
    ON n.step = c.step AND n.layer = c.layer AND n.head IS NOT DISTINCT FROM c.head AND n.matrix_name = c.matrix_name
    AND n.vector_side = c.vector_side AND n.singular_value_rank = c.singular_value_rank
ORDER BY c.layer, c.head NULLS LAST, matrix_position(c.matrix_name), c.singular_value_rank, c.vector_side, c.step

-- What is least from each step on decides since when a direction has been aligned or stable for good; NaN is neither.
-- view: tails
SELECT
    *,
    min(CASE WHEN isnan(final_abs_cosine) THEN -1 ELSE final_abs_cosine END) OVER tail AS least_final_ahead,
    min(CASE WHEN isnan(adjacent_abs_cosine) THEN -1 ELSE adjacent_abs_cosine END) OVER tail AS least_adjacent_ahead,
    count(adjacent_abs_cosine) OVER tail AS adjacent_ahead,
    step = max(step) OVER (PARTITION BY matrix_name, layer, head, singular_value_rank, vector_side) AS is_last
FROM vector_alignment
WINDOW tail AS (
    PARTITION BY matrix_name, layer, head, singular_value_rank, vector_side ORDER BY step
    ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING
)

-- rows: direction_birth
SELECT
    layer, head, component_type, matrix_name, matrix_label, singular_value_rank, vector_side, vector_label,
    min(step) AS start_step, max(step) AS end_step,
    min_by(final_abs_cosine, step) AS start_final_abs_cosine,
    max_by(final_abs_cosine, step) AS end_final_abs_cosine,
    1 - min_by(final_abs_cosine, step) AS total_rotation_to_final,
    max(final_abs_cosine) FILTER (NOT is_last) AS max_final_abs_cosine_before_end,
    min(adjacent_abs_cosine) AS min_adjacent_abs_cosine,
    arg_min(previous_step, (adjacent_abs_cosine, step)) FILTER (adjacent_abs_cosine IS NOT NULL)
        AS min_adjacent_interval_start,
    arg_min(step, (adjacent_abs_cosine, step)) FILTER (adjacent_abs_cosine IS NOT NULL) AS min_adjacent_interval_end,
    min(step) FILTER (least_final_ahead >= $final_alignment_threshold) AS first_final_alignment_step,
    min(step) FILTER (
        adjacent_abs_cosine IS NOT NULL
        AND least_adjacent_ahead >= $adjacent_stability_threshold
        AND adjacent_ahead >= $stability_patience
    ) AS first_adjacent_stable_step,
    count(*) FILTER (adjacent_best_rank <> singular_value_rank) AS rank_swaps
FROM tails
GROUP BY layer, head, component_type, matrix_name, matrix_label, singular_value_rank, vector_side, vector_label
ORDER BY
    total_rotation_to_final DESC NULLS LAST, layer, head NULLS LAST, matrix_position(matrix_name), singular_value_rank,
    vector_side

-- view: rank1_rotation
SELECT step, layer, head, matrix_name, list_avg(list(adjacent_rotation ORDER BY vector_side)) AS rotation
FROM vector_alignment
WHERE singular_value_rank = 1 AND adjacent_rotation IS NOT NULL
GROUP BY step, layer, head, matrix_name

-- rows: interval_event
WITH steps_of_series AS (
    SELECT
        *,
        lag(step) OVER series AS step0, lag(sigma1) OVER series AS s0, lag(effective_rank) OVER series AS e0,
        lag(top3) OVER series AS m0
    FROM spectra
    WINDOW series AS (PARTITION BY matrix_name, layer, head ORDER BY step)
)
SELECT
    i.step0 AS interval_start_step, i.step AS interval_end_step,
    i.layer, i.head, i.component_type, i.matrix_name, i.matrix_label,
    i.s0 AS singular_value_rank1_start, i.sigma1 AS singular_value_rank1_end,
    i.sigma1 - i.s0 AS singular_value_rank1_delta,
    (i.sigma1 - i.s0) / nullif(abs(i.s0), 0) AS singular_value_rank1_relative_delta,
    i.effective_rank - i.e0 AS effective_rank_delta,
    i.top3 - i.m0 AS spectral_mass_top3_delta,
    r.rotation AS rank1_mean_adjacent_rotation,
    1 - r.rotation AS rank1_mean_adjacent_abs_cosine,
    (i.sigma1 - i.s0) * positive_part(i.top3 - i.m0) AS positive_concentration_delta
FROM steps_of_series AS i
LEFT JOIN rank1_rotation AS r
    ON r.step = i.step AND r.layer = i.layer AND r.head IS NOT DISTINCT FROM i.head AND r.matrix_name = i.matrix_name
WHERE i.step0 IS NOT NULL
ORDER BY i.step0, singular_value_rank1_delta DESC NULLS LAST, i.matrix_label

-- rows: coordination_window
WITH intervals AS (
    SELECT
        interval_start_step, interval_end_step,
        list({
            'label': matrix_label, 'delta': singular_value_rank1_delta, 'mass': spectral_mass_top3_delta,
            'rotation': rank1_mean_adjacent_rotation
        } ORDER BY singular_value_rank1_delta DESC NULLS LAST, matrix_label) AS events
    FROM interval_event
    GROUP BY interval_start_step, interval_end_step
)
SELECT
    interval_start_step, interval_end_step,
    len(events) AS num_matrices,
    len(list_filter(events, lambda e: e.delta > 0)) AS num_positive_growth_matrices,
    len(list_filter(events, lambda e: e.mass > 0)) AS num_positive_mass_matrices,
    list_sum(list_transform(events, lambda e: positive_part(e.delta))) AS total_positive_singular_value_rank1_delta,
    list_sum(list_transform(events, lambda e: abs(e.delta))) AS total_abs_singular_value_rank1_delta,
    list_sum(list_transform(events, lambda e: positive_part(e.mass))) AS total_positive_spectral_mass_top3_delta,
    list_avg(list_transform(events, lambda e: e.rotation)) AS mean_rank1_adjacent_rotation,
    list_transform(
        events[1:8], lambda e: {'delta': e.delta, 'mass_delta': e.mass, 'matrix_label': e.label}
    ) AS top_growth_matrices,
    (
        SELECT
            list({
                'delta': turned.delta, 'matrix_label': turned.label, 'rank1_mean_adjacent_rotation': turned.rotation
            } ORDER BY turned.rotation DESC, turned.label)[1:8]
        FROM (SELECT unnest(events) AS turned)
        WHERE turned.rotation IS NOT NULL
    ) AS top_rotation_matrices
FROM intervals
ORDER BY interval_start_step, interval_end_step

-- view: top_rank1_growth
SELECT * FROM matrix_summary
ORDER BY singular_value_rank1_delta DESC NULLS LAST, layer, head NULLS LAST, matrix_position(matrix_name)
LIMIT $markdown_top_k

-- view: top_selective_concentration
SELECT * FROM matrix_summary
ORDER BY selective_concentration_score DESC NULLS LAST, layer, head NULLS LAST, matrix_position(matrix_name)
LIMIT $markdown_top_k

-- view: top_direction_birth_candidates
SELECT * FROM direction_birth
ORDER BY
    total_rotation_to_final DESC NULLS LAST, layer, head NULLS LAST, matrix_position(matrix_name), singular_value_rank,
    vector_side
LIMIT $markdown_top_k

-- view: top_coordinated_growth_windows
SELECT * FROM coordination_window
ORDER BY total_positive_singular_value_rank1_delta DESC NULLS LAST, interval_start_step
LIMIT $markdown_top_k

-- view: growth_chart
SELECT step, matrix_label, sigma1 FROM spectra ORDER BY step, layer, head NULLS LAST, matrix_position(matrix_name)

-- Left and right share most of their story; the chart takes the mean of the two.
-- view: stabilization_chart
SELECT step, matrix_label, list_avg(list(final_abs_cosine ORDER BY vector_side)) AS final_abs_cosine
FROM vector_alignment
WHERE singular_value_rank = 1
GROUP BY step, matrix_label, layer, head, matrix_name
ORDER BY step, layer, head NULLS LAST, matrix_position(matrix_name)

-- view: rotation_chart
SELECT interval_start_step AS start_step, interval_end_step AS end_step, matrix_label, rank1_mean_adjacent_rotation AS rotation
FROM interval_event
ORDER BY layer, head NULLS LAST, matrix_position(matrix_name), interval_start_step

-- view: window_chart
SELECT
    interval_start_step AS start_step, interval_end_step AS end_step, matrix_name AS part,
    list_sum(list(positive_part(singular_value_rank1_delta) ORDER BY layer, head)) / (interval_end_step - interval_start_step)
        * 100 AS growth
FROM interval_event
GROUP BY interval_start_step, interval_end_step, matrix_name
ORDER BY interval_start_step, matrix_position(matrix_name)

-- The spectra of the selected matrices. Sums run over every singular value, whatever is written, from the largest to
-- the smallest, so that they do not depend on the number of threads.
-- view: spectrum_statistics
WITH spectra AS (
    SELECT
        step, layer, head, matrix, any_value(matrix_rows) AS matrix_rows, any_value(matrix_columns) AS matrix_columns,
        list(singular_value ORDER BY rank) AS sigma
    FROM singular_values
    WHERE run = $run AND list_contains($steps, step) AND list_contains($matrix, matrix)
    GROUP BY step, layer, head, matrix
),
sums AS (
    SELECT
        *, list_sum(sigma) AS total, list_sum(list_transform(sigma, lambda s: s * s)) AS total_of_squares,
        list_sum(sigma[1:3]) AS top3
    FROM spectra
)
SELECT
    $lake || '#' || $run || '/' || step AS checkpoint,
    format('step_{:06d}', step) AS checkpoint_name,
    step, layer, head,
    CASE WHEN head IS NULL THEN 'mlp' ELSE 'attention_head' END AS component_type,
    matrix AS matrix_name,
    matrix_rows, matrix_columns AS matrix_cols,
    sigma,
    len(sigma) AS singular_value_count,
    total AS singular_value_sum,
    total_of_squares AS singular_value_sq_sum,
    effective_rank(total, total_of_squares) AS effective_rank,
    top3 / nullif(total, 0) AS spectral_mass_top3,
    matrix_label(layer, head, matrix) AS matrix_label
FROM sums
ORDER BY step, layer, head NULLS LAST, matrix_position(matrix)

-- rows: singular_value_rows
SELECT
    checkpoint, checkpoint_name, step, layer, head, component_type, matrix_name, matrix_rows, matrix_cols,
    rank AS singular_value_rank,
    sigma[rank] AS singular_value,
    singular_value_count, singular_value_sum, singular_value_sq_sum, effective_rank, spectral_mass_top3
FROM (
    SELECT *, unnest(range(1, least(coalesce($max_singular_values, len(sigma)), len(sigma)) + 1)) AS rank
    FROM spectrum_statistics
)
ORDER BY step, layer, head NULLS LAST, matrix_position(matrix_name), rank

-- rows: top_vector_rows
SELECT
    s.checkpoint, s.checkpoint_name, s.step, s.layer, s.head, s.component_type, s.matrix_name, s.matrix_rows,
    s.matrix_cols,
    v.rank AS singular_value_rank,
    s.sigma[v.rank] AS singular_value,
    s.singular_value_count, s.singular_value_sum, s.singular_value_sq_sum, s.effective_rank, s.spectral_mass_top3,
    v.side AS vector_side,
    vector_label(s.matrix_name, v.side) AS vector_label,
    len(v."values") AS vector_dim,
    v."values" AS vector
FROM singular_vectors AS v
JOIN spectrum_statistics AS s
    ON s.step = v.step AND s.layer = v.layer AND s.head IS NOT DISTINCT FROM v.head AND s.matrix_name = v.matrix
WHERE v.run = $run AND list_contains($steps, v.step) AND list_contains($matrix, v.matrix) AND v.rank <= $top_vector_ranks
ORDER BY s.step, s.layer, s.head NULLS LAST, matrix_position(s.matrix_name), v.rank, v.side

-- view: growth
SELECT
    any_value(matrix_label) AS matrix_label,
    matrix_name,
    min(step) AS start_step, max(step) AS end_step,
    arg_min(sigma[1], step) AS start_sigma1,
    arg_max(sigma[1], step) AS end_sigma1,
    end_sigma1 - start_sigma1 AS delta_sigma1,
    arg_min(effective_rank, step) AS start_effective_rank,
    arg_max(effective_rank, step) AS end_effective_rank,
    end_effective_rank - start_effective_rank AS delta_effective_rank,
    arg_min(spectral_mass_top3, step) AS start_top3,
    arg_max(spectral_mass_top3, step) AS end_top3,
    any_value(singular_value_count) AS singular_value_count
FROM spectrum_statistics
GROUP BY layer, head, matrix_name
ORDER BY delta_sigma1 DESC NULLS LAST, layer, head NULLS LAST, matrix_position(matrix_name)

-- view: top_growth
SELECT * FROM growth LIMIT 12

-- view: trajectories
SELECT step, matrix_label, sigma[1] AS sigma1, effective_rank, spectral_mass_top3
FROM spectrum_statistics
ORDER BY step, layer, head NULLS LAST, matrix_position(matrix_name)

-- Per step and label; numbers by singular rank are lists.
-- arrays: alignments

-- view: checkpoints
SELECT
    step AS checkpoint_step, $lake || '#' || $run || '/' || step AS checkpoint,
    format('step_{:06d}', step) AS checkpoint_name
FROM (SELECT unnest($steps) AS step)

-- view: measured
SELECT c.checkpoint, c.checkpoint_name, c.checkpoint_step, $context_stage AS context_stage, a.* EXCLUDE (step), s.spec
FROM alignments AS a
JOIN checkpoints AS c ON c.checkpoint_step = a.step
JOIN role_specs AS s ON s.role = a.role
ORDER BY c.checkpoint_step, s.spec

-- rows: alignment_rows
WITH ranked AS (SELECT *, unnest(range(1, len(singular_values) + 1)) AS singular_rank FROM measured)
SELECT
    r.checkpoint, r.checkpoint_name, r.checkpoint_step, r.context_stage,
    $head_layer AS head_layer,
    $head AS head,
    r.singular_rank,
    r.singular_values[r.singular_rank] AS singular_value,
    r.role,
    r.num_vectors AS role_num_vectors,
    r.num_unique_tokens AS role_num_unique_tokens,
    r.left_mean_cosine[r.singular_rank] AS left_mean_cosine,
    r.left_identity_overlap[r.singular_rank] AS left_identity_overlap,
    r.left_all_vector_overlap[r.singular_rank] AS left_all_vector_overlap,
    r.right_mean_cosine[r.singular_rank] AS right_mean_cosine,
    r.right_identity_overlap[r.singular_rank] AS right_identity_overlap,
    r.right_all_vector_overlap[r.singular_rank] AS right_all_vector_overlap,
    b.answer_margin, b.answer_accuracy,
    r.matched_rank[r.singular_rank] AS matched_rank,
    r.matched_abs_cosine[r.singular_rank] AS matched_abs_cosine,
    r.left_permuted[r.singular_rank].mean AS left_identity_overlap_permuted_mean,
    r.left_permuted[r.singular_rank].std AS left_identity_overlap_permuted_std,
    r.left_permuted[r.singular_rank].percentile_95 AS left_identity_overlap_permuted_percentile_95,
    r.left_permuted[r.singular_rank].p_value AS left_identity_overlap_permuted_p_value,
    r.right_permuted[r.singular_rank].mean AS right_identity_overlap_permuted_mean,
    r.right_permuted[r.singular_rank].std AS right_identity_overlap_permuted_std,
    r.right_permuted[r.singular_rank].percentile_95 AS right_identity_overlap_permuted_percentile_95,
    r.right_permuted[r.singular_rank].p_value AS right_identity_overlap_permuted_p_value
FROM ranked AS r
JOIN behavior AS b ON b.step = r.checkpoint_step
ORDER BY r.checkpoint_step, r.singular_rank, r.spec

-- rows: rank_aggregate_rows
WITH sums AS (
    SELECT
        *, list_sum(singular_values) AS total,
        [left_mean_cosine, left_identity_overlap, left_all_vector_overlap, right_mean_cosine, right_identity_overlap,
            right_all_vector_overlap] AS metrics
    FROM measured
),
aggregates AS (
    SELECT
        * EXCLUDE (metrics),
        list_transform(metrics, lambda m: list_dot_product(singular_values, m) / total) AS weighted,
        list_transform(metrics, lambda m: list_max(m)) AS largest
    FROM sums
)
SELECT
    a.checkpoint, a.checkpoint_name, a.checkpoint_step, a.context_stage,
    $head_layer AS head_layer,
    $head AS head,
    a.role,
    len(a.singular_values) AS rank_count,
    a.singular_values[1] AS singular_value_top,
    a.total AS singular_value_sum,
    a.weighted[1] AS left_mean_cosine_weighted,
    a.weighted[2] AS left_identity_overlap_weighted,
    a.weighted[3] AS left_all_vector_overlap_weighted,
    a.weighted[4] AS right_mean_cosine_weighted,
    a.weighted[5] AS right_identity_overlap_weighted,
    a.weighted[6] AS right_all_vector_overlap_weighted,
    a.largest[1] AS left_mean_cosine_max,
    a.largest[2] AS left_identity_overlap_max,
    a.largest[3] AS left_all_vector_overlap_max,
    a.largest[4] AS right_mean_cosine_max,
    a.largest[5] AS right_identity_overlap_max,
    a.largest[6] AS right_all_vector_overlap_max,
    b.answer_margin, b.answer_accuracy
FROM aggregates AS a
JOIN behavior AS b ON b.step = a.checkpoint_step
ORDER BY a.checkpoint_step, a.spec

-- view: role_groups
SELECT spec, list(group_token ORDER BY group_token_id) AS tokens, list(group_token_id ORDER BY group_token_id) AS token_ids
FROM (SELECT spec, group_token_id, any_value(group_token) AS group_token FROM context_vectors GROUP BY spec, group_token_id)
GROUP BY spec

-- rows: subspace_rows
SELECT
    m.checkpoint, m.checkpoint_name, m.checkpoint_step, m.context_stage, m.role, s.context_role, s.group_by, m.num_vectors,
    m.num_unique_tokens, g.tokens, g.token_ids, m.ambient_dim,
    $pca_rank AS pca_rank,
    m.identity_centered_rank, m.identity_singular_values, m.all_vector_centered_rank, m.all_vector_singular_values
FROM measured AS m
JOIN role_specs AS s ON s.spec = m.spec
JOIN role_groups AS g ON g.spec = m.spec
ORDER BY m.checkpoint_step, m.spec

-- rows: role_vector_rows
SELECT
    c.checkpoint, c.checkpoint_name, c.checkpoint_step,
    $context_stage AS context_stage,
    v.example AS batch_index, v.sample_id, v.split, v.query_index, v.role, v.context_role, v.group_by, v.position,
    v.group_token_id, v.group_token, v.position_token_id, v.position_token
FROM checkpoints AS c
CROSS JOIN context_vectors AS v
ORDER BY c.checkpoint_step, v.spec, v.event, v.position

-- view: first_direction
SELECT * FROM alignment_rows WHERE singular_rank = 1

-- view: first_direction_ends
SELECT
    f.role,
    arg_min(f.left_identity_overlap, f.checkpoint_step) AS start_left_identity_overlap,
    arg_max(f.left_identity_overlap, f.checkpoint_step) AS end_left_identity_overlap,
    arg_min(f.right_identity_overlap, f.checkpoint_step) AS start_right_identity_overlap,
    arg_max(f.right_identity_overlap, f.checkpoint_step) AS end_right_identity_overlap,
    arg_max(f.left_mean_cosine, f.checkpoint_step) AS end_left_mean_cosine,
    arg_max(f.right_mean_cosine, f.checkpoint_step) AS end_right_mean_cosine
FROM first_direction AS f
JOIN role_specs AS s ON s.role = f.role
GROUP BY f.role, s.spec
ORDER BY s.spec

-- view: rank1_correlation_rows
WITH long AS (
    UNPIVOT (
        SELECT
            role, checkpoint_step, singular_value, answer_margin, left_mean_cosine, left_identity_overlap, right_mean_cosine,
            right_identity_overlap, left_all_vector_overlap, right_all_vector_overlap
        FROM first_direction
    )
    ON COLUMNS('^(left|right)_') INTO NAME metric VALUE measure
)
SELECT
    role, metric, pearson(singular_value, measure) AS with_singular_value, pearson(answer_margin, measure) AS with_answer_margin
FROM long
GROUP BY role, metric
ORDER BY role, metric

-- view: rank_aggregate_correlation_rows
WITH long AS (
    UNPIVOT (SELECT * EXCLUDE (checkpoint, checkpoint_name, context_stage, head_layer, head) FROM rank_aggregate_rows)
    ON COLUMNS('^(left|right)_') INTO NAME metric VALUE measure
)
SELECT
    role, metric, pearson(singular_value_top, measure) AS with_singular_value,
    pearson(answer_margin, measure) AS with_answer_margin
FROM long
WHERE metric NOT LIKE '%_all_vector_overlap_max'
GROUP BY role, metric
ORDER BY role, metric

-- view: trajectory
WITH sides AS (
    SELECT checkpoint_step AS step, 'left on ' || role AS series, left_identity_overlap AS identity, left_mean_cosine AS mean
    FROM first_direction WHERE role = $plot_left_role
    UNION ALL
    SELECT checkpoint_step, 'right on ' || role, right_identity_overlap, right_mean_cosine
    FROM first_direction WHERE role = $plot_right_role
),
shared AS (
    SELECT DISTINCT f.checkpoint_step AS step, f.singular_value, f.answer_margin, sqrt($pca_rank / m.ambient_dim) AS chance
    FROM first_direction AS f
    JOIN measured AS m ON m.checkpoint_step = f.checkpoint_step AND m.spec = 0
    WHERE f.role = $labels[1]
)
SELECT step, series, 'identity' AS panel, identity AS value FROM sides
UNION ALL
SELECT step, 'chance √(k/d)', 'identity', chance FROM shared
UNION ALL
SELECT step, series, 'mean', mean FROM sides
UNION ALL
SELECT step, 'σ₁ of W_QK', 'sigma', singular_value FROM shared
UNION ALL
SELECT step, 'answer margin', 'margin', answer_margin FROM shared

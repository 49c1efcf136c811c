-- The groups of vectors: the same at every step, ascending by token id.
-- view: groups
SELECT
    group_token_id, any_value(group_token) AS group_token, count(*) AS group_count,
    row_number() OVER (ORDER BY group_token_id) AS place
FROM context_vectors
GROUP BY group_token_id
ORDER BY group_token_id

-- view: group_totals
SELECT
    count(*) AS num_groups, sum(group_count)::BIGINT AS num_vectors, min(group_count) AS min_group_count,
    max(group_count) AS max_group_count
FROM groups

-- Per step, stage and projection; numbers by group are lists in the order of `groups`.
-- arrays: separations

-- view: checkpoints
SELECT
    step AS checkpoint_step, $lake || '#' || $run || '/' || step AS checkpoint,
    format('step_{:06d}', step) AS checkpoint_name
FROM (SELECT unnest($steps) AS step)

-- view: every_metric
SELECT
    c.checkpoint, c.checkpoint_name, c.checkpoint_step,
    s.context_stage,
    $context_role AS context_role,
    $group_by AS group_by,
    $head_layer AS head_layer,
    $head AS head,
    s.projection,
    $projection_rank AS projection_rank,
    s.qk_singular_value_top, s.qk_singular_value_sum,
    t.num_groups, t.num_vectors, t.min_group_count, t.max_group_count,
    s.projected_dim, s.within_variance, s.between_variance, s.separation_ratio,
    s.nearest_centroid_accuracy, s.nearest_centroid_margin, s.mean_centroid_norm,
    b.answer_margin, b.answer_accuracy,
    (t.num_groups - 1) / (t.num_vectors - t.num_groups) AS chance_separation_ratio,
    t.max_group_count / t.num_vectors AS largest_group_share,
    s.* LIKE '%_permuted_%'
FROM separations AS s
JOIN checkpoints AS c ON c.checkpoint_step = s.step
JOIN behavior AS b ON b.step = s.step
CROSS JOIN group_totals AS t
ORDER BY c.checkpoint_step, s.stage_place, s.projection_place

-- rows: metric_rows
SELECT *
FROM every_metric
WHERE $include_full_residual OR projection <> 'full_residual'
ORDER BY
    checkpoint_step, list_position($context_stage, context_stage),
    list_position(['qk_left', 'qk_right', 'qk_both', 'full_residual'], projection)

-- rows: group_rows
WITH by_group AS (
    SELECT
        s.step, s.context_stage, s.stage_place, s.projection, s.projection_place, g.*,
        s.group_within[g.place] AS within_variance,
        s.group_distance[g.place] AS centroid_global_squared_distance,
        s.group_norm[g.place] AS centroid_norm
    FROM separations AS s
    CROSS JOIN groups AS g
    WHERE $include_full_residual OR s.projection <> 'full_residual'
),
stages_read AS (SELECT DISTINCT context_stage, stage_place FROM separations),
both_kinds AS (
    SELECT
        'vector' AS row_kind, c.checkpoint, c.checkpoint_name, c.checkpoint_step, s.context_stage AS stage,
        v.example AS batch_index, v.sample_id, v.split, v.query_index, v.event, v.context_role,
        v.position AS context_position, v.group_by, v.group_token_id, v.group_token, v.position_token_id, v.position_token,
        s.stage_place
    FROM checkpoints AS c
    CROSS JOIN stages_read AS s
    CROSS JOIN context_vectors AS v
    UNION ALL BY NAME
    SELECT
        'group' AS row_kind, c.checkpoint, c.checkpoint_name, c.checkpoint_step, g.context_stage, $context_role AS context_role,
        $group_by AS group_by, g.projection, g.group_token_id, g.group_token, g.group_count, g.within_variance,
        g.centroid_global_squared_distance, g.centroid_norm, g.stage_place, g.projection_place
    FROM by_group AS g
    JOIN checkpoints AS c ON c.checkpoint_step = g.step
)
SELECT * EXCLUDE (stage_place, projection_place, event)
FROM both_kinds
ORDER BY row_kind DESC, checkpoint_step, stage_place, projection_place, event, context_position, group_token_id

-- From the first checkpoint to the last, over all of them and over those of the window.
-- view: spans
WITH rows_of_spans AS (
    SELECT *, 'all' AS span FROM every_metric
    UNION ALL
    SELECT *, 'window' AS span FROM every_metric WHERE checkpoint_step BETWEEN $window_start AND $window_end
)
SELECT
    span, context_stage, projection,
    any_value(projected_dim) AS projected_dim,
    count(*) AS num_checkpoints,
    min(checkpoint_step) AS start_step,
    max(checkpoint_step) AS end_step,
    arg_min(separation_ratio, checkpoint_step) AS start_separation_ratio,
    arg_max(separation_ratio, checkpoint_step) AS end_separation_ratio,
    end_separation_ratio - start_separation_ratio AS delta_separation_ratio,
    arg_min(nearest_centroid_accuracy, checkpoint_step) AS start_nearest_centroid_accuracy,
    arg_max(nearest_centroid_accuracy, checkpoint_step) AS end_nearest_centroid_accuracy,
    end_nearest_centroid_accuracy - start_nearest_centroid_accuracy AS delta_nearest_centroid_accuracy,
    pearson(separation_ratio, qk_singular_value_top) AS separation_ratio_vs_qk_singular_value_top,
    pearson(nearest_centroid_accuracy, qk_singular_value_top) AS nearest_centroid_accuracy_vs_qk_singular_value_top,
    pearson(separation_ratio, answer_margin) AS separation_ratio_vs_answer_margin,
    pearson(nearest_centroid_accuracy, answer_margin) AS nearest_centroid_accuracy_vs_answer_margin
FROM rows_of_spans
GROUP BY span, context_stage, projection
HAVING span = 'all' OR count(*) > 1
ORDER BY span, list_position($context_stage, context_stage), list_position($projection_names, projection)

-- view: summary
SELECT * EXCLUDE (span) FROM spans WHERE span = 'all'

-- view: trajectory
WITH series AS (
    SELECT
        checkpoint_step AS step,
        CASE WHEN len($context_stage) = 1 THEN projection ELSE context_stage || ' ' || projection END AS series,
        *
    FROM every_metric
    WHERE projection <> 'full_residual'
),
-- What chance reaches depends little on the projection; the margin and the spectrum not at all.
shared AS (
    SELECT
        step, any_value(chance_separation_ratio) AS chance_separation_ratio,
        max(separation_ratio_permuted_percentile_95) AS ratio_percentile,
        any_value(largest_group_share) AS largest_group_share,
        max(nearest_centroid_accuracy_permuted_percentile_95) AS accuracy_percentile,
        any_value(answer_margin) AS answer_margin, any_value(qk_singular_value_top) AS qk_singular_value_top
    FROM series
    GROUP BY step
)
SELECT step, series, 'ratio' AS panel, separation_ratio AS value FROM series
UNION ALL
SELECT
    step, CASE WHEN $permutations > 0 THEN '95 % of shuffles' ELSE 'chance' END, 'ratio',
    CASE WHEN $permutations > 0 THEN ratio_percentile ELSE chance_separation_ratio END
FROM shared
UNION ALL
SELECT step, series, 'accuracy', nearest_centroid_accuracy FROM series
UNION ALL
SELECT
    step, CASE WHEN $permutations > 0 THEN '95 % of shuffles' ELSE 'always the largest group' END, 'accuracy',
    CASE WHEN $permutations > 0 THEN accuracy_percentile ELSE largest_group_share END
FROM shared
UNION ALL
SELECT step, 'answer margin', 'margin', answer_margin FROM shared
UNION ALL
SELECT step, 'σ₁ of W_QK', 'sigma', qk_singular_value_top FROM shared

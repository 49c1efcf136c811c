-- Made by the report's arrays method: one row per (step, stage, role, grouping), lists with one entry per event.
-- arrays: value_codes

-- view: codes_by_event
SELECT
    step, stage, position_role, group_by,
    unnest(range(num_vectors)) AS place,
    unnest(group_tokens) AS group_token_id,
    unnest(vector_norm) AS vector_norm,
    unnest(lens_correct_logit) AS stage_lens_correct_value_logit,
    unnest(lens_best_wrong_logit) AS stage_lens_best_wrong_value_logit,
    unnest(lens_margin) AS stage_lens_value_margin,
    unnest(lens_best_token) AS stage_lens_best_value_token_id,
    unnest(lens_accuracy) AS stage_lens_value_accuracy,
    unnest(mean_abs_cosine) AS mean_abs_cosine,
    unnest(identity_overlap) AS identity_overlap,
    unnest(all_vector_overlap) AS all_vector_overlap,
    unnest(centroid_scored) AS centroid_scored,
    unnest(centroid_prediction) AS centroid_prediction,
    unnest(centroid_true_cosine) AS centroid_true_cosine,
    unnest(centroid_best_wrong_cosine) AS centroid_best_wrong_cosine,
    unnest(centroid_margin) AS centroid_cosine_margin
FROM value_codes

-- view: selected
SELECT place, role, list(position ORDER BY position) AS selected_positions
FROM role_positions
GROUP BY place, role

-- rows: value_code_rows
SELECT
    $lake || '#' || $run || '/' || c.step AS checkpoint,
    format('step_{:06d}', c.step) AS checkpoint_name,
    c.step AS checkpoint_step,
    e.batch_index, e.sample_id, e.split, e.query_index,
    c.stage, c.position_role, p.selected_positions, len(p.selected_positions) AS num_positions,
    c.group_by, c.group_token_id, g.text AS group_token,
    e.query_key_token_id, e.query_key_token, e.support_value_token_id, e.support_value_token,
    e.answer_value_token_id, e.answer_value_token,
    c.vector_norm,
    f.correct_value_logit AS final_correct_value_logit,
    f.best_wrong_value_logit AS final_best_wrong_value_logit,
    f.value_margin AS final_value_margin,
    f.best_value_token_id AS final_best_value_token_id,
    ft.text AS final_best_value_token,
    f.value_accuracy AS final_value_accuracy,
    c.stage_lens_correct_value_logit, c.stage_lens_best_wrong_value_logit, c.stage_lens_value_margin,
    c.stage_lens_best_value_token_id, lt.text AS stage_lens_best_value_token, c.stage_lens_value_accuracy,
    c.mean_abs_cosine, c.identity_overlap, c.all_vector_overlap,
    c.centroid_scored, CASE WHEN c.centroid_scored THEN c.centroid_prediction END AS centroid_prediction_token_id,
    ct.text AS centroid_prediction_token,
    centroid_prediction_token_id = c.group_token_id AS centroid_prediction_correct,
    c.centroid_true_cosine, c.centroid_best_wrong_cosine, c.centroid_cosine_margin
FROM codes_by_event AS c
JOIN event_facts AS e ON e.place = c.place
JOIN selected AS p ON p.place = c.place AND p.role = c.position_role
JOIN final_values AS f ON f.place = c.place AND f.step = c.step
LEFT JOIN token_texts AS g ON g.token = c.group_token_id
LEFT JOIN token_texts AS ft ON ft.token = f.best_value_token_id
LEFT JOIN token_texts AS lt ON lt.token = c.stage_lens_best_value_token_id
LEFT JOIN token_texts AS ct ON c.centroid_scored AND ct.token = c.centroid_prediction
ORDER BY
    c.step, list_position($stage, c.stage), list_position($position_role, c.position_role),
    list_position($group_by, c.group_by), c.place

-- view: code_means
SELECT
    checkpoint_step, stage, position_role, group_by,
    count(*) AS num_rows,
    avg(vector_norm) AS mean_vector_norm,
    avg(identity_overlap) AS mean_identity_overlap,
    avg(all_vector_overlap) AS mean_all_vector_overlap,
    avg(mean_abs_cosine) AS mean_mean_abs_cosine,
    avg(stage_lens_value_accuracy) AS stage_lens_value_accuracy,
    avg(final_value_accuracy) AS final_value_accuracy,
    avg(stage_lens_value_margin) AS mean_stage_lens_value_margin,
    avg(final_value_margin) AS mean_final_value_margin,
    r_squared(final_value_margin, stage_lens_value_margin) AS stage_lens_margin_r_squared_vs_final_margin,
    r_squared(stage_lens_value_margin, identity_overlap) AS identity_overlap_r_squared_vs_stage_lens_margin,
    count(*) FILTER (centroid_scored) AS centroid_scored_rows,
    avg(centroid_prediction_correct::DOUBLE) AS leave_one_out_centroid_accuracy,
    avg(centroid_cosine_margin) AS mean_centroid_cosine_margin
FROM value_code_rows
GROUP BY checkpoint_step, stage, position_role, group_by

-- rows: summary_rows
SELECT
    m.checkpoint_step, m.stage, m.position_role, m.group_by, m.num_rows,
    v.num_unique_tokens AS num_unique_groups, v.min_group_count, v.max_group_count,
    m.* EXCLUDE (checkpoint_step, stage, position_role, group_by, num_rows),
    v.largest_group_share
FROM code_means AS m
JOIN value_codes AS v
    ON v.step = m.checkpoint_step AND v.stage = m.stage AND v.position_role = m.position_role AND v.group_by = m.group_by
ORDER BY
    m.checkpoint_step, list_position($stage, m.stage), list_position($position_role, m.position_role),
    list_position($group_by, m.group_by)

-- rows: subspace_rows
SELECT
    $lake || '#' || $run || '/' || step AS checkpoint,
    format('step_{:06d}', step) AS checkpoint_name,
    step AS checkpoint_step,
    stage, position_role, group_by,
    stage || ' ' || position_role AS role, position_role AS context_role,
    num_vectors, num_unique_tokens, tokens, ambient_dim, $pca_rank AS pca_rank,
    identity_centered_rank, identity_singular_values, identity_variance_share,
    all_vector_centered_rank, all_vector_singular_values, all_vector_variance_share
FROM value_codes
ORDER BY
    step, list_position($stage, stage), list_position($position_role, position_role), list_position($group_by, group_by)

-- Accuracies that are null (no group with two vectors) come last.
-- view: top_summary
SELECT *
FROM summary_rows
ORDER BY
    leave_one_out_centroid_accuracy DESC NULLS LAST, mean_identity_overlap DESC NULLS LAST, checkpoint_step,
    list_position($stage, stage), list_position($position_role, position_role), list_position($group_by, group_by)
LIMIT $markdown_top_k_rows

-- view: centroid_chart
SELECT
    checkpoint_step AS step, stage, position_role || ', by ' || group_by AS panel, leave_one_out_centroid_accuracy
FROM summary_rows
WHERE leave_one_out_centroid_accuracy IS NOT NULL
ORDER BY
    list_position($position_role, position_role), list_position($group_by, group_by), step, list_position($stage, stage)

-- view: stage_lens_chart
SELECT DISTINCT
    checkpoint_step AS step, stage, position_role AS panel, stage_lens_value_accuracy,
    list_position($position_role, position_role) AS role_order, list_position($stage, stage) AS stage_order
FROM summary_rows
ORDER BY role_order, step, stage_order

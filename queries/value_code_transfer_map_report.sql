-- Made by the report's arrays method: one row per (step, rank, kind of source), lists with one entry per eval example.
-- arrays: transfers

-- view: transfers_by_example
SELECT
    step, basis_rank, eval_kind, kind_order,
    unnest(places) AS place,
    unnest(source_group_tokens) AS source_group_token_id,
    unnest(target_group_tokens) AS target_group_token_id,
    unnest(source_coord_norm) AS source_coord_norm,
    unnest(target_coord_norm) AS target_coord_norm,
    unnest(predicted_coord_norm) AS predicted_coord_norm,
    unnest(coord_squared_error) AS coord_squared_error,
    unnest(coord_target_centered_squared_norm) AS coord_target_centered_squared_norm,
    unnest(coord_cosine) AS coord_cosine,
    unnest(projected_vector_cosine) AS projected_vector_cosine,
    unnest(lens_accuracy) AS predicted_stage_lens_value_accuracy,
    unnest(lens_margin) AS predicted_stage_lens_value_margin,
    unnest(lens_correct_logit) AS predicted_stage_lens_correct_value_logit,
    unnest(lens_best_token) AS predicted_stage_lens_best_value_token_id,
    unnest(centroid_scored) AS centroid_scored,
    unnest(centroid_prediction) AS centroid_prediction,
    unnest(centroid_true_cosine) AS centroid_true_cosine,
    unnest(centroid_best_wrong_cosine) AS centroid_best_wrong_cosine,
    unnest(centroid_margin) AS centroid_cosine_margin,
    unnest(source_has_same_answer) AS source_has_same_answer
FROM transfers

-- rows: transfer_rows
SELECT
    $lake || '#' || $run || '/' || t.step AS checkpoint,
    format('step_{:06d}', t.step) AS checkpoint_name,
    t.step AS checkpoint_step,
    t.basis_rank, t.eval_kind, x.fit_split,
    e.sample_id, e.split, e.query_index,
    $source_stage AS source_stage, $target_stage AS target_stage,
    $source_position_role AS source_position_role, $target_position_role AS target_position_role,
    $group_by AS group_by,
    t.source_group_token_id, st.text AS source_group_token,
    t.target_group_token_id, tt.text AS target_group_token,
    e.answer_value_token_id, e.answer_value_token,
    t.source_coord_norm, t.target_coord_norm, t.predicted_coord_norm,
    t.coord_squared_error, t.coord_target_centered_squared_norm, t.coord_cosine, t.projected_vector_cosine,
    t.predicted_stage_lens_value_accuracy, t.predicted_stage_lens_value_margin,
    t.predicted_stage_lens_correct_value_logit,
    t.predicted_stage_lens_best_value_token_id, lt.text AS predicted_stage_lens_best_value_token,
    t.centroid_scored, CASE WHEN t.centroid_scored THEN t.centroid_prediction END AS centroid_prediction_token_id,
    ct.text AS centroid_prediction_token,
    centroid_prediction_token_id = t.target_group_token_id AS centroid_prediction_correct,
    t.centroid_true_cosine, t.centroid_best_wrong_cosine, t.centroid_cosine_margin,
    t.source_has_same_answer = 1 AS source_has_same_answer
FROM transfers_by_example AS t
JOIN split_examples AS x ON x.place = t.place
JOIN event_facts AS e ON e.place = t.place
LEFT JOIN token_texts AS st ON st.token = t.source_group_token_id
LEFT JOIN token_texts AS tt ON tt.token = t.target_group_token_id
LEFT JOIN token_texts AS lt ON lt.token = t.predicted_stage_lens_best_value_token_id
LEFT JOIN token_texts AS ct ON t.centroid_scored AND ct.token = t.centroid_prediction
ORDER BY t.step, t.basis_rank, t.kind_order, t.place

-- rows: summary_rows
SELECT
    checkpoint_step, basis_rank, eval_kind, source_stage, target_stage, source_position_role, target_position_role,
    count(*) AS num_rows,
    CASE WHEN sum(coord_target_centered_squared_norm) > 0
        THEN 1 - sum(coord_squared_error) / sum(coord_target_centered_squared_norm) END AS coord_r_squared,
    avg(coord_cosine) AS mean_coord_cosine,
    avg(projected_vector_cosine) AS mean_projected_vector_cosine,
    avg(predicted_stage_lens_value_accuracy) AS predicted_stage_lens_value_accuracy,
    avg(predicted_stage_lens_value_margin) AS mean_predicted_stage_lens_value_margin,
    count(*) FILTER (centroid_scored) AS centroid_scored_rows,
    avg(centroid_prediction_correct::DOUBLE) AS centroid_accuracy,
    avg(centroid_cosine_margin) AS mean_centroid_cosine_margin,
    avg(source_has_same_answer::DOUBLE) AS source_has_same_answer_fraction
FROM transfer_rows
GROUP BY
    checkpoint_step, basis_rank, eval_kind, source_stage, target_stage, source_position_role, target_position_role
ORDER BY checkpoint_step, basis_rank, list_position($eval_kinds, eval_kind)

-- rows: subspace_rows
SELECT
    $lake || '#' || $run || '/' || step AS checkpoint,
    format('step_{:06d}', step) AS checkpoint_name,
    step AS checkpoint_step,
    basis_rank, basis.*
FROM (SELECT step, basis_rank, kind_order, unnest(bases) AS basis FROM transfers)
ORDER BY
    step, basis_rank,
    list_position(
        [
            'source_value_identity', 'target_value_identity', 'source_key_identity_control', 'random_source_control'
        ], basis.basis_role
    )

-- view: top_summary
SELECT *
FROM summary_rows
ORDER BY checkpoint_step DESC, basis_rank DESC, list_position($eval_kinds, eval_kind)
LIMIT $markdown_top_k_rows

-- The true map beside the best of its controls.
-- view: against_controls
SELECT
    checkpoint_step, basis_rank,
    max(coord_r_squared) FILTER (eval_kind = 'true_transfer') AS true_r_squared,
    max(coord_r_squared) FILTER (eval_kind <> 'true_transfer') AS control_r_squared,
    arg_max(eval_kind, coord_r_squared) FILTER (eval_kind <> 'true_transfer') AS control_by_r_squared,
    max(centroid_accuracy) FILTER (eval_kind = 'true_transfer') AS true_accuracy,
    max(centroid_accuracy) FILTER (eval_kind <> 'true_transfer') AS control_accuracy,
    arg_max(eval_kind, centroid_accuracy) FILTER (eval_kind <> 'true_transfer') AS control_by_accuracy,
    true_r_squared > control_r_squared AND coalesce(true_accuracy > control_accuracy, true) AS beats_controls
FROM summary_rows
GROUP BY checkpoint_step, basis_rank
ORDER BY checkpoint_step, basis_rank

-- view: r_squared_chart
SELECT
    checkpoint_step AS step, 'rank ' || basis_rank AS panel, eval_kind, greatest(coord_r_squared, -1.0) AS coord_r_squared
FROM summary_rows
WHERE coord_r_squared IS NOT NULL
ORDER BY basis_rank, step, list_position($eval_kinds, eval_kind)

-- view: centroid_chart
SELECT checkpoint_step AS step, 'rank ' || basis_rank AS panel, eval_kind, centroid_accuracy
FROM summary_rows
WHERE centroid_accuracy IS NOT NULL
ORDER BY basis_rank, step, list_position($eval_kinds, eval_kind)

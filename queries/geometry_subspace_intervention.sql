-- Every query in the untouched run and in a changed one; control_seed is null for the subspace itself.
-- view: outcomes
SELECT
    r.step, r.event, e.split, r.intervention,
    $control_seeds[list_position($control_names, r.intervention)] AS control_seed,
    u.value_margin::DOUBLE AS baseline_margin, r.value_margin::DOUBLE AS intervened_margin,
    u.value_margin::DOUBLE - r.value_margin::DOUBLE AS margin_drop,
    u.correct AS baseline_correct, r.correct AS intervened_correct,
    u.correct::INTEGER - r.correct::INTEGER AS accuracy_drop_indicator
FROM intervention_runs AS r
JOIN chosen_events AS e USING (event)
JOIN intervention_runs AS u
    ON u.run = r.run AND u.probe = r.probe AND u.spec = r.spec AND u.step = r.step AND u.event = r.event
        AND u.intervention = 'clean'
WHERE r.run = $run AND r.probe = $probe AND r.spec = $intervention_spec AND list_contains($steps, r.step)
    AND r.intervention <> 'clean'

-- What is asked, and where it is changed.
-- view: queries
WITH changed AS (
    SELECT event, list(DISTINCT position ORDER BY position) AS positions
    FROM positions
    WHERE run = $run AND probe = $probe AND kind = 'role' AND role = $position_role
    GROUP BY event
),
keys AS (
    SELECT event, any_value(text) AS query_key
    FROM positions
    WHERE run = $run AND probe = $probe AND kind = 'role' AND role = 'query_key'
    GROUP BY event
)
SELECT
    e.event, e.split, e.sample_id, e.query_index, format('{}:{}:{}', e.split, e.sample_id, e.query_index) AS query_id,
    k.query_key, e.answer AS answer_value,
    x.record->>format('$.query_events[{}].answer_pair_type', e.query_index) AS answer_pair_type,
    CASE WHEN $position_role = 'causal_prefix' THEN range(0, e.prediction_position + 1) ELSE c.positions END AS patched_positions
FROM chosen_events AS e
LEFT JOIN changed AS c USING (event)
LEFT JOIN keys AS k USING (event)
LEFT JOIN (SELECT example, record FROM probe_examples WHERE run = $run AND probe = $probe) AS x USING (example)

-- view: controls
SELECT
    step, event, favg(margin_drop) AS random_margin_drop_mean, favg(accuracy_drop_indicator) AS random_accuracy_drop_mean
FROM outcomes
WHERE control_seed IS NOT NULL
GROUP BY step, event

-- rows: query_rows
SELECT
    o.step, $subspace AS subspace_name, $stage AS stage, $operation AS operation, $position_role AS position_role,
    $query_mode AS query_mode, $rank AS rank,
    CASE WHEN $subspace LIKE 'head%' THEN 'head_singular_vectors' ELSE 'embedding_identity' END AS subspace_type,
    $head_label::VARCHAR AS head_label,
    q.split, q.sample_id, q.query_index, q.query_id, q.query_key, q.answer_value, q.answer_pair_type,
    o.baseline_margin, o.intervened_margin, o.margin_drop,
    o.baseline_correct, o.intervened_correct, o.accuracy_drop_indicator,
    c.random_margin_drop_mean, c.random_accuracy_drop_mean,
    len(q.patched_positions) AS patched_position_count, q.patched_positions
FROM outcomes AS o
JOIN queries AS q USING (event)
LEFT JOIN controls AS c USING (step, event)
WHERE o.control_seed IS NULL
ORDER BY o.step, o.event

-- Means over the queries of a split, and over all of them.
-- view: cells
SELECT
    step, control_seed, CASE grouping(split) WHEN 1 THEN '__all__' ELSE split END AS split,
    favg(baseline_margin) AS baseline_margin_mean, favg(intervened_margin) AS intervened_margin_mean,
    favg(margin_drop) AS margin_drop_mean, favg(abs(margin_drop)) AS margin_drop_abs_mean,
    favg((margin_drop > 0)::INTEGER) AS margin_drop_positive_fraction,
    favg((margin_drop < 0)::INTEGER) AS margin_drop_negative_fraction,
    favg(baseline_correct::INTEGER) AS baseline_accuracy, favg(intervened_correct::INTEGER) AS intervened_accuracy,
    favg(accuracy_drop_indicator) AS accuracy_drop, count(*) AS num_query_events
FROM outcomes
GROUP BY GROUPING SETS ((step, control_seed, split), (step, control_seed))

-- rows: aggregate_rows
WITH random AS (
    SELECT
        step, split, favg(margin_drop_mean) AS random_margin_drop_mean,
        population_std(margin_drop_mean) AS random_margin_drop_std,
        favg(accuracy_drop) AS random_accuracy_drop, favg(intervened_accuracy) AS random_accuracy
    FROM cells
    WHERE control_seed IS NOT NULL
    GROUP BY step, split
)
SELECT
    c.step, c.split, $subspace AS subspace_name, $stage AS stage, $operation AS operation, $position_role AS position_role,
    $query_mode AS query_mode, $rank AS rank,
    CASE WHEN $subspace LIKE 'head%' THEN 'head_singular_vectors' ELSE 'embedding_identity' END AS subspace_type,
    $head_label::VARCHAR AS head_label,
    c.* EXCLUDE (step, split, control_seed),
    r.random_margin_drop_mean, r.random_margin_drop_std, r.random_accuracy, r.random_accuracy_drop,
    c.margin_drop_mean - r.random_margin_drop_mean AS excess_margin_drop_mean
FROM cells AS c
LEFT JOIN random AS r USING (step, split)
WHERE c.control_seed IS NULL
ORDER BY c.step, c.split

-- rows: control_rows
SELECT
    c.step, c.split, c.control_seed, 'random' AS subspace_name, $stage AS stage, $operation AS operation,
    $position_role AS position_role, $query_mode AS query_mode, $rank AS rank,
    c.* EXCLUDE (step, split, control_seed)
FROM cells AS c
WHERE c.control_seed IS NOT NULL
ORDER BY c.step, c.split, c.control_seed

-- What the basis was cut from (definitions 2 §A1).
-- view: bases
SELECT
    b.step, b.subspace AS subspace_name,
    CASE WHEN b.subspace LIKE 'head%' THEN 'head_singular_vectors' ELSE 'embedding_identity' END AS subspace_type,
    b.rank AS selected_rank, b.available_rank, s.d_model AS ambient_dim, b.singular_values[1:b.rank] AS singular_values,
    'cpu' AS basis_svd_device,
    CASE b.subspace WHEN 'embedding_key_identity' THEN 'key' WHEN 'embedding_value_identity' THEN 'value' END AS token_class,
    CASE b.subspace WHEN 'embedding_key_identity' THEN s.num_keys WHEN 'embedding_value_identity' THEN s.num_values END
        AS num_tokens,
    CASE WHEN b.subspace LIKE 'head_qk%' THEN 'QK' WHEN b.subspace LIKE 'head_ov%' THEN 'OV' END AS matrix,
    CASE WHEN b.head IS NOT NULL THEN split_part(b.subspace, '_', 3) END AS side,
    $head_layer AS head_layer, $head AS head, b.head AS head_label,
    CASE WHEN b.head IS NOT NULL THEN s.d_model // s.num_heads END AS head_dim
FROM intervention_subspaces AS b
CROSS JOIN (
    SELECT
        (SELECT max(shape[2]) FROM parameters WHERE run = $run AND module = 'token_embedding') AS d_model,
        (SELECT count(DISTINCT head) FROM slices WHERE run = $run AND slice_kind = 'head') AS num_heads,
        len(key_tokens) AS num_keys, len(value_tokens) AS num_values
    FROM probes
    WHERE run = $run AND probe = $probe
) AS s
WHERE b.run = $run AND b.probe = $probe AND b.spec = $intervention_spec AND b.intervention = $subspace
    AND list_contains($steps, b.step)
ORDER BY b.step

-- view: final_by_split
SELECT * FROM aggregate_rows WHERE step = (SELECT max(step) FROM aggregate_rows) ORDER BY split

-- view: final_all
SELECT * FROM final_by_split WHERE split = '__all__'

-- view: top_final_positive_margin_drop_queries
SELECT * FROM query_rows
WHERE step = (SELECT max(step) FROM query_rows) AND margin_drop > 0
ORDER BY margin_drop DESC, split, sample_id, query_index
LIMIT 16

-- view: top_final_negative_margin_drop_queries
SELECT * FROM query_rows
WHERE step = (SELECT max(step) FROM query_rows) AND margin_drop < 0
ORDER BY margin_drop, split, sample_id, query_index
LIMIT 16

-- A line per split, one for all of them, and what a random subspace does to all of them.
-- view: drop_chart
SELECT step, CASE split WHEN '__all__' THEN 'all splits' ELSE split END AS series, margin_drop_mean, accuracy_drop
FROM aggregate_rows
WHERE split <> '__all__' OR (SELECT count(DISTINCT split) FROM chosen_events) > 1
UNION ALL
SELECT step, 'random subspace', random_margin_drop_mean, random_accuracy_drop
FROM aggregate_rows
WHERE split = '__all__' AND random_margin_drop_mean IS NOT NULL
ORDER BY step, series

-- Forty bins over all drops of the last step.
-- view: histogram
WITH drops AS (
    SELECT CASE WHEN control_seed IS NULL THEN $subspace ELSE 'random subspace' END AS series, margin_drop
    FROM outcomes
    WHERE step = (SELECT max(step) FROM outcomes)
),
bins AS (SELECT min(margin_drop) AS low, (max(margin_drop) - min(margin_drop)) / 40 AS width FROM drops),
placed AS (
    SELECT d.series, CASE WHEN b.width > 0 THEN least(39, floor((d.margin_drop - b.low) / b.width)) ELSE 0 END AS bin
    FROM drops AS d
    CROSS JOIN bins AS b
)
SELECT
    p.series, b.low + p.bin * b.width AS start, b.low + (p.bin + 1) * b.width AS "end",
    count(*) / CASE p.series WHEN $subspace THEN 1 ELSE $num_controls END AS queries
FROM placed AS p
CROSS JOIN bins AS b
GROUP BY p.series, p.bin, b.low, b.width
ORDER BY p.series = 'random subspace', start

-- Where the query, the support, the distractors and the grouping token of each event stand.
-- view: places
SELECT p.event, CASE p.kind WHEN 'partition' THEN 'causal_prefix' ELSE p.role END AS place, p.position, p.token, p.text
FROM positions AS p
JOIN chosen_events AS e ON e.event = p.event
WHERE
    p.run = $run AND p.probe = $probe
    AND list_contains($roles, CASE p.kind WHEN 'partition' THEN 'causal_prefix' ELSE p.role END)

-- The key rule: of support and distractors only the positions up to the query are keys of that query.
-- view: key_rule
WITH lists AS (
    SELECT
        event,
        list(position ORDER BY position) FILTER (place = $score_query_role) AS query_positions,
        list(position ORDER BY position) FILTER (place = $support_role) AS supports,
        list(position ORDER BY position) FILTER (place = $distractor_role) AS distractors,
        count(*) FILTER (place = $group_role) AS group_tokens,
        any_value(token) FILTER (place = $group_role) AS group_token_id,
        any_value(text) FILTER (place = $group_role) AS group_token
    FROM places
    GROUP BY event
)
SELECT
    e.event, e.example, e.sample_id, e.split, e.query_index, e.prediction_position,
    e.answer_token AS answer_token_id, e.answer AS answer_token,
    coalesce(l.query_positions, []) AS query_positions,
    l.query_positions[1] AS query_position,
    coalesce(list_filter(l.supports, lambda p: p <= l.query_positions[1]), []) AS support_positions,
    coalesce(list_filter(l.distractors, lambda p: p <= l.query_positions[1]), []) AS distractor_positions,
    CASE $group_by WHEN 'answer_value' THEN 1 ELSE coalesce(l.group_tokens, 0) END AS group_tokens,
    CASE $group_by WHEN 'answer_value' THEN e.answer_token ELSE l.group_token_id END AS group_token_id,
    CASE $group_by WHEN 'answer_value' THEN e.answer ELSE l.group_token END AS group_token
FROM chosen_events AS e
LEFT JOIN lists AS l ON l.event = e.event
ORDER BY e.event

-- view: spectrum
SELECT step, list(singular_value ORDER BY rank) AS sigma
FROM singular_values
WHERE run = $run AND matrix = 'W_QK' AND layer = $head_layer AND head = $head AND list_contains($steps, step)
GROUP BY step
ORDER BY step

-- The score forms, in report order: how many ranks each sums, and whether it adds the bias terms.
-- view: projections
SELECT
    unnest($projection_names) AS projection, unnest($projection_ranks) AS ranks, unnest($projection_biases) AS biases,
    generate_subscripts($projection_names, 1) AS place

-- view: context_stages
SELECT unnest($context_stage) AS context_stage, generate_subscripts($context_stage, 1) AS place

-- A query's side of every score: σ_i q_i / √d_head, so that a score is its dot product with the key's coordinates. The
-- head's width is the number of its ranks.
-- view: query_sides
SELECT
    c.step, c.stage, k.event, s.sigma, len(c.query) AS d_head,
    list_transform(c.query, lambda q, i: s.sigma[i] * q / sqrt(len(c.query))) AS query,
    c.query_bias / sqrt(len(c.query)) AS query_bias
FROM qk_coordinates AS c
JOIN key_rule AS k ON k.example = c.example AND k.query_position = c.position
JOIN spectrum AS s ON s.step = c.step
WHERE
    c.run = $run AND c.probe = $probe AND c.layer = $head_layer AND c.head = $head AND c.layernorm_mode = $layernorm_mode
    AND list_contains($context_stage, c.stage) AND list_contains($steps, c.step)

-- view: scores
WITH keys AS (
    SELECT event, example, true AS is_support, unnest(support_positions) AS position FROM key_rule
    UNION ALL
    SELECT event, example, false AS is_support, unnest(distractor_positions) AS position FROM key_rule
)
SELECT
    q.step, q.stage, q.event, p.projection, k.is_support, k.position,
    list_dot_product(q.query[1:p.ranks], c.key[1:p.ranks]::DOUBLE[])
    + CASE WHEN p.biases THEN q.query_bias + c.key_bias / sqrt(q.d_head) ELSE 0 END AS score
FROM qk_coordinates AS c
JOIN keys AS k ON k.example = c.example AND k.position = c.position
JOIN query_sides AS q ON q.event = k.event AND q.step = c.step AND q.stage = c.stage
CROSS JOIN projections AS p
WHERE
    c.run = $run AND c.probe = $probe AND c.layer = $head_layer AND c.head = $head AND c.layernorm_mode = $layernorm_mode
    AND list_contains($context_stage, c.stage) AND list_contains($steps, c.step)

-- view: answers
SELECT step, event, value_margin, correct
FROM readouts
WHERE run = $run AND probe = $probe AND stage = 'logits' AND list_contains($steps, step)

-- rows: event_rows
WITH sides AS (
    SELECT
        step, stage, event, projection,
        count(*) AS num_scores,
        avg(score ORDER BY position) FILTER (is_support) AS support_score_mean,
        max(score) FILTER (is_support) AS support_score_max,
        avg(score ORDER BY position) FILTER (NOT is_support) AS distractor_score_mean,
        max(score) FILTER (NOT is_support) AS distractor_score_max
    FROM scores
    GROUP BY step, stage, event, projection
)
SELECT
    $lake || '#' || $run || '/' || s.step AS checkpoint,
    format('step_{:06d}', s.step) AS checkpoint_name,
    s.step AS checkpoint_step,
    k.example AS batch_index, k.sample_id, k.split, k.query_index,
    $head_layer AS head_layer, $head AS head,
    s.stage AS context_stage,
    $layernorm_mode AS layernorm_mode,
    $score_query_role AS score_query_role, $support_role AS support_role, $distractor_role AS distractor_role,
    s.projection,
    k.query_position, k.support_positions, k.distractor_positions,
    len(k.support_positions) AS num_support_positions, len(k.distractor_positions) AS num_distractor_positions,
    s.support_score_mean, s.support_score_max, s.distractor_score_mean, s.distractor_score_max,
    s.support_score_mean - s.distractor_score_mean AS qk_match_separation,
    s.support_score_mean - s.distractor_score_max AS qk_match_max_margin,
    s.support_score_max > s.distractor_score_max AS support_beats_all_distractors,
    $group_by AS group_by, k.group_token_id, k.group_token,
    k.answer_token_id, k.answer_token,
    a.value_margin AS answer_margin, a.correct AS answer_correct
FROM sides AS s
JOIN key_rule AS k ON k.event = s.event
JOIN projections AS p ON p.projection = s.projection
JOIN context_stages AS c ON c.context_stage = s.stage
LEFT JOIN answers AS a ON a.event = s.event AND a.step = s.step
ORDER BY s.step, c.place, p.place, s.event

-- rows: metric_rows
WITH means AS (
    SELECT
        e.checkpoint_step,
        any_value(e.checkpoint) AS checkpoint,
        any_value(e.checkpoint_name) AS checkpoint_name,
        e.context_stage, e.projection,
        $head_layer AS head_layer, $head AS head,
        $score_query_role AS score_query_role, $support_role AS support_role, $distractor_role AS distractor_role,
        $layernorm_mode AS layernorm_mode,
        $group_by AS group_by,
        count(*) AS num_events,
        avg(e.qk_match_separation) AS qk_match_separation_mean,
        population_std(e.qk_match_separation) AS qk_match_separation_std,
        avg(e.qk_match_max_margin) AS qk_match_max_margin_mean,
        population_std(e.qk_match_max_margin) AS qk_match_max_margin_std,
        avg(e.support_score_mean) AS support_score_mean,
        avg(e.distractor_score_mean) AS distractor_score_mean,
        avg(e.support_beats_all_distractors::INTEGER) AS support_beats_all_rate,
        avg(e.answer_margin::DOUBLE) AS answer_margin_mean,
        avg(e.answer_correct::INTEGER) AS answer_accuracy
    FROM event_rows AS e
    GROUP BY e.checkpoint_step, e.context_stage, e.projection
)
SELECT
    m.*,
    s.sigma[1] AS qk_singular_value_top,
    list_sum(s.sigma) AS qk_singular_value_sum,
    list_sum(s.sigma[1:3]) / nullif(list_sum(s.sigma), 0) AS qk_singular_value_top3_fraction
FROM means AS m
JOIN spectrum AS s ON s.step = m.checkpoint_step
JOIN projections AS p ON p.projection = m.projection
JOIN context_stages AS c ON c.context_stage = m.context_stage
ORDER BY m.checkpoint_step, c.place, p.place

-- rows: group_rows
SELECT
    any_value(e.checkpoint) AS checkpoint,
    any_value(e.checkpoint_name) AS checkpoint_name,
    e.checkpoint_step, e.context_stage, e.projection,
    $group_by AS group_by,
    e.group_token_id,
    any_value(e.group_token) AS group_token,
    count(*) AS num_events,
    avg(e.qk_match_separation) AS qk_match_separation_mean,
    population_std(e.qk_match_separation) AS qk_match_separation_std,
    avg(e.qk_match_max_margin) AS qk_match_max_margin_mean,
    avg(e.support_beats_all_distractors::INTEGER) AS support_beats_all_rate
FROM event_rows AS e
JOIN projections AS p ON p.projection = e.projection
JOIN context_stages AS c ON c.context_stage = e.context_stage
GROUP BY e.checkpoint_step, e.context_stage, e.projection, e.group_token_id, c.place, p.place
ORDER BY e.checkpoint_step, c.place, p.place, e.group_token_id

-- From first checkpoint to last, over all of them and over those of the window.
-- view: spans
WITH rows_of_spans AS (
    SELECT *, 'all' AS span FROM metric_rows
    UNION ALL
    SELECT *, 'window' AS span FROM metric_rows WHERE checkpoint_step BETWEEN $window_start AND $window_end
)
SELECT
    r.span, r.context_stage, r.projection,
    count(*) AS num_checkpoints,
    min(r.checkpoint_step) AS start_step,
    max(r.checkpoint_step) AS end_step,
    arg_min(r.qk_match_separation_mean, r.checkpoint_step) AS start_qk_match_separation,
    arg_max(r.qk_match_separation_mean, r.checkpoint_step) AS end_qk_match_separation,
    end_qk_match_separation - start_qk_match_separation AS delta_qk_match_separation,
    arg_min(r.qk_match_max_margin_mean, r.checkpoint_step) AS start_qk_match_max_margin,
    arg_max(r.qk_match_max_margin_mean, r.checkpoint_step) AS end_qk_match_max_margin,
    end_qk_match_max_margin - start_qk_match_max_margin AS delta_qk_match_max_margin,
    arg_min(r.support_beats_all_rate, r.checkpoint_step) AS start_support_beats_all_rate,
    arg_max(r.support_beats_all_rate, r.checkpoint_step) AS end_support_beats_all_rate,
    end_support_beats_all_rate - start_support_beats_all_rate AS delta_support_beats_all_rate,
    pearson(r.qk_match_separation_mean, r.qk_singular_value_top) AS qk_match_separation_vs_qk_singular_value_top,
    pearson(r.qk_match_separation_mean, r.answer_margin_mean) AS qk_match_separation_vs_answer_margin
FROM rows_of_spans AS r
JOIN projections AS p ON p.projection = r.projection
JOIN context_stages AS c ON c.context_stage = r.context_stage
GROUP BY r.span, r.context_stage, r.projection, c.place, p.place
HAVING r.span = 'all' OR count(*) > 1
ORDER BY r.span, c.place, p.place

-- view: summary
SELECT * EXCLUDE (span) FROM spans WHERE span = 'all'

-- What a head that scores at random would win: the share of supports among an event's keys.
-- view: chance
SELECT avg(len(support_positions) / (len(support_positions) + len(distractor_positions))) AS win_rate
FROM key_rule

-- view: trajectory
WITH series AS (
    SELECT
        checkpoint_step AS step,
        CASE WHEN len($context_stage) = 1 THEN projection ELSE context_stage || ' ' || projection END AS series,
        *
    FROM metric_rows
),
-- The margin and the spectrum do not depend on stage or projection.
shared AS (FROM series WHERE context_stage = $context_stage[1] AND projection = $projection_names[1])
SELECT step, series, 'separation' AS panel, qk_match_separation_mean AS value FROM series
UNION ALL
SELECT step, series, 'win rate' AS panel, support_beats_all_rate AS value FROM series
UNION ALL
SELECT step, 'answer margin' AS series, 'answer margin' AS panel, answer_margin_mean AS value FROM shared
UNION ALL
SELECT step, 'σ₁ of W_QK' AS series, 'singular value' AS panel, qk_singular_value_top AS value FROM shared

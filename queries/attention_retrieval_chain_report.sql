-- Scores and probabilities of the query's keys, in double precision from here on.
-- view: attended
WITH places_in_lists AS (
    SELECT
        side_probe, side_event, list_transform(support_positions, lambda p: p + 1) AS supports,
        list_transform(distractor_positions, lambda p: p + 1) AS distractors
    FROM key_rule
)
SELECT
    a.step, k.side_probe, k.side_event,
    list_select(a.scores, k.supports)::DOUBLE[] AS support_scores,
    list_select(a.scores, k.distractors)::DOUBLE[] AS distractor_scores,
    list_select(a.probabilities, k.supports)::DOUBLE[] AS support_attention,
    list_select(a.probabilities, k.distractors)::DOUBLE[] AS distractor_attention
FROM attention_patterns AS a
JOIN places_in_lists AS k ON k.side_probe = a.probe AND k.side_event = a.event
WHERE
    a.run = $run AND a.layer = $head_layer AND a.head = $head AND a.query_role = $score_query_role
    AND list_contains($steps, a.step)

-- What the head writes at the query, and what it would write if it attended to the support alone.
-- view: writes
SELECT
    w.step, k.side_probe, k.side_event,
    any_value(w.margin_dla::DOUBLE) FILTER (w.role = 'write') AS head_margin_dla,
    any_value(w.answer_logit::DOUBLE) FILTER (w.role = 'write') AS head_answer_logit_dla,
    any_value(w.value_margin::DOUBLE) FILTER (w.role = 'write') AS head_value_margin_dla,
    any_value(w.value_margin::DOUBLE) FILTER (w.role = $support_key_role) AS support_ov_value_margin
FROM head_writes AS w
JOIN key_rule AS k ON k.side_probe = w.probe AND k.side_event = w.event
WHERE
    w.run = $run AND w.layer = $head_layer AND w.head = $head AND w.query_role = $score_query_role
    AND w.role IN ('write', $support_key_role) AND list_contains($steps, w.step)
GROUP BY w.step, k.side_probe, k.side_event

-- view: answers
SELECT r.step, k.side_probe, k.side_event, r.value_margin, r.answer_log_prob, r.correct
FROM readouts AS r
JOIN key_rule AS k ON k.side_probe = r.probe AND k.side_event = r.event
WHERE r.run = $run AND r.stage = 'logits' AND list_contains($steps, r.step)

-- rows: pair_metric_rows
SELECT
    $lake || '#' || $run || '/' || a.step AS checkpoint,
    format('step_{:06d}', a.step) AS checkpoint_name,
    a.step, $head_layer AS head_layer, $head AS head, $head_label AS head_label,
    $score_query_role AS score_query_role, $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role,
    s.record_side, s.split, s.pair_type, s.pair_id, s.source_sample_id, s.source_query_index,
    k.query_position, k.support_positions, k.distractor_positions,
    len(k.support_positions) AS num_support_positions, len(k.distractor_positions) AS num_distractor_positions,
    list_avg(a.support_scores) AS qk_support_score,
    list_avg(a.distractor_scores) AS qk_distractor_score,
    list_avg(a.support_scores) - list_avg(a.distractor_scores) AS qk_separation,
    list_avg(a.support_attention) AS attention_support_mean,
    list_avg(a.distractor_attention) AS attention_distractor_mean,
    list_avg(a.support_attention) - list_avg(a.distractor_attention) AS attention_separation,
    list_sum(a.support_attention) AS attention_support_mass,
    list_sum(a.distractor_attention) AS attention_distractor_mass,
    list_sum(a.support_attention) - list_sum(a.distractor_attention) AS attention_mass_separation,
    w.head_margin_dla, w.head_answer_logit_dla, w.head_value_margin_dla,
    w.support_ov_value_margin,
    list_avg(a.support_attention) * w.support_ov_value_margin AS attended_support_ov_value_margin,
    r.value_margin::DOUBLE AS answer_margin,
    -r.answer_log_prob::DOUBLE AS answer_loss,
    r.correct AS answer_correct
FROM pair_sides AS s
JOIN key_rule AS k ON k.side_probe = s.side_probe AND k.side_event = s.side_event
JOIN attended AS a ON a.side_probe = s.side_probe AND a.side_event = s.side_event
JOIN writes AS w ON w.side_probe = s.side_probe AND w.side_event = s.side_event AND w.step = a.step
JOIN answers AS r ON r.side_probe = s.side_probe AND r.side_event = s.side_event AND r.step = a.step
ORDER BY
    a.step, list_position($record_side, s.record_side), s.clean_event, list_position($pair_type, s.pair_type)

-- Means over each split and pair type, and over all of either or both.
-- rows: checkpoint_rows
SELECT
    any_value(checkpoint) AS checkpoint,
    any_value(checkpoint_name) AS checkpoint_name,
    step, $head_layer AS head_layer, $head AS head, $head_label AS head_label,
    $score_query_role AS score_query_role, $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role,
    record_side,
    coalesce(split, '__all__') AS split,
    coalesce(pair_type, '__all__') AS pair_type,
    count(*) AS num_pairs,
    avg(answer_correct::INTEGER) AS answer_accuracy,
    avg(COLUMNS('^(qk|attention|head_.*dla|support_ov|attended|answer_(margin|loss))')) AS "\0_mean",
    population_std(COLUMNS('^(qk|attention|head_.*dla|support_ov|attended|answer_(margin|loss))')) AS "\0_std"
FROM pair_metric_rows
GROUP BY step, record_side, CUBE (split, pair_type)
ORDER BY step, list_position($record_side, record_side), coalesce(split, '__all__'), coalesce(pair_type, '__all__')

-- What changed from each checkpoint to the next.
-- rows: delta_rows
SELECT
    lag(step) OVER cell AS source_step,
    step AS target_step,
    step - lag(step) OVER cell AS step_gap,
    lag(checkpoint) OVER cell AS source_checkpoint,
    checkpoint AS target_checkpoint,
    head_layer, head, head_label, score_query_role, support_key_role, distractor_key_role, record_side, split, pair_type,
    num_pairs,
    answer_accuracy - lag(answer_accuracy) OVER cell AS delta_answer_accuracy,
    COLUMNS('_mean$') - lag(COLUMNS('_mean$')) OVER cell AS "delta_\0",
    lag(answer_loss_mean) OVER cell - answer_loss_mean AS negative_delta_answer_loss_mean
FROM checkpoint_rows
WINDOW cell AS (PARTITION BY record_side, split, pair_type ORDER BY step)
QUALIFY source_step IS NOT NULL
ORDER BY target_step, list_position($record_side, record_side), split, pair_type

-- rows: pair_rows
SELECT
    pair_id, pair_type, split, source_sample_id, source_query_index, clean_answer_value, corrupted_answer_value,
    clean_transfer_token, corrupted_transfer_token, mutation::JSON AS mutation
FROM chosen_pairs
ORDER BY clean_event, list_position($pair_type, pair_type)

-- The record side asked for first, over all pairs: what the summary is about.
-- view: primary_rows
SELECT * FROM checkpoint_rows
WHERE record_side = $record_side[1] AND split = '__all__' AND pair_type = '__all__'
ORDER BY step

-- view: primary_deltas
SELECT * FROM delta_rows
WHERE record_side = $record_side[1] AND split = '__all__' AND pair_type = '__all__'
ORDER BY target_step

-- view: total_delta
SELECT
    first(step ORDER BY step) AS source_step, last(step ORDER BY step) AS target_step,
    last(answer_accuracy ORDER BY step) - first(answer_accuracy ORDER BY step) AS delta_answer_accuracy,
    last(COLUMNS('_mean$') ORDER BY step) - first(COLUMNS('_mean$') ORDER BY step) AS "delta_\0",
    first(answer_loss_mean ORDER BY step) - last(answer_loss_mean ORDER BY step) AS negative_delta_answer_loss_mean
FROM primary_rows

-- The chain in its order, link by link, at each interval.
-- view: link_changes
WITH changes AS (
    SELECT
        source_step, target_step,
        delta_qk_separation_mean AS qk, delta_attention_separation_mean AS attention, delta_head_margin_dla_mean AS dla,
        delta_answer_margin_mean AS margin, negative_delta_answer_loss_mean AS loss
    FROM primary_deltas
)
SELECT
    source_step || ' → ' || target_step AS interval, target_step,
    unnest([1, 2, 3, 4]) AS place,
    unnest(['qk_to_attention', 'attention_to_head_margin_dla', 'head_margin_dla_to_answer_margin',
            'answer_margin_to_loss_reduction']) AS link,
    unnest([qk, attention, dla, margin]) AS x,
    unnest([attention, dla, margin, loss]) AS y
FROM changes
ORDER BY place, target_step

-- view: correlations
SELECT
    link,
    CASE link
        WHEN 'qk_to_attention' THEN 'Δ QK separation → Δ attention separation'
        WHEN 'attention_to_head_margin_dla' THEN 'Δ attention separation → Δ head margin DLA'
        WHEN 'head_margin_dla_to_answer_margin' THEN 'Δ head margin DLA → Δ answer margin'
        ELSE 'Δ answer margin → −Δ answer loss'
    END AS label,
    pearson(x, y) AS value,
    CASE WHEN isfinite(pearson(x, y)) THEN 'ok' ELSE 'undefined' END AS status,
    CASE
        WHEN count(*) < 2 THEN 'fewer than two intervals'
        WHEN pearson(x, y) IS NULL THEN 'zero variance'
        WHEN NOT isfinite(pearson(x, y)) THEN 'values that are not finite'
    END AS reason,
    count(*) AS num_points
FROM link_changes
GROUP BY link, place
ORDER BY place

-- The links over training: from where to where, and the first checkpoint from which on half of the way stayed made.
-- view: links
WITH long AS (
    SELECT
        step,
        unnest([1, 2, 3, 4, 5]) AS place,
        unnest(['QK separation', 'attention separation', 'head margin DLA', 'answer margin', 'answer loss']) AS link,
        unnest([qk_separation_mean, attention_separation_mean, head_margin_dla_mean, answer_margin_mean, answer_loss_mean])
            AS value
    FROM primary_rows
),
ends AS (
    SELECT *, first_value(value) OVER link_steps AS start_value, last_value(value) OVER link_steps AS end_value FROM long
    WINDOW link_steps AS (PARTITION BY link ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
),
ways AS (
    SELECT
        *, max(CASE WHEN (value - start_value) / nullif(end_value - start_value, 0) < 0.5 THEN step END)
            OVER (PARTITION BY link) AS last_short_of_it
    FROM ends
)
SELECT
    link, any_value(start_value) AS start_value, any_value(end_value) AS end_value,
    any_value(end_value - start_value) AS change,
    min(step) FILTER (step > last_short_of_it) AS half_way_step
FROM ways
GROUP BY link, place
ORDER BY place

-- view: trajectory
SELECT
    step, record_side AS series,
    unnest(['qk', 'attention', 'dla', 'margin', 'loss']) AS panel,
    unnest([qk_separation_mean, attention_separation_mean, head_margin_dla_mean, answer_margin_mean, answer_loss_mean])
        AS value
FROM checkpoint_rows
WHERE split = '__all__' AND pair_type = '__all__'

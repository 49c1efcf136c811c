-- The answer of each measured record at each step.
-- view: answers
SELECT
    s.record_side, s.split, s.pair_type, s.pair_id, s.clean_event, s.source_sample_id, s.source_query_index,
    a.step, a.spec, a.shuffled_pair_id,
    k.query_position, k.support_positions, k.distractor_positions,
    e.answer_token, e.competitors, a.answer_token AS measured_answer_token,
    a.answer_logit::DOUBLE AS correct_value_logit,
    a.best_wrong_token AS best_wrong_token_id,
    a.best_wrong_logit::DOUBLE AS best_wrong_value_logit,
    a.answer_log_prob::DOUBLE AS negative_answer_loss,
    a.correct AS answer_correct,
    a.competitor_logits::DOUBLE[] AS competitor_logits
FROM pair_sides AS s
JOIN write_answers AS a
    ON a.run = $run AND a.pair_id = s.pair_id AND a.spec = $spec[list_position($record_side, s.record_side)]
JOIN events AS e ON e.run = $run AND e.probe = s.side_probe AND e.event = s.side_event
JOIN key_rule AS k ON k.side_probe = s.side_probe AND k.side_event = s.side_event
WHERE list_contains($steps, a.step)

-- Logits of every value token, by token.
-- view: value_logits
SELECT
    spec, step, pair_id,
    map_from_entries(list_sort(list_zip(
        list_append(competitors, answer_token), list_append(competitor_logits, correct_value_logit)
    ))) AS value_logits_by_token_id
FROM answers

-- The attention of the heads that were asked for.
-- view: attended
SELECT
    w.spec, w.step, w.pair_id, w.layer AS head_layer, w.head, format('L{}H{}', w.layer, w.head) AS head_label,
    w.support_score::DOUBLE AS qk_support_score,
    w.distractor_score::DOUBLE AS qk_distractor_score,
    w.support_attention::DOUBLE AS attention_support_mean,
    w.support_mass::DOUBLE AS attention_support_mass,
    w.distractor_mass::DOUBLE AS attention_distractor_mass
FROM write_attention AS w
WHERE
    w.run = $run AND list_contains($spec, w.spec) AND list_contains($steps, w.step)
    AND list_contains($head, format('L{}H{}', w.layer, w.head))

-- A row per step, pair, record side, head and condition. The products take the model's own attention and scores.
-- rows: pair_rows
SELECT
    a.step,
    $lake || '#' || $run || '/' || a.step AS checkpoint,
    a.split, a.pair_type, a.pair_id, a.source_sample_id, a.source_query_index,
    h.head_layer, h.head, h.head_label,
    $score_query_role AS score_query_role, $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role,
    a.record_side, c.condition,
    a.query_position, a.support_positions, a.distractor_positions,
    a.answer_token AS answer_token_id, a.best_wrong_token_id, v.value_logits_by_token_id, a.answer_correct,
    h.qk_support_score, h.qk_distractor_score,
    h.qk_support_score - h.qk_distractor_score AS qk_separation,
    h.attention_support_mean, h.attention_support_mass,
    h.attention_support_mass - h.attention_distractor_mass AS attention_mass_separation,
    c.ov_map_value_margin::DOUBLE AS ov_map_value_margin,
    c.head_value_margin_dla::DOUBLE AS head_value_margin_dla,
    c.head_answer_logit_dla::DOUBLE AS head_answer_logit_dla,
    c.head_margin_dla::DOUBLE AS head_margin_dla,
    h.attention_support_mean * c.ov_map_value_margin AS attended_support_ov_value_margin,
    h.attention_support_mass * c.ov_map_value_margin AS support_mass_ov_value_margin,
    (h.qk_support_score - h.qk_distractor_score) * c.ov_map_value_margin AS qk_ov_product,
    (h.attention_support_mass - h.attention_distractor_mass) * c.ov_map_value_margin AS attention_ov_product,
    a.correct_value_logit, a.best_wrong_value_logit,
    a.correct_value_logit - a.best_wrong_value_logit AS moving_answer_margin,
    a.negative_answer_loss
FROM answers AS a
JOIN value_logits AS v ON v.spec = a.spec AND v.step = a.step AND v.pair_id = a.pair_id
JOIN attended AS h ON h.spec = a.spec AND h.step = a.step AND h.pair_id = a.pair_id
JOIN write_conditions AS c
    ON c.run = $run AND c.spec = a.spec AND c.step = a.step AND c.pair_id = a.pair_id AND c.layer = h.head_layer AND c.head = h.head
ORDER BY
    a.step, list_position($record_side, a.record_side), list_position($head, h.head_label),
    list_position($conditions, c.condition), a.clean_event, list_position($pair_type, a.pair_type)

-- Means over each split and pair type, and over all of either or both.
-- rows: checkpoint_rows
SELECT
    step, any_value(checkpoint) AS checkpoint,
    coalesce(split, '__all__') AS split,
    coalesce(pair_type, '__all__') AS pair_type,
    head_layer, head, head_label, any_value(score_query_role) AS score_query_role,
    any_value(support_key_role) AS support_key_role, any_value(distractor_key_role) AS distractor_key_role,
    record_side, condition,
    count(*) AS num_entries,
    count(DISTINCT pair_id) AS num_unique_pairs,
    avg(answer_correct::INTEGER) AS answer_accuracy,
    avg(COLUMNS('^(qk_separation|attention_|ov_map|head_.*dla|attended|support_mass|qk_ov|correct_value|best_wrong_value|moving|negative)'))
        AS "\0_mean",
    population_std(COLUMNS('^(qk_separation|attention_|ov_map|head_.*dla|attended|support_mass|qk_ov|correct_value|best_wrong_value|moving|negative)'))
        AS "\0_std"
FROM pair_rows
GROUP BY step, record_side, head_layer, head, head_label, condition, CUBE (split, pair_type)
ORDER BY
    step, list_position($record_side, record_side), list_position($head, head_label), list_position($conditions, condition),
    coalesce(split, '__all__'), coalesce(pair_type, '__all__')

-- What the answer did from each checkpoint to the next: both ends held against the competitor that is best at one of them.
-- view: answer_deltas
WITH ends AS (
    SELECT
        record_side, pair_id, step AS target_step, answer_token, competitors,
        lag(step) OVER of_pair AS source_step,
        lag(best_wrong_token_id) OVER of_pair AS source_best_wrong_token_id, best_wrong_token_id AS target_best_wrong_token_id,
        lag(answer_correct) OVER of_pair AS source_answer_correct, answer_correct AS target_answer_correct,
        correct_value_logit - lag(correct_value_logit) OVER of_pair AS change,
        lag(competitor_logits) OVER of_pair AS source_logits, competitor_logits AS target_logits
    FROM answers
    WINDOW of_pair AS (PARTITION BY record_side, pair_id ORDER BY step)
    QUALIFY source_step IS NOT NULL
),
places AS (
    SELECT
        *, list_position(competitors, source_best_wrong_token_id) AS source_place,
        list_position(competitors, target_best_wrong_token_id) AS target_place
    FROM ends
)
SELECT
    record_side, pair_id, source_step, target_step, source_best_wrong_token_id, target_best_wrong_token_id,
    source_best_wrong_token_id <> target_best_wrong_token_id AS competitor_switched,
    source_answer_correct, target_answer_correct,
    change - (target_logits[source_place] - source_logits[source_place]) AS delta_fixed_source_competitor_margin,
    change - (target_logits[target_place] - source_logits[target_place]) AS delta_fixed_target_competitor_margin
FROM places

-- rows: pair_delta_rows
WITH deltas AS (
    SELECT
        lag(step) OVER one AS source_step, step AS target_step, step - lag(step) OVER one AS step_gap,
        lag(checkpoint) OVER one AS source_checkpoint, checkpoint AS target_checkpoint,
        split, pair_type, pair_id, source_sample_id, source_query_index, head_layer, head, head_label,
        score_query_role, support_key_role, distractor_key_role, record_side, condition,
        COLUMNS('^(qk_separation|attention_|ov_map|head_.*dla|attended|support_mass|qk_ov|correct_value|best_wrong_value|moving|negative)')
            - lag(COLUMNS('^(qk_separation|attention_|ov_map|head_.*dla|attended|support_mass|qk_ov|correct_value|best_wrong_value|moving|negative)'))
                OVER one AS "delta_\0"
    FROM pair_rows
    WINDOW one AS (PARTITION BY record_side, head_label, condition, pair_id ORDER BY step)
    QUALIFY source_step IS NOT NULL
)
SELECT
    d.*, a.delta_fixed_source_competitor_margin, a.delta_fixed_target_competitor_margin,
    a.source_best_wrong_token_id, a.target_best_wrong_token_id, a.competitor_switched,
    a.source_answer_correct, a.target_answer_correct
FROM deltas AS d
JOIN answer_deltas AS a USING (record_side, pair_id, source_step, target_step)
JOIN chosen_pairs AS p ON p.pair_id = d.pair_id
ORDER BY
    target_step, list_position($record_side, record_side), list_position($head, head_label),
    list_position($conditions, condition), p.clean_event, list_position($pair_type, d.pair_type)

-- rows: delta_rows
SELECT
    source_step, target_step, any_value(step_gap) AS step_gap,
    any_value(source_checkpoint) AS source_checkpoint, any_value(target_checkpoint) AS target_checkpoint,
    coalesce(split, '__all__') AS split,
    coalesce(pair_type, '__all__') AS pair_type,
    head_layer, head, head_label, any_value(score_query_role) AS score_query_role,
    any_value(support_key_role) AS support_key_role, any_value(distractor_key_role) AS distractor_key_role,
    record_side, condition,
    count(*) AS num_entries,
    count(DISTINCT pair_id) AS num_unique_pairs,
    avg(competitor_switched::INTEGER) AS competitor_switch_fraction,
    avg(COLUMNS('^delta_')) AS "\0_mean",
    population_std(COLUMNS('^delta_')) AS "\0_std"
FROM pair_delta_rows
GROUP BY source_step, target_step, record_side, head_layer, head, head_label, condition, CUBE (split, pair_type)
ORDER BY
    target_step, list_position($record_side, record_side), list_position($head, head_label),
    list_position($conditions, condition), coalesce(split, '__all__'), coalesce(pair_type, '__all__')

-- view: pooled_deltas
SELECT * FROM delta_rows WHERE split = '__all__' AND pair_type = '__all__'

-- view: write_changes
SELECT record_side, head_label, condition, target_step, w.position, w.metric, w.change
FROM pooled_deltas, LATERAL (
    SELECT
        unnest(range(8)) AS position,
        unnest([
            'ov_map_value_margin', 'head_value_margin_dla', 'head_answer_logit_dla', 'head_margin_dla',
            'attended_support_ov_value_margin', 'support_mass_ov_value_margin', 'qk_ov_product', 'attention_ov_product'
        ]) AS metric,
        unnest([
            delta_ov_map_value_margin_mean, delta_head_value_margin_dla_mean, delta_head_answer_logit_dla_mean,
            delta_head_margin_dla_mean, delta_attended_support_ov_value_margin_mean, delta_support_mass_ov_value_margin_mean,
            delta_qk_ov_product_mean, delta_attention_ov_product_mean
        ]) AS change
) AS w

-- view: output_changes
SELECT record_side, head_label, condition, target_step, o.position, o.metric, o.change
FROM pooled_deltas, LATERAL (
    SELECT
        unnest(range(5)) AS position,
        unnest([
            'correct_value_logit', 'negative_answer_loss', 'fixed_source_competitor_margin', 'fixed_target_competitor_margin',
            'moving_answer_margin'
        ]) AS metric,
        unnest([
            delta_correct_value_logit_mean, delta_negative_answer_loss_mean, delta_fixed_source_competitor_margin_mean,
            delta_fixed_target_competitor_margin_mean, delta_moving_answer_margin_mean
        ]) AS change
) AS o

-- Do the changes of a write and those of the answer go together, interval by interval?
-- rows: correlation_rows
WITH together AS (
    SELECT
        w.record_side, w.head_label, w.condition, w.position AS write_position, o.position AS output_position,
        w.metric AS write_metric, o.metric AS output_metric,
        pearson(w.change, o.change) AS correlation, count(*) AS num_points
    FROM write_changes AS w
    JOIN output_changes AS o USING (record_side, head_label, condition, target_step)
    GROUP BY ALL
)
SELECT
    '__all__' AS split, '__all__' AS pair_type,
    regexp_extract(head_label, 'L(\d+)', 1)::INTEGER AS head_layer, regexp_extract(head_label, 'H(\d+)', 1)::INTEGER AS head,
    head_label,
    $score_query_role AS score_query_role, $support_key_role AS support_key_role, $distractor_key_role AS distractor_key_role,
    record_side, condition,
    'delta_' || write_metric AS write_delta_metric,
    'delta_' || output_metric AS output_delta_metric,
    CASE WHEN isfinite(correlation) THEN correlation END AS correlation,
    CASE WHEN isfinite(correlation) THEN 'computed' ELSE 'not_computed' END AS status,
    CASE
        WHEN num_points < 2 THEN 'requires_at_least_two_intervals'
        WHEN correlation IS NULL THEN 'zero_variance'
        WHEN NOT isfinite(correlation) THEN 'not_finite'
    END AS reason,
    num_points
FROM together
ORDER BY
    list_position($record_side, record_side), list_position($head, head_label), list_position($conditions, condition),
    write_position, output_position

-- A pair, and the one whose values stand at its support where they are shuffled.
-- rows: pair_metadata_rows
SELECT
    p.pair_id, p.pair_type, p.split, p.source_sample_id, p.source_query_index, p.clean_answer_value, p.corrupted_answer_value,
    p.clean_transfer_token, p.corrupted_transfer_token, p.mutation::JSON AS mutation,
    s.pair_id AS shuffled_pair_id, s.clean_answer_value AS shuffled_clean_answer_value,
    s.corrupted_answer_value AS shuffled_corrupted_answer_value
FROM chosen_pairs AS p
JOIN (SELECT DISTINCT pair_id, shuffled_pair_id FROM answers) AS a ON a.pair_id = p.pair_id
JOIN chosen_pairs AS s ON s.pair_id = a.shuffled_pair_id
ORDER BY p.clean_event, list_position($pair_type, p.pair_type)

-- Pairs whose shuffled values tell the right answer all the same.
-- view: shuffled_to_itself
SELECT
    count(*) FILTER (CASE $record_side[1] WHEN 'clean' THEN clean_answer_value = shuffled_clean_answer_value
        ELSE corrupted_answer_value = shuffled_corrupted_answer_value END) AS same_answer,
    count(*) AS pairs
FROM pair_metadata_rows

-- The record side asked for first, over all pairs: what the summary and the charts are about.
-- view: primary_rows
SELECT * FROM checkpoint_rows
WHERE record_side = $record_side[1] AND split = '__all__' AND pair_type = '__all__'

-- How the support's mass and its OV map made their product, pair by pair: the midpoint rule, exact for a product.
-- view: product_parts
WITH ends AS (
    SELECT
        head_label, pair_id,
        min_by(attention_support_mass, step) AS first_mass, max_by(attention_support_mass, step) AS last_mass,
        min_by(ov_map_value_margin, step) AS first_map, max_by(ov_map_value_margin, step) AS last_map
    FROM pair_rows
    WHERE record_side = $record_side[1] AND condition = $conditions[1]
    GROUP BY head_label, pair_id
)
SELECT
    head_label,
    avg((last_mass - first_mass) * (first_map + last_map) / 2) AS by_attention,
    avg((last_map - first_map) * (first_mass + last_mass) / 2) AS by_ov_map
FROM ends
GROUP BY head_label

-- Heads by how much of their write from the support grew: attention mass times OV margin.
-- view: heads
WITH ends AS (
    SELECT
        head_label,
        min_by(support_mass_ov_value_margin_mean, step) FILTER (condition = $conditions[1]) AS first_product,
        max_by(support_mass_ov_value_margin_mean, step) FILTER (condition = $conditions[1]) AS last_product,
        min_by(head_value_margin_dla_mean, step) FILTER (condition = $conditions[1]) AS first_write,
        max_by(head_value_margin_dla_mean, step) FILTER (condition = $conditions[1]) AS last_write,
        min_by(attention_support_mass_mean, step) AS first_mass,
        max_by(attention_support_mass_mean, step) AS last_mass,
        min_by(ov_map_value_margin_mean, step) FILTER (condition = $conditions[1]) AS first_map,
        max_by(ov_map_value_margin_mean, step) FILTER (condition = $conditions[1]) AS last_map,
        max_by(head_value_margin_dla_mean, step) FILTER (condition = $conditions[3]) AS last_shuffled,
        max_by(head_value_margin_dla_mean, step) FILTER (condition = $conditions[4]) AS last_shuffled_map,
        min_by(moving_answer_margin_mean, step) AS first_margin,
        max_by(moving_answer_margin_mean, step) AS last_margin
    FROM primary_rows
    GROUP BY head_label
)
SELECT
    e.*, last_product - first_product AS change, p.by_attention, p.by_ov_map,
    c.correlation, c.reason, c.num_points
FROM ends AS e
JOIN product_parts AS p USING (head_label)
JOIN correlation_rows AS c
    ON c.head_label = e.head_label AND c.record_side = $record_side[1] AND c.condition = $conditions[1]
    AND c.write_delta_metric = 'delta_support_mass_ov_value_margin' AND c.output_delta_metric = 'delta_fixed_source_competitor_margin'
ORDER BY change DESC, list_position($head, e.head_label)

-- view: top_correlations
SELECT
    head_label, record_side, condition, write_delta_metric, output_delta_metric, correlation, num_points
FROM correlation_rows
WHERE status = 'computed'
ORDER BY
    abs(correlation) DESC, list_position($record_side, record_side), list_position($head, head_label),
    list_position($conditions, condition), write_delta_metric, output_delta_metric
LIMIT $top_k_correlations

-- The same heads in every panel.
-- view: trajectory
SELECT
    step, head_label AS series,
    unnest(['product', 'mass', 'ov_map']) AS panel,
    unnest([support_mass_ov_value_margin_mean, attention_support_mass_mean, ov_map_value_margin_mean]) AS value
FROM primary_rows
JOIN (SELECT head_label FROM heads ORDER BY abs(change) DESC, head_label LIMIT 6) AS shown USING (head_label)
WHERE condition = $conditions[1]
UNION ALL
SELECT DISTINCT step, 'answer', 'answer', moving_answer_margin_mean FROM primary_rows

-- The heads whose writes from the support grew most, under every condition.
-- view: condition_lines
SELECT
    r.step, r.head_label AS panel,
    CASE list_position($conditions, r.condition)
        WHEN 1 THEN 'as it is' WHEN 2 THEN 'attention on the support'
        WHEN 3 THEN 'values shuffled' ELSE 'support, shuffled'
    END AS series,
    r.head_value_margin_dla_mean AS value
FROM primary_rows AS r
JOIN (SELECT head_label, change FROM heads LIMIT 3) AS h USING (head_label)
ORDER BY h.change DESC, r.head_label, list_position($conditions, r.condition), r.step

-- view: condition_grid
SELECT
    r.head_label AS "row",
    CASE list_position($conditions, r.condition)
        WHEN 1 THEN 'as it is' WHEN 2 THEN 'attention on the support'
        WHEN 3 THEN 'values shuffled' ELSE 'support, shuffled'
    END AS "column",
    r.head_value_margin_dla_mean AS value
FROM primary_rows AS r
WHERE r.step = (SELECT max(step) FROM primary_rows)
ORDER BY list_position($head, r.head_label), list_position($conditions, r.condition)

-- view: correlation_grid
SELECT
    head_label AS "row",
    CASE write_delta_metric
        WHEN 'delta_ov_map_value_margin' THEN 'OV map'
        WHEN 'delta_head_value_margin_dla' THEN 'value margin'
        WHEN 'delta_head_answer_logit_dla' THEN 'answer logit'
        WHEN 'delta_head_margin_dla' THEN 'margin DLA'
        WHEN 'delta_attended_support_ov_value_margin' THEN 'mean a × OV'
        WHEN 'delta_support_mass_ov_value_margin' THEN 'mass × OV'
        WHEN 'delta_qk_ov_product' THEN 'QK × OV'
        ELSE 'mass separation × OV'
    END AS "column",
    correlation AS value
FROM correlation_rows
WHERE
    record_side = $record_side[1] AND condition = $conditions[1]
    AND output_delta_metric = 'delta_fixed_source_competitor_margin'

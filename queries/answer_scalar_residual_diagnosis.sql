-- rows: interval_pair_rows
WITH scalars AS (
    SELECT
        source_step, target_step, pair_id, margin_side,
        map_from_entries(list(struct_pack(
            k := scalar_name,
            v := struct_pack(
                source := source_scalar, target := target_scalar, delta := target_scalar - source_scalar
            )
        ) ORDER BY scalar_name)) AS scalars
    FROM changes
    GROUP BY ALL
),
answers AS (
    SELECT *, list_grade_up(c, 'DESC')[:$top_k_wrong] AS best FROM run_answers
)
SELECT
    p.source_step, p.target_step, p.target_step - p.source_step AS step_gap,
    $lake || '#' || $run || '/' || p.source_step AS source_checkpoint,
    $lake || '#' || $run || '/' || p.target_step AS target_checkpoint,
    p.pair_id, p.pair_id || '::' || p.margin_side AS interval_pair_id, p.split, p.pair_type, p.margin_side,
    p.source_sample_id, p.source_query_index, p.clean_transfer_token, p.corrupted_transfer_token,
    p.answer_token AS answer_target_id, p.competitor_switched, v.scalars,
    source.best_token AS source_answer_prediction_id, source.correct AS source_answer_correct,
    source.a AS source_correct_value_logit, source.p AS source_correct_log_prob,
    source.best_wrong_token AS source_best_wrong_token_id, source.c[p.s] AS source_best_wrong_logit,
    list_select(p.competitors, source.best) AS source_top_wrong_token_ids,
    list_select(source.c, source.best) AS source_top_wrong_logits,
    target.best_token AS target_answer_prediction_id, target.correct AS target_answer_correct,
    target.a AS target_correct_value_logit, target.p AS target_correct_log_prob,
    target.best_wrong_token AS target_best_wrong_token_id, target.c[p.t] AS target_best_wrong_logit,
    list_select(p.competitors, target.best) AS target_top_wrong_token_ids,
    list_select(target.c, target.best) AS target_top_wrong_logits
FROM scalar_pairs AS p
JOIN scalars AS v USING (source_step, target_step, pair_id, margin_side)
JOIN answers AS source
    ON source.step = p.source_step AND source.pair_id = p.pair_id AND source.margin_side = p.margin_side
JOIN answers AS target
    ON target.step = p.target_step AND target.pair_id = p.pair_id AND target.margin_side = p.margin_side
ORDER BY p.source_step, p.pair_id, p.margin_side

-- Each pair belongs to bucket all and to one of the other two.
-- rows: interval_summary_rows
WITH bucketed AS (
    SELECT *, unnest(['all', CASE WHEN competitor_switched THEN 'competitor_switch' ELSE 'same_competitor' END]) AS switch_bucket
    FROM changes
)
SELECT
    source_step, target_step, margin_side, switch_bucket, scalar_name,
    count(*) AS num_pairs,
    avg(competitor_switched::INTEGER) AS competitor_switch_fraction,
    avg(source_scalar) AS source_mean, avg(target_scalar) AS target_mean, avg(target_scalar - source_scalar) AS delta_mean,
    population_std(target_scalar - source_scalar) AS delta_std,
    avg((target_scalar > source_scalar)::INTEGER) AS delta_positive_fraction
FROM bucketed
GROUP BY ALL
ORDER BY source_step, margin_side, switch_bucket, scalar_name

-- How the moving margin's change splits: with the source's competitor held, and what the other competitor at the target takes.
-- rows: switch_rows
SELECT
    p.source_step, p.target_step, p.margin_side, count(*) AS num_pairs,
    avg(p.competitor_switched::INTEGER) AS competitor_switch_fraction,
    avg((target.a - target.c[p.t]) - (source.a - source.c[p.s])) AS moving_delta_mean,
    avg((target.a - target.c[p.s]) - (source.a - source.c[p.s])) AS fixed_source_delta_mean,
    avg(target.c[p.s] - target.c[p.t]) AS switch_delta_mean,
    avg(target.a - source.a) AS correct_logit_delta_mean,
    avg(source.c[p.s] - target.c[p.s]) AS suppressed_competitor_delta_mean
FROM scalar_pairs AS p
JOIN run_answers AS source
    ON source.step = p.source_step AND source.pair_id = p.pair_id AND source.margin_side = p.margin_side
JOIN run_answers AS target
    ON target.step = p.target_step AND target.pair_id = p.pair_id AND target.margin_side = p.margin_side
GROUP BY p.source_step, p.target_step, p.margin_side
ORDER BY p.source_step, p.margin_side

-- view: switch_table
SELECT
    format('{} → {}', source_step, target_step) AS interval, margin_side, moving_delta_mean, correct_logit_delta_mean,
    suppressed_competitor_delta_mean, switch_delta_mean, competitor_switch_fraction
FROM switch_rows
ORDER BY source_step, margin_side

-- view: parts_chart
SELECT source_step AS start_step, target_step AS end_step, part, value
FROM (
    SELECT
        source_step, target_step, unnest(['answer raised', 'competitor lowered', 'another competitor']) AS part,
        unnest([correct_logit_delta_mean, suppressed_competitor_delta_mean, switch_delta_mean]) AS value
    FROM switch_rows
    WHERE margin_side = $margin_side[1]
)
ORDER BY start_step, part

-- Values at every step: of an inner step those of the interval that it ends.
-- view: trajectory
SELECT
    step, scalar_name AS series,
    CASE scalar_name WHEN 'negative_answer_loss' THEN 'loss' WHEN 'moving_answer_margin' THEN 'margin' ELSE 'logit' END AS panel,
    avg(value) AS value
FROM endpoint_values
WHERE
    margin_side = $margin_side[1] AND scalar_name IN ('moving_answer_margin', 'correct_value_logit', 'negative_answer_loss')
    AND (endpoint_kind = 'target' OR source_step = (SELECT min(source_step) FROM intervals))
GROUP BY ALL
ORDER BY step, series

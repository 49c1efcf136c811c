-- Sums over parameters run in the order of their names, so that they do not depend on the number of threads.
-- view: selected_updates
SELECT * FROM parameter_updates
WHERE run = $run AND list_contains($steps, step)
ORDER BY step, parameter

-- view: step_sums
WITH by_step AS (
    SELECT step, list(u ORDER BY parameter) AS updates FROM selected_updates AS u GROUP BY step
)
SELECT
    step,
    sqrt(list_sum(list_transform(updates, lambda u: u.delta_l2 ** 2))) AS parameter_delta_l2,
    list_max(list_transform(updates, lambda u: u.delta_max_abs)) AS parameter_delta_max_abs,
    sqrt(list_sum(list_transform(updates, lambda u: u.weight_l2_before ** 2))) AS parameter_l2_before,
    sqrt(list_sum(list_transform(updates, lambda u: u.gradient_l2 ** 2))) AS gradient_l2,
    sqrt(list_sum(list_transform(updates, lambda u: u.clipped_gradient_l2 ** 2))) AS clipped_gradient_l2,
    list_sum(list_transform(updates, lambda u: u.update_dot_negative_gradient)) AS update_dot_negative_gradient,
    list_sum(list_transform(updates, lambda u: u.update_dot_negative_clipped_gradient))
        AS update_dot_negative_clipped_gradient,
    len(list_filter(updates, lambda u: u.exp_avg_l2 IS NOT NULL)) AS optimizer_state_entries,
    list_max(list_transform(updates, lambda u: u.optimizer_step)) AS optimizer_state_step_max,
    sqrt(list_sum(list_transform(updates, lambda u: u.exp_avg_l2 ** 2))) AS adam_exp_avg_l2,
    sqrt(list_sum(list_transform(updates, lambda u: u.exp_avg_sq_l2 ** 2))) AS adam_exp_avg_sq_l2,
    coalesce(list_sum(list_transform(updates, lambda u: CASE WHEN u.exp_avg_l2 IS NOT NULL THEN u.numel END)), 0)::BIGINT
        AS adam_exp_avg_count,
    coalesce(
        list_sum(list_transform(updates, lambda u: CASE WHEN u.exp_avg_sq_l2 IS NOT NULL THEN u.numel END)), 0
    )::BIGINT AS adam_exp_avg_sq_count,
    sqrt(list_sum(list_transform(updates, lambda u: u.current_gradient_l2 ** 2))) AS current_gradient_l2,
    sqrt(list_sum(list_transform(updates, lambda u: u.momentum_l2 ** 2))) AS momentum_l2,
    sqrt(list_sum(list_transform(updates, lambda u: u.weight_decay_l2 ** 2))) AS weight_decay_l2,
    sqrt(list_sum(list_transform(updates, lambda u: u.residual_l2 ** 2))) AS residual_l2,
    sqrt(list_sum(list_transform(updates, lambda u: u.raw_sgd_l2 ** 2))) AS raw_sgd_l2,
    sqrt(list_sum(list_transform(updates, lambda u: u.clipped_sgd_l2 ** 2))) AS clipped_sgd_l2,
    list_sum(list_transform(updates, lambda u: u.current_gradient_dot_update)) AS current_gradient_dot_update,
    list_sum(list_transform(updates, lambda u: u.momentum_dot_update)) AS momentum_dot_update,
    list_sum(list_transform(updates, lambda u: u.weight_decay_dot_update)) AS weight_decay_dot_update,
    list_sum(list_transform(updates, lambda u: u.residual_dot_update)) AS residual_dot_update,
    len(list_filter(updates, lambda u: NOT u.has_gradient)) AS parameters_without_gradient
FROM by_step

-- rows: step
SELECT
    t.step, t.step - 1 AS source_step, t.step AS target_step,
    t.loss, t.token_accuracy, t.learning_rate, t.pre_clip_grad_norm, t.grad_clip_norm, t.batch_size, t.query_event_count,
    s.parameter_delta_l2, s.parameter_delta_max_abs, s.parameter_l2_before, s.clipped_gradient_l2,
    s.update_dot_negative_clipped_gradient, s.optimizer_state_entries, s.optimizer_state_step_max,
    s.adam_exp_avg_l2, s.adam_exp_avg_sq_l2, s.adam_exp_avg_count, s.adam_exp_avg_sq_count,
    t.clip_coefficient, t.clip_coefficient < 1 AS clipped, t.nonfinite_gradient_entries, s.parameters_without_gradient,
    s.gradient_l2, s.update_dot_negative_gradient,
    s.current_gradient_l2, s.momentum_l2, s.weight_decay_l2, s.residual_l2, s.raw_sgd_l2, s.clipped_sgd_l2,
    s.current_gradient_dot_update, s.momentum_dot_update, s.weight_decay_dot_update, s.residual_dot_update,
    t.seconds
FROM training_steps AS t
LEFT JOIN step_sums AS s ON s.step = t.step
WHERE t.run = $run AND list_contains($steps, t.step)
ORDER BY t.step

-- Examples are numbered once; a step's lists are then picked by number, which is far cheaper than gathering strings.
-- view: numbered_examples
SELECT split, sample_id, query_keys, answer_values, row_number() OVER (ORDER BY split, sample_id) AS number
FROM examples
WHERE run = $run
ORDER BY number

-- rows: batch
WITH ids AS (
    SELECT step, split, unnest(sample_ids) AS sample_id, generate_subscripts(sample_ids, 1) AS place
    FROM training_batches
    WHERE run = $run AND list_contains($steps, step)
),
known AS (
    SELECT i.step, list(e.number ORDER BY i.place) AS numbers
    FROM ids AS i
    JOIN numbered_examples AS e ON e.split = i.split AND e.sample_id = i.sample_id
    GROUP BY i.step
),
everything AS (
    SELECT list(query_keys ORDER BY number) AS keys, list(answer_values ORDER BY number) AS answers
    FROM numbered_examples
),
queries_of_step AS (
    SELECT
        step, len(numbers) AS known_examples,
        flatten(list_select(keys, numbers)) AS query_keys,
        flatten(list_select(answers, numbers)) AS answer_values
    FROM known, everything
)
SELECT
    b.step,
    len(b.sample_ids) AS batch_size,
    coalesce(t.query_event_count, CASE WHEN q.known_examples = len(b.sample_ids) THEN len(q.query_keys) END)
        AS query_event_count,
    [b.split] AS splits,
    b.sample_ids,
    CASE WHEN q.known_examples = len(b.sample_ids) THEN q.query_keys END AS query_keys,
    CASE WHEN q.known_examples = len(b.sample_ids) THEN q.answer_values END AS answer_values
FROM training_batches AS b
LEFT JOIN queries_of_step AS q ON q.step = b.step
LEFT JOIN training_steps AS t ON t.run = $run AND t.step = b.step
WHERE b.run = $run AND list_contains($steps, b.step)
ORDER BY b.step

-- rows: parameter_update
SELECT
    step, parameter, numel, delta_l2, delta_max_abs, weight_l2_before AS parameter_l2_before, clipped_gradient_l2,
    update_dot_negative_clipped_gradient,
    gradient_l2, exp_avg_l2, exp_avg_sq_l2, update_gradient_cosine, update_weight_cosine, gradient_momentum_cosine,
    update_momentum_cosine, current_gradient_l2, momentum_l2, weight_decay_l2, residual_l2, current_gradient_dot_update,
    momentum_dot_update, weight_decay_dot_update, residual_dot_update
FROM selected_updates
QUALIFY row_number() OVER (PARTITION BY step ORDER BY delta_l2 DESC NULLS LAST, parameter) <= $top_k_parameters
ORDER BY step, delta_l2 DESC NULLS LAST, parameter

-- view: run_facts
SELECT source, parent_run, parent_step, historical_replay, store, anchor_every FROM runs WHERE run = $run

-- Up to 60 windows of neighbouring steps, for charts and for "when".
-- view: step_windows
SELECT step, (row_number() OVER (ORDER BY step) - 1) * least(60, count(*) OVER ()) // count(*) OVER () AS time_window
FROM step

-- view: windows
SELECT
    w.time_window, min(s.source_step) AS start_step, max(s.step) AS end_step, count(*) AS steps,
    list_avg(list(s.loss ORDER BY s.step)) AS loss,
    list_avg(list(s.pre_clip_grad_norm ORDER BY s.step)) AS gradient_norm,
    list_sum(list(s.parameter_delta_l2 ** 2 ORDER BY s.step)) AS squared_update,
    list_sum(list(s.current_gradient_dot_update ORDER BY s.step)) AS current_gradient,
    list_sum(list(s.momentum_dot_update ORDER BY s.step)) AS momentum,
    list_sum(list(s.weight_decay_dot_update ORDER BY s.step)) AS weight_decay,
    list_sum(list(s.residual_dot_update ORDER BY s.step)) AS residual
FROM step AS s
JOIN step_windows AS w ON w.step = s.step
GROUP BY w.time_window
ORDER BY w.time_window

-- view: update_terms
SELECT start_step, end_step, part, part_order, part_sum / nullif(squared_update, 0) AS share
FROM (
    SELECT start_step, end_step, squared_update, 'current gradient' AS part, 1 AS part_order, current_gradient AS part_sum
    FROM windows
    UNION ALL
    SELECT start_step, end_step, squared_update, 'carried momentum', 2, momentum FROM windows
    UNION ALL
    SELECT start_step, end_step, squared_update, 'weight decay', 3, weight_decay FROM windows
    UNION ALL
    SELECT start_step, end_step, squared_update, 'rounding residual', 4, residual FROM windows
)
WHERE part_sum IS NOT NULL
ORDER BY start_step, part_order

-- view: parameter_totals
SELECT
    u.parameter,
    coalesce(any_value(p.module), u.parameter) AS module,
    any_value(u.numel) AS numel,
    sqrt(list_sum(list(u.delta_l2 ** 2 ORDER BY u.step))) AS root_sum_of_squares,
    list_sum(list(u.delta_l2 ** 2 ORDER BY u.step)) AS squared_update,
    list_avg(list(u.delta_l2 ORDER BY u.step)) AS mean_delta_l2,
    list_avg(list(u.update_gradient_cosine ORDER BY u.step)) AS mean_update_gradient_cosine,
    arg_min(u.weight_l2_before, u.step) AS start_l2,
    arg_max(u.weight_l2, u.step) AS end_l2
FROM selected_updates AS u
LEFT JOIN parameters AS p ON p.run = $run AND p.parameter = u.parameter
GROUP BY u.parameter
ORDER BY squared_update DESC NULLS LAST, u.parameter

-- view: top_parameters
SELECT *, squared_update / nullif((SELECT list_sum(list(squared_update ORDER BY parameter)) FROM parameter_totals), 0) AS share
FROM parameter_totals
ORDER BY squared_update DESC NULLS LAST, parameter
LIMIT 12

-- view: module_shares
WITH sums AS (
    SELECT
        w.time_window, coalesce(p.module, u.parameter) AS module, min(p.position) AS position,
        list_sum(list(u.delta_l2 ** 2 ORDER BY u.step, u.parameter)) AS total
    FROM selected_updates AS u
    JOIN step_windows AS w ON w.step = u.step
    LEFT JOIN parameters AS p ON p.run = $run AND p.parameter = u.parameter
    GROUP BY w.time_window, coalesce(p.module, u.parameter)
)
SELECT w.start_step, w.end_step, s.module AS part, s.total / nullif(w.squared_update, 0) AS share
FROM sums AS s
JOIN windows AS w ON w.time_window = s.time_window
ORDER BY w.start_step, s.position, s.module

-- Accuracy on the first evaluated split whose name says validation, else on the first evaluated split.
-- view: accuracy
SELECT step, split, "value" AS answer_accuracy FROM evaluations
WHERE run = $run AND metric = 'answer_accuracy' AND step BETWEEN list_min($steps) AND list_max($steps)
QUALIFY dense_rank() OVER (ORDER BY split NOT LIKE '%validation%', split) = 1
ORDER BY step

-- view: loss_chart
SELECT step, 1 AS place, 'loss' AS panel, loss AS "value" FROM step WHERE loss IS NOT NULL
UNION ALL
SELECT step, 2, 'answer accuracy, ' || split, answer_accuracy FROM accuracy
UNION ALL
SELECT step, 3, 'learning rate', learning_rate FROM step WHERE learning_rate IS NOT NULL
ORDER BY place, step

-- view: gradient_chart
SELECT step, 'raw gradient' AS series, pre_clip_grad_norm AS norm FROM step WHERE pre_clip_grad_norm > 0
UNION ALL
SELECT step, 'gradient the optimizer saw', clipped_gradient_l2 FROM step WHERE clipped_gradient_l2 > 0
UNION ALL
SELECT step, 'clipping threshold', grad_clip_norm FROM step WHERE grad_clip_norm > 0
ORDER BY series DESC, step

-- view: training_summary
SELECT
    count(*) AS steps, min(source_step) AS start_step, max(target_step) AS end_step,
    arg_min(loss, step) AS first_loss, arg_max(loss, step) AS last_loss,
    list_avg(list(loss ORDER BY step)) AS mean_loss,
    min(learning_rate) AS lowest_learning_rate, max(learning_rate) AS highest_learning_rate,
    list_avg(list(pre_clip_grad_norm ORDER BY step)) AS mean_pre_clip_grad_norm,
    max(pre_clip_grad_norm) AS highest_pre_clip_grad_norm, arg_max(step, pre_clip_grad_norm) AS highest_norm_step,
    count(clip_coefficient) AS steps_with_clip_coefficient, count(*) FILTER (clipped) AS clipped_steps,
    min(clip_coefficient) AS lowest_clip_coefficient,
    list_avg(list(parameter_delta_l2 ORDER BY step)) AS mean_parameter_delta_l2,
    list_sum(list(parameter_delta_l2 ** 2 ORDER BY step)) AS squared_update,
    list_sum(list(current_gradient_dot_update ORDER BY step)) AS current_gradient,
    list_sum(list(momentum_dot_update ORDER BY step)) AS momentum,
    list_sum(list(weight_decay_dot_update ORDER BY step)) AS weight_decay,
    list_sum(list(residual_dot_update ORDER BY step)) AS residual,
    count(*) FILTER (nonfinite_gradient_entries > 0) AS steps_with_nonfinite_gradients,
    coalesce(sum(nonfinite_gradient_entries), 0)::BIGINT AS nonfinite_gradient_entries
FROM step

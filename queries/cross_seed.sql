-- Heads of every seed of one scan. An end of training counts as formed when the head wins more events than --formed-at.
-- rows: candidate_rows
SELECT
    run, seed, spec, layer, head, head_label, place, label, stage, window_start_step, window_end_step, growth,
    win_rate_growth, growth_vs_singular_value, growth_vs_answer_margin, end_step, separation, win_rate,
    win_rate > $formed_at AS formed,
    chance_win_rate, answer_margin, answer_accuracy, num_events
FROM cross_seed_candidates
WHERE list_contains($chosen_runs, run) AND spec = $chosen_spec
ORDER BY seed, place

-- Lost to no other: of what all growing heads of the seed grew, the winner's part.
-- rows: seed_rows
WITH seconds AS (
    SELECT run, head_label AS runner_up, growth AS runner_up_growth FROM candidate_rows WHERE place = 2
),
sums AS (
    SELECT run, sum(greatest(growth, 0) ORDER BY place) AS growing, count(*) FILTER (formed) AS formed_heads
    FROM candidate_rows
    GROUP BY run
),
formation AS (
    SELECT s.run, min(s.step) AS formed_step
    FROM cross_seed_scans AS s
    JOIN candidate_rows AS c ON c.run = s.run AND c.layer = s.layer AND c.head = s.head AND c.place = 1
    WHERE s.spec = $chosen_spec AND s.win_rate > $formed_at AND list_contains($chosen_runs, s.run)
    GROUP BY s.run
)
SELECT
    c.seed, c.run, c.head_label AS winner, c.layer, c.head, c.stage, c.growth,
    c.growth / nullif(s.growing, 0) AS share_of_growth,
    r.runner_up, r.runner_up_growth,
    c.separation, c.win_rate, c.chance_win_rate, c.formed, s.formed_heads, f.formed_step,
    c.growth_vs_singular_value, c.growth_vs_answer_margin, c.answer_margin, c.answer_accuracy, c.num_events
FROM candidate_rows AS c
JOIN sums AS s ON s.run = c.run
LEFT JOIN seconds AS r ON r.run = c.run
LEFT JOIN formation AS f ON f.run = c.run
WHERE c.place = 1
ORDER BY c.seed

-- Which heads won, and in how many seeds.
-- rows: address_rows
SELECT
    winner AS head_label, layer, head,
    count(*) AS seeds_won,
    count(*) FILTER (formed) AS seeds_formed,
    list(seed ORDER BY seed) AS seeds,
    avg(growth) AS mean_growth
FROM seed_rows
GROUP BY winner, layer, head
ORDER BY seeds_won DESC, layer, head

-- What the terms of AdamW's updates did to the chosen heads over the recorded steps.
-- rows: update_rows
SELECT
    c.seed, c.run, c.head_label, c.label, u.start_step, u.end_step, u.component, u.sum_delta, u.sum_actual_delta,
    u.sum_first_order_delta,
    u.sum_delta / nullif(u.sum_actual_delta, 0) AS share_of_actual,
    u.sum_delta / nullif(u.sum_first_order_delta, 0) AS share_of_first_order,
    u.mean_cosine, u.adam_spec
FROM cross_seed_updates AS u
JOIN candidate_rows AS c ON c.run = u.run AND c.spec = u.spec AND c.layer = u.layer AND c.head = u.head
ORDER BY c.seed, c.place, u.start_step, u.end_step, u.adam_spec, u.component

-- view: update_summary
SELECT
    seed, head_label, start_step, end_step,
    any_value(sum_actual_delta) AS actual,
    any_value(share_of_first_order) FILTER (component = 'adam_current_gradient') AS current_gradient,
    any_value(share_of_first_order) FILTER (component = 'adam_historical_momentum') AS momentum,
    any_value(share_of_first_order) FILTER (component = 'weight_decay') AS weight_decay,
    any_value(share_of_first_order) FILTER (component = 'raw_sgd') AS raw_sgd
FROM update_rows
GROUP BY seed, head_label, start_step, end_step, adam_spec
ORDER BY seed, head_label, start_step, end_step, adam_spec

-- view: growth_cells
SELECT
    c.head_label || ' ← ' || c.stage AS row, 'seed ' || c.seed AS "column", c.growth AS value
FROM candidate_rows AS c
ORDER BY c.layer, c.head, c.seed

-- view: trajectory
SELECT s.step, format('seed {} ({})', c.seed, c.head_label) AS series, p.panel, p.value
FROM cross_seed_scans AS s
JOIN candidate_rows AS c ON c.run = s.run AND c.layer = s.layer AND c.head = s.head AND c.place = 1,
LATERAL (
    SELECT 'separation' AS panel, s.separation AS value
    UNION ALL SELECT 'win rate', s.win_rate
    UNION ALL SELECT 'answer margin', s.answer_margin
) AS p
WHERE
    s.spec = $chosen_spec AND list_contains($chosen_runs, s.run)
    AND (len($steps) = 0 OR list_contains($steps, s.step))
ORDER BY p.panel DESC, c.seed, s.step

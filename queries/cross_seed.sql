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

-- The winner is the head that grew most over the window; the holder, formed or not, the one that wins most events at the end.
-- rows: seed_rows
WITH seconds AS (
    SELECT run, head_label AS runner_up, growth AS runner_up_growth FROM candidate_rows WHERE place = 2
),
sums AS (
    SELECT
        run,
        sum(greatest(growth, 0) ORDER BY place) AS growing,
        count(*) FILTER (formed) AS formed_heads,
        first(layer ORDER BY win_rate DESC, place) AS holder_layer,
        first(head ORDER BY win_rate DESC, place) AS holder_head
    FROM candidate_rows
    GROUP BY run
),
formation AS (
    SELECT s.run, min(s.step) FILTER (s.win_rate > $formed_at) AS formed_step
    FROM cross_seed_scans AS s
    JOIN sums AS h ON h.run = s.run AND h.holder_layer = s.layer AND h.holder_head = s.head
    WHERE s.spec = $chosen_spec
    GROUP BY s.run
)
SELECT
    w.seed, w.run,
    h.head_label AS holder, h.layer AS holder_layer, h.head AS holder_head, h.stage AS holder_stage,
    h.win_rate, h.separation, h.chance_win_rate, h.formed, s.formed_heads, f.formed_step,
    w.head_label AS winner, w.layer AS winner_layer, w.head AS winner_head, w.stage AS winner_stage,
    w.growth, w.growth / nullif(s.growing, 0) AS share_of_growth, r.runner_up, r.runner_up_growth,
    w.head_label = h.head_label AS winner_holds,
    w.growth_vs_singular_value, w.growth_vs_answer_margin, w.answer_margin, w.answer_accuracy, w.num_events
FROM candidate_rows AS w
JOIN sums AS s ON s.run = w.run
JOIN candidate_rows AS h ON h.run = w.run AND h.layer = s.holder_layer AND h.head = s.holder_head
LEFT JOIN seconds AS r ON r.run = w.run
LEFT JOIN formation AS f ON f.run = w.run
WHERE w.place = 1
ORDER BY w.seed

-- In how many seeds each head holds the role, formed, and in how many it grew most.
-- rows: address_rows
SELECT
    c.head_label, c.layer, c.head,
    count(*) FILTER (s.holder = c.head_label AND s.formed) AS seeds_held,
    count(*) FILTER (c.formed) AS seeds_formed,
    count(*) FILTER (c.place = 1) AS seeds_won,
    avg(c.growth ORDER BY c.seed) AS mean_growth,
    avg(c.win_rate ORDER BY c.seed) AS mean_win_rate
FROM candidate_rows AS c
JOIN seed_rows AS s ON s.run = c.run
GROUP BY c.head_label, c.layer, c.head
ORDER BY c.layer, c.head

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
SELECT c.head_label || ' ← ' || c.stage AS row, 'seed ' || c.seed AS "column", c.growth AS value
FROM candidate_rows AS c
ORDER BY c.layer, c.head, c.seed

-- view: win_cells
SELECT c.head_label || ' ← ' || c.stage AS row, 'seed ' || c.seed AS "column", c.win_rate AS value
FROM candidate_rows AS c
ORDER BY c.layer, c.head, c.seed

-- view: trajectory
SELECT s.step, format('seed {} ({})', r.seed, r.holder) AS series, p.panel, p.value
FROM cross_seed_scans AS s
JOIN seed_rows AS r ON r.run = s.run AND r.holder_layer = s.layer AND r.holder_head = s.head,
LATERAL (
    SELECT 'separation' AS panel, s.separation AS value
    UNION ALL SELECT 'win rate', s.win_rate
    UNION ALL SELECT 'answer margin', s.answer_margin
) AS p
WHERE s.spec = $chosen_spec AND (len($steps) = 0 OR list_contains($steps, s.step))
ORDER BY p.panel DESC, r.seed, s.step

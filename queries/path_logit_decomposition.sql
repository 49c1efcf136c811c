-- Answers of the model itself, per split and over all events.
-- rows: checkpoint
SELECT
    r.step,
    CASE grouping(e.split) WHEN 1 THEN '__all__' ELSE e.split END AS split,
    avg(r.value_margin) AS baseline_margin_mean,
    avg(r.correct::INTEGER) AS baseline_accuracy,
    count(*) AS num_query_events
FROM readouts AS r
JOIN chosen_events AS e USING (event)
WHERE r.run = $run AND r.probe = $probe AND r.stage = 'logits' AND list_contains($steps, r.step)
GROUP BY GROUPING SETS ((r.step, e.split), (r.step))
ORDER BY r.step, 2

-- rows: stage
WITH readout AS (
    SELECT
        r.step,
        CASE grouping(e.split) WHEN 1 THEN '__all__' ELSE e.split END AS split,
        r.stage,
        avg(r.value_margin) AS readout_margin_mean,
        avg(r.correct::INTEGER) AS readout_accuracy,
        count(*) AS num_query_events
    FROM readouts AS r
    JOIN chosen_events AS e USING (event)
    WHERE r.run = $run AND r.probe = $probe AND r.stage <> 'logits' AND list_contains($steps, r.step)
    GROUP BY GROUPING SETS ((r.step, r.stage, e.split), (r.step, r.stage))
)
SELECT r.*, s.position AS stage_position
FROM readout AS r
LEFT JOIN (SELECT stage, position FROM stages WHERE run = $run) AS s USING (stage)
ORDER BY r.step, r.split, s.position, r.stage

-- Heads and MLP blocks are what the reference reports; the other parts are there so that the frozen column adds up.
-- rows: component
WITH contribution AS (
    SELECT
        c.step,
        CASE grouping(e.split) WHEN 1 THEN '__all__' ELSE e.split END AS split,
        c.component_type, c.component AS component_id, c.layer, c.head,
        avg(c.margin_dla) AS direct_margin_contribution_mean,
        avg(abs(c.margin_dla)) AS direct_margin_contribution_abs_mean,
        avg((c.margin_dla > 0)::INTEGER) AS direct_margin_contribution_positive_fraction,
        avg((c.margin_dla < 0)::INTEGER) AS direct_margin_contribution_negative_fraction,
        avg(c.margin_dla_frozen) AS frozen_margin_contribution_mean,
        avg(abs(c.margin_dla_frozen)) AS frozen_margin_contribution_abs_mean,
        avg((c.margin_dla_frozen > 0)::INTEGER) AS frozen_margin_contribution_positive_fraction,
        avg((c.margin_dla_frozen < 0)::INTEGER) AS frozen_margin_contribution_negative_fraction,
        count(*) AS num_query_events
    FROM component_logits AS c
    JOIN chosen_events AS e USING (event)
    WHERE c.run = $run AND c.probe = $probe AND list_contains($steps, c.step)
    GROUP BY GROUPING SETS (
        (c.step, c.component_type, c.component, c.layer, c.head, e.split), (c.step, c.component_type, c.component, c.layer, c.head)
    )
)
SELECT c.*, p.baseline_margin_mean, p.baseline_accuracy
FROM contribution AS c
LEFT JOIN checkpoint AS p USING (step, split)
ORDER BY c.step, c.split, c.component_type, c.layer NULLS FIRST, c.head NULLS FIRST

-- Does the frozen column add up to the margin, event by event? The tolerance is that of sums of float32 numbers.
-- view: closure
SELECT
    max(abs(s.total - r.value_margin)) AS largest_difference,
    max(abs(s.total - r.value_margin) / (1 + s.magnitude)) AS largest_relative_difference,
    arg_max((s.step, s.event), abs(s.total - r.value_margin) / (1 + s.magnitude)) AS at
FROM (
    SELECT
        c.step, c.event,
        sum(c.margin_dla_frozen::DOUBLE) AS total,
        sum(abs(c.margin_dla_frozen::DOUBLE)) AS magnitude
    FROM component_logits AS c
    JOIN chosen_events AS e USING (event)
    WHERE c.run = $run AND c.probe = $probe AND list_contains($steps, c.step)
    GROUP BY c.step, c.event
) AS s
JOIN (
    SELECT step, event, value_margin
    FROM readouts
    WHERE run = $run AND probe = $probe AND stage = 'logits' AND list_contains($steps, step)
) AS r USING (step, event)

-- Components ablated at a step: the largest and the smallest mean attributions over all events, each component once.
-- view: chosen_components
WITH ranked AS (
    SELECT
        step, component_type, component_id, layer, head, direct_margin_contribution_mean AS mean_all_splits,
        row_number() OVER (
            PARTITION BY step ORDER BY direct_margin_contribution_mean DESC, component_type, layer, head
        ) AS from_top,
        row_number() OVER (
            PARTITION BY step ORDER BY direct_margin_contribution_mean, component_type, layer, head
        ) AS from_bottom
    FROM component
    WHERE split = '__all__' AND component_type IN ('attention_head', 'mlp_block')
        AND (list_contains($ablation_step, step) OR ($ablate_last AND step = (SELECT max(step) FROM checkpoint)))
)
SELECT * EXCLUDE (from_top, from_bottom)
FROM ranked
WHERE from_top <= $ablation_top_k OR from_bottom <= $ablation_top_k
ORDER BY step, component_type, layer, head

-- rows: ablation
WITH measured AS (
    SELECT
        i.step,
        CASE grouping(e.split) WHEN 1 THEN '__all__' ELSE e.split END AS split,
        i.intervention AS component_id,
        avg(i.baseline) FILTER (i.scalar = 'value_margin') AS baseline_margin_mean,
        avg(i.intervened) FILTER (i.scalar = 'value_margin') AS ablated_margin_mean,
        avg(i.baseline) FILTER (i.scalar = 'correct') AS baseline_accuracy,
        avg(i.intervened) FILTER (i.scalar = 'correct') AS ablated_accuracy,
        count(*) FILTER (i.scalar = 'value_margin') AS num_query_events
    FROM interventions AS i
    JOIN chosen_events AS e USING (event)
    JOIN chosen_components AS c ON c.step = i.step AND c.component_id = i.intervention
    WHERE i.run = $run AND i.probe = $probe AND i.spec = $intervention_spec AND i.scalar IN ('value_margin', 'correct')
    GROUP BY GROUPING SETS ((i.step, i.intervention, e.split), (i.step, i.intervention))
)
SELECT
    m.step, m.split, c.component_type, m.component_id, c.layer, c.head,
    d.direct_margin_contribution_mean,
    c.mean_all_splits AS direct_margin_contribution_mean_all_splits,
    d.frozen_margin_contribution_mean,
    m.baseline_margin_mean, m.ablated_margin_mean,
    m.baseline_margin_mean - m.ablated_margin_mean AS margin_drop,
    m.baseline_accuracy, m.ablated_accuracy,
    m.baseline_accuracy - m.ablated_accuracy AS accuracy_drop,
    m.num_query_events
FROM measured AS m
JOIN chosen_components AS c USING (step, component_id)
JOIN component AS d USING (step, split, component_id)
ORDER BY m.step, m.split, c.component_type, c.layer, c.head

-- view: final_components
SELECT
    component_type, component_id, layer, head, direct_margin_contribution_mean, direct_margin_contribution_abs_mean,
    direct_margin_contribution_positive_fraction, frozen_margin_contribution_mean,
    frozen_margin_contribution_mean / nullif(baseline_margin_mean, 0) AS frozen_share_of_margin, baseline_margin_mean
FROM component
WHERE split = '__all__' AND step = (SELECT max(step) FROM checkpoint)
ORDER BY frozen_margin_contribution_mean DESC, component_type, layer, head

-- view: top_positive_components
SELECT * FROM final_components
WHERE component_type IN ('attention_head', 'mlp_block') AND direct_margin_contribution_mean > 0
ORDER BY direct_margin_contribution_mean DESC, component_type, layer, head
LIMIT 8

-- view: top_negative_components
SELECT * FROM final_components
WHERE component_type IN ('attention_head', 'mlp_block') AND direct_margin_contribution_mean < 0
ORDER BY direct_margin_contribution_mean, component_type, layer, head
LIMIT 8

-- view: final_stage_readout
SELECT stage, readout_margin_mean, readout_accuracy, num_query_events
FROM stage
WHERE split = '__all__' AND step = (SELECT max(step) FROM checkpoint)
ORDER BY stage_position, stage

-- view: final_ablation
SELECT * EXCLUDE (split)
FROM ablation
WHERE split = '__all__' AND step = (SELECT max(step) FROM ablation)
ORDER BY margin_drop DESC, component_type, layer, head

-- Does zeroing a component do what its attribution says?
-- view: ablation_agreement
SELECT
    count(*) AS components,
    count(*) FILTER (sign(margin_drop) = sign(direct_margin_contribution_mean)) AS same_sign,
    pearson(direct_margin_contribution_mean, margin_drop) AS correlation
FROM final_ablation

-- view: component_chart
SELECT step, component_id, component_type, direct_margin_contribution_mean
FROM component
WHERE split = '__all__' AND component_type IN ('attention_head', 'mlp_block')
ORDER BY step, component_type, layer, head

-- view: frozen_chart
SELECT step, component_id, frozen_margin_contribution_mean
FROM component
WHERE split = '__all__'
ORDER BY step, component_type, layer NULLS FIRST, head NULLS FIRST

-- view: stage_chart
SELECT step, stage, readout_margin_mean FROM stage WHERE split = '__all__' ORDER BY step, stage_position, stage

-- view: ablation_chart
SELECT step, component_id, direct_margin_contribution_mean, margin_drop
FROM ablation
WHERE split = '__all__'
ORDER BY step, component_type, layer, head

-- What an event asks of its attention pattern: where its roles stand, up to the prediction, as 1-based list indices.
-- view: event_places
SELECT
    e.event,
    min(r.position + 1) FILTER (r.role = 'support_key') AS support_key,
    min(r.position + 1) FILTER (r.role = 'support_value') AS support_value,
    min(r.position + 1) FILTER (r.role = 'support_op') AS support_op,
    list(r.position + 1 ORDER BY r.position) FILTER (r.role = 'key_distractors') AS key_distractors,
    list(r.position + 1 ORDER BY r.position) FILTER (r.role = 'value_distractors') AS value_distractors
FROM chosen_events AS e
LEFT JOIN (SELECT event, role, position FROM positions WHERE run = $run AND probe = $probe AND kind = 'role') AS r
    ON r.event = e.event AND r.position <= e.prediction_position
GROUP BY e.event
ORDER BY e.event

-- Roles of the partition, in the order of the definitions; an imported probe has its own.
-- view: partition_roles
WITH there AS (
    SELECT DISTINCT role FROM positions WHERE run = $run AND probe = $probe AND kind = 'partition'
),
named AS (
    SELECT unnest($partition_roles::VARCHAR[]) AS role, generate_subscripts($partition_roles::VARCHAR[], 1) AS place
),
own AS (SELECT count(*) = 0 AS symbolic FROM there WHERE role NOT IN (SELECT role FROM named))
SELECT role, place FROM named, own WHERE symbolic
UNION ALL
SELECT role, row_number() OVER (ORDER BY role) AS place FROM there, own WHERE NOT symbolic
ORDER BY place

-- The partition role of every position of an event, as a list beside its attention pattern.
-- view: event_partition
SELECT p.event, list(r.place::UTINYINT ORDER BY p.position) AS places
FROM positions AS p
JOIN partition_roles AS r USING (role)
WHERE p.run = $run AND p.probe = $probe AND p.kind = 'partition' AND p.event IN (SELECT event FROM chosen_events)
GROUP BY p.event
ORDER BY p.event

-- Pattern and places are unnested side by side: no join over key positions. A pattern is of one file, so its sums do not
-- depend on the number of threads.
-- view: role_masses
SELECT
    step, layer, head, place,
    sum(probability::DOUBLE) AS mass,
    -sum(CASE WHEN probability > 0 THEN probability::DOUBLE * ln(probability::DOUBLE) ELSE 0 END) AS entropy
FROM (
    SELECT a.step, a.layer, a.head, unnest(a.probabilities) AS probability, unnest(e.places) AS place
    FROM attention_patterns AS a
    JOIN event_partition AS e USING (event)
    WHERE a.run = $run AND a.probe = $probe AND a.query_role = 'prediction' AND list_contains($steps, a.step)
)
GROUP BY step, layer, head, place

-- Means over events of attention and scores at the support and at the strongest distractor, and of the OV write.
-- view: head_means
WITH head_events AS (
    SELECT
        a.step, a.layer, a.head, a.event,
        a.probabilities[e.support_key]::DOUBLE AS support_key_attention,
        a.probabilities[e.support_value]::DOUBLE AS support_value_attention,
        a.probabilities[e.support_op]::DOUBLE AS support_op_attention,
        coalesce(list_max(list_select(a.probabilities, e.key_distractors))::DOUBLE, 0) AS key_distractor_attention_max,
        coalesce(list_max(list_select(a.probabilities, e.value_distractors))::DOUBLE, 0) AS value_distractor_attention_max,
        a.scores[e.support_key]::DOUBLE - list_max(list_select(a.scores, e.key_distractors)) AS support_key_qk_margin,
        a.scores[e.support_value]::DOUBLE - list_max(list_select(a.scores, e.value_distractors)) AS support_value_qk_margin
    FROM attention_patterns AS a
    JOIN event_places AS e USING (event)
    WHERE a.run = $run AND a.probe = $probe AND a.query_role = 'prediction' AND list_contains($steps, a.step)
)
SELECT
    h.step, h.layer, h.head,
    count(*) AS num_examples,
    avg(h.support_key_attention) AS support_key_attention_mean,
    avg(h.support_value_attention) AS support_value_attention_mean,
    avg(h.support_op_attention) AS support_op_attention_mean,
    avg(h.key_distractor_attention_max) AS key_distractor_attention_max_mean,
    avg(h.value_distractor_attention_max) AS value_distractor_attention_max_mean,
    avg(h.support_key_qk_margin) AS support_key_qk_margin_mean,
    avg(h.support_value_qk_margin) AS support_value_qk_margin_mean,
    avg(h.support_key_attention - h.key_distractor_attention_max) AS support_key_attention_margin_mean,
    avg(h.support_value_attention - h.value_distractor_attention_max) AS support_value_attention_margin_mean,
    avg(w.answer_logit) AS ov_value_score_mean,
    avg(w.value_margin) AS ov_value_margin_mean,
    avg(h.support_value_attention * w.answer_logit) AS attended_ov_value_score_mean,
    avg(h.support_value_attention * w.value_margin) AS attended_ov_value_margin_mean
FROM head_events AS h
LEFT JOIN (
    SELECT step, event, layer, head, answer_logit, value_margin
    FROM head_writes
    WHERE run = $run AND probe = $probe AND query_role = 'prediction' AND role = 'support_value' AND list_contains($steps, step)
) AS w USING (step, layer, head, event)
GROUP BY h.step, h.layer, h.head
ORDER BY h.step, h.layer, h.head

-- view: role_attention_means
SELECT
    m.step, m.layer, m.head, r.place, r.role,
    coalesce(s.mass, 0) / m.num_examples AS attention
FROM head_means AS m
CROSS JOIN partition_roles AS r
LEFT JOIN role_masses AS s USING (step, layer, head, place)
ORDER BY m.step, m.layer, m.head, r.place

-- view: entropies
SELECT s.step, s.layer, s.head, list_sum(list(s.entropy ORDER BY s.place)) / any_value(m.num_examples) AS attention_entropy_mean
FROM role_masses AS s
JOIN head_means AS m USING (step, layer, head)
GROUP BY s.step, s.layer, s.head

-- view: spectra
SELECT
    step, layer, head,
    list(singular_value ORDER BY rank) FILTER (matrix = 'W_QK') AS qk_singular_values,
    list(singular_value ORDER BY rank) FILTER (matrix = 'W_OV') AS ov_singular_values
FROM singular_values
WHERE run = $run AND list_contains($steps, step) AND matrix IN ('W_QK', 'W_OV') AND rank <= 5
GROUP BY step, layer, head

-- Per step and head: how much of each first direction lies in the identity subspace of keys or values, the tokens it points
-- to, and those subspaces.
-- arrays: head_directions

-- rows: rows
SELECT
    m.step, m.layer, m.head, format('L{}H{}', m.layer, m.head) AS head_label, m.num_examples,
    m.support_key_attention_mean, m.support_value_attention_mean, m.support_op_attention_mean,
    m.key_distractor_attention_max_mean, m.value_distractor_attention_max_mean,
    m.support_key_qk_margin_mean, m.support_value_qk_margin_mean,
    m.support_key_attention_margin_mean, m.support_value_attention_margin_mean,
    e.attention_entropy_mean,
    m.ov_value_score_mean, m.ov_value_margin_mean, m.attended_ov_value_score_mean, m.attended_ov_value_margin_mean,
    d.qk_query_key_subspace_alignment, d.qk_key_key_subspace_alignment,
    d.ov_input_value_subspace_alignment, d.ov_output_value_subspace_alignment,
    r.role_attention_mean,
    {
        'qk_singular_values': s.qk_singular_values,
        'ov_singular_values': s.ov_singular_values,
        'subspace_alignment': {
            'qk_query_key_subspace_alignment': d.qk_query_key_subspace_alignment,
            'qk_key_key_subspace_alignment': d.qk_key_key_subspace_alignment,
            'ov_input_value_subspace_alignment': d.ov_input_value_subspace_alignment,
            'ov_output_value_subspace_alignment': d.ov_output_value_subspace_alignment
        },
        'qk_query_direction_top_tokens': d.qk_query_direction_top_tokens,
        'qk_key_direction_top_tokens': d.qk_key_direction_top_tokens,
        'ov_input_direction_top_tokens': d.ov_input_direction_top_tokens,
        'ov_output_direction_top_tokens': d.ov_output_direction_top_tokens
    } AS svd
FROM head_means AS m
JOIN entropies AS e USING (step, layer, head)
JOIN (
    SELECT step, layer, head, map(list(role ORDER BY place), list(attention ORDER BY place)) AS role_attention_mean
    FROM role_attention_means
    GROUP BY step, layer, head
) AS r USING (step, layer, head)
LEFT JOIN spectra AS s USING (step, layer, head)
LEFT JOIN head_directions AS d USING (step, layer, head)
ORDER BY m.step, m.layer, m.head

-- rows: checkpoint
SELECT
    o.step,
    count(*) AS num_query_events,
    avg(o.correct::INTEGER) AS answer_accuracy,
    avg(o.value_margin) AS answer_value_margin_mean,
    any_value(i.embedding_subspaces) AS embedding_subspaces
FROM readouts AS o
LEFT JOIN (SELECT step, any_value(embedding_subspaces) AS embedding_subspaces FROM head_directions GROUP BY step) AS i
    USING (step)
WHERE o.run = $run AND o.probe = $probe AND o.stage = 'logits' AND list_contains($steps, o.step)
    AND o.event IN (SELECT event FROM chosen_events)
GROUP BY o.step
ORDER BY o.step

-- First step at which QK margin, attention margin and attended OV margin of a head are all positive; null if none is.
-- view: first_positive_joint_geometry
SELECT
    layer, head, any_value(head_label) AS head_label,
    min(step) FILTER (
        support_value_qk_margin_mean > 0 AND support_value_attention_margin_mean > 0 AND attended_ov_value_margin_mean > 0
    ) AS first_step
FROM rows
GROUP BY layer, head
ORDER BY layer, head

-- view: final_heads
SELECT
    r.head_label, r.support_value_attention_mean, r.support_value_qk_margin_mean, r.support_value_attention_margin_mean,
    r.attended_ov_value_margin_mean, r.attention_entropy_mean, r.qk_key_key_subspace_alignment,
    r.ov_output_value_subspace_alignment, j.first_step AS first_joint_step
FROM rows AS r
JOIN first_positive_joint_geometry AS j USING (layer, head)
WHERE r.step = (SELECT max(step) FROM rows)
ORDER BY r.support_value_attention_mean DESC NULLS LAST, r.layer, r.head
LIMIT 12

-- view: top_final_heads
WITH measured AS (
    UNPIVOT (
        SELECT
            layer, head, head_label,
            support_value_attention_mean AS by_support_value_attention,
            support_value_qk_margin_mean AS by_support_value_qk_margin,
            qk_key_key_subspace_alignment AS by_qk_key_subspace_alignment,
            attended_ov_value_margin_mean AS by_attended_ov_value_margin,
            ov_output_value_subspace_alignment AS by_ov_output_value_subspace_alignment,
            attention_entropy_mean AS by_low_entropy
        FROM rows
        WHERE step = (SELECT max(step) FROM rows)
    )
    ON COLUMNS('by_.*') INTO NAME ranking VALUE value
)
SELECT
    ranking,
    row_number() OVER (
        PARTITION BY ranking ORDER BY CASE WHEN ranking = 'by_low_entropy' THEN value ELSE -value END, layer, head
    ) AS place,
    layer, head, head_label, value
FROM measured
QUALIFY place <= 8
ORDER BY ranking, place

-- view: top_heads_by_place
SELECT
    place,
    any_value(shown) FILTER (ranking = 'by_support_value_attention') AS by_support_value_attention,
    any_value(shown) FILTER (ranking = 'by_support_value_qk_margin') AS by_support_value_qk_margin,
    any_value(shown) FILTER (ranking = 'by_qk_key_subspace_alignment') AS by_qk_key_subspace_alignment,
    any_value(shown) FILTER (ranking = 'by_attended_ov_value_margin') AS by_attended_ov_value_margin,
    any_value(shown) FILTER (ranking = 'by_ov_output_value_subspace_alignment') AS by_ov_output_value_subspace_alignment,
    any_value(shown) FILTER (ranking = 'by_low_entropy') AS by_low_entropy
FROM (SELECT *, format('{} ({:.3g})', head_label, value) AS shown FROM top_final_heads)
GROUP BY place
ORDER BY place

-- view: head_trajectories
SELECT
    step, head_label, support_value_qk_margin_mean, qk_key_key_subspace_alignment, attended_ov_value_margin_mean,
    ov_output_value_subspace_alignment
FROM rows
ORDER BY step, layer, head

-- Heads that look at the support value most, in layer order.
-- view: role_attention_chart
SELECT format('L{}H{}', a.layer, a.head) AS head_label, a.role, a.attention
FROM role_attention_means AS a
JOIN (
    SELECT layer, head
    FROM rows
    WHERE step = (SELECT max(step) FROM rows)
    ORDER BY support_value_attention_mean DESC NULLS LAST, layer, head
    LIMIT 48
) AS chosen USING (layer, head)
WHERE a.step = (SELECT max(step) FROM rows)
ORDER BY a.layer, a.head, a.place

-- view: checkpoint_chart
SELECT step, 'accuracy' AS panel, 'accuracy' AS series, answer_accuracy AS value, 1 AS place FROM checkpoint
UNION ALL
SELECT step, 'margin', 'margin', answer_value_margin_mean, 2 FROM checkpoint
UNION ALL
SELECT step, 'heads', 'best QK margin', max(support_value_qk_margin_mean), 3 FROM rows GROUP BY step
UNION ALL
SELECT step, 'heads', 'best attended OV margin', max(attended_ov_value_margin_mean), 4 FROM rows GROUP BY step
ORDER BY place, step

-- What competes with the answer in each run; at equal logits the token that comes first.
-- view: scored_runs
SELECT
    r.step, $basis_rank[list_position($specs, r.spec)] AS basis_rank, m.place, r.eval_kind, r.source_event,
    r.competitor_logits,
    r.answer_logit::DOUBLE AS answer_logit,
    list_max(r.competitor_logits)::DOUBLE AS best_wrong_logit,
    list_position(r.competitor_logits, list_max(r.competitor_logits)) AS best_wrong_at,
    r.answer_log_prob::DOUBLE AS answer_log_prob,
    (r.answer_logit > list_max(r.competitor_logits)
        OR (r.answer_logit = list_max(r.competitor_logits) AND m.answer_token < m.competitors[best_wrong_at])
    )::DOUBLE AS value_accuracy
FROM value_code_runs AS r
JOIN measured_events AS m ON m.event = r.event
WHERE r.run = $run AND r.probe = $probe AND list_contains($specs, r.spec) AND list_contains($steps, r.step)

-- view: final_values
SELECT
    step, place, answer_logit - best_wrong_logit AS value_margin, value_accuracy
FROM scored_runs
WHERE eval_kind = 'clean' AND basis_rank = $basis_rank[1]

-- Every run beside the clean one and the one without the code, scalar by scalar.
-- view: compared_runs
WITH compared AS (
    SELECT
        p.step, p.basis_rank, p.place, p.eval_kind, p.source_event,
        [c.answer_logit, c.answer_logit - c.best_wrong_logit, c.answer_logit - c.best_wrong_logit,
            c.answer_logit - c.competitor_logits[r.best_wrong_at], c.answer_log_prob, c.value_accuracy] AS clean,
        [r.answer_logit, r.answer_logit - r.best_wrong_logit, r.answer_logit - r.competitor_logits[c.best_wrong_at],
            r.answer_logit - r.best_wrong_logit, r.answer_log_prob, r.value_accuracy] AS removed,
        [p.answer_logit, p.answer_logit - p.best_wrong_logit, p.answer_logit - p.competitor_logits[c.best_wrong_at],
            p.answer_logit - p.competitor_logits[r.best_wrong_at], p.answer_log_prob, p.value_accuracy] AS patched
    FROM scored_runs AS p
    JOIN scored_runs AS c
        ON c.step = p.step AND c.basis_rank = p.basis_rank AND c.place = p.place AND c.eval_kind = 'clean'
    JOIN scored_runs AS r
        ON r.step = p.step AND r.basis_rank = p.basis_rank AND r.place = p.place
        AND r.eval_kind = 'target_subspace_removed'
    WHERE p.eval_kind NOT IN ('clean', 'target_subspace_removed')
)
SELECT
    step, basis_rank, place, eval_kind, source_event,
    unnest(range(1, 7)) AS scalar_order,
    unnest($scalars) AS scalar_name,
    unnest(clean) AS clean_scalar,
    unnest(removed) AS target_subspace_removed_scalar,
    unnest(patched) AS patched_scalar
FROM compared

-- rows: rescue_rows
SELECT
    $lake || '#' || $run || '/' || p.step AS checkpoint,
    format('step_{:06d}', p.step) AS checkpoint_name,
    p.step AS checkpoint_step,
    p.basis_rank, p.eval_kind, e.sample_id, e.split, e.query_index,
    $source_stage AS source_stage, $target_stage AS target_stage,
    $source_position_role AS source_position_role, $target_position_role AS target_position_role,
    $group_by AS group_by, e.answer_value_token_id, e.answer_value_token,
    p.scalar_name, p.clean_scalar, p.target_subspace_removed_scalar, p.patched_scalar,
    p.clean_scalar - p.target_subspace_removed_scalar AS total_drop,
    p.patched_scalar - p.target_subspace_removed_scalar AS rescue,
    p.clean_scalar - p.patched_scalar AS unrecovered,
    CASE WHEN abs(total_drop) > 1e-12 THEN rescue / total_drop END AS rescue_fraction,
    abs(unrecovered) < abs(total_drop) AS improved_by_patch,
    CASE WHEN p.eval_kind LIKE '%shuffled_answer_value' THEN o.answer_token = e.answer_value_token_id END
        AS source_has_same_answer
FROM compared_runs AS p
JOIN event_facts AS e ON e.place = p.place
LEFT JOIN measured_events AS o ON o.event = p.source_event
ORDER BY p.step, p.basis_rank, list_position($eval_kinds, p.eval_kind), p.place, p.scalar_order

-- rows: summary_rows
SELECT
    checkpoint_step, basis_rank, eval_kind, scalar_name,
    count(*) AS num_rows,
    avg(clean_scalar) AS mean_clean_scalar,
    avg(target_subspace_removed_scalar) AS mean_target_subspace_removed_scalar,
    avg(patched_scalar) AS mean_patched_scalar,
    avg(total_drop) AS mean_total_drop,
    avg(rescue) AS mean_rescue,
    avg(unrecovered) AS mean_unrecovered,
    CASE WHEN abs(avg(total_drop)) > 1e-12 THEN avg(rescue) / avg(total_drop) END AS mean_rescue_fraction_from_means,
    avg(rescue_fraction) AS mean_rescue_fraction_per_row,
    count(rescue_fraction) AS num_rescue_fraction_rows,
    avg(improved_by_patch::INTEGER) AS improved_fraction,
    r_squared(total_drop, rescue) AS rescue_vs_drop_r_squared,
    avg((total_drop > 0)::INTEGER) AS dropped_fraction,
    avg(source_has_same_answer::INTEGER) AS source_has_same_answer_fraction
FROM rescue_rows
GROUP BY checkpoint_step, basis_rank, eval_kind, scalar_name
ORDER BY checkpoint_step, basis_rank, list_position($eval_kinds, eval_kind), list_position($scalars, scalar_name)

-- rows: subspace_rows
SELECT
    $lake || '#' || $run || '/' || b.step AS checkpoint,
    format('step_{:06d}', b.step) AS checkpoint_name,
    b.step AS checkpoint_step,
    b.basis_rank, b.basis_role,
    b.stage || ' ' || b.position_role AS role, b.position_role AS context_role, b.group_by,
    b.num_vectors, len(b.tokens) AS num_unique_tokens, b.tokens, b.ambient_dim, b.basis_rank AS pca_rank,
    b.identity_centered_rank, b.identity_singular_values, b.all_vector_centered_rank, b.all_vector_singular_values,
    CASE b.basis_role WHEN 'prediction_context_identity' THEN b.stage END AS context_stage,
    CASE b.basis_role WHEN 'prediction_context_identity' THEN b.position_role END AS context_position_role
FROM value_code_bases AS b
WHERE b.run = $run AND b.probe = $probe AND list_contains($specs, b.spec) AND list_contains($steps, b.step)
    -- The context's basis is the same whatever the rank of the ends.
    AND (b.basis_role <> 'prediction_context_identity' OR b.spec = $specs[1])
ORDER BY b.step, list_position($basis_rank, b.basis_rank), list_position($basis_roles, b.basis_role)

-- view: headline
SELECT *
FROM summary_rows
WHERE scalar_name = 'fixed_clean_competitor_margin'
ORDER BY checkpoint_step, basis_rank, list_position($eval_kinds, eval_kind)

-- The transfer beside the best of its controls; with context, the one with both beside the best of those and of either alone.
-- view: against_controls
WITH contested AS (
    SELECT checkpoint_step, basis_rank, 'true_transfer' AS transfer, eval_kind, mean_rescue_fraction_from_means AS share
    FROM headline
    WHERE eval_kind = 'true_transfer' OR list_contains($controls, eval_kind)
    UNION ALL
    SELECT checkpoint_step, basis_rank, 'source_plus_context', eval_kind, mean_rescue_fraction_from_means
    FROM headline
    WHERE (eval_kind IN ('true_transfer', 'context_only') OR starts_with(eval_kind, 'source_plus_context'))
        AND NOT ends_with(eval_kind, '_not_refit')
)
SELECT
    checkpoint_step, basis_rank, transfer,
    max(share) FILTER (eval_kind = transfer) AS fraction,
    max(share) FILTER (eval_kind <> transfer) AS other_fraction,
    arg_max(eval_kind, share) FILTER (eval_kind <> transfer) AS other,
    -- What gives back more than all is no better for it, and a few points are noise.
    least(fraction, 1) > coalesce(least(other_fraction, 1) + 0.05, '-infinity'::DOUBLE) AS is_ahead
FROM contested
GROUP BY checkpoint_step, basis_rank, transfer
HAVING count(*) FILTER (eval_kind = transfer) > 0
ORDER BY checkpoint_step, basis_rank, transfer DESC

-- view: top_summary
SELECT
    checkpoint_step, basis_rank, eval_kind, any_value(num_rows) AS num_rows,
    any_value(mean_total_drop) FILTER (scalar_name = 'fixed_clean_competitor_margin') AS total_drop,
    any_value(mean_rescue_fraction_from_means) FILTER (scalar_name = 'fixed_clean_competitor_margin') AS fixed_clean,
    any_value(mean_rescue_fraction_from_means) FILTER (scalar_name = 'fixed_removed_competitor_margin') AS fixed_removed,
    any_value(mean_rescue_fraction_from_means) FILTER (scalar_name = 'value_margin') AS moving,
    any_value(mean_rescue_fraction_from_means) FILTER (scalar_name = 'correct_value_logit') AS logit,
    any_value(mean_rescue_fraction_from_means) FILTER (scalar_name = 'negative_answer_loss') AS log_prob,
    any_value(mean_patched_scalar) FILTER (scalar_name = 'value_accuracy') AS value_accuracy
FROM summary_rows
GROUP BY checkpoint_step, basis_rank, eval_kind
ORDER BY checkpoint_step DESC, basis_rank DESC, list_position($eval_kinds, eval_kind)
LIMIT $markdown_top_k_rows

-- view: margin_chart
WITH runs AS (
    SELECT checkpoint_step AS step, basis_rank, 'clean' AS run, mean_clean_scalar AS margin, 0 AS run_order
    FROM headline
    WHERE eval_kind = 'true_transfer'
    UNION ALL
    SELECT checkpoint_step, basis_rank, 'code removed', mean_target_subspace_removed_scalar, 1
    FROM headline
    WHERE eval_kind = 'true_transfer'
    UNION ALL
    SELECT checkpoint_step, basis_rank, eval_kind, mean_patched_scalar, 1 + list_position($eval_kinds, eval_kind)
    FROM headline
    WHERE eval_kind IN ('true_transfer', 'source_plus_context')
)
SELECT step, 'rank ' || basis_rank AS panel, run, margin
FROM runs
ORDER BY list_position($basis_rank, basis_rank), step, run_order

-- A fraction of next to nothing, or of a gain, is left out.
-- view: rescue_chart
SELECT
    checkpoint_step AS step,
    'rank ' || basis_rank
        || CASE WHEN starts_with(eval_kind, 'source_plus') OR eval_kind = 'context_only' THEN ', with context' ELSE '' END
        AS panel,
    replace(eval_kind, 'source_plus_context_', '') AS kind,
    least(greatest(mean_rescue_fraction_from_means, -0.5), 1.5) AS rescue_fraction
FROM headline
WHERE eval_kind <> 'oracle_actual_projected' AND NOT ends_with(eval_kind, '_not_refit')
QUALIFY mean_total_drop >= 0.05 * max(mean_total_drop) OVER (PARTITION BY basis_rank) AND mean_total_drop > 0
ORDER BY list_position($basis_rank, basis_rank), panel, step, list_position($eval_kinds, eval_kind)

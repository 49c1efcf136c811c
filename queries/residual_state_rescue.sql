-- rows: rescue_rows
SELECT
    r.source_step, r.target_step, r.pair_id, r.pair_type, r.split, r.margin_side, r.scalar_name, r.endpoint_kind, r.step,
    format('step_{:06d}', r.step) AS checkpoint,
    r.source_component, x.patch_at AS patch_stage, nullif(x.role, '') AS position_role,
    r.clean_scalar, r.source_ablated_scalar, r.patched_scalar, r.total_drop, r.rescue, r.unrecovered,
    r.absolute_unrecovered, r.improved_by_patch
FROM rescues AS r
JOIN patches AS x USING (place)
JOIN listed_pairs AS p USING (pair_id)
ORDER BY
    r.source_step, r.endpoint_kind, list_position($margin_side, r.margin_side), p.scan_order,
    list_position($scalar, r.scalar_name), r.place

-- rows: summary_rows
SELECT
    s.scalar_name, s.endpoint_kind, x.source_component, x.patch_at AS patch_stage, nullif(x.role, '') AS position_role,
    s.* EXCLUDE (scalar_name, endpoint_kind, place, step)
FROM rescue_statistics AS s
JOIN patches AS x USING (place)
WHERE s.step IS NULL
ORDER BY list_position($scalar, s.scalar_name), s.endpoint_kind, s.place

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
ORDER BY scan_order

-- Whether the stage is one that the source's write has reached.
-- view: plumbing
SELECT
    coalesce(max(r.absolute_unrecovered) FILTER (patched.position >= written.position), 0) AS after,
    coalesce(max(abs(r.rescue)) FILTER (patched.position < written.position), 0) AS before
FROM rescues AS r
JOIN patches AS x USING (place)
JOIN stages AS patched ON patched.run = $run AND patched.stage = x.patch_at
JOIN stages AS written ON written.run = $run AND written.stage = x.written_at
WHERE x.role = ''

-- At the last step, before the last attention if any is: after it no position but the prediction is read.
-- view: places
SELECT
    h.source_component, h.patch, h.place, h.mean_rescue_fraction_from_means AS fraction,
    patched.position < (SELECT max(position) FROM stages WHERE run = $run AND stage LIKE '%post_attn')
        AS is_before_last_attention
FROM headline AS h
JOIN patches AS x USING (place)
JOIN stages AS patched ON patched.run = $run AND patched.stage = x.patch_at
WHERE h.step = (SELECT max(step) FROM headline) AND h.has_something_to_rescue
QUALIFY is_before_last_attention = max(is_before_last_attention) OVER ()
ORDER BY h.place

-- view: top_summary
SELECT x.patch, s.*
FROM summary_rows AS s
JOIN patches AS x
    ON x.source_component = s.source_component AND x.patch_at = s.patch_stage AND x.role = coalesce(s.position_role, '')
ORDER BY
    s.endpoint_kind <> $chart_endpoint, s.scalar_name <> $headline_scalar, list_position($scalar, s.scalar_name), x.place
LIMIT $markdown_top_k_rows

-- view: fraction_cells
SELECT row_label AS "row", patch AS "column", mean_rescue_fraction_from_means AS value
FROM cells
WHERE has_something_to_rescue AND row_place <= $plot_top_k_rows
ORDER BY row_place, place

-- view: unrecovered_cells
SELECT row_label AS "row", patch AS "column", mean_abs_unrecovered AS value
FROM cells
WHERE row_place <= $plot_top_k_rows
ORDER BY row_place, place

-- rows: rescue_rows
SELECT
    r.source_step, r.target_step, r.endpoint_kind, r.pair_id, r.pair_type, r.split, r.margin_side, r.scalar_name,
    r.source_component, r.patch AS patch_component, r.patch AS patch_group_id, string_split(r.patch, '+') AS patch_components,
    x.patch_at AS patch_stage, string_split(x.patch_at, '+') AS patch_stages,
    r.clean_scalar, r.source_ablated_scalar, r.patched_scalar, r.total_drop, r.rescue, r.unrecovered,
    CASE WHEN abs(r.total_drop) > 1e-12 THEN r.rescue / r.total_drop END AS rescue_fraction, r.improved_by_patch
FROM rescues AS r
JOIN patches AS x USING (place)
JOIN listed_pairs AS p USING (pair_id)
ORDER BY
    r.source_step, r.endpoint_kind, list_position($margin_side, r.margin_side), p.scan_order,
    list_position($scalar, r.scalar_name), r.place

-- rows: summary_rows
SELECT
    s.scalar_name, s.endpoint_kind, x.source_component, x.patch AS patch_component, x.patch_at AS patch_stage,
    s.* EXCLUDE (scalar_name, endpoint_kind, place, step)
FROM rescue_statistics AS s
JOIN patches AS x USING (place)
WHERE s.step IS NULL
ORDER BY list_position($scalar, s.scalar_name), s.endpoint_kind, s.place

-- rows: pair_rows
SELECT * EXCLUDE (scan_order)
FROM listed_pairs
ORDER BY scan_order

-- view: top_summary
SELECT *
FROM summary_rows
ORDER BY
    endpoint_kind <> $chart_endpoint, scalar_name <> $headline_scalar, list_position($scalar, scalar_name),
    list_position($source_component, source_component), mean_rescue_fraction_from_means DESC NULLS LAST, patch_component
LIMIT $markdown_top_k_rows

-- view: fraction_cells
SELECT row_label AS "row", patch AS "column", mean_rescue_fraction_from_means AS value
FROM cells
WHERE has_something_to_rescue
ORDER BY row_place, place

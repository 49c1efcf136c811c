"""The views that every attribution report begins with: intervals, cells of pairs, groups of parameters, contributions.

Sums are compensated (`fsum`), so that they do not depend on the number of threads.
"""

from __future__ import annotations

from ..lake.schema_attributions import UPDATE_FIELDS, UPDATE_SUMS

_SPECS = """\
-- The scalars the report is about, with the parameters each was made with.
-- view: attributed_scalars
SELECT unnest($spec) AS spec, unnest($spec_parameters)::JSON AS scalar_parameters
"""

INTERVALS = """\
-- Between neighbouring steps. The learning rate is that of the schedule at the source; a recorded step has its own.
-- view: intervals
WITH ends AS (
  SELECT step AS source_step, lead(step) OVER (ORDER BY step) AS target_step
  FROM (SELECT unnest($steps)::BIGINT AS step)
)
SELECT
  e.source_step, e.target_step, e.target_step - e.source_step AS step_gap,
  format('step_{:06d}', e.source_step) AS source_checkpoint, format('step_{:06d}', e.target_step) AS target_checkpoint,
  s.learning_rate, t.step AS recorded_step, t.learning_rate AS trace_learning_rate, t.loss AS trace_loss,
  t.token_accuracy AS trace_token_accuracy, t.pre_clip_grad_norm, t.grad_clip_norm, t.clip_coefficient,
  t.batch_size, t.query_event_count
FROM ends AS e
LEFT JOIN steps AS s ON s.run = $run AND s.step = e.source_step
LEFT JOIN training_steps AS t ON t.run = $run AND t.step = e.target_step AND e.target_step = e.source_step + 1
WHERE e.target_step IS NOT NULL
ORDER BY e.source_step
"""

LISTED_PAIRS = """\
-- Pairs as the reports list them, in scan order.
-- view: listed_pairs
SELECT
  pair_id, pair_type, split, source_sample_id, source_query_index, clean_answer_value, corrupted_answer_value,
  clean_transfer_token, corrupted_transfer_token, mutation, row_number() OVER (
    ORDER BY clean_event, list_position($pair_type, pair_type)
  ) AS scan_order
FROM chosen_pairs
"""

_CELLS = """\
-- Pairs that are averaged together. What is stored names a split or a type only where there are several.
-- view: cells
WITH counted AS (SELECT count(DISTINCT split) AS splits, count(DISTINCT pair_type) AS types FROM chosen_pairs)
SELECT
  s.split, t.pair_type,
  CASE WHEN splits = 1 THEN '__all__' ELSE s.split END AS stored_split,
  CASE WHEN types = 1 THEN '__all__' ELSE t.pair_type END AS stored_pair_type
FROM
  counted,
  (SELECT '__all__' AS split UNION SELECT split FROM chosen_pairs) AS s,
  (SELECT '__all__' AS pair_type UNION SELECT pair_type FROM chosen_pairs) AS t
WHERE EXISTS (
  FROM chosen_pairs AS p
  WHERE s.split IN ('__all__', p.split) AND t.pair_type IN ('__all__', p.pair_type)
)
ORDER BY ALL

-- view: cell_pairs
SELECT c.split, c.pair_type, p.pair_id
FROM cells AS c
JOIN chosen_pairs AS p ON c.split IN ('__all__', p.split) AND c.pair_type IN ('__all__', p.pair_type)

-- view: pair_changes
SELECT
  c.spec, c.source_step, c.target_step, c.pair_id, c.split, c.pair_type, c.quantity,
  c.source_value, c.target_value, c.target_value - c.source_value AS actual_delta, c.weight
FROM scalar_changes AS c
JOIN intervals AS i USING (source_step, target_step)
WHERE c.run = $run AND list_contains($spec, c.spec)
ORDER BY spec, source_step, pair_id, quantity

-- Cells by scalar: scalars of one report may be of different pairs.
-- view: scalar_cells
WITH held AS (SELECT DISTINCT spec, split, pair_type FROM pair_changes),
counted AS (
  SELECT spec, count(DISTINCT split) AS splits, count(DISTINCT pair_type) AS types FROM held GROUP BY spec
),
pooled AS (
  SELECT DISTINCT spec, unnest([split, split, '__all__', '__all__']) AS split,
    unnest([pair_type, '__all__', pair_type, '__all__']) AS pair_type
  FROM held
)
SELECT
  p.spec, p.split, p.pair_type,
  CASE WHEN c.splits = 1 THEN '__all__' ELSE p.split END AS stored_split,
  CASE WHEN c.types = 1 THEN '__all__' ELSE p.pair_type END AS stored_pair_type
FROM pooled AS p
JOIN counted AS c USING (spec)
ORDER BY ALL

-- Means over the pairs of a cell.
-- view: cell_changes
SELECT
  v.spec, v.source_step, v.target_step, p.split, p.pair_type, v.quantity,
  count(*) AS num_pairs,
  fsum(v.source_value * v.weight) / fsum(v.weight) AS source_value,
  fsum(v.target_value * v.weight) / fsum(v.weight) AS target_value,
  fsum(v.actual_delta * v.weight) / fsum(v.weight) AS actual_delta,
  favg(abs(v.actual_delta)) AS actual_delta_abs_mean,
  population_std(v.actual_delta) AS actual_delta_std,
  favg(abs(v.source_value)) AS source_value_abs_mean,
  population_std(v.source_value) AS source_value_std,
  population_std(v.target_value) AS target_value_std,
  fsum(v.source_value) AS source_sum
FROM pair_changes AS v
JOIN scalar_cells AS p ON p.spec = v.spec AND p.split IN ('__all__', v.split) AND p.pair_type IN ('__all__', v.pair_type)
GROUP BY ALL
ORDER BY ALL
"""

_GROUPS = """\
-- Groups of parameters, as the parts of the model they are put together from. A tied parameter is one, and counts once.
-- view: group_parts
WITH named AS (
  SELECT
    parameter, module, layer,
    CASE
      WHEN module IN ('token_embedding', 'position_embedding') THEN 'embedding'
      WHEN module LIKE '%.attention' THEN 'attention'
      WHEN module LIKE '%.mlp' THEN 'mlp'
      WHEN module IS NOT NULL THEN 'layernorm'
    END AS component_type
  FROM parameters
  WHERE run = $run
),
cut AS (
  SELECT DISTINCT slice_kind, slice, layer, head, neuron, split_part(slice, '.', 2) AS projection
  FROM slices
  WHERE run = $run AND slice_kind IN ('head_projection', 'neuron')
),
every AS (
  SELECT 'global:all_named_parameters' AS group_id, 'global_all' AS group_kind, 'all' AS component_type,
    NULL::INTEGER AS group_layer, NULL::INTEGER AS group_head, NULL AS group_projection, NULL::INTEGER AS group_neuron,
    'parameter' AS slice_kind, parameter AS slice
  FROM named
  UNION ALL
  SELECT 'parameter:' || parameter, 'parameter_tensor', component_type, layer, NULL, NULL, NULL, 'parameter', parameter
  FROM named
  UNION ALL
  SELECT 'module:' || module, 'module_block', component_type, layer, NULL, NULL, NULL, 'parameter', parameter
  FROM named
  WHERE module IS NOT NULL
  UNION ALL
  -- Queries, keys and values are cut whole into heads; the output projection has a bias that is no head's.
  SELECT format('attention_projection:L{}.{}', layer, projection), 'attention_projection', 'attention', layer, NULL,
    projection, NULL, slice_kind, slice
  FROM cut
  WHERE slice_kind = 'head_projection' AND projection <> 'out_proj'
  UNION ALL
  SELECT format('attention_projection:L{}.out_proj', layer), 'attention_projection', 'attention', layer, NULL, 'out_proj',
    NULL, 'parameter', parameter
  FROM slices
  WHERE run = $run AND slice_kind = 'projection' AND slice LIKE '%.out_proj'
  UNION ALL
  SELECT 'attention_head_projection:' || slice, 'attention_head_projection', 'attention', layer, head, projection, NULL,
    slice_kind, slice
  FROM cut
  WHERE slice_kind = 'head_projection'
  UNION ALL
  SELECT format('attention_head:L{}H{}.qkvo', layer, head), 'attention_head', 'attention', layer, head, NULL, NULL,
    slice_kind, slice
  FROM cut
  WHERE slice_kind = 'head_projection'
  UNION ALL
  SELECT 'mlp_neuron:' || slice, 'mlp_neuron', 'mlp', layer, NULL, NULL, neuron, slice_kind, slice
  FROM cut
  WHERE slice_kind = 'neuron'
)
SELECT
  * EXCLUDE (slice_kind, slice),
  CASE group_kind WHEN 'global_all' THEN group_kind ELSE group_kind || 's' END AS partition_name,
  slice_kind, slice
FROM every
WHERE list_contains($group_kinds, group_kind) OR list_contains($group_ids, group_id)
ORDER BY group_kind, group_id, slice_kind, slice

-- The parts that the groups are put together from, and every parameter: read once.
-- view: attributed_parts
SELECT a.* EXCLUDE (run, scalar, scalar_head, record_side)
FROM attribution_slices AS a
JOIN intervals AS i USING (source_step, target_step)
WHERE a.run = $run AND list_contains($spec, a.spec)
  AND (a.slice_kind = 'parameter' OR (a.slice_kind, a.slice) IN (SELECT (slice_kind, slice) FROM group_parts))

-- Gradient of a cell's mean, times the update and its terms, summed over a group; squared norms beside it.
-- view: contributions
SELECT
  a.spec, a.source_step, a.target_step, a.split, a.pair_type, a.point, g.group_id,
  any_value(a.num_pairs) AS num_pairs,
  sum(a.numel)::BIGINT AS num_selected_parameters,
  @CONTRIBUTED@
FROM attributed_parts AS a
JOIN group_parts AS g USING (slice_kind, slice)
JOIN update_slices AS u ON u.run = $run AND u.source_step = a.source_step AND u.target_step = a.target_step
  AND u.slice_kind = a.slice_kind AND u.slice = a.slice
GROUP BY a.spec, a.source_step, a.target_step, a.split, a.pair_type, a.point, g.group_id
ORDER BY a.spec, a.source_step, a.target_step, a.split, a.pair_type, a.point, g.group_id
"""
# For reports that list the groups.
DECOMPOSITION = """\
-- What a group selects, parameter by parameter.
-- view: groups
WITH selected AS (
  SELECT DISTINCT
    g.group_id, s.parameter, s.row_start, s.row_stop, s.column_start, s.column_stop,
    (s.row_stop - s.row_start) * coalesce(s.column_stop - s.column_start, 1) AS numel
  FROM group_parts AS g
  JOIN slices AS s ON s.run = $run AND s.slice_kind = g.slice_kind AND s.slice = g.slice
  UNION ALL
  SELECT
    g.group_id, p.parameter, 0, p.shape[1], CASE WHEN len(p.shape) > 1 THEN 0 END,
    CASE WHEN len(p.shape) > 1 THEN p.shape[2] END, p.numel
  FROM group_parts AS g
  JOIN parameters AS p ON p.run = $run AND g.slice_kind = 'parameter' AND p.parameter = g.slice
),
-- The heads' slices of a projection are the whole of it: one selection.
merged AS (
  SELECT
    group_id, parameter, min(row_start) AS row_start, max(row_stop) AS row_stop, min(column_start) AS column_start,
    max(column_stop) AS column_stop, sum(numel)::BIGINT AS numel
  FROM (
    SELECT s.*, CASE
      WHEN sum(s.numel) OVER (PARTITION BY s.group_id, s.parameter) < p.numel THEN (s.row_start, s.column_start)
    END AS part
    FROM selected AS s
    JOIN parameters AS p ON p.run = $run AND p.parameter = s.parameter
  )
  GROUP BY group_id, parameter, part
),
summed AS (
  SELECT
    s.group_id,
    count(*) AS selection_count,
    sum(s.numel)::BIGINT AS num_selected_parameters,
    list(
      {
        'parameter_name': s.parameter, 'parameter_shape': p.shape,
        'selector': CASE
          WHEN s.numel = p.numel THEN 'all'
          WHEN s.row_stop - s.row_start < p.shape[1] THEN format('rows {}:{}', s.row_start, s.row_stop)
          ELSE format('columns {}:{}', s.column_start, s.column_stop)
        END,
        'num_parameters': s.numel
      } ORDER BY p.position, s.row_start, s.column_start
    ) AS selections,
    list(DISTINCT tied ORDER BY tied) FILTER (tied IS NOT NULL) AS tied
  FROM merged AS s
  JOIN parameters AS p ON p.run = $run AND p.parameter = s.parameter
  LEFT JOIN (SELECT parameter, unnest(tied_to) AS tied FROM parameters WHERE run = $run) AS t ON t.parameter = s.parameter
  GROUP BY s.group_id
)
SELECT
  g.*, s.selection_count, s.num_selected_parameters, s.selections,
  CASE WHEN len(s.tied) > 0 THEN 'counts once, is also named ' || array_to_string(s.tied, ', ') END AS notes
FROM (SELECT DISTINCT * EXCLUDE (slice_kind, slice) FROM group_parts) AS g
JOIN summed AS s USING (group_id)
ORDER BY g.group_kind, g.group_id

-- First order, and along the path where it was asked for, side by side.
-- view: group_contributions
SELECT
  f.spec, f.source_step, f.target_step, f.split, f.pair_type, f.group_id,
  f.actual_update AS predicted_delta_contribution,
  path.actual_update AS integrated_delta_contribution,
  sqrt(f.actual_update_squared) AS parameter_delta_l2_norm,
  sqrt(f.gradient_squared) AS gradient_l2_norm,
  f.actual_update / nullif(sqrt(f.actual_update_squared * f.gradient_squared), 0) AS update_gradient_cosine
FROM contributions AS f
LEFT JOIN contributions AS path ON path.spec = f.spec AND path.source_step = f.source_step
  AND path.target_step = f.target_step AND path.split = f.split AND path.pair_type = f.pair_type
  AND path.group_id = f.group_id AND path.point = 'path'
WHERE f.point = 'source'
ORDER BY ALL
"""

# A relative error over a denominator that is at least `--min-error-denominator`.
_METRICS = """\
-- Parameters that the gradient does not reach, and what the tied ones would add if every name of theirs counted.
-- view: reached
SELECT
  a.spec, a.source_step, a.target_step, a.split, a.pair_type,
  list(a.slice ORDER BY p.position) FILTER (a.gradient_squared = 0) AS zero_names,
  coalesce(fsum(a.actual_update * len(p.tied_to)) FILTER (len(p.tied_to) > 0), 0) AS of_aliases
FROM attributed_parts AS a
JOIN parameters AS p ON p.run = $run AND p.parameter = a.slice
WHERE a.slice_kind = 'parameter' AND a.point = 'source'
GROUP BY ALL

-- The actual change of every cell beside the one its gradient predicts.
-- view: metrics
WITH global AS (FROM contributions WHERE group_id = 'global:all_named_parameters')
SELECT
  v.spec, v.source_step, v.target_step, v.split, v.pair_type, v.num_pairs,
  v.source_value, v.source_value_std, v.source_value_abs_mean, v.target_value, v.target_value_std,
  v.actual_delta, v.actual_delta_abs_mean, v.actual_delta_std,
  f.actual_update AS predicted_delta,
  v.actual_delta - f.actual_update AS residual,
  abs(v.actual_delta - f.actual_update) AS absolute_error,
  abs(v.actual_delta - f.actual_update) / greatest(abs(v.actual_delta), $min_error_denominator) AS relative_error,
  greatest(abs(v.actual_delta), $min_error_denominator) AS relative_error_denominator,
  abs(v.actual_delta - f.actual_update) / greatest(abs(f.actual_update), $min_error_denominator)
    AS predicted_relative_error,
  greatest(abs(f.actual_update), $min_error_denominator) AS predicted_relative_error_denominator,
  sign(v.actual_delta) = sign(f.actual_update) AS sign_match,
  f.actual_update + r.of_aliases AS predicted_delta_counting_aliases,
  path.actual_update AS integrated_delta,
  abs(v.actual_delta - path.actual_update) / greatest(abs(v.actual_delta), $min_error_denominator)
    AS integrated_relative_error,
  sqrt(f.actual_update_squared) AS parameter_delta_l2_norm,
  sqrt(f.gradient_squared) AS gradient_l2_norm,
  f.actual_update / nullif(sqrt(f.actual_update_squared * f.gradient_squared), 0) AS update_gradient_cosine,
  f.num_selected_parameters AS num_parameters,
  coalesce(len(r.zero_names), 0) AS zero_gradient_parameter_count,
  coalesce(r.zero_names, []) AS zero_gradient_parameter_names,
  c.stored_split, c.stored_pair_type
FROM cell_changes AS v
JOIN scalar_cells AS c ON c.spec = v.spec AND c.split = v.split AND c.pair_type = v.pair_type
JOIN global AS f ON f.spec = v.spec AND f.source_step = v.source_step AND f.target_step = v.target_step
  AND f.split = c.stored_split AND f.pair_type = c.stored_pair_type AND f.point = 'source'
LEFT JOIN global AS path ON path.spec = v.spec AND path.source_step = v.source_step AND path.target_step = v.target_step
  AND path.split = c.stored_split AND path.pair_type = c.stored_pair_type AND path.point = 'path'
LEFT JOIN reached AS r ON r.spec = v.spec AND r.source_step = v.source_step AND r.target_step = v.target_step
  AND r.split = c.stored_split AND r.pair_type = c.stored_pair_type
WHERE v.quantity = 'value'
ORDER BY v.spec, v.source_step, v.target_step, v.split, v.pair_type
"""

_CONTRIBUTED = ",\n  ".join(
    [f"fsum(a.{name}) AS {name}" for name in UPDATE_FIELDS]
    + ["fsum(a.gradient_squared) AS gradient_squared"]
    + [f"fsum(u.{name}_squared) AS {name}_squared" for name in (*UPDATE_FIELDS, *UPDATE_SUMS)]
)
PRELUDE = "\n".join(
    (_SPECS, INTERVALS, LISTED_PAIRS, _CELLS, _GROUPS.replace("@CONTRIBUTED@", _CONTRIBUTED), _METRICS)
)

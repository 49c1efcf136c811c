"""Views of reports on separations: mean score over support keys minus mean score over distractor keys, pair by pair."""

from __future__ import annotations

# Read by what follows `intervals` and `pair_changes` of `attribution_sql`.
SEPARATIONS = """\
-- A row per pair and interval: the separation and what it is made of, at both ends.
-- view: pair_separations
PIVOT pair_changes
ON quantity IN ('value', 'support_score_mean', 'distractor_score_mean', 'max_margin', 'support_beats_all', 'support_scores',
  'distractor_scores', 'support_attention_mean', 'distractor_attention_mean')
USING any_value(source_value) AS source, any_value(target_value) AS target
GROUP BY spec, source_step, target_step, split, pair_type, pair_id

-- By cell: means over pairs, which count equally; and means over scores, in which a pair with more keys counts more.
-- view: cell_separations
SELECT
  v.spec, v.source_step, v.target_step, p.split, p.pair_type,
  favg(support_score_mean_target - support_score_mean_source) AS support_delta_mean,
  favg(distractor_score_mean_target - distractor_score_mean_source) AS distractor_delta_mean,
  favg(max_margin_target - max_margin_source) AS max_margin_delta_mean,
  favg(support_beats_all_target - support_beats_all_source) AS support_beats_all_delta_mean,
  favg(support_attention_mean_source - distractor_attention_mean_source) AS source_attention_mean,
  favg(support_attention_mean_target - distractor_attention_mean_target) AS target_attention_mean,
  fsum(support_scores_source)::BIGINT AS num_support_scores,
  fsum(distractor_scores_source)::BIGINT AS num_distractor_scores,
  fsum(support_scores_source + distractor_scores_source)::BIGINT AS num_scores,
  favg(support_scores_source) AS support_scores_per_pair_mean,
  favg(distractor_scores_source) AS distractor_scores_per_pair_mean,
  fsum(support_score_mean_source * support_scores_source) / fsum(support_scores_source) AS source_support_score_mean,
  fsum(support_score_mean_target * support_scores_source) / fsum(support_scores_source) AS target_support_score_mean,
  fsum(distractor_score_mean_source * distractor_scores_source) / fsum(distractor_scores_source)
    AS source_distractor_score_mean,
  fsum(distractor_score_mean_target * distractor_scores_source) / fsum(distractor_scores_source)
    AS target_distractor_score_mean
FROM pair_separations AS v
JOIN cell_pairs AS p ON p.pair_id = v.pair_id
GROUP BY ALL
ORDER BY ALL
"""

QK_RANKS = """\
-- One scalar per rank, and per record side where a report has both.
-- view: labels
SELECT
  spec, rank, record_side, list_position($rank, rank) AS position, format('rank {}', rank) AS label
FROM (
  SELECT spec, (scalar_parameters->>'$.rank')::INTEGER AS rank, scalar_parameters->>'$.record_side' AS record_side
  FROM attributed_scalars
)

-- The spectrum that the basis was cut from, at the source.
-- view: spectra
SELECT
  b.spec, b.source_step, b.target_step,
  b.singular_values[1] AS qk_singular_value_top,
  list_sum(b.singular_values) AS qk_singular_value_sum,
  list_sum(b.singular_values[1:s.rank]) AS qk_singular_value_rank_sum,
  list_sum(b.singular_values[1:s.rank]) / list_sum(b.singular_values) AS qk_singular_value_rank_fraction,
  list_min(list_transform(range(1, len(b.singular_values)), lambda i: b.singular_values[i] - b.singular_values[i + 1]))
    AS qk_singular_value_min_gap
FROM scalar_bases AS b
JOIN labels AS s USING (spec)
JOIN intervals AS i USING (source_step, target_step)
WHERE b.run = $run
"""

"""What the two reports on downstream scalars share: which scalars, of which head, and where in the model a change was made.

The scalars themselves are `engine.scalars.downstream`; a test holds the names here against those there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from ..lake.schema_attributions import UPDATE_FIELDS
from .attribution_report import SeparationOptions
from .key_roles import KEY_RULE

if TYPE_CHECKING:
    from .pair_selection import RecordSide

DownstreamScalar = Literal[
    "attention_separation",
    "attention_mass_separation",
    "head_answer_logit_dla",
    "head_value_margin_dla",
    "support_ov_value_margin",
    "attended_support_ov_value_margin",
    "head_margin_dla_fixed_readout",
    "answer_margin",
    "negative_answer_loss",
    "support_mass_ov_value_margin",
    "qk_ov_product",
]
# All but the last two.
ALL_NINE: tuple[DownstreamScalar, ...] = get_args(DownstreamScalar)[:9]
HOW_TO_READ = (
    "S and D are the support and distractor keys up to the query, a the attention to them, s the score before the softmax, "
    "w what the head writes at the query (value bias in, output bias out), w_S what it would write from the mean value of "
    "S alone; vm(u) is u read by the raw unembedding, answer less its best competitor.",
    "`attention_separation` is mean_S a − mean_D a, `attention_mass_separation` the same of sums; `head_answer_logit_dla` "
    "reads w by the answer's unembedding, `head_value_margin_dla` is vm(w), `support_ov_value_margin` vm(w_S); `attended_` "
    "and `support_mass_` multiply that by mean_S a and sum_S a, `qk_ov_product` by mean_S s − mean_D s.",
    "`head_margin_dla_fixed_readout` is w times the gradient of the answer's margin in the last residual stage, taken at "
    "the source and held there at both ends: the readout does not move, so what changes is the write.",
    "`answer_margin` and `negative_answer_loss` are the model's own, at the prediction: no part of the head.",
    "A competitor is chosen anew at each end; the gradient at the source knows the source's. Where it switches "
    "(`competitor_switch_fraction`), first order is off.",
)
# Titles of panels, by the `unit` of view `labels`.
UNITS: Mapping[str, str] = {
    "attention": "attention",
    "logits": "logits",
    "nats": "nats",
    "product": "QK score × logits",
}

_NUMBERS = ",\n  ".join(f"fsum(p.sign * a.{name}) AS {name}" for name in UPDATE_FIELDS)
_VIEWS = f"""\
-- A scalar per record side.
-- view: labels
SELECT
  spec, scalar_name, record_side, list_position($scalar, scalar_name) AS position, scalar_name AS label,
  CASE
    WHEN scalar_name LIKE 'attention%' THEN 'attention'
    WHEN scalar_name = 'negative_answer_loss' THEN 'nats'
    WHEN scalar_name = 'qk_ov_product' THEN 'product'
    ELSE 'logits'
  END AS unit
FROM (
  SELECT spec, scalar_parameters->>'$.scalar' AS scalar_name, scalar_parameters->>'$.record_side' AS record_side
  FROM attributed_scalars
)

-- What goes with the values, by pair: null where a scalar has no competitor.
-- view: pair_scalars
PIVOT pair_changes
ON quantity IN ('value', 'answer_correct', 'support_scores', 'distractor_scores', 'best_wrong_token')
USING any_value(source_value) AS source, any_value(target_value) AS target
GROUP BY spec, source_step, target_step, split, pair_type, pair_id

-- view: cell_scalars
SELECT
  v.spec, v.source_step, v.target_step, p.split, p.pair_type,
  favg(answer_correct_source) AS source_accuracy,
  favg(answer_correct_target) AS target_accuracy,
  favg((best_wrong_token_source <> best_wrong_token_target)::INTEGER) AS competitor_switch_fraction,
  favg(support_scores_source) AS support_scores_per_pair_mean,
  favg(distractor_scores_source) AS distractor_scores_per_pair_mean
FROM pair_scalars AS v
JOIN cell_pairs AS p ON p.pair_id = v.pair_id
GROUP BY ALL
ORDER BY ALL

-- Where in the model: the head's four maps, then everything else. They are disjoint, and add up to the whole.
-- view: regions
WITH maps AS (
  SELECT $head_label || '.' || projection AS slice, region, place
  FROM (VALUES ('q_proj', 'W_Q', 1), ('k_proj', 'W_K', 2), ('v_proj', 'W_V', 3), ('out_proj', 'W_O', 4))
    AS of_head (projection, region, place)
)
SELECT 'head_projection' AS slice_kind, slice, region, place, 1 AS sign FROM maps
UNION ALL
SELECT 'head_projection', slice, 'other attention', 5, -1 FROM maps
UNION ALL
SELECT
  'parameter', parameter,
  CASE
    WHEN module LIKE '%.attention' THEN 'other attention'
    WHEN module LIKE '%.mlp' THEN 'MLPs'
    WHEN module IN ('token_embedding', 'position_embedding') THEN 'embeddings'
    ELSE 'LayerNorms'
  END,
  CASE
    WHEN module LIKE '%.attention' THEN 5
    WHEN module LIKE '%.mlp' THEN 6
    WHEN module IN ('token_embedding', 'position_embedding') THEN 7
    ELSE 8
  END,
  1
FROM parameters
WHERE run = $run

-- view: region_contributions
SELECT
  a.spec, a.source_step, a.target_step, a.split, a.pair_type, a.point, p.region, p.place,
  {_NUMBERS}
FROM attribution_slices AS a
JOIN intervals AS i USING (source_step, target_step)
JOIN regions AS p USING (slice_kind, slice)
WHERE a.run = $run AND list_contains($spec, a.spec)
GROUP BY ALL
ORDER BY ALL
"""


class DownstreamOptions(SeparationOptions):
    """Options of reports on downstream scalars of one head (definitions 2 §G, 3 §F)."""

    more_views: ClassVar[str] = f"{KEY_RULE}{_VIEWS}"

    scalar: tuple[DownstreamScalar, ...] = Field(
        ALL_NINE, min_length=1, description="scalar that is attributed; the first is the charts'"
    )

    @field_validator("scalar")
    @classmethod
    def _each_scalar_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def downstream_scalars(self, sides: Sequence[RecordSide]) -> list[tuple[str, Mapping[str, Any]]]:
        """One per record side and scalar."""
        return [
            (name, {**self.role_parameters(), "head": self.head_label, "record_side": side})
            for side in sides
            for name in self.scalar
        ]

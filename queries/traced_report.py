"""What reports on recorded steps share: intervals of one step, the optimizer's settings, the components of the update.

The components, and what they are to each other (definitions 3 §D): adam_preconditioned = adam_current_gradient +
adam_historical_momentum; reconstructed_adamw_update = adam_preconditioned + weight_decay; raw_sgd and clipped_sgd are what
plain SGD at the same learning rate would have done. They are in the lake, from the exact replay; nothing is recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .attribution_report import AttributionReport
from .pair_selection import PairType
from .report import ReportFailed

if TYPE_CHECKING:
    from .results import Results

COMPONENTS = (
    "raw_sgd",
    "clipped_sgd",
    "adam_current_gradient",
    "adam_historical_momentum",
    "adam_preconditioned",
    "weight_decay",
    "reconstructed_adamw_update",
)
_PRODUCT = {
    "adam_preconditioned": "c.adam_current_gradient + c.adam_historical_momentum",
    "reconstructed_adamw_update": "c.adam_current_gradient + c.adam_historical_momentum + c.weight_decay",
}
_SQUARED = {"reconstructed_adamw_update": "reconstructed"}
_STRUCTS = ",\n    ".join(
    f"{{'component': '{name}', 'delta': {_PRODUCT.get(name, f'c.{name}')}, "
    f"'squared': c.{_SQUARED.get(name, name)}_squared}}"
    for name in COMPONENTS
)

_VIEWS = f"""\
-- Hyperparameters of every recorded step; unchanged ones are written once a block.
-- view: optimizer_settings
WITH filled AS (
  SELECT step, last_value(optimizer_groups IGNORE NULLS) OVER (ORDER BY step) AS groups
  FROM training_steps
  WHERE run = $run
)
SELECT
  i.source_step,
  list_sort(list_distinct((f.groups::JSON->>'$[*].eps')::DOUBLE[])) AS adam_eps_values,
  list_sort(list_distinct((f.groups::JSON->>'$[*].beta1')::DOUBLE[])) AS adam_beta1_values,
  list_sort(list_distinct((f.groups::JSON->>'$[*].beta2')::DOUBLE[])) AS adam_beta2_values,
  list_sort(list_distinct((f.groups::JSON->>'$[*].weight_decay')::DOUBLE[])) AS adam_weight_decay_values,
  list_sort(list_distinct((f.groups::JSON->>'$[*].learning_rate')::DOUBLE[])) AS learning_rates
FROM intervals AS i
JOIN filled AS f ON f.step = i.target_step

-- Over all parameters: the gradient's norms, the loss it promised to take off, the optimizer's own counters before the step.
-- view: step_sums
SELECT
  u.step AS target_step,
  sqrt(fsum(u.gradient_l2 ** 2)) AS raw_gradient_l2_norm,
  sqrt(fsum(u.clipped_gradient_l2 ** 2)) AS clipped_gradient_l2_norm,
  fsum(u.update_dot_negative_gradient) AS negative_loss_dot_actual_update,
  sqrt(fsum(u.delta_l2 ** 2)) AS optimizer_trace_parameter_delta_l2,
  min(u.optimizer_step) - 1 AS adam_state_step_min,
  max(u.optimizer_step) - 1 AS adam_state_step_max
FROM parameter_updates AS u
JOIN intervals AS i ON i.target_step = u.step
WHERE u.run = $run
GROUP BY u.step

-- The optimizer's columns of every row (OPT in the definitions), and the batch's.
-- view: traced_steps
SELECT
  i.*, s.raw_gradient_l2_norm, i.pre_clip_grad_norm AS trace_pre_clip_grad_norm, s.clipped_gradient_l2_norm,
  s.negative_loss_dot_actual_update, s.adam_state_step_min, s.adam_state_step_max,
  o.adam_eps_values, [o.adam_beta1_values, o.adam_beta2_values] AS adam_beta_values, o.adam_weight_decay_values,
  [i.learning_rate] AS stored_optimizer_group_lr_values,
  abs(i.learning_rate - i.trace_learning_rate) <= 1e-12 AS stored_optimizer_group_lr_matches_trace,
  len(b.sample_ids) AS actual_batch_sample_count,
  len(list_distinct(b.sample_ids)) AS actual_batch_unique_sample_count,
  before.learning_rate AS learning_rate_used
FROM intervals AS i
LEFT JOIN step_sums AS s USING (target_step)
LEFT JOIN optimizer_settings AS o USING (source_step)
LEFT JOIN training_batches AS b ON b.run = $run AND b.step = i.target_step
LEFT JOIN training_steps AS before ON before.run = $run AND before.step = i.source_step
ORDER BY i.source_step

-- The batch of every recorded step, and what training logged of it. The loss is the logged one; it is not computed again,
-- so there is nothing to hold it against. A record of n tokens has n - 1 next tokens.
-- view: actual_batches
WITH counted AS (
  SELECT b.step, sum(len(e.tokens) - 1)::BIGINT AS loss_num_tokens
  FROM (
    SELECT step, split, unnest(sample_ids) AS sample_id FROM training_batches
    WHERE run = $run AND step IN (SELECT recorded_step FROM intervals)
  ) AS b
  JOIN examples AS e ON e.run = $run AND e.split = b.split AND e.sample_id = b.sample_id
  GROUP BY b.step
)
SELECT
  t.source_step, t.target_step, t.trace_loss AS loss, t.batch_size AS loss_num_records, c.loss_num_tokens,
  $lake AS optimizer_trace_dir, t.recorded_step AS optimizer_trace_batch_step, t.trace_loss AS optimizer_trace_loss,
  t.trace_token_accuracy AS optimizer_trace_token_accuracy, s.optimizer_trace_parameter_delta_l2,
  t.pre_clip_grad_norm AS optimizer_trace_pre_clip_grad_norm, NULL::DOUBLE AS loss_delta_vs_optimizer_trace,
  t.actual_batch_sample_count, t.query_event_count AS actual_batch_query_event_count, t.actual_batch_unique_sample_count
FROM traced_steps AS t
LEFT JOIN step_sums AS s USING (target_step)
LEFT JOIN counted AS c ON c.step = t.recorded_step
ORDER BY t.source_step

-- The one cell of pairs the report is about.
-- view: objective
SELECT m.*
FROM metrics AS m
WHERE m.split = $objective_split AND m.pair_type = $objective_pair_type

-- A row per scalar, interval, component and group.
-- view: components
WITH each AS (
  SELECT c.spec, c.source_step, c.target_step, c.group_id, c.actual_update, c.gradient_squared, unnest([
    {_STRUCTS}
  ]) AS part
  FROM contributions AS c
  JOIN (SELECT DISTINCT stored_split, stored_pair_type FROM objective) AS o
    ON c.split = o.stored_split AND c.pair_type = o.stored_pair_type
  WHERE c.point = 'source'
)
SELECT
  spec, source_step, target_step, group_id, part.component AS component, part.delta AS component_delta,
  sqrt(part.squared) AS component_l2_norm, sqrt(gradient_squared) AS gradient_l2_norm,
  part.delta / nullif(sqrt(part.squared * gradient_squared), 0) AS component_gradient_cosine,
  actual_update AS actual_update_predicted_delta,
  part.delta / nullif(actual_update, 0) AS component_fraction_of_actual_update_prediction
FROM each
ORDER BY spec, source_step, group_id, list_position([{", ".join(repr(name) for name in COMPONENTS)}], component)

-- Components of the whole model beside each other.
-- view: global_components
SELECT
  spec, source_step, target_step,
  {", ".join(f"any_value(component_delta) FILTER (component = '{name}') AS {name}" for name in COMPONENTS)}
FROM components
WHERE group_id = 'global:all_named_parameters'
GROUP BY spec, source_step, target_step

-- How far the sum of the terms is from the update: float32 rounding of the weights.
-- view: reconstructions
SELECT
  spec, source_step, target_step,
  residual AS reconstructed_adamw_residual,
  abs(residual) / greatest(abs(actual_update), $min_error_denominator) AS reconstructed_adamw_relative_error,
  sign(actual_update) = sign(actual_update - residual) AS reconstructed_adamw_sign_match,
  sqrt(residual_squared) AS reconstructed_adamw_l2_error,
  sqrt(residual_squared) / nullif(sqrt(actual_update_squared), 0) AS reconstructed_adamw_l2_relative_error
FROM contributions AS c
JOIN (SELECT DISTINCT stored_split, stored_pair_type FROM objective) AS o
  ON c.split = o.stored_split AND c.pair_type = o.stored_pair_type
WHERE c.point = 'source' AND c.group_id = 'global:all_named_parameters'
"""


class TracedReport(AttributionReport):
    """Base of reports on the recorded steps between neighbouring `--steps`, one cell of pairs at a time.

    The names that the traced tools of the guide have for the pairs' options are taken too.
    """

    more_views: ClassVar[str] = _VIEWS
    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "window"

    pair_type: tuple[PairType, ...] = Field((), description="type of causal patch pair that is built")
    route_pair_source_type: tuple[PairType, ...] = Field((), description="the same as --pair-type")
    max_route_pairs_per_type: int | None = Field(None, ge=1, description="the same as --max-pairs-per-type")
    min_route_pairs_per_type: int | None = Field(None, ge=1, description="the same as --min-pairs-per-type")
    route_split_filter: tuple[str, ...] = Field((), description="the same as --split")
    loss_scope: Literal["full_lm", "answer"] = Field(
        "full_lm", description="loss whose gradient the optimizer saw: that of every next token"
    )
    grad_norm_match_tolerance: float = Field(
        1e-4,
        ge=0,
        description="how far the norm of the recorded gradient may be from the one that training logged",
    )

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, values: Any) -> Any:
        names = {
            "route_pair_source_type": "pair_type",
            "max_route_pairs_per_type": "max_pairs_per_type",
            "min_route_pairs_per_type": "min_pairs_per_type",
            "route_split_filter": "split",
        }
        found = dict(values)
        for other, name in names.items():
            given = found.pop(other, None)
            if given:
                if found.get(name) and tuple(found[name]) != tuple(given):
                    raise ValueError(f"--{other.replace('_', '-')} and --{name.replace('_', '-')} disagree")
                found[name] = given
        return found

    @model_validator(mode="after")
    def _is_traced(self) -> TracedReport:
        if not self.pair_type:
            raise ValueError("--route-pair-source-type is required: a type of causal patch pair")
        if len(self.record_side) != 1:
            raise ValueError("--record-side is one of clean and corrupted here")
        if self.loss_scope == "answer":
            raise ValueError(
                "--loss-scope answer: the optimizer stepped along the gradient of the full language-model loss, and "
                "that is what was recorded; an answer-only gradient has no AdamW terms. Use full_lm"
            )
        return self

    def objective(self) -> tuple[str, str]:
        """Split and pair type of the cell that is attributed; `__all__` pools."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """Adds the cell."""
        split, pair_type = self.objective()
        return {**super().parameters(), "objective_split": split, "objective_pair_type": pair_type}

    def check(self, results: Results) -> None:
        """Every interval must be one recorded step, its gradient the one that was logged, and the cell must have
        pairs."""
        name = self.report_name()
        unrecorded = results.first(
            "SELECT source_step, target_step FROM intervals WHERE recorded_step IS NULL ORDER BY source_step LIMIT 1"
        )
        if unrecorded:
            source, target = unrecorded["source_step"], unrecorded["target_step"]
            raise ReportFailed(
                f"{name}: the update from step {source} to {target} of run {results.run!r} was not recorded as one "
                f"step, so its terms are not known: ask for neighbouring recorded steps, such as --steps "
                f"{source}:{source + 64}, or record them with lakebed trace --lake {results.lake.uri} "
                f"--run {results.run} --from-step {source} --num-steps 64"
            )
        _check_norms(results, name, self.grad_norm_match_tolerance)
        if not results.value("SELECT count(*) FROM objective"):
            split, pair_type = self.objective()
            held = results.rows("SELECT split, pair_type FROM cells ORDER BY ALL")
            raise ReportFailed(
                f"{name}: no pair is of split {split} and type {pair_type}; there are "
                + ", ".join(f"{row['split']}/{row['pair_type']}" for row in held)
            )
        super().check(results)


def _check_norms(results: Results, name: str, tolerance: float) -> None:
    wrong = results.first(
        "SELECT target_step, raw_gradient_l2_norm AS held, trace_pre_clip_grad_norm AS logged FROM traced_steps WHERE "
        "abs(raw_gradient_l2_norm - trace_pre_clip_grad_norm) > $tolerance ORDER BY target_step LIMIT 1",
        tolerance=tolerance,
    )
    if wrong:
        raise ReportFailed(
            f"{name}: Recomputed gradient norm mismatch at step {wrong['target_step']}: the recorded gradient has norm "
            f"{wrong['held']:.9g}, training logged {wrong['logged']:.9g} (--grad-norm-match-tolerance {tolerance:g})"
        )
    rates = results.first(
        "SELECT source_step, learning_rate AS stored, learning_rate_used AS used FROM traced_steps "
        "WHERE abs(learning_rate - learning_rate_used) > 1e-12 ORDER BY source_step LIMIT 1"
    )
    if rates:
        raise ReportFailed(
            f"{name}: Optimizer param-group lr mismatch at step {rates['source_step']}: its state was stored with "
            f"{rates['stored']:.9g}, the step was taken with {rates['used']:.9g}"
        )


SCALAR_SUMMARY = """\
-- By scalar.
-- view: scalar_summary
SELECT
  s.label, count(*) AS num_intervals, min(o.source_step) AS start_step, max(o.target_step) AS end_step,
  fsum(o.actual_delta) AS sum_actual_delta,
  fsum(o.predicted_delta) AS sum_predicted_delta,
  fsum(o.predicted_delta) - fsum(r.reconstructed_adamw_residual) AS sum_reconstructed_adamw_delta,
  fsum(r.reconstructed_adamw_residual) AS sum_reconstructed_adamw_residual,
  favg(o.relative_error) AS mean_relative_error,
  favg(r.reconstructed_adamw_relative_error) AS mean_reconstructed_adamw_relative_error,
  count(*) FILTER (o.sign_match) AS sign_matches,
  count(*) FILTER (o.actual_delta > 0) AS growing_intervals,
  favg(t.clip_coefficient) AS mean_clip_coefficient,
  count(*) FILTER (t.clip_coefficient < 1) AS clipped_intervals
FROM objective AS o
JOIN labels AS s USING (spec)
JOIN reconstructions AS r USING (spec, source_step, target_step)
JOIN traced_steps AS t USING (source_step, target_step)
GROUP BY s.label, s.position
ORDER BY s.position
"""

SUMMARY = f"""\
-- Sums over the window, by scalar and component; a share's denominator stands beside it.
-- view: component_summary
SELECT
  s.label, c.component,
  fsum(c.component_delta) AS sum_delta,
  fsum(c.component_delta) / nullif(fsum(o.actual_delta), 0) AS share_of_actual,
  fsum(c.component_delta) / nullif(fsum(c.actual_update_predicted_delta), 0) AS share_of_first_order,
  favg(c.component_gradient_cosine) AS mean_cosine,
  favg(c.component_l2_norm) AS mean_l2_norm
FROM components AS c
JOIN objective AS o USING (spec, source_step, target_step)
JOIN labels AS s USING (spec)
WHERE c.group_id = 'global:all_named_parameters'
GROUP BY s.label, s.position, c.component
ORDER BY s.position, list_position([{", ".join(repr(name) for name in COMPONENTS)}], c.component)

{SCALAR_SUMMARY}
-- Running sums of the terms that add up, and of the actual change.
-- view: ledger
WITH each AS (
  SELECT c.spec, c.target_step AS step, replace(c.component, '_', ' ') AS series, c.component_delta AS delta
  FROM components AS c
  WHERE c.group_id = 'global:all_named_parameters'
    AND c.component IN ('adam_current_gradient', 'adam_historical_momentum', 'weight_decay', 'raw_sgd')
  UNION ALL
  SELECT spec, target_step, 'actual change', actual_delta FROM objective
)
SELECT e.step, e.series, s.label AS panel, fsum(e.delta) OVER (PARTITION BY e.spec, e.series ORDER BY e.step) AS value
FROM each AS e
JOIN labels AS s USING (spec)
ORDER BY s.position, e.series, e.step

-- The terms that add up, stacked over up to 60 windows of the first scalar.
-- view: stacked_terms
WITH placed AS (
  SELECT
    source_step, target_step,
    (row_number() OVER (ORDER BY source_step) - 1) * least(60, count(*) OVER ()) // count(*) OVER () AS time_window
  FROM intervals
),
windows AS (
  SELECT time_window, min(source_step) AS start_step, max(target_step) AS end_step FROM placed GROUP BY time_window
)
SELECT w.start_step, w.end_step, replace(c.component, '_', ' ') AS part, fsum(c.component_delta) AS value
FROM components AS c
JOIN placed AS p USING (source_step, target_step)
JOIN windows AS w USING (time_window)
JOIN labels AS s USING (spec)
WHERE c.group_id = 'global:all_named_parameters' AND s.position = 1
  AND c.component IN ('adam_current_gradient', 'adam_historical_momentum', 'weight_decay')
GROUP BY w.start_step, w.end_step, c.component
ORDER BY ALL
"""

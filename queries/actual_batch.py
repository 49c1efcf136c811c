"""What reports on the batch of each recorded step share: was descent on that very batch for a scalar, or against it?

With L the loss of the batch that was drawn, C a scalar's mean and Δ the update, all at the source (definitions 3 §C, §E):
support = −∇L·∇C, what descent on the batch does to the scalar, and loss reduction = −∇L·Δ. ∇L is the gradient that training
recorded: nothing is computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .report import ReportFailed
from .traced_report import SCALAR_SUMMARY, TracedReport

if TYPE_CHECKING:
    from .results import Results

_VIEWS = f"""\
-- The term raw_sgd of the update is -lr ∇L: divided by the learning rate, its product with ∇C is the support.
-- view: supports
SELECT
  c.spec, c.source_step, c.target_step,
  sqrt(c.gradient_squared) AS gradient_l2_norm,
  c.raw_sgd AS sgd_equivalent,
  c.raw_sgd / nullif(t.trace_learning_rate, 0) AS support,
  c.raw_sgd / nullif(t.trace_learning_rate * t.raw_gradient_l2_norm * sqrt(c.gradient_squared), 0) AS support_cosine,
  t.raw_gradient_l2_norm AS loss_gradient_l2_norm,
  t.negative_loss_dot_actual_update AS loss_reduction,
  t.negative_loss_dot_actual_update / nullif(t.raw_gradient_l2_norm * sqrt(c.actual_update_squared), 0)
    AS loss_reduction_cosine
FROM contributions AS c
JOIN traced_steps AS t USING (source_step, target_step)
JOIN (SELECT DISTINCT stored_split, stored_pair_type FROM objective) AS o
  ON c.split = o.stored_split AND c.pair_type = o.stored_pair_type
WHERE c.point = 'source' AND c.group_id = 'global:all_named_parameters'

-- By scalar: what its steps' batches stood for.
-- view: batch_summary
SELECT
  l.label, l.position, 'actual_batch' AS data_group_id, count(*) AS num_intervals,
  fsum(s.support) AS sum_support,
  fsum(s.sgd_equivalent) AS sum_sgd_equivalent,
  fsum(o.actual_delta) AS sum_actual_delta,
  fsum(s.sgd_equivalent) / nullif(fsum(o.actual_delta), 0) AS sgd_equivalent_share_of_actual,
  fsum(s.loss_reduction) AS sum_loss_reduction,
  favg(s.support_cosine) AS mean_support_cosine,
  favg(s.loss_reduction_cosine) AS mean_loss_reduction_cosine,
  favg(b.loss) AS mean_loss,
  count(*) FILTER (s.support > 0) AS supporting_intervals
FROM supports AS s
JOIN objective AS o USING (spec, source_step, target_step)
JOIN labels AS l USING (spec)
JOIN actual_batches AS b USING (source_step, target_step)
GROUP BY l.label, l.position
ORDER BY l.position

{SCALAR_SUMMARY}"""


class ActualBatchReport(TracedReport):
    """Base of reports on what the batches of recorded steps stood for. View `labels` comes from a base after this one."""

    more_views: ClassVar[str] = _VIEWS

    def check(self, results: Results) -> None:
        """One learning rate must have served every parameter, or no one number takes raw_sgd back to the gradient."""
        super().check(results)
        several = results.first(
            "SELECT source_step + 1 AS step, learning_rates FROM optimizer_settings WHERE len(learning_rates) > 1 "
            "ORDER BY source_step LIMIT 1"
        )
        if several:
            rates = ", ".join(f"{rate:g}" for rate in several["learning_rates"])
            raise ReportFailed(
                f"{self.report_name()}: the parameter groups of step {several['step']} have learning rates {rates}; the "
                "support −∇L·∇C is read from the update's SGD term, which takes one. "
                "bilinear-qk-rank-adam-state-attribution works with several"
            )

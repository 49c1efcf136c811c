"""What reports on components' direct logit attributions share (definitions 4 §0.12).

A component's DLA of a scalar is ⟨what it writes at the prediction, gradient of the scalar with respect to the last residual
stage⟩, the final LayerNorm differentiated, at the run's own state. It is linear in the logits' gradients, so the DLA of
every scalar follows from those of the answer, of its competitors and of the log-probability, which the lake holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lake.datasets import INTERVENTIONS, Need
from ..lake.names import spec_id
from .component_options import require_components
from .scalar_pairs import SCALAR_NAMES_SQL, SCALAR_VALUES_SQL, CheckedScalarReport, ScalarName

if TYPE_CHECKING:
    from ..lake import Lake

# Of reports that change something: those whose competitor is the same in every run and at both ends.
CAUSAL_SCALARS: tuple[ScalarName, ...] = (
    "negative_answer_loss",
    "correct_value_logit",
    "fixed_source_competitor_margin",
    "fixed_target_competitor_margin",
)
# LayerNorm does not see the length of its input: ⟨h, ∂s/∂h⟩ is 0 but for its ε.
DLA_IS_NO_SHARE = (
    "DLA is a first-order sensitivity, no share of the scalar: the final LayerNorm does not see the length of its input, so "
    "the DLAs of embedding, heads, MLPs and attention biases sum to about 0 in every run, not to the scalar. Attention "
    "biases are no components and are left out."
)

_DLAS = f"""\
-- What each component adds to a scalar, to first order, at the ends of an interval.
-- view: endpoint_dlas
SELECT * FROM (
  SELECT
    e.source_step, e.target_step, e.pair_id, e.margin_side, e.endpoint_kind, e.step, r.intervention, r.component,
    unnest([{SCALAR_NAMES_SQL}]) AS scalar_name, unnest([{SCALAR_VALUES_SQL}]) AS dla
  FROM endpoints AS e
  JOIN (
    SELECT
      p.record_side AS margin_side, p.pair_id, r.step, r.intervention, r.component,
      r.answer_dla::DOUBLE AS a, r.competitor_dla AS c, r.log_prob_dla::DOUBLE AS p
    FROM intervention_components AS r
    JOIN pair_sides AS p ON p.side_probe = r.probe AND p.side_event = r.event
    WHERE
      r.run = $run AND list_contains($component_spec, r.spec) AND list_contains($steps, r.step)
      AND r.component NOT LIKE '%bias' AND ($all_components OR list_contains($dla_component, r.component))
  ) AS r USING (step, pair_id, margin_side)
) WHERE list_contains($scalar, scalar_name)

"""


class ComponentDLAReport(CheckedScalarReport):
    """Base of reports on components' DLAs. Its SQL has view `endpoint_dlas`."""

    def components(self) -> tuple[str, ...]:
        """Those whose DLAs are read; empty for all."""
        return ()

    def component_parameters(self) -> list[dict[str, Any]]:
        """Of the runs whose DLAs are read: the untouched one alone, so that reports share it."""
        return self.run_parameters((), components=True)

    def needs(self) -> tuple[Need, ...]:
        """Adds the DLAs."""
        before = super().needs()
        more = (Need(INTERVENTIONS, of) for of in self.component_parameters())
        return (*before, *(need for need in more if need not in before))

    def parameters(self) -> dict[str, Any]:
        """Adds which DLAs."""
        return {
            **super().parameters(),
            "component_spec": [spec_id(of) for of in self.component_parameters()],
            "all_components": not self.components(),
            "dla_component": list(self.components()) or [""],
        }

    @classmethod
    def more_views(cls) -> str:
        """The DLAs."""
        return super().more_views() + _DLAS

    def require(self, lake: Lake, run: str) -> None:
        """The components must be there."""
        super().require(lake, run)
        require_components(lake, run, self.components())


__all__ = ["CAUSAL_SCALARS", "DLA_IS_NO_SHARE", "ComponentDLAReport"]

"""actual-batch-route-attribution: did the batches that training saw ask for a route? (definitions 3 §E)

The loss gradient of a step's batch is the one that was recorded; no loss is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..lake import Lake
from .actual_batch import ActualBatchReport
from .chart import Scatter, Trajectory
from .markdown import number, percent
from .report import RowFile, TextTable
from .results import Results
from .route_options import SeveralRoutes, last_bases

_STEM = "actual_batch_route_attribution"


class ActualBatchRouteAttribution(ActualBatchReport, SeveralRoutes):
    """Step by step: would descent on the batch that was drawn have raised what passes through each route?

    The subspace of a route is that of each step's source, frozen there.
    """

    route_pair_type: str = Field(
        ..., description="type of the pairs that are scored; __all__ pools those that are built"
    )
    loss_scope: Literal["full_lm"] = Field(
        "full_lm", description="loss whose gradient was recorded: that of every next token"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "rows": RowFile(f"{_STEM}_rows", "rows"),
        "pair_rows": RowFile(f"{_STEM}_pair_rows", "pair_rows"),
    }
    tables = (
        TextTable(
            "route_summary",
            "By route",
            {
                "route": "label",
                "steps": "num_intervals",
                "Σ support −∇L·∇R": "sum_support",
                "steps in support": "supporting_intervals",
                "mean cosine of −∇L and ∇R": "mean_support_cosine",
                "Σ plain SGD": "sum_sgd_equivalent",
                "Σ actual change": "sum_actual_delta",
                "Σ first order ∇R·Δ": "sum_predicted_delta",
                "signs that match": "sign_match_fraction",
                "Σ loss reduction −∇L·Δ": "sum_loss_reduction",
            },
            about="∇L is the recorded gradient of each step's own batch, ∇R that of the route's score, Δ the step's update.",
        ),
    )
    charts = (
        Trajectory(
            "ledger",
            "ledger",
            "Did the batches ask for what the updates did?",
            about="running sums; support is what descent on each step's batch does to the route, per unit of step size",
            y_title="Σ",
            series="series",
            panel="panel",
        ),
        Scatter(
            "asked_and_done",
            "asked_and_done",
            "Step by step, what the batch asked for and what the update did",
            about="in the upper right and lower left the update went where plain SGD on its batch would have gone",
            x_title="change by plain SGD on the batch, first order",
            y_title="actual change of the route score",
            label="step",
            color="series",
            highlight=4,
        ),
    )
    how_to_read = (
        "A route's score is what the corrupted run's margin (clean token less corrupted one) gains when the clean record's "
        "state is put into one subspace, at one stage and role.",
        "Support is −∇L·∇R: positive where descent on the batch that was drawn raises the score. It has no step size in it; "
        "times the learning rate it is what plain, unclipped SGD would have done, the term raw_sgd of the update.",
        "∇L is the gradient training recorded, and `loss` the one it logged: no loss is computed again, so "
        "`loss_delta_vs_optimizer_trace` is empty.",
        "Support and actual change need not agree step by step: AdamW's update is mostly carried momentum, rescaled entry "
        "by entry.",
        "Loss reduction is first order, for the batch that the update was made from.",
        "The tied embedding is one tensor and counts once; `…_counting_aliases` counts every name of it, as published "
        "numbers of the reference toolkit do.",
    )
    next_queries = (
        (
            "Through which parameters did the batches ask for a route?",
            "SELECT slice, sum(a.raw_sgd / t.learning_rate) AS support, sum(a.actual_update) AS first_order FROM "
            "attribution_slices AS a JOIN training_steps AS t ON t.run = a.run AND t.step = a.target_step WHERE "
            "a.run = $run AND scalar = 'route_score' AND split = '__all__' AND pair_type = '__all__' AND "
            "point = 'source' AND slice_kind = 'parameter' GROUP BY ALL ORDER BY abs(support) DESC LIMIT 20",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 4)
    example: ClassVar[str] = (
        "lakebed query actual-batch-route-attribution --lake demo.lake --run demo --steps 32:64 --route "
        "'label=L1H1_qk_query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head=L1H1,position_role=query_key' "
        "--pair-type query_key --route-pair-type query_key --out route-batches"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "route": (
            "label=L1H1_qk_query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head=L1H1,position_role=query_key",
            "label=L0H1_qk_query,stage=embedding,subspace=head_qk_query,rank=4,head=L0H1,position_role=query_key",
        ),
        "pair_type": ("query_key",),
        "route_pair_type": "query_key",
    }

    def objective(self) -> tuple[str, str]:
        """All splits, and `--route-pair-type`."""
        return "__all__", self.route_pair_type

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        return {
            **super().facts(lake, results),
            "basis_mode": "source_checkpoint_per_interval",
            "subspaces": last_bases(results),
            "summary": {"by_route": results.rows("FROM route_summary")},
            "calculation": {
                "route_score": "mean over pairs of margin(corrupted run, patched) - margin(corrupted run)",
                "negative_loss_dot_route_gradient": "-(gradient of the recorded batch's loss) . (gradient of the route "
                "score), both at the source",
                "local_sgd_route_delta_linearized": "learning rate times that",
                "loss_reduction_under_actual_update_linearized": "-(gradient of the batch's loss) . (target - source "
                "weights)",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """For each route whether the batches asked for it, and what the updates made of that and of the loss."""
        rows = results.rows("FROM route_summary")
        reduction, cosine = rows[0]["sum_loss_reduction"], rows[0]["mean_loss_reduction_cosine"]
        return [
            *(_of_route(of, results.steps) for of in rows),
            f"The same updates took {number(reduction)} nats per token off the losses of their batches to first order, at a "
            f"mean cosine of {number(cosine, 2)} with −∇L.",
        ]


def _of_route(of: dict[str, Any], steps: list[int]) -> str:
    if of["sum_support"] is None:
        return f"**{of['label']}**: the learning rate is zero, so what the batches asked for cannot be read from the update."
    change = of["sum_actual_delta"]
    return (
        f"**The batches of steps {steps[0]} to {steps[-1]} asked for {of['label']} in {of['supporting_intervals']} of "
        f"{of['num_intervals']} steps**, and {'for' if of['sum_support'] > 0 else 'against'} it in sum: −∇L·∇R adds up to "
        f"{number(of['sum_support'], 3)} (mean cosine {number(of['mean_support_cosine'], 2)}). Plain SGD would have moved "
        f"its score by {number(of['sum_sgd_equivalent'], 3)}; it {'grew' if change > 0 else 'fell'} by "
        f"{number(abs(change), 3)} ({number(of['sum_predicted_delta'], 3)} to first order, the sign right in "
        f"{percent(of['sign_match_fraction'])} of steps)."
    )

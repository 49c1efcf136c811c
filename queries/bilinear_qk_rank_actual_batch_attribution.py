"""bilinear-qk-rank-actual-batch-attribution: did the batches that training saw ask for a head's QK separation?

Definitions 3 §C. The loss gradient of a step's batch is the one that was recorded; no loss is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ..lake import Lake
from .actual_batch import ActualBatchReport
from .attribution_report import QKRankOptions
from .chart import Trajectory
from .markdown import number, percent
from .report import RowFile, TextTable
from .results import Results

_STEM = "bilinear_qk_rank_actual_batch_attribution"


class BilinearQKRankActualBatchAttribution(ActualBatchReport, QKRankOptions):
    """Step by step: would descent on the batch that was drawn have raised a head's rank-r QK separation?

    The singular basis is that of each step's source, frozen there.
    """

    route_pair_type: str = Field(
        ..., description="type of the pairs that are scored; __all__ pools those that are built"
    )
    route_split: str = Field("__all__", description="split of the pairs that are scored; __all__ pools")
    top_k_data_groups: int = Field(
        24, ge=1, description="data groups in the summary, largest support first; the actual batch is one"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name)
        for name in ("route_rows", "actual_batch_rows", "route_pair_rows")
    }
    tables = (
        TextTable(
            "data_group_summary",
            "What the batches stood for",
            {
                "scalar": "label",
                "data group": "data_group_id",
                "steps": "num_intervals",
                "Σ support −∇L·∇C": "sum_support",
                "steps in support": "supporting_intervals",
                "mean cosine of −∇L and ∇C": "mean_support_cosine",
                "Σ SGD-equivalent change": "sum_sgd_equivalent",
                "as share of the actual": "sgd_equivalent_share_of_actual",
                "Σ loss reduction −∇L·Δ": "sum_loss_reduction",
                "mean cosine of −∇L and Δ": "mean_loss_reduction_cosine",
                "mean loss": "mean_loss",
            },
            about="∇L is the recorded gradient of each step's own batch, ∇C that of the separation, Δ the step's update.",
        ),
        TextTable(
            "scalar_summary",
            "What the updates did",
            {
                "scalar": "label",
                "steps": "num_intervals",
                "Σ actual change": "sum_actual_delta",
                "Σ first order ∇C·Δ": "sum_predicted_delta",
                "mean relative error of the first order": "mean_relative_error",
                "signs that match": "sign_matches",
                "steps of growth": "growing_intervals",
            },
        ),
        TextTable(
            "top_steps",
            "The batches that stood most for it, or against it",
            {
                "scalar": "label",
                "from": "source_step",
                "to": "target_step",
                "support": "support",
                "cosine": "cosine",
                "actual change": "actual_delta",
                "loss": "loss",
            },
            about="The ten largest by rank, whichever their sign.",
        ),
    )
    charts = (
        Trajectory(
            "ledger",
            "ledger",
            "Did the batches ask for what the updates did?",
            about="running sums; support is what descent on each step's batch does to the separation, per unit of step size",
            y_title="Σ",
            series="series",
            panel="panel",
        ),
        Trajectory(
            "loss_reduction",
            "loss_reduction",
            "What the same updates did to the loss of their batch",
            about="first order, summed over the steps",
            y_title="nats per token",
            series="series",
            panel="panel",
        ),
    )
    how_to_read = (
        "Support is −∇L·∇C: positive where descent on the batch that was drawn raises the separation. It has no step size "
        "in it; times the learning rate it is what plain, unclipped SGD would have done, the term raw_sgd of the update.",
        "∇L is the gradient training recorded, and `loss` the one it logged: no loss is computed again, so "
        "`loss_delta_vs_optimizer_trace` is empty.",
        "Support and actual change need not agree step by step: AdamW's update is mostly carried momentum, rescaled entry "
        "by entry. bilinear-qk-rank-adam-state-attribution splits it.",
        "Loss reduction is first order, for the batch that the update was made from.",
        "Mean support and distractor scores are over scores, so a pair with more keys counts more; the separation is a mean "
        "over pairs, which count equally.",
        "The tied embedding is one tensor and counts once; `…_counting_aliases` counts every name of it, as published "
        "numbers of the reference toolkit do.",
    )
    next_queries = (
        (
            "Through which parameters did the batches stand for it?",
            "SELECT slice, sum(a.raw_sgd / t.learning_rate) AS support, sum(a.actual_update) AS first_order FROM "
            "attribution_slices AS a JOIN training_steps AS t ON t.run = a.run AND t.step = a.target_step WHERE "
            "a.run = $run AND scalar = 'qk_rank_separation' AND split = '__all__' AND pair_type = '__all__' AND "
            "point = 'source' AND slice_kind = 'parameter' GROUP BY ALL ORDER BY abs(support) DESC LIMIT 20",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 3)
    example: ClassVar[str] = (
        "lakebed query bilinear-qk-rank-actual-batch-attribution --lake demo.lake --run demo --steps 32:64 --head L1H1 "
        "--rank 4 --context-stage layer_0_post_mlp --score-query-role prediction --support-key-role support_key "
        "--distractor-key-role key_distractors --route-pair-source-type support_value --route-pair-type support_value "
        "--out qk-batches"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "rank": (4,),
        "context_stage": "layer_0_post_mlp",
        "score_query_role": "prediction",
        "support_key_role": "support_key",
        "distractor_key_role": "key_distractors",
        "route_pair_source_type": ("support_value",),
        "route_pair_type": "support_value",
    }

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per rank."""
        return self.qk_rank_scalars(self.record_side)

    def objective(self) -> tuple[str, str]:
        """`--route-split` and `--route-pair-type`."""
        return self.route_split, self.route_pair_type

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        return {
            **super().facts(lake, results),
            "head_label": self.head_label,
            "basis_mode": "source_checkpoint_per_interval",
            "summary": {
                "by_rank": results.rows("FROM scalar_summary"),
                "by_data_group": results.rows("FROM data_group_summary"),
                "top_steps": results.rows("FROM top_steps"),
            },
            "calculation": {
                "negative_loss_dot_rank_gradient": "-(gradient of the recorded batch's loss) . (gradient of the mean "
                "separation), both at the source",
                "sgd_equivalent_rank_match_delta_linearized": "learning rate times that",
                "loss_reduction_under_actual_update_linearized": "-(gradient of the batch's loss) . (target - source "
                "weights)",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Whether the batches stood for the separation, and what the updates made of that and of the loss."""
        groups = {row["label"]: row for row in results.rows("FROM data_group_summary")}
        ranks = results.rows("FROM scalar_summary")
        lines = [line for of in ranks for line in _of_rank(self.head_label, of, groups[of["label"]])]
        batch = groups[ranks[0]["label"]]
        return [
            *lines,
            f"The same updates took {number(batch['sum_loss_reduction'])} nats per token off the losses of their batches to "
            f"first order, at a mean cosine of {number(batch['mean_loss_reduction_cosine'], 2)} with −∇L.",
        ]


def _of_rank(head: str, of: dict[str, Any], batch: dict[str, Any]) -> list[str]:
    support, change = batch["sum_support"], of["sum_actual_delta"]
    if support is None:
        return [
            f"**The learning rate of steps {of['start_step']} to {of['end_step']} is zero**: what their batches stood for "
            "cannot be read from the update."
        ]
    return [
        f"**The batches of steps {of['start_step']} to {of['end_step']} stood for {head}'s {of['label']} QK separation "
        f"in {batch['supporting_intervals']} of {of['num_intervals']} steps**, and {'for' if support > 0 else 'against'} "
        f"it in sum: −∇L·∇C adds up to {number(support)}, at a mean cosine of {number(batch['mean_support_cosine'], 2)}.",
        f"Plain SGD along them would have changed it by {number(batch['sum_sgd_equivalent'], 3)}; the updates that were "
        f"made changed it by {number(change)} ({number(of['sum_predicted_delta'])} to first order, "
        f"{percent(of['mean_relative_error'])} off per step on average), and it grew in {of['growing_intervals']} of "
        f"{of['num_intervals']:,} steps.",
    ]

"""bilinear-qk-rank-update-attribution: which parameters moved a head's rank-r QK separation (definitions: part 3, "
"B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ..lake import Lake
from .attribution_report import ARITHMETIC, DecomposedReport, QKRankOptions
from .chart import Trajectory
from .decomposed_charts import ACTUAL_VS_PREDICTED, RELATIVE_ERROR, TOP_CONTRIBUTIONS
from .decomposed_findings import carried, explained, movement
from .decomposed_sql import DECOMPOSED_SUMMARY, interval_facts
from .pair_selection import RecordSide
from .report import RowFile, TextTable
from .results import Results

_STEM = "bilinear_qk_rank_update_attribution"


class BilinearQKRankUpdateAttribution(DecomposedReport, QKRankOptions):
    """Between steps, which parameters moved a head's rank-r QK separation of support from distractors?

    The singular basis is that of each interval's source, frozen there.
    """

    more_views: ClassVar[str] = DECOMPOSED_SUMMARY

    record_side: tuple[RecordSide, ...] = Field(
        ("clean", "corrupted"),
        min_length=1,
        description="record of the pair that is scored; the first is the summary's",
    )
    top_k_groups: int = Field(40, ge=1, description="groups in the summary, largest contribution first")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name)
        for name in ("metric_rows", "decomposition_rows", "group_rows", "score_rows", "pair_rows")
    }
    tables = (
        TextTable(
            "rank_summary",
            "By rank",
            {
                "rank": "rank",
                "intervals": "num_intervals",
                "Σ actual change": "sum_actual_delta",
                "Σ first order": "sum_predicted_delta",
                "Σ integrated": "sum_integrated_delta",
                "Σ support": "sum_support_delta",
                "Σ distractors": "sum_distractor_delta",
                "mean relative error, first order": "mean_relative_error",
                "integrated": "mean_integrated_relative_error",
                "signs that match": "sign_matches",
            },
            about="Sums over the intervals, all pairs of the first record side. The basis is that of each "
            "interval's source, "
            "so the sums do not telescope to end minus start.",
        ),
        TextTable(
            "carriers",
            "What carried the change",
            {
                "scalar": "label",
                "group": "group_id",
                "Σ first order": "first_order_contribution",
                "Σ integrated": "integrated_contribution",
                "share of Σ actual change": "share_of_actual",
                "parameters": "num_selected_parameters",
            },
            about="The ten largest by rank, integrated where that was asked for. Compare only within a kind of group: "
            "kinds overlap.",
        ),
    )
    charts = (
        Trajectory(
            "separation",
            "ledger",
            "How the rank-r QK separation grew",
            about="sum of the actual changes, each in its own source's basis",
            y_title="Σ change of the separation",
            series="series",
        ),
        ACTUAL_VS_PREDICTED,
        RELATIVE_ERROR,
        TOP_CONTRIBUTIONS,
    )
    how_to_read = (
        "The separation is the mean over support keys minus the mean over distractor keys (up to the query) of the "
        "head's QK "
        "score, cut to the first r singular directions of W_QK at the source; biases are left out.",
        "A contribution is the source's gradient times the parameters' change, summed over a group. First order is "
        "exact only "
        "for small steps: with `--integrate N` the gradient is averaged along the straight path, and contributions "
        "add up to "
        "the actual change.",
        "The tied embedding is one tensor and counts once. `predicted_delta_counting_aliases` counts every name of "
        "it, as "
        "published numbers of the reference toolkit do.",
        "Groups of one kind add up to their whole (modules to the global sum, heads and the output bias to the "
        "attention block, "
        "neurons and the output bias to the MLP); groups of different kinds overlap.",
        ARITHMETIC,
    )
    next_queries = (
        (
            "The ledger of every term that was recorded, over any window:",
            "SELECT target_step, term, sum(value) AS value, sum(sum(value)) OVER (PARTITION BY term ORDER BY "
            "target_step) AS "
            "so_far FROM attributions WHERE run = $run AND scalar = 'qk_rank_separation' AND split = '__all__' AND "
            "pair_type = "
            "'__all__' AND slice_kind = 'parameter' AND point = 'source' GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (6, 2)
    example: ClassVar[str] = (
        "lakebed query bilinear-qk-rank-update-attribution --lake demo.lake --run demo --head L1H1 --rank 4 "
        "--context-stage "
        "layer_0_post_mlp --score-query-role prediction --support-key-role support_key --distractor-key-role "
        "key_distractors "
        "--record-side clean --pair-type support_value --out qk-updates"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "rank": (2, 4),
        "context_stage": "layer_0_post_mlp",
        "score_query_role": "prediction",
        "support_key_role": "support_key",
        "distractor_key_role": "key_distractors",
        "record_side": ("clean",),
        "pair_type": ("support_value",),
        "integrate": 4,
    }

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per record side and rank."""
        return self.qk_rank_scalars(self.record_side)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        return {
            **super().facts(lake, results),
            "head_label": self.head_label,
            "basis_mode": "source_checkpoint_per_interval",
            "summary": {
                **interval_facts(results, self.top_k_groups),
                "by_rank": results.rows("FROM rank_summary"),
                "top_contributions": results.rows("FROM largest_contributions"),
            },
            "calculation": {
                "actual_delta": "mean over pairs of separation(target; source basis) - separation(source; source "
                "basis)",
                "predicted_delta": "gradient of the mean separation at the source . (target - source weights)",
                "integrated_delta": "the same with the gradient averaged along the straight path",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """How far the separation moved and when, how well that is explained, and what carried it."""
        of = results.rows("FROM rank_summary")[0]
        fastest = results.first(
            "SELECT * FROM primary_metrics WHERE label = $label ORDER BY $sign * actual_delta / step_gap DESC, source_step "
            "LIMIT 1",
            label=of["label"],
            sign=-1 if of["sum_actual_delta"] < 0 else 1,
        )
        assert fastest is not None
        return [
            movement(
                f"{self.head_label}'s rank-{of['rank']} QK separation",
                of["sum_actual_delta"],
                results.steps[0],
                results.steps[-1],
                fastest,
                f"{of['growing_intervals']} of {of['num_intervals']} intervals",
            ),
            explained(of),
            carried(results, of["label"]),
        ]

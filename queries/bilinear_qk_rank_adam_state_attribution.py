"""bilinear-qk-rank-adam-state-attribution: which term of AdamW's updates moved a head's QK separation (definitions "
"3, D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ..lake import Lake
from .attribution_report import ARITHMETIC, QKRankOptions
from .chart import StackedBars, Trajectory
from .report import RowFile
from .results import Results
from .traced_findings import COMPONENT_TABLE, EXACTNESS_TABLE, beside_the_terms, moved_by_terms
from .traced_report import COMPONENTS, SUMMARY, TracedReport

_STEM = "bilinear_qk_rank_adam_state_attribution"


class BilinearQKRankAdamStateAttribution(TracedReport, QKRankOptions):
    """Step by step: what share of a head's rank-r QK separation came from gradient, momentum, decay, and raw SGD?

    The singular basis is that of each step's source, frozen there.
    """

    route_pair_type: str = Field("__all__", description="type of the pairs that are scored; __all__ pools")
    route_split: str = Field("__all__", description="split of the pairs that are scored; __all__ pools")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name)
        for name in ("metric_rows", "component_rows", "route_pair_rows")
    }
    tables = (
        COMPONENT_TABLE,
        EXACTNESS_TABLE,
    )
    charts = (
        Trajectory(
            "ledger",
            "ledger",
            "The ledger: running sums of what moved the separation",
            about="gradient of the separation times each term of the update; momentum, gradient and decay add up",
            y_title="Σ change of the separation",
            series="series",
            panel="panel",
        ),
        StackedBars(
            "terms",
            "stacked_terms",
            "Which term moved the separation, and when",
            about="of the first rank; arithmetic, not a counterfactual",
            y_title="change of the separation",
        ),
    )
    how_to_read = (
        "Row t→t+1: the separation is measured with the singular basis of step t at both ends; its gradient at t is "
        "multiplied "
        "by every term of the recorded update.",
        ARITHMETIC,
        "raw_sgd and clipped_sgd take AdamW's learning rate, so a small share of theirs is partly a statement on "
        "step size: "
        "read the component's norm and cosine beside it.",
        "Each share names its denominator: `share_of_actual` divides by the measured change, `share_of_first_order` "
        "by what "
        "gradient times update makes of it. Shares need not total 100 %.",
        "The basis moves from step to step, so the sum of the changes is not the separation's end minus its start.",
        "The tied embedding is one tensor and counts once; `…_counting_aliases` counts every name of it, as "
        "published numbers "
        "of the reference toolkit do.",
    )
    next_queries = (
        (
            "Which heads' and neurons' parameters did the momentum act through?",
            "SELECT slice_kind, slice, sum(adam_historical_momentum) AS momentum, sum(adam_current_gradient) AS "
            "gradient, "
            "sum(raw_sgd) AS raw_sgd FROM attribution_slices WHERE run = $run AND scalar = 'qk_rank_separation' AND "
            "split = "
            "'__all__' AND pair_type = '__all__' AND point = 'source' GROUP BY ALL ORDER BY abs(momentum) DESC "
            "LIMIT 20",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 5)
    example: ClassVar[str] = (
        "lakebed query bilinear-qk-rank-adam-state-attribution --lake demo.lake --run demo --steps 32:64 --head "
        "L1H1 --rank 4 "
        "--context-stage layer_0_post_mlp --score-query-role prediction --support-key-role support_key "
        "--distractor-key-role "
        "key_distractors --route-pair-source-type support_value --route-pair-type support_value --out qk-adam"
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

    @classmethod
    def sql_text(cls) -> str:
        """Adds the sums over the window, which read the report's labels."""
        return f"{super().sql_text()}\n{SUMMARY}"

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per rank."""
        return self.qk_rank_scalars(self.record_side)

    def objective(self) -> tuple[str, str]:
        """`--route-split` and `--route-pair-type`."""
        return self.route_split, self.route_pair_type

    def parameters(self) -> dict[str, Any]:
        """Adds the components, in report order."""
        return {**super().parameters(), "components": list(COMPONENTS)}

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        return {
            **super().facts(lake, results),
            "head_label": self.head_label,
            "summary": {
                "by_rank": results.rows("FROM scalar_summary"),
                "by_component": results.rows("FROM component_summary"),
            },
            "terms": ARITHMETIC,
        }

    def findings(self, results: Results) -> list[str]:
        """How far the separation moved, and which term carried it."""
        return [
            line
            for of in results.rows("FROM scalar_summary")
            for line in (
                moved_by_terms(f"{self.head_label}'s {of['label']} QK separation", of, results),
                beside_the_terms([of], results),
            )
        ]

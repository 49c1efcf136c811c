"""checkpoint-update-attribution: which parameters' updates moved a route's score (definitions 2 §E)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ..lake import Lake
from ..lake.subspaces import Subspace
from .attribution_report import ARITHMETIC, DecomposedReport
from .chart import Trajectory
from .decomposed_charts import ACTUAL_VS_PREDICTED, RELATIVE_ERROR, TOP_CONTRIBUTIONS
from .decomposed_findings import carried, explained, movement
from .decomposed_sql import DECOMPOSED_SUMMARY, interval_facts
from .markdown import number, percent
from .report import RowFile, TextTable
from .results import Results
from .route_options import Route, RouteReport, last_bases, make_route

_STEM = "checkpoint_update_attribution"


class CheckpointUpdateAttribution(DecomposedReport, RouteReport):
    """Between steps, which parameters moved what passes through one subspace from the clean record to the answer?

    The subspace is that of each interval's source, frozen there.
    """

    more_views: ClassVar[str] = DECOMPOSED_SUMMARY

    stage: str = Field(..., description="residual stage that is patched")
    subspace: Subspace = Field(..., description="subspace of it that takes the clean record's state")
    position_role: str = Field(..., description="role whose positions are patched")
    rank: int | None = Field(None, ge=1, description="directions of the subspace; none for full_residual")
    head_layer: int | None = Field(None, ge=0, description="layer of the head, for head_… subspaces")
    head: str | None = Field(None, description="head, or both as L2H1, for head_… subspaces")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name)
        for name in ("metric_rows", "decomposition_rows", "group_rows", "pair_rows")
    }
    tables = (
        TextTable(
            "interval_table",
            "Interval by interval",
            {
                "from": "source_step",
                "to": "target_step",
                "route score": "source_route_score",
                "share of clean − corrupted margin": "source_recovery",
                "actual change": "actual_delta",
                "first order": "predicted_delta",
                "integrated": "integrated_delta",
                "relative error, first order": "relative_error",
            },
            about="Means over all pairs. The score is the corrupted run's margin with the patch less that without it; the "
            "basis is that of the interval's source at both ends.",
        ),
        TextTable(
            "carriers",
            "What carried the change",
            {
                "group": "group_id",
                "Σ first order": "first_order_contribution",
                "Σ integrated": "integrated_contribution",
                "share of Σ actual change": "share_of_actual",
                "parameters": "num_selected_parameters",
            },
            about="The ten largest, integrated where that was asked for. Compare within a kind of group: kinds overlap.",
        ),
    )
    charts = (
        Trajectory(
            "route_score",
            "ledger",
            "How the route's score moved",
            about="sum of the actual changes, each in its own source's basis",
            y_title="Σ change of the route score",
            series="series",
        ),
        replace(ACTUAL_VS_PREDICTED, y_title="actual change of the route score"),
        RELATIVE_ERROR,
        TOP_CONTRIBUTIONS,
    )
    how_to_read = (
        "The margin is the logit of the clean record's token less that of the corrupted one's, at the prediction. The "
        "corrupted run is repeated with the clean state in one subspace, at one stage and role: what its margin gains is "
        "the route score, and gradients flow through the clean, the corrupted and the patched run.",
        "A contribution is the source's gradient times the parameters' change, summed over a group. First order is exact "
        "only for small steps: with `--integrate N` the gradient is averaged along the straight path, and contributions "
        "add up to the actual change.",
        "The tied embedding is one tensor and counts once. `predicted_delta_counting_aliases` counts every name of it, as "
        "published numbers of the reference toolkit do. A head's subspace has at most as many directions as the head is "
        "wide; the reference lists d_model of them.",
        "Groups of one kind add up to their whole (modules to the global sum, heads and the output bias to the attention "
        "block, neurons and the output bias to the MLP); groups of different kinds overlap.",
        ARITHMETIC,
    )
    next_queries = (
        (
            "How many pairs does the route carry, and how far, at each source step?",
            "SELECT source_step, pair_type, count(*) AS pairs, avg(source_value) AS route_score, "
            "avg((source_value > 0)::INTEGER) AS positive FROM scalar_changes WHERE run = $run AND scalar = 'route_score' "
            "AND quantity = 'value' GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (6, 1)
    example: ClassVar[str] = (
        "lakebed query checkpoint-update-attribution --lake demo.lake --run demo --stage layer_0_post_mlp --subspace "
        "head_qk_query --rank 4 --head L1H1 --position-role query_key --pair-type query_key --out route-updates"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "stage": "layer_0_post_mlp",
        "subspace": "head_qk_query",
        "rank": 4,
        "head": "L1H1",
        "position_role": "query_key",
        "pair_type": ("query_key",),
        "integrate": 4,
    }

    @model_validator(mode="after")
    def _is_a_route(self) -> CheckpointUpdateAttribution:
        self._route()
        return self

    def _route(self) -> Route:
        values = self.model_dump(include={"stage", "subspace", "position_role", "rank", "head_layer", "head"})
        name = self.subspace if self.rank is None else f"rank {self.rank} of {self.subspace}"
        return make_route({"label": name, **values})

    @property
    def routes(self) -> tuple[Route, ...]:
        """The one."""
        return (self._route(),)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        bases = last_bases(results)
        return {
            **super().facts(lake, results),
            "basis_mode": "source_checkpoint_per_interval",
            "subspace": bases[0]
            if bases
            else {"subspace_name": self.subspace, "subspace_type": self.subspace},
            "summary": {
                **interval_facts(results, self.top_k_groups),
                **_final(results),
                "top_contributions": results.rows("FROM largest_contributions"),
            },
            "calculation": {
                "route_score": "mean over pairs of margin(corrupted run, patched) - margin(corrupted run)",
                "actual_delta": "route_score(target; source basis) - route_score(source; source basis)",
                "predicted_delta": "gradient of route_score at the source . (target - source weights)",
                "integrated_delta": "the same with the gradient averaged along the straight path",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """How far the score moved and when, how well that is explained, and what carried it."""
        of = results.rows("FROM interval_summary")[0]
        (route,) = self.routes
        name = route.label if route.head is None else f"{route.label} of {route.head_label}"
        what = f"What passes through {name} at {self.stage} ({self.position_role})"
        return [_movement(what, results, of), explained(of), carried(results, of["label"])]


def _final(results: Results) -> dict[str, Any]:
    rows = results.rows(
        "FROM metric_rows WHERE source_step = (SELECT max(source_step) FROM intervals) ORDER BY split, pair_type"
    )
    pooled = next(row for row in rows if (row["split"], row["pair_type"]) == ("__all__", "__all__"))
    return {"final_all": pooled, "final_metric_by_split_and_pair_type": rows}


def _movement(what: str, results: Results, of: dict[str, Any]) -> str:
    steepest = results.first(
        "FROM interval_table ORDER BY actual_delta / (target_step - source_step) DESC LIMIT 1"
    )
    last = results.first("FROM interval_table ORDER BY source_step DESC LIMIT 1")
    assert steepest is not None
    assert last is not None
    grew = f"{of['growing_intervals']} of {of['num_intervals']} intervals"
    text = movement(what, of["sum_actual_delta"], results.steps[0], results.steps[-1], steepest, grew)
    return (
        f"{text} In logits: the corrupted run's margin gains {number(last['source_route_score'])} at step "
        f"{last['source_step']}, {percent(last['source_recovery'])} of the gap to the clean one."
    )

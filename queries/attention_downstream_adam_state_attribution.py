"""attention-downstream-adam-state-attribution: which term of AdamW's updates moved what a head writes (definitions 3, F)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..lake import Lake
from .attribution_report import ARITHMETIC
from .attribution_sql import DECOMPOSITION
from .chart import Grid, StackedBars, Trajectory
from .downstream_options import HOW_TO_READ, DownstreamOptions, DownstreamScalar
from .key_roles import check_key_rule
from .markdown import number, percent
from .report import InvalidOption, RowFile, TextTable
from .results import Results
from .traced_findings import COMPONENT_TABLE, EXACTNESS_TABLE, beside_the_terms, moved_by_terms
from .traced_report import COMPONENTS, SUMMARY, TracedReport

_STEM = "attention_downstream_adam_state_attribution"
_GLOBAL = "global:all_named_parameters"
_GROUPS = f"""\
SELECT '{_GLOBAL}' AS group_id, 0 AS kind
UNION SELECT 'module:' || module, 1 FROM parameters WHERE run = $run AND module IS NOT NULL
UNION SELECT 'attention_head_projection:' || slice, 2 FROM slices WHERE run = $run AND slice_kind = 'head_projection'
UNION SELECT format('attention_head:L{{}}H{{}}.qkvo', layer, head), 3 FROM slices
  WHERE run = $run AND slice_kind = 'head_projection'
ORDER BY kind, group_id"""


class AttentionDownstreamAdamStateAttribution(TracedReport, DownstreamOptions):
    """Step by step: which AdamW term moved what a head writes, and in which of W_Q, W_K, W_V, W_O or outside the head?

    The source's readout direction is held at both ends of a step where a scalar has one.
    """

    more_views: ClassVar[str] = f"{DECOMPOSITION}\n{SUMMARY}"

    objective_pair_type: Literal["__all__", "query_key", "support_value", "recency", "distractor"] = Field(
        ..., description="type of the pairs that are measured; __all__ pools those that are built"
    )
    objective_route_split: str = Field(
        "__all__", description="split of the pairs that are measured; __all__ pools"
    )
    scalar: tuple[DownstreamScalar, ...] = Field(
        ("attended_support_ov_value_margin", "head_value_margin_dla", "head_margin_dla_fixed_readout"),
        min_length=1,
        description="scalar that is attributed; the first is the stacked chart's",
    )
    parameter_group: tuple[str, ...] = Field(
        (),
        description="group of parameters by its full id, such as module:L0.mlp; default all parameters, the head's four "
        "projections, and those four together",
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name)
        for name in ("metric_rows", "component_rows", "group_rows", "route_pair_rows")
    }
    tables = (
        COMPONENT_TABLE,
        TextTable(
            "group_table",
            "By group of parameters",
            {
                "scalar": "scalar_name",
                "group": "parameter_group_id",
                "raw SGD": "raw_sgd",
                "current gradient": "adam_current_gradient",
                "historical momentum": "adam_historical_momentum",
                "weight decay": "weight_decay",
                "their sum": "reconstructed_adamw_update",
                "share of the first order of all": "share_of_first_order",
            },
            about="Sums over the window. Groups overlap: the head's qkvo is the sum of its four projections.",
        ),
        EXACTNESS_TABLE,
    )
    charts = (
        Trajectory(
            "ledger",
            "ledger",
            "The ledger: running sums of what moved each scalar",
            about="gradient of the scalar times each term of the update; momentum, gradient and decay add up",
            y_title="Σ change",
            series="series",
            panel="panel",
        ),
        StackedBars(
            "terms",
            "stacked_terms",
            "Which term moved the first scalar, and when",
            about="arithmetic, not a counterfactual",
            y_title="change of the scalar",
        ),
        Grid(
            "regions",
            "region_grid",
            "In which parameters did each term act?",
            about="gradient · term, summed over the window, relative to the largest cell of the scalar",
            value_title="relative size",
            domain=(-1, 1),
        ),
    )
    how_to_read = (
        "Row t→t+1: a scalar's gradient at step t is multiplied by every term of the recorded update, entry by entry.",
        *HOW_TO_READ,
        ARITHMETIC,
        "raw_sgd and clipped_sgd take AdamW's learning rate, so a small share of theirs is partly a statement on step size: "
        "read the component's norm and cosine beside it.",
        "Each share names its denominator: `share_of_actual` divides by the measured change, `share_of_first_order` by what "
        "gradient times update makes of it. Shares need not total 100 %.",
        "Parameters outside the head move its scalars too: they make what it reads, and the unembedding reads what it "
        "writes. The tied embedding is one tensor and counts once; `…_counting_aliases` counts every name of it, as "
        "published numbers of the reference toolkit do.",
    )
    next_queries = (
        (
            "Through which parts of the model did momentum act, and did raw SGD agree with it?",
            "SELECT scalar, slice_kind, slice, sum(adam_historical_momentum) AS momentum, sum(raw_sgd) AS raw_sgd FROM "
            "attribution_slices WHERE run = $run AND scalar = 'head_value_margin_dla' AND split = '__all__' AND pair_type = "
            "'__all__' AND point = 'source' GROUP BY ALL ORDER BY abs(momentum) DESC LIMIT 20",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 9)
    example: ClassVar[str] = (
        "lakebed query attention-downstream-adam-state-attribution --lake demo.lake --run demo --steps 32:64 --head L1H1 "
        "--score-query-role prediction --support-key-role support_key --distractor-key-role key_distractors "
        "--route-pair-source-type support_value --objective-pair-type support_value --out downstream-adam"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "score_query_role": "prediction",
        "support_key_role": "support_key",
        "distractor_key_role": "key_distractors",
        "route_pair_source_type": ("support_value",),
        "objective_pair_type": "support_value",
    }

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups that are listed."""
        projections = [
            f"attention_head_projection:{self.head_label}.{part}_proj" for part in ("q", "k", "v", "out")
        ]
        return self.parameter_group or (_GLOBAL, *projections, f"attention_head:{self.head_label}.qkvo")

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per scalar."""
        return self.downstream_scalars(self.record_side)

    def group_ids(self) -> Sequence[str]:
        """Those that are listed."""
        return self.groups

    def objective(self) -> tuple[str, str]:
        """`--objective-route-split` and `--objective-pair-type`."""
        return self.objective_route_split, self.objective_pair_type

    def parameters(self) -> dict[str, Any]:
        """Adds the components, in report order, and the groups."""
        return {
            **super().parameters(),
            "components": list(COMPONENTS),
            "parameter_group": list(self.groups),
        }

    def require(self, lake: Lake, run: str) -> None:
        """Every group must be one of the model's, and asked for once."""
        super().require(lake, run)
        held = lake.session.execute(_GROUPS, {"run": run}, tables={"parameters", "slices"}).fetchall()
        valid = [group for group, _ in held]
        for at, group in enumerate(self.parameter_group):
            twice = group in self.parameter_group[:at]
            if twice or group not in valid:
                wrong = f"group {group!r} is given twice" if twice else f"no group {group!r}"
                raise InvalidOption(
                    f"{self.report_name()}: --parameter-group: {wrong}; run {run!r} has {', '.join(valid)}"
                )

    def check(self, results: Results) -> None:
        """Keys of both roles for every query."""
        super().check(results)
        check_key_rule(results, self.score_query_role, self.support_key_role, self.distractor_key_role)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        return {
            **super().facts(lake, results),
            "head_label": self.head_label,
            "parameter_groups": list(self.groups),
            "summary": {
                "by_scalar": results.rows("FROM scalar_summary"),
                "by_component": results.rows("FROM component_summary"),
                "by_group": results.rows("SELECT * EXCLUDE (position) FROM group_summary"),
                "largest_groups": results.rows("FROM largest_groups"),
                "by_region": results.rows("SELECT label, region, term, contribution FROM region_terms"),
            },
            "calculation": {
                "component_scalar_delta": "gradient of the mean scalar at the source . component of the recorded update",
                "actual_scalar_delta": "mean over pairs of scalar(target) - scalar(source), readout held at the source's",
            },
            "terms": ARITHMETIC,
        }

    def findings(self, results: Results) -> list[str]:
        """How far each scalar moved and when, which term carried it, and in which parameters."""
        half_way = {row["label"]: row["half_way_step"] for row in results.rows("FROM half_way")}
        scalars = results.rows("FROM scalar_summary")
        lines = []
        for of in scalars:
            when = f"; half of the change stood from step {half_way[of['label']]} on"
            lines += [
                moved_by_terms(f"{self.head_label}'s `{of['label']}`", of, results, when),
                _acted(of, results),
            ]
        return [*lines, beside_the_terms(scalars, results)]


def _acted(of: dict[str, Any], results: Results) -> str:
    regions = results.rows(
        "SELECT region, place, fsum(contribution) AS total, "
        "fsum(contribution) FILTER (term = 'adam_historical_momentum') AS momentum FROM region_terms "
        "WHERE label = $label GROUP BY region, place ORDER BY place",
        label=of["label"],
    )
    first_order = of["sum_predicted_delta"]

    def listed(rows: list[dict[str, Any]]) -> str:
        return ", ".join(
            f"{row['region']} {number(row['total'], 3)}"
            + (f" ({percent(row['total'] / first_order)})" if first_order else "")
            for row in rows
        )

    outside = sorted((row for row in regions if row["place"] > 4), key=lambda row: -abs(row["total"]))
    return (
        f"The update acted on it in the head's own {listed([row for row in regions if row['place'] <= 4])}; outside the "
        f"head in {listed(outside)}."
    )

"""attention-retrieval-separation-update-attribution: did the query or the keys move a head's score separation, and through
which parameters? (definitions 2 §F1)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..lake import Lake
from ..lake.datasets import SCORE_CHANGES, Need, score_change_parameters
from ..lake.names import spec_id
from .attribution_report import ARITHMETIC, DecomposedReport, SeparationOptions
from .chart import StackedBars, Trajectory
from .decomposed_charts import ACTUAL_VS_PREDICTED, TOP_CONTRIBUTIONS
from .decomposed_findings import carried, explained, movement
from .decomposed_sql import DECOMPOSED_SUMMARY, interval_facts
from .markdown import number, percent
from .pair_selection import RecordSide
from .report import ReportFailed, RowFile, TextTable
from .results import Results
from .separation_sql import SEPARATIONS

ScoreComponent = Literal["score", "q_side", "k_side"]
_STEM = "attention_retrieval_separation_update_attribution"
_LABELS = """\
-- A scalar per record side and component.
-- view: labels
SELECT
  spec, score_component, record_side, list_position($score_component, score_component) AS position,
  CASE score_component WHEN 'q_side' THEN 'query side' WHEN 'k_side' THEN 'key side' ELSE 'score' END AS label
FROM (
  SELECT spec, scalar_parameters->>'$.component' AS score_component, scalar_parameters->>'$.record_side' AS record_side
  FROM attributed_scalars
)
"""


class AttentionRetrievalSeparationUpdateAttribution(DecomposedReport, SeparationOptions):
    """Between steps, did a head's query or its keys move the score of the support above that of the distractors?"""

    more_views: ClassVar[str] = f"{_LABELS}\n{SEPARATIONS}\n{DECOMPOSED_SUMMARY}"

    record_side: tuple[RecordSide, ...] = Field(
        ("clean", "corrupted"),
        min_length=1,
        description="record of the pair that is scored; the first is the summary's",
    )
    score_component: tuple[ScoreComponent, ...] = Field(
        ("score", "q_side", "k_side"),
        min_length=1,
        description="what is attributed: the score, or its change through the query (q_side) or the keys (k_side) alone; "
        "the first is the charts'",
    )
    reconstruction_tolerance: float = Field(
        1e-3, gt=0, description="how far the nine parts of a change may be from the change that was measured"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name)
        for name in ("metric_rows", "decomposition_rows", "group_rows", "score_rows", "pair_rows")
    }
    tables = (
        TextTable(
            "part_summary",
            "What the change of the score separation is the sum of",
            {
                "side": "side",
                "part": "part",
                "Σ change": "sum_delta",
                "share of Σ actual change": "share_of_actual",
                "Σ of sizes": "sum_of_sizes",
            },
            about="Mean over all pairs of the first record side, summed over the intervals; the nine add up to the actual "
            "change. The input is the LayerNorm of what the head reads, so it holds all that earlier layers learned.",
        ),
        TextTable(
            "interval_summary",
            "How well gradient times update explains it",
            {
                "component": "label",
                "intervals": "num_intervals",
                "of them in growth": "growing_intervals",
                "Σ actual change": "sum_actual_delta",
                "Σ first order": "sum_predicted_delta",
                "Σ integrated": "sum_integrated_delta",
                "mean relative error, first order": "mean_relative_error",
                "integrated": "mean_integrated_relative_error",
                "signs that match": "sign_matches",
            },
        ),
        TextTable(
            "carriers",
            "What carried the change",
            {
                "component": "label",
                "group": "group_id",
                "Σ first order": "first_order_contribution",
                "Σ integrated": "integrated_contribution",
                "share of Σ actual change": "share_of_actual",
                "parameters": "num_selected_parameters",
            },
            about="The ten largest by component, integrated where that was asked for. Compare only within a kind of group: "
            "kinds overlap.",
        ),
    )
    charts = (
        Trajectory(
            "sides",
            "sides",
            "Did the query or the keys move the separation?",
            about="running sums of the score separation and of its three parts, and the attention that came of it",
            series="series",
            panel="panel",
            panel_titles={"change": "Σ Δ score", "attention": "attention, support − distractors"},
        ),
        StackedBars(
            "parts",
            "stacked_parts",
            "Which part moved it, and when",
            about="the parts add up to the change of the separation; biases stand with their weights",
            y_title="change of the score separation",
            highlight=9,
        ),
        replace(
            ACTUAL_VS_PREDICTED,
            about="a point is a component over an interval; on the diagonal gradient times update is the whole of it",
        ),
        replace(
            TOP_CONTRIBUTIONS,
            about="of the first component, summed over the intervals; compare within a kind of group",
        ),
    )
    how_to_read = (
        "The separation is the mean over support keys minus the mean over distractor keys (up to the query) of the head's "
        "score q·k/√d_head before the softmax, biases in.",
        "A score moves by exactly Δq·k + q·Δk + Δq·Δk over √d_head, q and k those of the source: query side, key side, and "
        "both at once. Query and keys follow from every earlier parameter, so a side holds what upstream layers did to it.",
        "`q_side` and `k_side` have the keys or the query of the source frozen at both ends and in the gradient. To first "
        "order the two add up to `score`; over long intervals both at once is what is left.",
        "A contribution is the source's gradient times the parameters' change, summed over a group. First order is exact "
        "only for small steps: with `--integrate N` the gradient is averaged along the straight path, and contributions add "
        "up to the actual change.",
        "The tied embedding is one tensor and counts once. `predicted_delta_counting_aliases` counts every name of it, as "
        "published numbers of the reference toolkit do.",
        ARITHMETIC,
    )
    next_queries = (
        (
            "Where a query moved against its distractors rather than towards its support:",
            "SELECT target_step, key_role, avg(q_vector_delta_source_key) AS query_side, avg(source_query_k_vector_delta) "
            "AS key_side, avg(target_attention - source_attention) AS attention FROM score_changes WHERE run = $run GROUP "
            "BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (7, 1)
    example: ClassVar[str] = (
        "lakebed query attention-retrieval-separation-update-attribution --lake demo.lake --run demo --head L1H1 "
        "--score-query-role prediction --support-key-role support_key --distractor-key-role key_distractors --record-side "
        "clean --pair-type support_value --out score-updates"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "score_query_role": "prediction",
        "support_key_role": "support_key",
        "distractor_key_role": "key_distractors",
        "record_side": ("clean",),
        "pair_type": ("support_value",),
        "integrate": 4,
    }

    @field_validator("score_component")
    @classmethod
    def _each_component_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per record side and component."""
        return [
            (
                "attention_score_separation",
                {
                    **self.role_parameters(),
                    "head": self.head_label,
                    "component": component,
                    "record_side": side,
                },
            )
            for side in self.record_side
            for component in self.score_component
        ]

    def score_changes(self) -> list[dict[str, Any]]:
        """Parameters of dataset score_changes, one set per record side."""
        return [
            score_change_parameters(
                self.head_label,
                self.role_parameters(),
                side,
                pair_type=self.pair_type,
                probe=self.probe,
                split=self.split,
                max_pairs_per_type=self.max_pairs_per_type,
            )
            for side in self.record_side
        ]

    def needs(self) -> tuple[Need, ...]:
        """Adds the changes of every score."""
        return (*super().needs(), *(Need(SCORE_CHANGES, of) for of in self.score_changes()))

    def parameters(self) -> dict[str, Any]:
        """Adds their specs."""
        return {**super().parameters(), "score_spec": [spec_id(of) for of in self.score_changes()]}

    def check(self, results: Results) -> None:
        """The parts must add up to what the passes measured."""
        wrong = results.first(
            "SELECT * FROM reconstruction WHERE greatest(score_error, query_error, key_error) > $tolerance "
            "ORDER BY greatest(score_error, query_error, key_error) DESC LIMIT 1",
            tolerance=self.reconstruction_tolerance,
        )
        if wrong:
            raise ReportFailed(
                f"{self.report_name()}: from step {wrong['source_step']} to {wrong['target_step']} the parts miss what was "
                f"measured by up to {wrong['score_error']:.3g} in the score, {wrong['query_error']:.3g} in the query and "
                f"{wrong['key_error']:.3g} in the keys, more than --reconstruction-tolerance "
                f"{self.reconstruction_tolerance:g}"
            )
        super().check(results)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        pooled = "SELECT * FROM metric_rows WHERE target_step = $last AND record_side = $side"
        last = {"last": results.steps[-1], "side": self.record_side[0]}
        errors = results.first(
            "SELECT max(score_error) AS score, max(query_error) AS query, max(key_error) AS key FROM reconstruction"
        )
        return {
            **super().facts(lake, results),
            "head_label": self.head_label,
            "max_reconstruction_errors": errors,
            "summary": {
                **interval_facts(results, self.top_k_groups),
                "final_all": results.rows(
                    f"{pooled} AND split = '__all__' AND pair_type = '__all__'", **last
                ),
                "final_metric_by_split_and_pair_type": results.rows(pooled, **last),
                "by_component": results.rows("FROM interval_summary"),
                "sides": results.first("FROM side_summary"),
                "parts": results.rows("FROM part_summary"),
                "top_contributions": results.rows("FROM largest_contributions"),
            },
            "calculation": {
                "actual_delta": "mean over pairs of separation(target) - separation(source), the frozen side that of the "
                "source",
                "predicted_delta": "gradient of the mean separation at the source . (target - source weights)",
                "integrated_delta": "the same with the gradient averaged along the straight path",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """How far the separation moved and when, which side moved it, how well that is explained, and what carried it."""
        sides = results.first("FROM side_summary")
        assert sides is not None
        rows = results.rows("FROM interval_summary")
        name = f"{self.head_label}'s score of `{self.support_key_role}` above `{self.distractor_key_role}`"
        return [
            movement(
                name,
                sides["sum_actual"],
                results.steps[0],
                results.steps[-1],
                {key: sides[f"fastest_{key}"] for key in ("source_step", "target_step")}
                | {"actual_delta": sides["fastest_delta"]},
                f"{sides['growing_intervals']} of {sides['num_intervals']} intervals",
            ),
            _of_sides(sides, results),
            *(
                f"*{of['label'].capitalize()}.* {explained(of)} {carried(results, of['label'])}"
                for of in rows
            ),
        ]


def _of_sides(sides: dict[str, Any], results: Results) -> str:
    total = sides["sum_actual"]

    def part(value: float) -> str:
        return f"{number(value, 3)} ({percent(value / total)})" if total else number(value, 3)

    query, key = sides["sum_q_side"], sides["sum_k_side"]
    largest = results.first("SELECT * FROM part_summary ORDER BY abs(sum_delta) DESC, part LIMIT 1")
    assert largest is not None
    return (
        f"**The {'query' if abs(query) > abs(key) else 'key'} side moved it more**: the query side gave {part(query)}, the "
        f"key side {part(key)}, both at once {part(sides['sum_cross'])}; the query side was the larger in "
        f"{sides['q_side_larger']} of {sides['num_intervals']} intervals. The largest of the nine parts is "
        f"{largest['part']}, {number(largest['sum_delta'], 3)}."
    )

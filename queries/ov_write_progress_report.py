"""ov-write-progress-report: whose write grew with the answer, by attention or by its value map? (definitions 3 §G)"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..lake import Lake
from ..lake.datasets import Need
from ..lake.names import spec_id
from ..lake.write_conditions import CONDITIONS, WRITE_CONDITIONS, write_condition_parameters
from .chart import Grid, Trajectory
from .key_roles import KEY_RULE, check_key_rule
from .pair_selection import PairOptions, RecordSide
from .probe_report import ProbeReport, require_head, require_roles
from .report import ReportFailed, RowFile, TextTable
from .results import Results
from .write_findings import findings, warnings


class AnswerChanged(ReportFailed):
    """The answer of a pair is not the same at every checkpoint, or not that of its record."""


class OVWriteProgressReport(PairOptions):
    """Which head's write grew with the answer, and did its attention or its value map make it grow?

    The same pairs are measured at every checkpoint, with the head's attention and values as they are or replaced.
    """

    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "checkpoints"

    head: tuple[str, ...] = Field(..., min_length=1, description="head that is audited, as L2H1")
    score_query_role: str = Field(
        "prediction", description="role of the attending position; must be one position"
    )
    support_key_role: str = Field(..., description="role the head should attend to")
    distractor_key_role: str = Field(..., description="role it should not attend to")
    record_side: tuple[RecordSide, ...] = Field(
        ("clean", "corrupted"),
        min_length=1,
        description="record of the pair that is measured; the first is the summary's",
    )
    max_pairs_per_type: int = Field(64, ge=2, description="most pairs of each type, the first in scan order")
    min_pairs_per_type: int = Field(2, ge=2, description="fewest pairs of each type; fewer is an error")
    top_k_correlations: int = Field(24, ge=1, description="correlations in the summary, largest |r| first")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"ov_write_progress_{name}", name)
        for name in (
            "pair_rows",
            "checkpoint_rows",
            "pair_delta_rows",
            "delta_rows",
            "correlation_rows",
            "pair_metadata_rows",
        )
    }
    tables = (
        TextTable(
            "heads",
            "Head by head",
            {
                "head": "head_label",
                "attention × OV, first": "first_product",
                "last": "last_product",
                "change by attention": "by_attention",
                "by the OV map": "by_ov_map",
                "r with the answer": "correlation",
                "attention, first": "first_mass",
                "last ": "last_mass",
                "whole write at the end": "last_write",
                "from the support alone": "last_map",
                "values shuffled": "last_shuffled",
                "both": "last_shuffled_map",
            },
            about="Means over all pairs of the first record side. Attention is the mass on the support, OV the value "
            "margin of what the head writes from it; the change of their product is the sum of the two parts. r is over "
            "the intervals, of the product and the answer's margin against the source's best competitor. The last four "
            "columns are value margins in logits at the last checkpoint, under the four conditions.",
        ),
        TextTable(
            "top_correlations",
            "Which changes go together",
            {
                "head": "head_label",
                "record side": "record_side",
                "condition": "condition",
                "write": "write_delta_metric",
                "output": "output_delta_metric",
                "Pearson r": "correlation",
                "intervals": "num_points",
            },
            about="Over the intervals between neighbouring checkpoints, largest |r| first. The OV map and its products "
            "are the same under both attentions.",
        ),
    )
    charts = (
        Trajectory(
            "write_trajectory",
            "trajectory",
            "Whose write from the support grew, by what, and with the answer?",
            about="means over all pairs of the first record side; the heads whose attention × OV changed most, six at most",
            series="series",
            panel="panel",
            panel_titles={
                "product": "attention × OV",
                "mass": "attention to the support",
                "ov_map": "OV value margin",
                "answer": "answer margin",
            },
            highlight=6,
        ),
        Trajectory(
            "conditions",
            "condition_lines",
            "Is it the attention, or the values it finds?",
            about="value margin of the whole write, in logits, of the heads whose write from the support grew most",
            series="series",
            panel="panel",
        ),
        Grid(
            "final_conditions",
            "condition_grid",
            "What each head writes at the last checkpoint, under every condition",
            about="value margin of the write, in logits",
            value_title="value margin",
        ),
        Grid(
            "correlations",
            "correlation_grid",
            "Which write scalar moves with the answer?",
            about="r over the intervals with the margin against the source's best competitor",
            value_title="Pearson r",
            domain=(-1, 1),
        ),
    )
    how_to_read = (
        "S and D are the support and distractor keys up to the query, a the attention to them, s the score before the "
        "softmax; a write is W_O times a mix of value vectors (value bias in, output bias out), and vm(u) is u read by "
        "the raw unembedding, answer less the competitor that u favours most.",
        "`real_attention_real_values` is what the head writes; `correct_support_attention_…` what it would write if it "
        "attended to S alone; with `…_shuffled_values` S has the mean value vector of another pair's S. "
        "`ov_map_value_margin` is vm of the write from S alone, `head_value_margin_dla` vm of the condition's write.",
        "These are substitutions at readout: no later layer is run again, so attention, scores, logits and loss are the "
        "model's own under every condition, and the four products take the model's own attention and scores.",
        "The other pair is the one before it among the pairs of its type in scan order, the last for the first "
        "(`shuffled_pair_id`); the reference toolkit's depends on its batch size. Its values are those of its own "
        "record, at its own positions.",
        "`head_margin_dla` is the write times the gradient of the model's value margin at the last residual stage, "
        "through its LayerNorm, at the same checkpoint: the readout moves too. `fixed_source_competitor_margin` holds "
        "the answer against the competitor that was best at the interval's source.",
        "That two changes go together over the intervals is no proof that one makes the other; between two intervals r is "
        "±1 whatever they are.",
    )
    next_queries = (
        (
            "Every other head is there too: which write most, and from the support alone?",
            "SELECT layer, head, condition, avg(head_value_margin_dla) AS margin FROM write_conditions WHERE run = $run AND "
            "step = (SELECT max(step) FROM write_conditions WHERE run = $run) GROUP BY ALL ORDER BY margin DESC LIMIT 12",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 7)
    example: ClassVar[str] = (
        "lakebed query ov-write-progress-report --lake demo.lake --run demo --head L0H0 --head L1H1 --score-query-role "
        "prediction --support-key-role support_value --distractor-key-role value_distractors --record-side clean "
        "--pair-type support_value --out writes"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": ("L0H0", "L0H1", "L1H0", "L1H1"),
        "support_key_role": "support_value",
        "distractor_key_role": "value_distractors",
        "record_side": ("clean",),
        "pair_type": ("support_value",),
    }

    @field_validator("head")
    @classmethod
    def _are_heads(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if re.fullmatch(r"L(0|[1-9]\d*)H(0|[1-9]\d*)", value) is None:
                raise ValueError(f"{value} is no head: write it as L2H1, layer and head from 0")
            if values.count(value) > 1:
                raise ValueError(f"{value} stands {values.count(value)} times")
        return values

    @model_validator(mode="after")
    def _has_two_roles(self) -> OVWriteProgressReport:
        if self.support_key_role == self.distractor_key_role:
            raise ValueError(f"--support-key-role and --distractor-key-role are both {self.support_key_role}")
        return self

    @classmethod
    def sql_text(cls) -> str:
        """The key rule of the pairs' records before the report's own sections."""
        own = super(ProbeReport, cls).sql_text()
        return f"{super().sql_text().removesuffix(own)}{KEY_RULE}{own}"

    def datasets(self) -> list[dict[str, Any]]:
        """Parameters of dataset write_conditions, one set per record side."""
        roles = self.model_dump(include={"score_query_role", "support_key_role", "distractor_key_role"})
        return [
            write_condition_parameters(
                roles,
                side,
                pair_type=self.pair_type,
                probe=self.probe,
                split=self.split,
                max_pairs_per_type=self.max_pairs_per_type,
            )
            for side in self.record_side
        ]

    def needs(self) -> tuple[Need, ...]:
        """Every head of the model, on each record side."""
        return tuple(Need(WRITE_CONDITIONS, of) for of in self.datasets())

    def parameters(self) -> dict[str, Any]:
        """Adds the spec of each record side and the conditions, in the order of the rows."""
        return {
            **super().parameters(),
            "spec": [spec_id(of) for of in self.datasets()],
            "conditions": list(CONDITIONS),
        }

    def require(self, lake: Lake, run: str) -> None:
        """Heads and roles must be there."""
        super().require(lake, run)
        for label in self.head:
            layer, head = label[1:].split("H")
            require_head(lake, run, int(layer), int(head))
        require_roles(
            lake, run, self.probe, self.score_query_role, self.support_key_role, self.distractor_key_role
        )

    def check(self, results: Results) -> None:
        """At least two checkpoints, and every pair measured at each of them with the answer of its record."""
        name = self.report_name()
        if len(results.steps) < 2:
            raise ReportFailed(
                f"{name}: at least two checkpoints are needed, and --steps leaves {len(results.steps)}"
            )
        check_key_rule(results, self.score_query_role, self.support_key_role, self.distractor_key_role)
        changed = results.first(
            "SELECT pair_id, step, measured_answer_token, answer_token FROM answers "
            "WHERE measured_answer_token <> answer_token ORDER BY step, pair_id LIMIT 1"
        )
        if changed:
            raise AnswerChanged(
                f"{name}: the answer of pair {changed['pair_id']} was token {changed['measured_answer_token']} at step "
                f"{changed['step']}, and its record asks for {changed['answer_token']}"
            )

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        ranked = "FROM correlation_rows WHERE status = 'computed' ORDER BY correlation"
        return {
            **super().facts(lake, results),
            "conditions": list(CONDITIONS),
            "summary": {
                "primary_record_side": self.record_side[0],
                "final_rows": results.rows(
                    "SELECT * FROM checkpoint_rows WHERE split = '__all__' AND pair_type = '__all__' "
                    "AND step = (SELECT max(step) FROM checkpoint_rows)"
                ),
                "top_correlations": results.rows("FROM top_correlations"),
                "strongest_positive": results.first(f"SELECT * {ranked} DESC LIMIT 1"),
                "strongest_negative": results.first(f"SELECT * {ranked} LIMIT 1"),
            },
            "calculation": {
                "delta": "target checkpoint - source checkpoint, neighbouring checkpoints, pair by pair",
                "correlation": "Pearson over intervals of the pooled mean deltas",
                "shuffled_values": "mean value vector over the support of the pair before, among the pairs of its type in "
                "scan order; the last one's for the first",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Whose write grew with the answer, by what, what replaced values do to it, and which scalar tracks the answer."""
        return findings(results, self.record_side[0])

    def warnings(self, results: Results) -> list[str]:
        """Two intervals, pairs shuffled to the same answer, numbers that are not finite."""
        return [*super().warnings(results), *warnings(results)]

"""answer-scalar-residual-diagnosis: what an answer's margin changes by, and against which competitor (4 §0.10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from .chart import StackedBars, Trajectory
from .markdown import number, percent
from .report import RowFile, TextTable
from .results import Results
from .scalar_pairs import ScalarChangeReport


class AnswerScalarResidualDiagnosis(ScalarChangeReport):
    """Did a margin grow because the answer rose, its competitor fell, or another competitor took its place?"""

    top_k_wrong: PositiveInt = Field(5, description="competitors listed with their logits, best first")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "interval_pair_rows": RowFile("answer_scalar_residual_diagnosis_pair_rows", "interval_pair_rows"),
        "interval_summary_rows": RowFile(
            "answer_scalar_residual_diagnosis_summary_rows", "interval_summary_rows"
        ),
        "switch_rows": RowFile("answer_scalar_residual_diagnosis_switch_rows", "switch_rows"),
    }
    tables = (
        TextTable(
            "switch_table",
            "What the moving margin's change is the sum of",
            {
                "interval": "interval",
                "record": "margin_side",
                "Δ moving margin": "moving_delta_mean",
                "answer raised": "correct_logit_delta_mean",
                "competitor lowered": "suppressed_competitor_delta_mean",
                "another competitor": "switch_delta_mean",
                "pairs that switch": "competitor_switch_fraction",
            },
            "Means over pairs, in logits. The three parts add up to the change of the moving margin, pair by pair.",
        ),
    )
    charts = (
        StackedBars(
            "margin_parts",
            "parts_chart",
            "What the answer's margin grew by",
            about="mean over pairs of the first record side: change of the answer's logit, of minus the source's best wrong "
            "logit, and what is lost to a competitor that overtook it",
            y="value",
            y_title="change of the margin (logits)",
        ),
        Trajectory(
            "scalar_trajectory",
            "trajectory",
            "The answer's margin, its logit and its log-probability",
            series="series",
            panel="panel",
            panel_titles={
                "margin": "moving margin (logits)",
                "logit": "answer's logit",
                "loss": "log p(answer) (nats)",
            },
        ),
    )
    how_to_read = (
        "With y the answer and w_S, w_T the best wrong tokens of the record at the source and at the target, the *moving* "
        "margin is l[y] − l[w_S] at the source and l[y] − l[w_T] at the target; the *fixed* ones hold w_S, or w_T, "
        "at both ends.",
        "Δ moving = (answer raised) + (competitor lowered) + (another competitor), the last being l[w_S] − l[w_T] at the "
        "target: never positive, and 0 where the best wrong token stays the same.",
        "`negative_answer_loss` is log p(y) over the whole vocabulary, so that more is better, as for the margins.",
        "These rows are what the closure and rescue reports are about; those read them from the lake, by the same options.",
    )
    next_queries = (
        (
            "Which wrong tokens compete most often at the last step?",
            "SELECT best_wrong_token, count(*) AS events, avg(value_margin) AS margin FROM intervention_runs WHERE run = "
            "$run AND intervention = 'clean' AND step = (SELECT max(step) FROM intervention_runs) GROUP BY ALL ORDER BY "
            "events DESC LIMIT 10",
        ),
    )
    place: ClassVar[tuple[int, int]] = (10, 1)
    example: ClassVar[str] = (
        "lakebed query answer-scalar-residual-diagnosis --lake demo.lake --run demo --steps 0:1300:130 "
        "--pair-type support_value --margin-side clean --out scalars"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {"pair_type": ("support_value", "query_key")}

    def findings(self, results: Results) -> list[str]:
        """The interval with the largest change, and its parts; how often competitors switch."""
        side = self.margin_side[0]
        top = results.first(
            "SELECT * FROM switch_rows WHERE margin_side = $side ORDER BY moving_delta_mean DESC, source_step",
            side=side,
        )
        assert top is not None
        total = results.first(
            "SELECT sum(moving_delta_mean) AS moving, sum(correct_logit_delta_mean) AS raised, "
            "sum(suppressed_competitor_delta_mean) AS lowered, sum(switch_delta_mean) AS switched, "
            "avg(competitor_switch_fraction) AS fraction FROM switch_rows WHERE margin_side = $side",
            side=side,
        )
        assert total is not None
        return [
            f"From step {results.steps[0]} to {results.steps[-1]} the mean margin of {top['num_pairs']} {side} records "
            f"changed by **{_signed(total['moving'])}** logits: the answer's gave {_signed(total['raised'])}, the best "
            f"competitor's {_signed(total['lowered'])}, competitors that overtook it {_signed(total['switched'])}.",
            f"Most came between steps {top['source_step']} and {top['target_step']}, {_signed(top['moving_delta_mean'])}.",
            f"In an interval {percent(total['fraction'])} of the records change their best wrong token on average: there a "
            "moving margin and a fixed one are different scalars.",
        ]


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + number(value, 3)

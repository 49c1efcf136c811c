"""qk-separation-ledger: which head's QK separation grew most over recorded steps, when, and which term carried it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from .attribution_report import ARITHMETIC, require_rank
from .chart import Bars, StackedBars, Trajectory
from .markdown import number, percent
from .probe_report import require_head, require_roles
from .report import RowFile, TextTable
from .traced_report import COMPONENTS, SUMMARY, TracedReport

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

_STEM = "qk_separation_ledger"


class QKSeparationLedger(TracedReport):
    """Which head's QK separation grew most, between which steps, and what share came from which term of the updates?

    Every head is scored on the stage it reads, with the singular basis of each step's source.
    """

    head: tuple[str, ...] = Field(..., min_length=1, description="head, as L2H1; repeat it to compare heads")
    rank: int = Field(4, ge=1, description="singular directions of W_QK that the scores are cut to")
    score_query_role: str = Field("prediction", description="role of the attending position")
    support_key_role: str = Field(..., description="role the head should attend to")
    distractor_key_role: str = Field(..., description="role it should not attend to")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name) for name in ("head_rows", "step_rows", "group_rows")
    }
    tables = (
        TextTable(
            "head_rows",
            "Heads, the one that grew most first",
            {
                "head": "head_label",
                "Σ actual change": "sum_actual_delta",
                "Σ first order": "sum_predicted_delta",
                "momentum": "momentum_share",
                "current gradient": "current_gradient_share",
                "weight decay": "weight_decay_share",
                "raw SGD": "raw_sgd_share",
                "fastest from step": "fastest_from",
                "to step": "fastest_to",
                "by": "fastest_growth",
            },
            about="Shares are of the first-order sum: momentum, current gradient and decay add up to 1; raw SGD at "
            "the same "
            "learning rate stands beside them.",
        ),
    )
    charts = (
        Trajectory(
            "growth",
            "growth",
            "Whose QK separation grew?",
            about="running sum of the actual changes, each in its own source's basis",
            y_title="Σ change of the separation",
            series="series",
        ),
        Trajectory(
            "ledger",
            "first_ledger",
            "The ledger of the head that grew most",
            about="gradient of its separation times each term of the update; momentum, gradient and decay add up",
            y_title="Σ change of the separation",
            series="series",
        ),
        StackedBars(
            "terms",
            "stacked_terms",
            "Which term moved it, and when",
            about="of the head that grew most; arithmetic, not a counterfactual",
            y_title="change of the separation",
        ),
        Bars(
            "parts",
            "first_parts",
            "Which parameters did it act through?",
            about="of the head that grew most, summed over the window; compare within a kind",
            value_title="Σ gradient · term",
            label="name",
            panel="partition",
            color="term",
        ),
    )
    how_to_read = (
        "The separation of a head is its mean QK score of the support keys minus that of the distractor keys, cut "
        "to the first "
        "singular directions of W_QK at each step's source; biases are left out.",
        ARITHMETIC,
        "The basis moves from step to step, so the sum of the changes is not the separation's end minus its start.",
        "Heads of one layer read the same stage; a head's separation may grow because an earlier layer writes what "
        "it matches.",
    )
    next_queries = (
        (
            "The same ledger as one statement, over whatever was attributed:",
            "SELECT scalar_head, min(source_step) AS from_step, max(target_step) AS to_step, sum(actual_update) AS "
            "change, "
            "sum(adam_historical_momentum) / sum(actual_update) AS momentum, sum(adam_current_gradient) / "
            "sum(actual_update) AS "
            "gradient, sum(weight_decay) / sum(actual_update) AS decay, sum(raw_sgd) / sum(actual_update) AS "
            "raw_sgd FROM "
            "attribution_slices WHERE run = $run AND scalar = 'qk_rank_separation' AND slice_kind = 'parameter' AND "
            "split = "
            "'__all__' AND pair_type = '__all__' AND point = 'source' GROUP BY spec, scalar_head ORDER BY change DESC",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 6)
    example: ClassVar[str] = (
        "lakebed query qk-separation-ledger --lake demo.lake --run demo --steps 32:64 --head L0H0 --head L0H1 "
        "--head L1H0 "
        "--head L1H1 --support-key-role support_key --distractor-key-role key_distractors --pair-type support_value "
        "--out ledger"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": ("L0H0", "L0H1", "L1H0", "L1H1"),
        "support_key_role": "support_key",
        "distractor_key_role": "key_distractors",
        "pair_type": ("support_value",),
    }

    @field_validator("head")
    @classmethod
    def _are_heads(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not re.fullmatch(r"L\d+H\d+", value):
                raise ValueError(f"{value!r} is no head: write it as L2H1")
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _has_two_roles(self) -> QKSeparationLedger:
        if self.support_key_role == self.distractor_key_role:
            raise ValueError(f"--support-key-role and --distractor-key-role are both {self.support_key_role}")
        return self

    @classmethod
    def sql_text(cls) -> str:
        """The sums over the window come after the labels and before the rows that read them."""
        head, mark, tail = super().sql_text().partition("-- The quarter of the window")
        return f"{head}{SUMMARY}\n{mark}{tail}"

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per head, on the stage it reads."""
        return [
            (
                "qk_rank_separation",
                {
                    "score_query_role": self.score_query_role,
                    "support_key_role": self.support_key_role,
                    "distractor_key_role": self.distractor_key_role,
                    "head": head,
                    "rank": self.rank,
                    "stage": _input_stage(head),
                    "layernorm_mode": "head_ln1",
                    "record_side": self.record_side[0],
                },
            )
            for head in self.head
        ]

    def objective(self) -> tuple[str, str]:
        """All pairs."""
        return "__all__", "__all__"

    def group_kinds(self) -> Sequence[str]:
        """Modules and heads."""
        return ("module_block", "attention_head_projection", "attention_head")

    def parameters(self) -> dict[str, Any]:
        """Adds the components, in report order."""
        return {**super().parameters(), "components": list(COMPONENTS)}

    def require(self, lake: Lake, run: str) -> None:
        """The heads and roles must be there, and the rank within the heads' width."""
        super().require(lake, run)
        for head in self.head:
            layer, _, number_of = head.removeprefix("L").partition("H")
            require_head(lake, run, int(layer), int(number_of))
        require_roles(
            lake, run, self.probe, self.score_query_role, self.support_key_role, self.distractor_key_role
        )
        require_rank(lake, run, self.report_name(), self.rank)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The summary, heads in order of growth."""
        return {
            **super().facts(lake, results),
            "summary": {
                "by_component": results.rows("FROM component_summary"),
                "by_head": results.rows("FROM scalar_summary"),
            },
            "terms": ARITHMETIC,
        }

    def findings(self, results: Results) -> list[str]:
        """Which head grew most, when, by which terms, and through which parts."""
        heads = results.rows("FROM head_rows ORDER BY position")
        first = heads[0]
        others = ", ".join(f"{of['head_label']} {number(of['sum_actual_delta'], 3)}" for of in heads[1:])
        grew = first["sum_actual_delta"] > 0
        parts = results.rows(
            "SELECT name, sum(value) AS total FROM first_parts WHERE partition = 'module block' GROUP BY name "
            "ORDER BY abs(total) DESC, name LIMIT 3"
        )
        return [
            f"**{first['head_label']}'s rank-{self.rank} QK separation {'grew most' if grew else 'fell least'}: "
            f"{number(first['sum_actual_delta'])}** over steps {first['start_step']} to {first['end_step']}, "
            f"fastest from "
            f"{first['fastest_from']} to {first['fastest_to']} ({number(first['fastest_growth'], 3)})"
            + (f"; {others}." if others else "."),
            f"Of its first order, {number(first['sum_predicted_delta'])}, carried momentum made "
            f"{percent(first['momentum_share'])}, the current gradient {percent(first['current_gradient_share'])}, "
            f"weight decay "
            f"{percent(first['weight_decay_share'])}; plain SGD at the same learning rate would have made "
            f"{percent(first['raw_sgd_share'])} along these gradients.",
            "It acted through "
            + ", ".join(f"`{part['name']}` ({number(part['total'], 3)})" for part in parts)
            + ". Arithmetic, not a counterfactual.",
        ]


def _input_stage(head: str) -> str:
    """The stage that a head reads, by its label."""
    layer = int(head[1 : head.index("H")])
    return "embedding" if layer == 0 else f"layer_{layer - 1}_post_mlp"

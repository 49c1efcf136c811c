"""bilinear-qk-match-separation: does a head's QK form score the support above the distractors? (definitions: part 1, J.3)"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from ..lake import Lake
from ..lake.datasets import PROBE, QK_COORDINATES, READOUTS, SVD, Need
from .chart import Trajectory
from .key_roles import check_key_rule
from .markdown import number, percent
from .probe_report import HeadReport, require_roles, require_stages
from .report import ReportFailed, RowFile, TextTable
from .results import Results
from .window_options import WindowOptions

_ALL_RANKS = 2**31 - 1
_CORRELATIONS = {
    "qk_match_separation_vs_qk_singular_value_top": "σ₁ of W_QK",
    "qk_match_separation_vs_answer_margin": "the answer margin",
}


class BilinearQKMatchSeparation(HeadReport, WindowOptions):
    """Does a head's QK form score the support above the distractors, and with how many singular directions?

    At each checkpoint the query-key score of the head is formed from a residual stage, whole or truncated to its
    strongest singular directions, and compared between the support and the distractors of every event.
    """

    context_stage: tuple[str, ...] = Field(
        ..., min_length=1, description="residual stage that query and keys are read from; may be given again"
    )
    support_role: str = Field(..., description="role whose positions should win")
    distractor_role: str = Field(..., description="role whose positions should lose")
    score_query_role: str = Field(
        "prediction", description="role of the query position; must be one position"
    )
    layernorm_mode: Literal["head_ln1", "none"] = Field(
        "head_ln1",
        description="head_ln1: through the LayerNorm before the head; none: the raw residual stream",
    )
    score_mode: tuple[Literal["full_with_bias", "weight_full"], ...] = Field(
        (), description="whole score to form: full_with_bias as the head does, weight_full without its biases"
    )
    rank: tuple[PositiveInt, ...] = Field(
        (), description="number of singular directions of W_QK to form the score from; may be given again"
    )
    group_by: Literal["position_token", "query_key", "support_key", "support_value", "answer_value"] = Field(
        "query_key", description="token that events are grouped by; position_token is the one at the query"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "metric_rows": RowFile("bilinear_qk_match_separation_rows", "metric_rows", "metric_csv"),
        "event_rows": RowFile("bilinear_qk_match_separation_event_rows", "event_rows"),
        "group_rows": RowFile("bilinear_qk_match_separation_group_rows", "group_rows"),
    }
    tables = (
        TextTable(
            "summary",
            "From the first checkpoint to the last",
            {
                "stage": "context_stage",
                "score": "projection",
                "separation at start": "start_qk_match_separation",
                "at end": "end_qk_match_separation",
                "support − best distractor at start": "start_qk_match_max_margin",
                "at end ": "end_qk_match_max_margin",
                "win rate at start": "start_support_beats_all_rate",
                "at end  ": "end_support_beats_all_rate",
                "r with σ₁": "qk_match_separation_vs_qk_singular_value_top",
                "r with answer margin": "qk_match_separation_vs_answer_margin",
            },
            about="Separation is mean support score minus mean distractor score. The win rate is the share of events "
            "whose best support score is above every distractor's.",
        ),
    )
    charts = (
        Trajectory(
            "trajectory",
            "trajectory",
            "When the head's query-key match finds the support",
            series="series",
            panel="panel",
            panel_titles={
                "separation": "support − distractors",
                "win rate": "win rate",
                "answer margin": "answer margin (logits)",
                "singular value": "σ₁ of W_QK",
            },
        ),
    )
    how_to_read = (
        "`full_with_bias` is the head's pre-softmax attention score when the stage is the one the head reads; "
        "`weight_full` leaves the biases out; `rank_r` keeps the r largest singular directions of the same checkpoint's "
        "W_QK. All are divided by √d_head.",
        "Keys are the positions up to the query: a write after it is no key of that query, although the distractor roles "
        "list it.",
        "A head has at most d_head singular directions, and rank d_head is `weight_full`. Tools that decompose the full "
        "d×d product accept ranks up to d; beyond d_head they add nothing.",
        "The win rate is strict: a tie with a distractor is no win. Chance is the share of supports among an event's keys.",
        "The key bias adds one constant to all scores of an event and separates nothing; the query bias favours some keys "
        "over others, whatever the query is.",
        "Correlations are over checkpoints: two quantities that both grow while the model learns correlate without one "
        "causing the other.",
        "`batch_index` is the index of the record in the probe: a lake has no batches.",
    )
    next_queries = (
        (
            "The rank-8 score of every stored key position of one event, from the coordinates:",
            "SELECT q.step, layer, head, stage, layernorm_mode, k.position, list_sum(list_transform(s.sigma[1:8], "
            "lambda v, i: v * q.query[i] * k.key[i])) / sqrt(len(q.query)) AS rank_8 FROM qk_coordinates q JOIN "
            "qk_coordinates k USING (run, probe, step, example, layer, head, stage, layernorm_mode) JOIN (SELECT run, "
            "step, layer, head, list(singular_value ORDER BY rank) AS sigma FROM singular_values WHERE matrix = 'W_QK' "
            "GROUP BY ALL) s USING (run, step, layer, head) JOIN events e USING (run, probe, example) WHERE run = $run "
            "AND e.event = 0 AND q.position = e.prediction_position AND k.position <= q.position ORDER BY ALL LIMIT 40",
        ),
        (
            "How far back the value lies that each head attends to, at the last step (1 is the one written last):",
            "SELECT layer, head, written_before, avg(probability) AS attention FROM (SELECT a.layer, a.head, a.probability, "
            "row_number() OVER (PARTITION BY a.probe, a.event, a.layer, a.head ORDER BY p.position DESC) AS written_before "
            "FROM attention a JOIN positions p ON p.run = a.run AND p.probe = a.probe AND p.event = a.event AND "
            "p.position = a.key_position WHERE a.run = $run AND a.query_role = 'prediction' AND a.step = (SELECT max(step) "
            "FROM attention_patterns) AND p.role IN ('support_value', 'value_distractors')) GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (5, 1)
    example: ClassVar[str] = (
        "lakebed query bilinear-qk-match-separation --lake demo.lake --run demo --head L1H0 "
        "--context-stage layer_0_post_mlp --support-role support_value --distractor-role value_distractors --rank 8 "
        "--score-mode full_with_bias --out qk-match"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "context_stage": ("layer_0_post_mlp",),
        "support_role": "support_key",
        "distractor_role": "key_distractors",
        "score_mode": ("full_with_bias", "weight_full"),
        "rank": (2, 8),
    }

    @field_validator("context_stage", "score_mode")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("rank")
    @classmethod
    def _ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(values)))

    @model_validator(mode="after")
    def _makes_sense(self) -> BilinearQKMatchSeparation:
        if not self.score_mode and not self.rank:
            raise ValueError(
                "no score to form: give --rank, or --score-mode full_with_bias or weight_full, or several"
            )
        if self.support_role == self.distractor_role:
            raise ValueError(f"--support-role and --distractor-role are both {self.support_role}")
        return self

    def projections(self) -> dict[str, tuple[int, bool]]:
        """The score forms by name, in report order: how many ranks each sums, and whether it adds the bias terms."""
        forms: dict[str, tuple[int, bool]] = {}
        for mode in self.score_mode:
            forms[mode] = (_ALL_RANKS, mode == "full_with_bias")
        for rank in self.rank:
            forms[f"rank_{rank}"] = (rank, False)
        return forms

    def parameters(self) -> dict[str, Any]:
        """Adds the score forms, and the role that events are grouped by."""
        forms = self.projections()
        group_role = {"position_token": self.score_query_role}.get(self.group_by, self.group_by)
        return {
            **super().parameters(),
            "projection_names": list(forms),
            "projection_ranks": [ranks for ranks, _ in forms.values()],
            "projection_biases": [biases for _, biases in forms.values()],
            "group_role": group_role,
            "roles": list({self.score_query_role, self.support_role, self.distractor_role, group_role}),
        }

    def needs(self) -> tuple[Need, ...]:
        """The probe, the head's coordinates at every stage, its singular values and the model's own answers."""
        stages = (
            Need(
                QK_COORDINATES,
                {
                    "probe": self.probe,
                    "head": self.head_label,
                    "stage": stage,
                    "layernorm_mode": self.layernorm_mode,
                },
            )
            for stage in self.context_stage
        )
        return (*stages, Need(SVD), Need(READOUTS, {"probe": self.probe}))

    def require(self, lake: Lake, run: str) -> None:
        """Stages and roles must be there."""
        super().require(lake, run)
        require_stages(lake, run, *self.context_stage)
        grouped = () if self.group_by in ("position_token", "answer_value") else (self.group_by,)
        require_roles(
            lake, run, self.probe, self.score_query_role, self.support_role, self.distractor_role, *grouped
        )

    def check(self, results: Results) -> None:
        """Every event must have its score, and a token to be grouped by; no rank may exceed the head's width."""
        check_key_rule(results, self.score_query_role, self.support_role, self.distractor_role)
        name = self.report_name()
        ungrouped = results.value("SELECT count(*) FROM key_rule WHERE group_tokens <> 1")
        if ungrouped:
            raise ReportFailed(
                f"{name}: --group-by {self.group_by} is not one position in {ungrouped:,} of the events"
            )
        zero = results.rows("SELECT step FROM spectrum WHERE NOT list_sum(sigma) > 0")
        if zero:
            raise ReportFailed(
                f"{name}: W_QK of {self.head_label} is zero at step {zero[0]['step']}: it has no singular directions"
            )
        width = results.value("SELECT max(d_head) FROM query_sides")
        if width is not None and self.rank and self.rank[-1] > width:
            raise ReportFailed(
                f"{name}: --rank {self.rank[-1]} is above the head's width: W_QK of {self.head_label} has {width} "
                f"singular directions, and rank {width} is already the whole of it"
            )
        keys = results.value("SELECT sum(len(support_positions) + len(distractor_positions)) FROM key_rule")
        wanted = keys * len(results.steps) * len(self.context_stage) * len(self.projections())
        scored = results.value("SELECT count(*) FROM scores")
        if scored != wanted:
            raise ReportFailed(
                f"{name}: {wanted - scored:,} of {wanted:,} scores have no coordinates: {QK_COORDINATES} of {PROBE} "
                f"{self.probe!r} holds the positions that named roles have, not every position of causal_prefix"
            )

    def warnings(self, results: Results) -> list[str]:
        """A stage the head does not read gives scores the model never forms."""
        read = "embedding" if self.head_layer == 0 else f"layer_{(self.head_layer or 0) - 1}_post_mlp"
        others = [stage for stage in self.context_stage if stage != read]
        lines = []
        if others or self.layernorm_mode == "none":
            what = (
                f"{self.head_label} reads {read}, not {', '.join(others)}"
                if others
                else f"{self.head_label} reads {read} through its LayerNorm"
            )
            lines.append(f"{what}: these scores are not the ones the model forms.")
        return [*lines, *self.window_warnings(results)]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The summary with the window's fields, the window as asked for, and what chance would win."""
        return {
            "summary": self.summary_with_windows(results),
            "window_start": self.window_start,
            "window_end": self.window_end,
            "head_label": self.head_label,
            "head_width": results.value("SELECT max(d_head) FROM query_sides"),
            "chance_win_rate": results.value("FROM chance"),
            "calculation": {
                "qk_match_separation": "mean support score - mean distractor score, keys up to the query",
                "qk_match_max_margin": "mean support score - largest distractor score",
                "rank_r": "sum over i <= r of singular value * query * key coordinate / sqrt(d_head)",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """When the head began to find the support, where it ended, what carries it and what it goes with."""
        rows = results.rows(
            "FROM metric_rows WHERE context_stage = $stage AND projection = $projection ORDER BY checkpoint_step",
            stage=self.context_stage[0],
            projection=next(iter(self.projections())),
        )
        chance = results.value("FROM chance")
        lines = [_outcome(self, rows, chance)]
        if len(rows) > 1:
            lines += [line for line in (_turn(rows), _correlated(self, results)) if line]
        return [*lines, *_compared(self, results)]


def _outcome(report: BilinearQKMatchSeparation, rows: list[dict[str, Any]], chance: float) -> str:
    last = rows[-1]
    rate, events = last["support_beats_all_rate"], last["num_events"]
    start = f", from {percent(rows[0]['support_beats_all_rate'])} at step {rows[0]['checkpoint_step']}"
    # Two standard errors of a share.
    near = abs(rate - chance) <= 2 * (chance * (1 - chance) / events) ** 0.5
    return (
        f"**{report.head_label} scores {report.support_role} above every {report.distractor_role} in {percent(rate)} of "
        f"{events:,} events at step {last['checkpoint_step']}**{start if len(rows) > 1 else ''}; chance is {percent(chance)}"
        f"{', so that is no more than chance' if near else ''} ({last['projection']} at {last['context_stage']}). Mean "
        f"separation there: {number(last['qk_match_separation_mean'])}."
    )


def _turn(rows: list[dict[str, Any]]) -> str:
    """From which checkpoint on the support wins, and where the win rate rose fastest."""
    losing = [row["checkpoint_step"] for row in rows if not row["support_beats_all_rate"] > 0.5]
    after = [row["checkpoint_step"] for row in rows if not losing or row["checkpoint_step"] > losing[-1]]
    if not losing:
        text = "It wins most events at every checkpoint"
    elif after:
        text = f"It wins **most events from step {after[0]} on**"
    else:
        text = "It does not win most events at the last checkpoint"
    gain, before, at = max(
        (
            (
                b["support_beats_all_rate"] - a["support_beats_all_rate"],
                a["checkpoint_step"],
                b["checkpoint_step"],
            )
            for a, b in itertools.pairwise(rows)
        ),
        key=lambda found: (found[0], -found[1]),
    )
    if gain <= 0:
        return f"{text}; the win rate never rose."
    return f"{text}; the win rate rose fastest between steps {before} and {at} (+{percent(gain)})."


def _correlated(report: BilinearQKMatchSeparation, results: Results) -> str:
    found = results.first("FROM summary")
    assert found is not None
    window = results.first("FROM spans WHERE span = 'window'")
    parts = []
    for key, what in _CORRELATIONS.items():
        if found[key] is None:
            parts.append(f"has no correlation with {what} (one of them does not vary)")
        else:
            inside = (
                f" ({number(window[key], 2)} in the window)" if window and window[key] is not None else ""
            )
            parts.append(f"{_tracks(found[key])} {what}: r = {number(found[key], 2)}{inside}")
    return f"Over {found['num_checkpoints']} checkpoints the separation {', and '.join(parts)}."


def _tracks(correlation: float) -> str:
    if abs(correlation) < 0.5:
        return "hardly goes with"
    return "rises with" if correlation > 0 else "falls as there rises"


def _compared(report: BilinearQKMatchSeparation, results: Results) -> list[str]:
    """The other score forms and stages at the last checkpoint."""
    last = results.rows(
        "SELECT context_stage, projection, end_qk_match_separation AS separation, end_support_beats_all_rate AS rate "
        "FROM summary"
    )
    if len(last) < 2:
        return []
    several = len(report.context_stage) > 1
    listed = "; ".join(
        f"{row['context_stage'] + ' ' if several else ''}{row['projection']} {number(row['separation'])} "
        f"({percent(row['rate'])} won)"
        for row in last
    )
    return [f"Separation at the last checkpoint by score: {listed}."]

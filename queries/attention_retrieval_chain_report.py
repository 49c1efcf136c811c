"""attention-retrieval-chain-report: from a head's QK match to the answer's loss, link by link (definitions: part 2, F2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ..lake import Lake
from ..lake.datasets import ATTENTION, HEAD_WRITES, READOUTS, Need
from .chart import Scatter, Trajectory
from .key_roles import KEY_RULE, check_key_rule
from .markdown import number, percent
from .pair_selection import PairOptions, RecordSide
from .probe_report import HeadReport, ProbeReport, require_roles
from .report import ReportFailed, RowFile, TextTable
from .results import Results


class AttentionRetrievalChainReport(PairOptions, HeadReport):
    """One head's chain from QK match to attention, to what it writes, to the answer: which link moved when?

    The same pairs are measured at every checkpoint, so that a change is the model's and not the sample's.
    """

    support_key_role: str = Field(..., description="role the head should attend to")
    distractor_key_role: str = Field(..., description="role it should not attend to")
    score_query_role: str = Field(
        "prediction", description="role of the attending position; must be one position"
    )
    record_side: tuple[RecordSide, ...] = Field(
        ("clean", "corrupted"),
        min_length=1,
        description="record of the pair that is measured; the first is the summary's",
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"attention_retrieval_chain_{name}", name)
        for name in ("checkpoint_rows", "delta_rows", "pair_metric_rows", "pair_rows")
    }
    tables = (
        TextTable(
            "links",
            "The chain, link by link",
            {
                "link": "link",
                "at the first checkpoint": "start_value",
                "at the last": "end_value",
                "change": "change",
                "half of it made from step": "half_way_step",
            },
            about="Means over all pairs of the first record side.",
        ),
        TextTable(
            "correlations",
            "Do neighbouring links move together?",
            {
                "from → to": "label",
                "Pearson r": "value",
                "intervals": "num_points",
                "status": "status",
                "reason": "reason",
            },
            about="Over the intervals between neighbouring checkpoints.",
        ),
    )
    charts = (
        Trajectory(
            "trajectory",
            "trajectory",
            "From QK match to answer, link by link",
            series="series",
            panel="panel",
            panel_titles={
                "qk": "QK separation",
                "attention": "attention separation",
                "dla": "head margin DLA",
                "margin": "answer margin (logits)",
                "loss": "answer loss (nats)",
            },
        ),
        Scatter(
            "deltas",
            "link_changes",
            "Do neighbouring links move in the same intervals?",
            about="a point is the change from one checkpoint to the next, mean over the pairs of the first record side",
            label="interval",
            highlight=3,
            panel="link",
            panel_titles={
                "qk_to_attention": ("Δ QK separation", "Δ attention separation"),
                "attention_to_head_margin_dla": ("Δ attention separation", "Δ head margin DLA"),
                "head_margin_dla_to_answer_margin": ("Δ head margin DLA", "Δ answer margin"),
                "answer_margin_to_loss_reduction": ("Δ answer margin", "−Δ answer loss"),
            },
        ),
    )
    how_to_read = (
        "QK separation: mean pre-softmax score of the support keys minus that of the distractor keys, keys up to the query "
        "only; attention separation: the same of the softmax probabilities; `_mass_` sums instead of averaging.",
        "`head_margin_dla` is what the head writes at the query, times the gradient of the model's value margin at the last "
        "residual stage, through its LayerNorm: a marginal effect, not a share of the margin. "
        "`head_answer_logit_dla` and `head_value_margin_dla` read the write by the raw unembedding.",
        "`support_ov_value_margin` is the margin of what the head would write if it attended to the support alone (value "
        "bias in, output bias out); `attended_` multiplies it by the mean attention to the support.",
        "With a score-query role other than prediction the write is the one at that position, while margin, loss and the "
        "readout gradient stay at the prediction.",
        "A link has made half of its way from the checkpoint on after which it never falls short of half of its change from "
        "first to last. This orders the links only as finely as the checkpoints lie, and says nothing of what moved them.",
        "The correlations are over intervals: that two links move together is no proof that one moves the other.",
    )
    next_queries = (
        (
            "Attention of every head to the support value at the last step, over all events instead of the pairs:",
            "SELECT a.layer, a.head, avg(a.probability) AS attention FROM attention a JOIN positions p ON p.run = a.run AND "
            "p.probe = a.probe AND p.event = a.event AND p.position = a.key_position WHERE a.run = $run AND a.query_role = "
            "'prediction' AND p.role = 'support_value' AND a.step = (SELECT max(step) FROM attention_patterns) GROUP BY ALL "
            "ORDER BY attention DESC",
        ),
        (
            "Which heads' writes carry the margin at the last step, with the LayerNorm's scale frozen:",
            "SELECT layer, head, avg(margin_dla_frozen) AS dla FROM head_writes WHERE run = $run AND role = 'write' AND "
            "query_role = 'prediction' AND step = (SELECT max(step) FROM head_writes) GROUP BY ALL ORDER BY dla DESC",
        ),
    )
    place: ClassVar[tuple[int, int]] = (7, 2)
    example: ClassVar[str] = (
        "lakebed query attention-retrieval-chain-report --lake demo.lake --run demo --head L1H0 "
        "--support-key-role support_value --distractor-key-role value_distractors --pair-type support_value "
        "--pair-type distractor --record-side clean --out chain"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "head": "L1H1",
        "support_key_role": "support_key",
        "distractor_key_role": "key_distractors",
        "pair_type": ("support_value", "distractor"),
    }

    @model_validator(mode="after")
    def _has_two_roles(self) -> AttentionRetrievalChainReport:
        if self.support_key_role == self.distractor_key_role:
            raise ValueError(f"--support-key-role and --distractor-key-role are both {self.support_key_role}")
        return self

    @classmethod
    def sql_text(cls) -> str:
        """The key rule of the pairs' records before the report's own sections."""
        own = super(ProbeReport, cls).sql_text()
        return f"{super().sql_text().removesuffix(own)}{KEY_RULE}{own}"

    def needs(self) -> tuple[Need, ...]:
        """Attention, writes and answers of each record side's probe."""
        return tuple(
            need
            for probe in self.side_probes()
            for need in (
                Need(ATTENTION, {"probe": probe, "query_role": self.score_query_role}),
                Need(HEAD_WRITES, {"probe": probe, "query_role": self.score_query_role}),
                Need(READOUTS, {"probe": probe}),
            )
        )

    def require(self, lake: Lake, run: str) -> None:
        """The roles must be there."""
        super().require(lake, run)
        require_roles(
            lake, run, self.probe, self.score_query_role, self.support_key_role, self.distractor_key_role
        )

    def check(self, results: Results) -> None:
        """At least two checkpoints, and every pair measured at each of them."""
        name = self.report_name()
        if len(results.steps) < 2:
            raise ReportFailed(
                f"{name}: at least two checkpoints are needed, and --steps leaves {len(results.steps)}"
            )
        check_key_rule(results, self.score_query_role, self.support_key_role, self.distractor_key_role)
        if results.value("SELECT count(*) FROM writes WHERE support_ov_value_margin IS NULL"):
            held = results.lake.session.execute(
                "SELECT DISTINCT role FROM head_writes WHERE run = ? AND probe = ? AND role <> 'write' ORDER BY role",
                [results.run, self.probe],
                tables={"head_writes"},
            ).fetchall()
            raise ReportFailed(
                f"{name}: {HEAD_WRITES} does not say what a head would write from {self.support_key_role!r} alone; "
                f"it does for {', '.join(role for (role,) in held)}"
            )
        counts = results.rows(
            "SELECT step, count(*) AS measured FROM pair_metric_rows GROUP BY step ORDER BY step"
        )
        wanted = results.value("SELECT count(*) FROM pair_sides")
        for row in counts:
            if row["measured"] != wanted:
                raise ReportFailed(
                    f"{name}: {row['measured']:,} of {wanted:,} pair records are measured at step {row['step']}: the "
                    "number of pairs must not change between checkpoints"
                )

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        deltas = results.rows("FROM primary_deltas")
        return {
            **super().facts(lake, results),
            "head_label": self.head_label,
            "summary": {
                "primary_record_side": self.record_side[0],
                "final_primary_row": results.rows("FROM primary_rows")[-1],
                "primary_delta_rows": deltas,
                "total_primary_delta": results.first("FROM total_delta"),
                "correlations": {
                    row["link"]: {
                        key: row[key] for key in ("label", "value", "status", "reason", "num_points")
                    }
                    for row in results.rows("FROM correlations")
                },
            },
            "calculation": {
                "qk_separation": "mean score over support keys - mean over distractor keys, keys up to the query",
                "head_margin_dla": "head write at the query . gradient of the value margin at the last residual stage",
                "delta": "target checkpoint - source checkpoint, neighbouring checkpoints",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Which link moved first, how far each went, and which moved together."""
        links = results.rows("FROM links")
        counted = results.first("FROM primary_rows")
        assert counted is not None
        over = f"{counted['num_pairs']:,} {self.record_side[0]} records"
        return [_order(self.head_label, links), _changes(links, results, over), _together(results)]


def _order(head: str, links: list[dict[str, Any]]) -> str:
    """The links by the step from which on half of their way was made. The loss falls first for reasons of its own."""
    moved = [link for link in links if link["half_way_step"] is not None and link["link"] != "answer loss"]
    if not moved:
        return f"No link of {head}'s chain changed between the first checkpoint and the last."
    steps = sorted({link["half_way_step"] for link in moved})
    groups = [(step, [_moved(link) for link in moved if link["half_way_step"] == step]) for step in steps]
    first_step, first = groups[0]
    later = "; ".join(f"then {_listed(names)}, from step {step}" for step, names in groups[1:])
    return (
        f"**{_listed(first)} moved first** in {head}'s chain: half of the way was made from step {first_step} on; "
        f"{later or 'no link came later at these checkpoints'}."
    )


def _moved(link: dict[str, Any]) -> str:
    return f"{link['link']} ({'+' if link['change'] > 0 else ''}{number(link['change'], 3)})"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _changes(links: list[dict[str, Any]], results: Results, over: str) -> str:
    parts = [f"{link['link']} {number(link['start_value'])} → {number(link['end_value'])}" for link in links]
    accuracy = results.first(
        "SELECT first(answer_accuracy ORDER BY step) AS a, last(answer_accuracy ORDER BY step) AS b FROM primary_rows"
    )
    assert accuracy is not None
    return (
        f"From step {results.steps[0]} to {results.steps[-1]}, over {over}: {', '.join(parts)}; accuracy "
        f"{percent(accuracy['a'])} → {percent(accuracy['b'])}."
    )


def _together(results: Results) -> str:
    found = results.rows("FROM correlations")
    known = [row for row in found if row["status"] == "ok"]
    if not known:
        return f"No link can be held against the next over the intervals: {found[0]['reason']}."
    weakest = min(known, key=lambda row: (row["value"], row["link"]))
    listed = ", ".join(f"{row['label']} r = {number(row['value'], 2)}" for row in known)
    return (
        f"Interval by interval ({known[0]['num_points']}): {listed}. The loosest link is {weakest['label']}."
    )

"""attention-geometry-trace: where every head looks, what it would write, and its weights' geometry (definitions 2 §B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt

from ..lake.datasets import ATTENTION, HEAD_WRITES, READOUTS, SVD, WEIGHTS, Need
from .chart import Grid, Trajectory
from .markdown import number, percent
from .probe_report import ProbeReport
from .report import ReportFailed, RowFile, TextTable

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

PARTITION_ROLES = (
    "bos",
    *(
        f"{write}_{part}"
        for write in ("support_write", "same_key_stale_write", "other_key_write")
        for part in ("op", "key", "value")
    ),
    "prior_read_op",
    "prior_read_key",
    "prior_read_answer",
    "current_read_op",
    "current_read_key_self",
    "other",
)
RANKINGS = (
    "by_support_value_attention",
    "by_support_value_qk_margin",
    "by_qk_key_subspace_alignment",
    "by_attended_ov_value_margin",
    "by_ov_output_value_subspace_alignment",
    "by_low_entropy",
)

CALCULATION = {
    "attention_entropy": "-sum_j a_j ln a_j over key positions up to the prediction, nats",
    "qk_margin": "score at the support minus the largest score at a distractor up to the prediction",
    "attention_margin": "attention at the support minus the largest attention at a distractor",
    "ov_value_score": "write of the support value's position alone . unembedding of the answer",
    "ov_value_margin": "the same, minus the largest over the other competitors",
    "attended_ov_value_margin": "attention at the support value * ov_value_margin",
    "role_attention": "sum of attention over the role's positions up to the prediction; mean over all events",
    "subspace_alignment": "norm(B B^T u) / norm(u), B from the SVD of the centred token embeddings of the class",
}


class AttentionGeometryTrace(ProbeReport):
    """Where every head looks, what it would write of what it sees, and where its weights point, step by step."""

    top_k_tokens: PositiveInt = Field(8, description="tokens listed for each first singular direction")
    top_k_plot_heads: PositiveInt = Field(6, description="heads in colour in the trajectory charts")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "rows": RowFile("attention_geometry_rows", "rows"),
        "checkpoint": RowFile("attention_geometry_checkpoint_rows", "checkpoint_rows"),
    }
    tables = (
        TextTable(
            "final_heads",
            "Heads at the last step",
            {
                "head": "head_label",
                "attention at support value": "support_value_attention_mean",
                "QK margin there": "support_value_qk_margin_mean",
                "attention margin": "support_value_attention_margin_mean",
                "attended OV margin": "attended_ov_value_margin_mean",
                "entropy (nats)": "attention_entropy_mean",
                "key direction in key identity": "qk_key_key_subspace_alignment",
                "output direction in value identity": "ov_output_value_subspace_alignment",
                "all three margins > 0 from step": "first_joint_step",
            },
            "Those that look at the support value most, at most twelve; every head is in the rows.",
        ),
        TextTable(
            "top_heads_by_place",
            "Rankings at the last step",
            {
                "": "place",
                "support value attention": "by_support_value_attention",
                "support value QK margin": "by_support_value_qk_margin",
                "key direction alignment": "by_qk_key_subspace_alignment",
                "attended OV margin": "by_attended_ov_value_margin",
                "output direction alignment": "by_ov_output_value_subspace_alignment",
                "lowest entropy": "by_low_entropy",
            },
        ),
    )
    charts = (
        Trajectory(
            "checkpoint_summary",
            "checkpoint_chart",
            "Answers, and the best head's geometry",
            panel="panel",
            panel_titles={
                "accuracy": "answer accuracy",
                "margin": "mean answer margin",
                "heads": "best head's mean margin",
            },
            series="series",
        ),
        Trajectory(
            "support_value_qk_margin",
            "head_trajectories",
            "QK margin of the support value over the other values",
            about="mean over events of the support value's score minus the largest distractor's",
            y="support_value_qk_margin_mean",
            y_title="QK score margin",
            series="head_label",
            highlight="top_k_plot_heads",
            rank_by="last",
        ),
        Trajectory(
            "qk_key_subspace_alignment",
            "head_trajectories",
            "How far each head's first key direction tells keys apart",
            about="share (a norm) of the first right singular vector of W_QK within the key tokens' identity subspace",
            y="qk_key_key_subspace_alignment",
            y_title="alignment",
            series="head_label",
            highlight="top_k_plot_heads",
            rank_by="last",
        ),
        Trajectory(
            "attended_ov_value_margin",
            "head_trajectories",
            "Answer margin in what each head copies from the support value",
            about="attention at the support value times the value margin of its OV write, mean over events",
            y="attended_ov_value_margin_mean",
            y_title="attended OV value margin",
            series="head_label",
            highlight="top_k_plot_heads",
            rank_by="last",
        ),
        Trajectory(
            "ov_output_value_subspace_alignment",
            "head_trajectories",
            "How far each head's first output direction tells values apart",
            about="share (a norm) of the first right singular vector of W_OV within the value tokens' identity subspace",
            y="ov_output_value_subspace_alignment",
            y_title="alignment",
            series="head_label",
            highlight="top_k_plot_heads",
            rank_by="last",
        ),
        Grid(
            "role_attention",
            "role_attention_chart",
            "Where each head looks at the last step",
            about="mean attention from the prediction position by role; a row adds up to 1",
            value="attention",
            value_title="mean attention",
            row="head_label",
            column="role",
            domain=(0, 1),
        ),
    )
    how_to_read = (
        "A QK margin is the support's score minus the largest score among distractors *at or before the prediction*: a "
        "later token is no key of this query. Published numbers that let later tokens set that maximum lie at or below "
        "these; they cannot be had from this lake, which stores no score beyond the prediction. Attention margins are "
        "the same either way, since attention to later tokens is 0.",
        "Scores are q·k/√d_head before the softmax, with biases; entropy is in nats. An event without a distractor has no "
        "QK margin and is left out of that mean alone.",
        "OV numbers are of the head's write if it attended to the support value alone: value bias in, output bias out, "
        "read by the raw unembedding without the final LayerNorm. *Attended* ones are multiplied by the attention there.",
        "Attention by role: sums of probability over a role's positions, divided by all events, also those that lack the "
        "role. The roles are disjoint and cover every position up to the prediction, so they add up to 1.",
        "An alignment is ‖BBᵀu‖/‖u‖ of a first singular vector u with the subspace B that tells the key (or value) token "
        "embeddings apart, at full numerical rank. A random direction has about √(rank/d); with more value tokens than "
        "dimensions B is the whole space and the alignment is 1 by construction.",
        "Top tokens have the largest |E·u| over the whole vocabulary. A singular vector's sign is arbitrary; here the "
        "largest entry of the left one is positive, and the right one goes with it.",
    )
    next_queries = (
        (
            "Which events does a head get wrong, and where does it look instead?",
            "SELECT a.event, p.role, a.probability FROM attention a JOIN positions p ON p.run = a.run AND p.probe = a.probe "
            "AND p.event = a.event AND p.position = a.key_position AND p.kind = 'partition' WHERE a.run = $run AND "
            "a.layer = 0 AND a.head = 0 AND a.step = (SELECT max(step) FROM attention_patterns) ORDER BY 3 DESC LIMIT 10",
        ),
        (
            "Attention at the support value by how far back it stands:",
            "SELECT a.query_position - a.key_position AS distance, avg(a.probability) FROM attention a JOIN positions p ON "
            "p.run = a.run AND p.probe = a.probe AND p.event = a.event AND p.position = a.key_position AND p.role = "
            "'support_value' WHERE a.run = $run GROUP BY 1 ORDER BY 1",
        ),
    )
    place: ClassVar[tuple[int, int]] = (1, 1)
    example: ClassVar[str] = (
        "lakebed query attention-geometry-trace --lake demo.lake --run demo --steps 250:5500 --top-k-tokens 8 "
        "--top-k-plot-heads 12 --out geometry"
    )

    def needs(self) -> tuple[Need, ...]:
        """Attention and head writes at the prediction, readouts, spectra and the token embedding."""
        probe = {"probe": self.probe}
        query = {**probe, "query_role": "prediction"}
        return (
            Need(ATTENTION, query),
            Need(HEAD_WRITES, query),
            Need(READOUTS, probe),
            Need(SVD),
            Need(WEIGHTS),
        )

    def parameters(self) -> dict[str, Any]:
        """Adds the roles of the partition."""
        return {**super().parameters(), "partition_roles": list(PARTITION_ROLES)}

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """A row per step and head: alignments and token lists of its first directions, and the step's subspaces."""
        from .first_directions import head_directions

        return head_directions(results, self.probe, self.top_k_tokens)

    def check(self, results: Results) -> None:
        """There must be events."""
        if not results.value("SELECT count(*) FROM rows"):
            raise ReportFailed(f"{self.report_name()}: no event of probe {self.probe!r} is left to measure")

    def warnings(self, results: Results) -> list[str]:
        """Roles and token classes that the probe lacks, and events without a distractor."""
        lines = []
        classes = results.first(
            "SELECT embedding_subspaces.key_identity_subspace IS NULL AS keys, "
            'embedding_subspaces.value_identity_subspace IS NULL AS "values" FROM checkpoint'
        )
        assert classes is not None
        without = [kind for kind in ("key", "value") if classes[f"{kind}s"]]
        if without:
            lines.append(
                f"Probe {self.probe!r} does not say which tokens are {' or '.join(f'{kind}s' for kind in without)}: "
                "alignments with their identity subspace are null."
            )
        places = results.first(
            "SELECT count(*) AS events, count(support_key) AS support_key, count(support_value) AS support_value, "
            "count(support_op) AS support_op, count(value_distractors) AS value_distractors FROM event_places"
        )
        assert places is not None
        absent = [role for role in ("support_key", "support_value", "support_op") if not places[role]]
        if absent:
            lines.append(f"No event has the role {' or '.join(absent)}: the columns about it are null.")
        alone = places["events"] - places["value_distractors"]
        if alone and places["support_value"]:
            lines.append(
                f"{alone:,} of {places['events']:,} events have no distractor value before the prediction: they are not "
                "in the QK margin's mean, and their distractor attention is 0."
            )
        return lines

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The reference's summary: rankings at the last step, and when each head's geometry became jointly positive."""
        top: dict[str, list[dict[str, Any]]] = {ranking: [] for ranking in RANKINGS}
        for row in results.rows("FROM top_final_heads"):
            top[row.pop("ranking")].append(row)
        return {
            "calculation": CALCULATION,
            "summary": {
                "final_step": results.value("SELECT max(step) FROM rows"),
                "top_final_heads": top,
                "first_positive_joint_geometry": results.rows("FROM first_positive_joint_geometry"),
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Which head reads the support value, when its geometry was complete, and what the model answers then."""
        lines = (_reader(results), _sharpest(results), _joint(results), _answers(results), _aligned(results))
        return [line for line in lines if line]


def _reader(results: Results) -> str:
    heads = results.rows("FROM final_heads WHERE support_value_attention_mean IS NOT NULL LIMIT 2")
    if not heads:
        return ""
    head = heads[0]
    text = (
        f"At step {results.value('SELECT max(step) FROM rows')} **{head['head_label']}** looks at the support value most: "
        f"{percent(head['support_value_attention_mean'])} of its attention"
    )
    if len(heads) > 1:
        text += f" (next: {heads[1]['head_label']}, {percent(heads[1]['support_value_attention_mean'])})"
    margin = head["support_value_qk_margin_mean"]
    if margin is not None:
        side = "above" if margin > 0 else "below"
        text += f". It scores that value {number(abs(margin), 3)} {side} the strongest distractor"
        best = results.value(
            "SELECT max(support_value_qk_margin_mean) FROM rows WHERE step = (SELECT max(step) FROM rows)"
        )
        text += ", and no head scores it above" if best <= 0 else ""
    attended = head["attended_ov_value_margin_mean"]
    if attended is not None:
        way = "towards" if attended > 0 else "away from"
        text += f"; what it copies from there points {number(abs(attended), 3)} logits {way} the answer over the next value"
    return f"{text}."


def _sharpest(results: Results) -> str:
    head = results.first("FROM top_final_heads WHERE ranking = 'by_low_entropy'")
    assert head is not None
    roles = results.rows(
        "SELECT role, attention FROM role_attention_means WHERE layer = $layer AND head = $head AND "
        "step = (SELECT max(step) FROM rows) ORDER BY attention DESC, place LIMIT 2",
        layer=head["layer"],
        head=head["head"],
    )
    where = ", ".join(f"{percent(row['attention'])} on `{row['role']}`" for row in roles)
    return (
        f"The sharpest head is **{head['head_label']}** (entropy {number(head['value'], 3)} nats): {where}."
    )


def _joint(results: Results) -> str:
    joint = results.rows("FROM first_positive_joint_geometry ORDER BY first_step NULLS LAST, layer, head")
    formed = [row for row in joint if row["first_step"] is not None]
    if not formed:
        if results.value("SELECT count(support_value_qk_margin_mean) FROM rows") == 0:
            return ""
        return (
            "No head's geometry is complete at any step: QK margin, attention margin and attended OV margin at the "
            "support value are never all positive."
        )
    first_steps = {row["head_label"]: row["first_step"] for row in joint}
    reader = results.value("SELECT head_label FROM final_heads")
    lines = [
        f"QK margin, attention margin and attended OV margin at the support value became all positive in {len(formed)} "
        f"of {len(joint)} heads, first in **{formed[0]['head_label']}** at step {formed[0]['first_step']}"
    ]
    if reader != formed[0]["head_label"]:
        when = first_steps[reader]
        lines.append(f"in {reader} {'never' if when is None else f'at step {when}'}")
    return f"{'; '.join(lines)}."


def _answers(results: Results) -> str:
    first = results.first("FROM checkpoint ORDER BY step")
    last = results.first("FROM checkpoint ORDER BY step DESC")
    assert first is not None
    assert last is not None
    events = f"{last['num_query_events']:,} query events"
    if first["step"] == last["step"]:
        return (
            f"At step {last['step']} the model answers {percent(last['answer_accuracy'])} of {events} right; the mean "
            f"margin over the next value is {number(last['answer_value_margin_mean'], 3)}."
        )
    return (
        f"From step {first['step']} to {last['step']} answer accuracy went from {percent(first['answer_accuracy'])} to "
        f"{percent(last['answer_accuracy'])} of {events}, the mean answer margin from "
        f"{number(first['answer_value_margin_mean'], 3)} to {number(last['answer_value_margin_mean'], 3)}."
    )


def _aligned(results: Results) -> str:
    best = results.first("FROM top_final_heads WHERE ranking = 'by_qk_key_subspace_alignment'")
    if best is None:
        return ""
    subspace = results.first(
        "SELECT unnest(embedding_subspaces.key_identity_subspace) FROM checkpoint ORDER BY step DESC"
    )
    assert subspace is not None
    chance = (subspace["rank"] / subspace["ambient_dim"]) ** 0.5
    return (
        f"The first key direction nearest to what tells keys apart is **{best['head_label']}**'s: alignment "
        f"{number(best['value'], 3)}, where a random direction has about {number(chance, 2)} ({subspace['rank']} of "
        f"{subspace['ambient_dim']} dimensions)."
    )

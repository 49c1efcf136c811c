"""Tables of interventions: what the model answers when something inside it is changed, and everything after recomputed.

Rows are keyed by probe and event: those of a pair's corrupted record are of probe NAME.corrupted. Every unit has the
untouched run too, as intervention `clean`.
"""

from __future__ import annotations

from .columns import table

TABLES = (
    table(
        "intervention_runs",
        "probe spec step event intervention",
        "one row per intervention and event: the logits at the prediction. Competitors are the event's; every margin, moving or "
        "against a fixed competitor, follows from these",
        """
        probe | VARCHAR | probe
        spec | VARCHAR | 12-hex identity of the interventions: see view specs
        step | BIGINT | step
        event | INTEGER | event
        intervention | VARCHAR | name; clean for the untouched run
        answer_logit | FLOAT | logit of the answer
        best_wrong_token | INTEGER | competitor with the largest logit in this run
        best_wrong_logit | FLOAT | its logit
        value_margin | FLOAT | answer_logit - best_wrong_logit
        best_token | INTEGER | token with the largest logit in the whole vocabulary
        answer_log_prob | FLOAT | log softmax of the answer over the whole vocabulary, nats
        correct | BOOLEAN | whether best_token is the answer
        competitor_logits | FLOAT[] | logits of the event's competitors, in their order (events.competitors)
        """,
    ),
    table(
        "intervention_components",
        "probe spec step event intervention component",
        "one row per intervention, event and additive part of the last residual stage: part · gradient of a logit with respect to "
        "that stage, at the run's own state, the final LayerNorm differentiated. Over all parts they sum to nearly 0",
        """
        probe | VARCHAR | probe
        spec | VARCHAR | 12-hex identity of the interventions
        step | BIGINT | step
        event | INTEGER | event
        intervention | VARCHAR | name; clean for the untouched run
        component | VARCHAR | embedding, L0H1, L0.attention_bias or L0MLP; what a patch adds to the stream is none of them
        answer_dla | FLOAT | of the answer's logit
        competitor_dla | FLOAT[] | of the logits of the event's competitors, in their order
        log_prob_dla | FLOAT | of the answer's log-probability over the whole vocabulary
        """,
    ),
    table(
        "intervention_subspaces",
        "probe spec step intervention edit",
        "one row per edit of a residual stage within a subspace: what its basis was cut from, at that step's weights",
        """
        probe | VARCHAR | probe
        spec | VARCHAR | 12-hex identity of the interventions
        step | BIGINT | step
        intervention | VARCHAR | name
        edit | INTEGER | place among the intervention's edits, from 0
        subspace | VARCHAR | its name, as in the specification; or random
        rank | INTEGER | directions of the basis
        head | VARCHAR | label such as L2H1; null for a subspace of no head
        seed | BIGINT | what a random subspace was drawn from; null for others
        available_rank | INTEGER | numerical rank of what it was cut from; of a random one, the width of the residual stream
        singular_values | DOUBLE[] | every singular value of what it was cut from, largest first; null for a random one
        """,
    ),
)

# Each scalar of a run beside that of the untouched one.
_SCALARS = ("value_margin", "answer_logit", "answer_log_prob", "correct")
_UNTOUCHED = ", ".join(
    f"CAST(u.{name} AS DOUBLE) AS u_{name}, CAST(r.{name} AS DOUBLE) AS r_{name}" for name in _SCALARS
)

VIEWS = {
    "interventions": (
        "one row per intervention, event and scalar (value_margin, answer_logit, answer_log_prob, correct): its value in the "
        "untouched run and in the changed one. intervention_runs, unpivoted, without the run clean",
        "SELECT run, probe, spec, step, event, intervention, unnest(["
        + ", ".join(f"{{scalar: '{name}', baseline: u_{name}, intervened: r_{name}}}" for name in _SCALARS)
        + "], recursive := true) FROM (SELECT r.run, r.probe, r.spec, r.step, r.event, r.intervention, "
        + _UNTOUCHED
        + " FROM intervention_runs AS r JOIN intervention_runs AS u USING (run, probe, spec, step, event) "
        "WHERE u.intervention = 'clean' AND r.intervention <> 'clean')",
    ),
}

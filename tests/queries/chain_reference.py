"""The retrieval chain of one head over one record, and its cells, straight from the definition (part 2, F2)."""

import numpy as np

from tests.trained_probe_lake import RUN

from .float64_decoder import best_wrong

SIDES = {"clean": "probe", "corrupted": "probe.corrupted"}
METRICS = (
    "qk_support_score", "qk_distractor_score", "qk_separation",
    "attention_support_mean", "attention_distractor_mean", "attention_separation",
    "attention_support_mass", "attention_distractor_mass", "attention_mass_separation",
    "head_margin_dla", "head_answer_logit_dla", "head_value_margin_dla",
    "support_ov_value_margin", "attended_support_ov_value_margin", "answer_margin", "answer_loss",
)  # fmt: skip


def chosen_pairs(lake, types, most):
    """The first pairs of each type in scan order."""
    rows = lake.sql(
        "SELECT clean_event, corrupted_event, pair_type, split, pair_id, source_sample_id, source_query_index FROM pairs "
        "WHERE run = ? AND probe = 'probe' AND pair_id IS NOT NULL ORDER BY clean_event",
        [RUN],
    ).fetchall()
    chosen = []
    for row in sorted(rows, key=lambda row: (row[0], types.index(row[2]) if row[2] in types else -1)):
        if row[2] in types and sum(other[2] == row[2] for other in chosen) < most:
            chosen.append(row)
    return chosen


def chain(decoder, layer, head, event, query_role, support_role, distractor_role):
    """The sixteen metrics and the answer of one record, as the definition says."""
    forward = decoder.forward(event.tokens)
    at = event.roles[query_role][0]
    supports = [p for p in event.roles[support_role] if p <= at]
    distractors = [p for p in event.roles[distractor_role] if p <= at]
    scores, attention = (of[layer, head][at] for of in (forward.scores, forward.probabilities))
    values, w_o = forward.values[layer, head], decoder.head_output(layer, head)
    unembedding = decoder.weights["token_embedding.weight"]
    write = w_o @ (attention[: at + 1] @ values[: at + 1])
    write_of_support = w_o @ values[supports].mean(0)

    def value_margin(logits):
        return logits[event.answer] - logits[best_wrong(logits, event.answer, event.competitors)]

    logits = forward.logits[event.prediction]
    last = forward.stages[f"layer_{decoder.layers - 1}_post_mlp"][event.prediction]
    wrong = best_wrong(logits, event.answer, event.competitors)
    gradient = decoder.readout_gradient(last, event.answer, wrong)
    largest = logits.max()
    return {
        "query_position": at,
        "support_positions": supports,
        "distractor_positions": distractors,
        "num_support_positions": len(supports),
        "num_distractor_positions": len(distractors),
        "qk_support_score": scores[supports].mean(),
        "qk_distractor_score": scores[distractors].mean(),
        "qk_separation": scores[supports].mean() - scores[distractors].mean(),
        "attention_support_mean": attention[supports].mean(),
        "attention_distractor_mean": attention[distractors].mean(),
        "attention_separation": attention[supports].mean() - attention[distractors].mean(),
        "attention_support_mass": attention[supports].sum(),
        "attention_distractor_mass": attention[distractors].sum(),
        "attention_mass_separation": attention[supports].sum() - attention[distractors].sum(),
        "head_margin_dla": write @ gradient,
        "head_answer_logit_dla": write @ unembedding[event.answer],
        "head_value_margin_dla": value_margin(unembedding @ write),
        "support_ov_value_margin": value_margin(unembedding @ write_of_support),
        "attended_support_ov_value_margin": attention[supports].mean()
        * value_margin(unembedding @ write_of_support),
        "answer_margin": value_margin(logits),
        "answer_loss": largest + np.log(np.exp(logits - largest).sum()) - logits[event.answer],
        "answer_correct": bool(logits.argmax() == event.answer),
    }


def cells(rows):
    """(step, side, split, pair type) -> rows, `__all__` for all of them, in report order."""
    made = {}
    for row in rows:
        for split in ("__all__", row["split"]):
            for pair_type in ("__all__", row["pair_type"]):
                made.setdefault((row["step"], row["record_side"], split, pair_type), []).append(row)
    return dict(
        sorted(made.items(), key=lambda item: (item[0][0], list(SIDES).index(item[0][1]), *item[0][2:]))
    )

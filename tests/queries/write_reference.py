"""What a head writes of one record under the four conditions, in float64 from the definition (part 3, G).

A condition changes the head's attention pattern, its value vectors, or both, and the head is computed once more from those.
"""

import numpy as np

from .chain_reference import chosen_pairs
from .float64_decoder import best_wrong

CONDITIONS = (
    "real_attention_real_values",
    "correct_support_attention_real_values",
    "real_attention_shuffled_values",
    "correct_support_attention_shuffled_values",
)
WRITES = (
    "ov_map_value_margin", "head_value_margin_dla", "head_answer_logit_dla", "head_margin_dla",
    "attended_support_ov_value_margin", "support_mass_ov_value_margin", "qk_ov_product", "attention_ov_product",
)  # fmt: skip
METRICS = (
    "qk_separation", "attention_support_mean", "attention_support_mass", "attention_mass_separation", *WRITES,
    "correct_value_logit", "best_wrong_value_logit", "moving_answer_margin", "negative_answer_loss",
)  # fmt: skip
OUTPUTS = (
    "correct_value_logit", "negative_answer_loss", "fixed_source_competitor_margin", "fixed_target_competitor_margin",
    "moving_answer_margin",
)  # fmt: skip


def partners(pairs):
    """Pair id to the pair before it of its type, in scan order; the last for the first. `pairs` as `chosen_pairs`."""
    before = {}
    for pair in pairs:
        same = [other for other in pairs if other[2] == pair[2]]
        before[pair[4]] = same[same.index(pair) - 1]
    return before


def positions_of(event, roles):
    """Query, and support and distractor positions up to it."""
    at = event.roles[roles[0]][0]
    supports, distractors = ([p for p in event.roles[role] if p <= at] for role in roles[1:])
    return at, supports, distractors


def mean_support_value(decoder, head, event, roles):
    """Mean value vector of a record's support, Float64[d_head]."""
    _, supports, _ = positions_of(event, roles)
    return np.mean([decoder.forward(event.tokens).values[head][p] for p in supports], 0)


def condition_metrics(decoder, head, event, other, roles, condition):
    """The sixteen metrics of a record, and what goes with them; `other` is the record whose values are taken in its place."""
    forward = decoder.forward(event.tokens)
    at, supports, distractors = positions_of(event, roles)
    scores, attention = (of[head][at] for of in (forward.scores, forward.probabilities))
    pattern, values = attention[: at + 1].copy(), forward.values[head][: at + 1].copy()
    on_support = np.zeros(at + 1)
    on_support[supports] = 1 / len(supports)
    if condition.startswith("correct_support"):
        pattern = on_support
    if condition.endswith("shuffled_values"):
        for position in supports:
            values[position] = mean_support_value(decoder, head, other, roles)
    w_o, unembedding = decoder.head_output(*head), decoder.weights["token_embedding.weight"]
    write = w_o @ sum(weight * value for weight, value in zip(pattern, values, strict=True))
    ov_map = w_o @ sum(weight * value for weight, value in zip(on_support, values, strict=True))

    def margin(vector):
        logits = unembedding @ vector
        return logits[event.answer] - logits[best_wrong(logits, event.answer, event.competitors)]

    logits = forward.logits[event.prediction]
    wrong = best_wrong(logits, event.answer, event.competitors)
    last = forward.stages[f"layer_{decoder.layers - 1}_post_mlp"][event.prediction]
    support, distractor = attention[supports], attention[distractors]
    qk = scores[supports].mean() - scores[distractors].mean()
    map_margin = margin(ov_map)
    found = {
        "qk_support_score": scores[supports].mean(),
        "qk_distractor_score": scores[distractors].mean(),
        "qk_separation": qk,
        "attention_support_mean": support.mean(),
        "attention_support_mass": support.sum(),
        "attention_mass_separation": support.sum() - distractor.sum(),
        "ov_map_value_margin": map_margin,
        "head_value_margin_dla": margin(write),
        "head_answer_logit_dla": unembedding[event.answer] @ write,
        "head_margin_dla": write @ decoder.readout_gradient(last, event.answer, wrong),
        "attended_support_ov_value_margin": support.mean() * map_margin,
        "support_mass_ov_value_margin": support.sum() * map_margin,
        "qk_ov_product": qk * map_margin,
        "attention_ov_product": (support.sum() - distractor.sum()) * map_margin,
        "correct_value_logit": logits[event.answer],
        "best_wrong_value_logit": logits[wrong],
        "moving_answer_margin": logits[event.answer] - logits[wrong],
        "negative_answer_loss": logits[event.answer]
        - logits.max()
        - np.log(np.exp(logits - logits.max()).sum()),
    }
    return {
        **{name: float(value) for name, value in found.items()},
        "query_position": at,
        "support_positions": supports,
        "distractor_positions": distractors,
        "answer_token_id": event.answer,
        "best_wrong_token_id": wrong,
        "answer_correct": bool(logits.argmax() == event.answer),
        "logits": {token: float(logits[token]) for token in event.competitors},
    }


def pair_rows(lake, records, decoders, heads, roles, types, most, sides=("clean", "corrupted")):
    """Rows in report order: step, side, head, condition, pair."""
    pairs = chosen_pairs(lake, types, most)
    before = partners(pairs)
    for step, decoder in decoders.items():
        for side in sides:
            place = 0 if side == "clean" else 1
            for head in heads:
                for condition in CONDITIONS:
                    for pair in pairs:
                        event, other = (records[side][of[place]] for of in (pair, before[pair[4]]))
                        yield {
                            "step": step,
                            "record_side": side,
                            "head_layer": head[0],
                            "head": head[1],
                            "head_label": f"L{head[0]}H{head[1]}",
                            "condition": condition,
                            "pair_type": pair[2],
                            "split": pair[3],
                            "pair_id": pair[4],
                            "source_sample_id": pair[5],
                            "source_query_index": pair[6],
                            **condition_metrics(decoder, head, event, other, roles, condition),
                        }

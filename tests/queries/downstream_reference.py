"""The eleven downstream scalars of one head over one record, in float64, straight from the definition (part 3, F)."""

import numpy as np

from .chain_reference import chain
from .float64_decoder import best_wrong

SCALARS = (
    "attention_separation", "attention_mass_separation", "head_answer_logit_dla", "head_value_margin_dla",
    "support_ov_value_margin", "attended_support_ov_value_margin", "head_margin_dla_fixed_readout", "answer_margin",
    "negative_answer_loss", "support_mass_ov_value_margin", "qk_ov_product",
)  # fmt: skip


def readout(decoder, event):
    """γ: gradient of the answer's margin in the last residual stage at the prediction, the competitor fixed."""
    forward = decoder.forward(event.tokens)
    wrong = best_wrong(forward.logits[event.prediction], event.answer, event.competitors)
    last = forward.stages[f"layer_{decoder.layers - 1}_post_mlp"][event.prediction]
    return decoder.readout_gradient(last, event.answer, wrong)


def scalars(decoder, head, event, roles, gamma):
    """Every scalar by name; `head` is (layer, head), `roles` query, support and distractors, `gamma` of the source."""
    links = chain(decoder, *head, event, *roles)
    forward, at = decoder.forward(event.tokens), links["query_position"]
    mixed = forward.probabilities[head][at] @ forward.values[head]
    margin = links["support_ov_value_margin"]
    made = {
        "head_margin_dla_fixed_readout": decoder.head_output(*head) @ mixed @ gamma,
        "negative_answer_loss": -links["answer_loss"],
        "support_mass_ov_value_margin": links["attention_support_mass"] * margin,
        "qk_ov_product": links["qk_separation"] * margin,
    }
    return {name: float(made[name] if name in made else links[name]) for name in SCALARS}


def competitors(decoder, head, event, roles):
    """The best wrong token of what the head writes, of what it would write from the support alone, and of the answer."""
    forward = decoder.forward(event.tokens)
    at = event.roles[roles[0]][0]
    supports = [p for p in event.roles[roles[1]] if p <= at]
    values, w_o = forward.values[head], decoder.head_output(*head)
    unembedding = decoder.weights["token_embedding.weight"]
    of = {
        "head_value_margin_dla": unembedding @ (w_o @ (forward.probabilities[head][at] @ values)),
        "support_ov_value_margin": unembedding @ (w_o @ np.mean(values[supports], 0)),
        "answer_margin": forward.logits[event.prediction],
    }
    return {name: best_wrong(logits, event.answer, event.competitors) for name, logits in of.items()}

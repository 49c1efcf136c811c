"""The eleven downstream scalars of one head, and what updates do to them, in float64 straight from the definitions.

Part 3, F for the scalars; part 3, D for the terms of an update. Nothing here reads what an extractor made, but stored states
and gradients, and the log of the training.
"""

import json
from functools import cache

import numpy as np

from tests.downstream_lake import HEADS, RUN

from .chain_reference import SIDES, chain, chosen_pairs
from .float64_decoder import Decoder, best_wrong, load_events, load_weights

SCALARS = (
    "attention_separation", "attention_mass_separation", "head_answer_logit_dla", "head_value_margin_dla",
    "support_ov_value_margin", "attended_support_ov_value_margin", "head_margin_dla_fixed_readout", "answer_margin",
    "negative_answer_loss", "support_mass_ov_value_margin", "qk_ov_product",
)  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


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
    found = {name: best_wrong(logits, event.answer, event.competitors) for name, logits in of.items()}
    for name in ("attended_support_ov_value_margin", "support_mass_ov_value_margin", "qk_ov_product"):
        found[name] = found["support_ov_value_margin"]
    return found


class Reference:
    """One head over the pairs that a report chooses, at any stored step."""

    def __init__(self, lake, head, roles, types, most):
        self.lake, self.head, self.roles = lake, head, roles
        self.events = {side: load_events(lake, RUN, probe) for side, probe in SIDES.items()}
        self.pairs = [
            {
                "clean": clean, "corrupted": corrupted, "pair_type": pair_type, "split": split, "pair_id": pair_id,
                "source_sample_id": source, "source_query_index": query,
            }
            for clean, corrupted, pair_type, split, pair_id, source, query in chosen_pairs(lake, types, most)
        ]  # fmt: skip
        self.weights = cache(lambda step: load_weights(lake, RUN, step))
        self.decoder = cache(lambda step: Decoder(self.weights(step), HEADS))
        self.gamma = cache(lambda step, side, event: readout(self.decoder(step), self.events[side][event]))
        self.at = cache(self._at)

    def _at(self, step, source, side, event):
        return self.of(self.decoder(step), source, side, event)

    def of(self, decoder, source, side, event):
        """Scalars of one record, the readout frozen at step `source`."""
        return scalars(
            decoder, self.head, self.events[side][event], self.roles, self.gamma(source, side, event)
        )

    def event(self, pair, side):
        return self.events[side][pair[side]]

    def cell(self, split, pair_type):
        """Pairs of a cell; `__all__` pools."""
        return [
            pair
            for pair in self.pairs
            if split in ("__all__", pair["split"]) and pair_type in ("__all__", pair["pair_type"])
        ]

    def slope(self, source, direction, side, pairs, target=None, along=0.0):
        """Central difference of every scalar's mean along `direction`, on the path from `source` to `target`."""
        base = self.weights(source)
        if target is not None:
            base = {name: (1 - along) * of + along * self.weights(target)[name] for name, of in base.items()}
        size, ends = 1e-5, []
        wanted = [pair[side] for pair in pairs]
        for sign in (1, -1):
            moved = {name: of + sign * size * direction.get(name, 0) for name, of in base.items()}
            decoder = Decoder(moved, HEADS)
            rows = {event: self.of(decoder, source, side, event) for event in set(wanted)}
            ends.append({key: np.mean([rows[event][key] for event in wanted]) for key in SCALARS})
        return {key: (ends[0][key] - ends[1][key]) / (2 * size) for key in SCALARS}

    def update(self, source, target):
        return {name: self.weights(target)[name] - of for name, of in self.weights(source).items()}

    def terms(self, target):
        """Fields of the recorded update to `target`, by name and parameter (definitions 3 §D)."""
        source = target - 1
        log = {row["step"]: row for row in self.lake.table("training_steps", RUN).collect().to_dicts()}
        held = next(
            log[step]["optimizer_groups"] for step in range(target, 0, -1) if log[step]["optimizer_groups"]
        )
        (group,) = json.loads(held)
        rate, b1, b2 = log[target]["learning_rate"], group["beta1"], group["beta2"]
        read = {
            key: {
                name: self.lake.tensor(key, name, RUN).read([step])[0].astype(np.float64)
                for name in self.lake.axes.names(RUN, key)
            }
            for key, step in (("gradients", target), ("exp_avg", source), ("exp_avg_sq", source))
        }
        found = {}
        for name, gradient in read["gradients"].items():
            clipped = gradient * log[target]["clip_coefficient"]
            m, v = read["exp_avg"][name], read["exp_avg_sq"][name]
            after = b2 * v + (1 - b2) * clipped**2
            den = np.sqrt(after) / np.sqrt(1 - b2**target) + group["eps"]
            scale = rate / (1 - b1**target)
            parts = {
                "raw_sgd": -rate * gradient,
                "clipped_sgd": -rate * clipped,
                "adam_current_gradient": -scale * (1 - b1) * clipped / den,
                "adam_historical_momentum": -scale * b1 * m / den,
                "weight_decay": -rate * group["weight_decay"] * self.weights(source)[name],
            }
            parts["adam_preconditioned"] = parts["adam_current_gradient"] + parts["adam_historical_momentum"]
            parts["reconstructed_adamw_update"] = parts["adam_preconditioned"] + parts["weight_decay"]
            for key, of in parts.items():
                found.setdefault(key, {})[name] = of
        return log[target], group, found


def parameter_groups(weights):
    """Every group of parameters by id: [(parameter, index)], slice by slice (definitions 2 §E)."""
    width = weights["token_embedding.weight"].shape[1] // HEADS
    layers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    every = slice(None)
    found = {"global:all_named_parameters": [(name, every) for name in weights]}
    found |= {f"parameter:{name}": [(name, every)] for name in weights}

    def module(prefix):
        return [(name, every) for name in weights if name.startswith(prefix)]

    for name in ("token_embedding", "position_embedding", "final_norm"):
        found[f"module:{name}"] = module(f"{name}.")
    for layer in sorted(layers):
        block = f"blocks.{layer}"
        for mine, stored in (("ln_1", "ln_1"), ("ln_2", "ln_2"), ("attention", "attn"), ("mlp", "ff")):
            found[f"module:L{layer}.{mine}"] = module(f"{block}.{stored}.")
        for part in PROJECTIONS:
            found[f"attention_projection:L{layer}.{part}"] = module(f"{block}.attn.{part}.")
        for head in range(HEADS):
            rows, whole = slice(head * width, (head + 1) * width), []
            for part in PROJECTIONS:
                name = f"{block}.attn.{part}"
                slices = (
                    [(f"{name}.weight", (every, rows))]
                    if part == "out_proj"
                    else [(f"{name}.weight", rows), (f"{name}.bias", rows)]
                )
                found[f"attention_head_projection:L{layer}H{head}.{part}"] = slices
                whole += slices
            found[f"attention_head:L{layer}H{head}.qkvo"] = whole
        for neuron in range(len(weights[f"{block}.ff.fc_in.bias"])):
            found[f"mlp_neuron:L{layer}N{neuron}"] = [
                (f"{block}.ff.fc_in.weight", neuron),
                (f"{block}.ff.fc_in.bias", neuron),
                (f"{block}.ff.fc_out.weight", (every, neuron)),
            ]
    return found


def restricted(field, group):
    """A field cut to a group, as one vector."""
    return np.concatenate([np.ravel(field[name][index]) for name, index in group])


def cosine(one, other):
    sizes = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / sizes) if sizes else None


def identifiers(source, target, head, roles, side):
    """The columns that name interval, head, roles and record side in every row of both reports."""
    return {
        "source_step": source,
        "target_step": target,
        "step_gap": target - source,
        "source_checkpoint": f"step_{source:06d}",
        "target_checkpoint": f"step_{target:06d}",
        "head_layer": head[0],
        "head": head[1],
        "head_label": f"L{head[0]}H{head[1]}",
        **dict(zip(("score_query_role", "support_key_role", "distractor_key_role"), roles, strict=True)),
        "record_side": side,
    }


def scalar_row(reference, source, target, side, pair, name):
    """A pair's row of scalar_rows."""
    head, roles = reference.head, reference.roles
    event = reference.event(pair, side)
    at = event.roles[roles[0]][0]
    before, after = (reference.at(step, source, side, pair[side])[name] for step in (source, target))
    correct, wrong = [], []
    for step in (source, target):
        decoder = reference.decoder(step)
        logits = decoder.forward(event.tokens).logits[event.prediction]
        correct.append(bool(logits.argmax() == event.answer))
        wrong.append(competitors(decoder, head, event, roles).get(name))
    support, distractors = ([p for p in event.roles[role] if p <= at] for role in roles[1:])
    return {
        **identifiers(source, target, head, roles, side),
        **{
            key: pair[key]
            for key in ("split", "pair_type", "pair_id", "source_sample_id", "source_query_index")
        },
        "query_position": at,
        "support_positions": support,
        "distractor_positions": distractors,
        "num_support_positions": len(support),
        "num_distractor_positions": len(distractors),
        "answer_token_id": event.answer,
        "source_answer_correct": correct[0],
        "target_answer_correct": correct[1],
        "source_best_wrong_token_id": wrong[0],
        "target_best_wrong_token_id": wrong[1],
        "scalar_name": name,
        "source_value": before,
        "target_value": after,
        "actual_delta": after - before,
    }

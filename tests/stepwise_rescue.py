"""Rescue in float64 NumPy, step by step as the definitions say it (part 4, §0.12, §I, §J): a whole run for every step.

A run knows two things only: components whose output is 0, and stages whose state is given. What a component writes is read
off two runs' states, or off one layer with all heads but one turned off. Nothing here knows of restoring a write in place.
"""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np

from tests.plain_decoder import PlainDecoder, norm

_erf = np.vectorize(math.erf)


class Stepwise(PlainDecoder):
    """The decoder, one unpadded record at a time."""

    def attention(self, layer, stage, heads):
        """What a layer's attention adds to a stage, with only `heads` turned on; the output bias is there in any case."""
        y, length = norm(stage, *self.part(layer, "ln_1")), len(stage)
        mixed = np.zeros((length, self.heads * self.width))
        for head in heads:
            (wq, bq), (wk, bk), (wv, bv) = (self.part(layer, f"attn.{p}_proj", head) for p in "qkv")
            scores = (y @ wq.T + bq) @ (y @ wk.T + bk).T / math.sqrt(self.width)
            scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            columns = slice(head * self.width, (head + 1) * self.width)
            mixed[:, columns] = weights / weights.sum(-1, keepdims=True) @ (y @ wv.T + bv)
        weight, bias = self.part(layer, "attn.out_proj")
        return mixed @ weight.T + bias

    def stages(self, tokens, ablated=(), patches=None):
        """Stages by name, after any patch; and `logits`."""
        patches = patches or {}
        x = self.U[tokens] + self.w["position_embedding.weight"][: len(tokens)]
        found = {}

        def at(name, state):
            found[name] = patches.get(name, state)
            return found[name]

        x = at("embedding", x)
        for layer in range(self.layers):
            on = [head for head in range(self.heads) if f"L{layer}H{head}" not in ablated]
            x = at(f"layer_{layer}_post_attn", x + self.attention(layer, x, on))
            (w1, b1), (w2, b2) = self.part(layer, "ff.fc_in"), self.part(layer, "ff.fc_out")
            inner = norm(x, *self.part(layer, "ln_2")) @ w1.T + b1
            write = (0.5 * inner * (1 + _erf(inner / math.sqrt(2)))) @ w2.T + b2
            x = at(f"layer_{layer}_post_mlp", x + (0 if f"L{layer}MLP" in ablated else write))
        found["logits"] = at("final_norm", self.final(x)) @ self.U.T
        return found

    def write(self, label, stages):
        """What a component writes in a run with these stages, at all positions."""
        layer, head = re.fullmatch(r"L(\d+)(?:MLP|H(\d+))", label).groups()
        if head is None:
            return stages[f"layer_{layer}_post_mlp"] - stages[f"layer_{layer}_post_attn"]
        before = stages["embedding" if layer == "0" else f"layer_{int(layer) - 1}_post_mlp"]
        return self.attention(int(layer), before, [int(head)]) - self.attention(int(layer), before, [])

    def without(self, tokens, source):
        """The run in which a source is taken away."""
        return self.stages(tokens, (source,))

    def restored_writes(self, tokens, source, group):
        """The run in which a source is taken away and a group writes what it writes in the clean run (§J)."""
        clean, patches = self.stages(tokens), {}
        for index in sorted({order(label) for label in group}):
            current = self.stages(tokens, (source,), patches)
            members = [label for label in group if order(label) == index]
            deltas = [self.write(label, clean) - self.write(label, current) for label in members]
            stage = f"layer_{index // 2}_post_{'mlp' if index % 2 else 'attn'}"
            patches[stage] = current[stage] + sum(deltas)
        return self.stages(tokens, (source,), patches)

    def restored_state(self, tokens, source, stage, positions=None):
        """The run in which a source is taken away and a stage is clean, at all positions or at some (§I)."""
        clean, state = self.stages(tokens)[stage], self.without(tokens, source)[stage].copy()
        places = slice(None) if positions is None else positions
        state[places] = clean[places]
        return self.stages(tokens, (source,), {stage: state})


def order(label):
    """A head's place 2 i, an MLP's 2 i + 1."""
    return 2 * int(re.match(r"L(\d+)", label)[1]) + label.endswith("MLP")


def answers(logits, event, source_wrong, target_wrong, own_wrong):
    """The scalars of a run's logits at the prediction, against given competitors."""
    l, y = logits[event.prediction], event.answer  # noqa: E741
    return {
        "moving_answer_margin": l[y] - l[own_wrong],
        "fixed_source_competitor_margin": l[y] - l[source_wrong],
        "fixed_target_competitor_margin": l[y] - l[target_wrong],
        "correct_value_logit": l[y],
        "source_best_wrong_logit": l[source_wrong],
        "target_best_wrong_logit": l[target_wrong],
        "negative_answer_loss": l[y] - l.max() - math.log(np.exp(l - l.max()).sum()),
    }


class World:
    """Pairs and decoders of some steps of a lake, and every row a rescue report has to write."""

    def __init__(self, lake, run, steps, heads, pairs, load_weights):
        self.steps, self.pairs = steps, pairs
        self.decoders = {step: Stepwise(load_weights(lake, run, step), heads) for step in steps}
        self._held = {}

    def run(self, step, event, key, make):
        """A run of an event at a step, made once."""
        held = (step, event.example, id(event), key)
        if held not in self._held:
            self._held[held] = make(self.decoders[step], np.array(event.tokens))["logits"]
        return self._held[held]

    def clean(self, step, event):
        return self.run(step, event, "clean", lambda decoder, tokens: decoder.stages(tokens))

    def wrong(self, step, event):
        logits = self.clean(step, event)[event.prediction]
        return max((token for token in event.competitors if token != event.answer), key=lambda t: logits[t])

    def rows(self, sides, scalars, patches):
        """`patches` is (source, label, make); rows in the order of the reports: (row key, clean, ablated, patched)."""
        for source_step, target_step in zip(self.steps, self.steps[1:], strict=False):
            for kind, step in (("source", source_step), ("target", target_step)):
                for side in sides:
                    for pair in self.pairs:
                        yield from self._of(
                            source_step, target_step, kind, step, side, pair, scalars, patches
                        )

    def _of(self, source_step, target_step, kind, step, side, pair, scalars, patches):
        event = getattr(pair, side)
        wrong = (self.wrong(source_step, event), self.wrong(target_step, event), self.wrong(step, event))
        clean = answers(self.clean(step, event), event, *wrong)
        runs = []
        for source, label, make in patches:
            ablated = self.run(step, event, source, lambda d, t, s=source: d.without(t, s))
            patched = self.run(step, event, (source, label), lambda d, t, m=make: m(d, t, event))
            runs.append((source, label, *(answers(of, event, *wrong) for of in (ablated, patched))))
        for scalar in scalars:
            for source, label, ablated, patched in runs:
                key = SimpleNamespace(
                    source_step=source_step, target_step=target_step, kind=kind, step=step, side=side, pair=pair,
                    scalar=scalar, source=source, label=label,
                )  # fmt: skip
                yield key, clean[scalar], ablated[scalar], patched[scalar]


def statistics(rows, threshold=1e-6):
    """What summary rows say of some rescue rows, in plain Python."""
    drops, rescues = ([row[name] for row in rows] for name in ("total_drop", "rescue"))
    count = len(rows)

    def mean(values):
        values = list(values)
        return math.fsum(values) / len(values) if values else None

    ratios = [rescue / drop for drop, rescue in zip(drops, rescues, strict=True) if abs(drop) > threshold]
    spread = math.fsum((drop - mean(drops)) ** 2 for drop in drops)
    missed = math.fsum((drop - rescue) ** 2 for drop, rescue in zip(drops, rescues, strict=True))
    moved = math.fsum((rescue - mean(rescues)) ** 2 for rescue in rescues)
    together = math.fsum(
        (drop - mean(drops)) * (rescue - mean(rescues)) for drop, rescue in zip(drops, rescues, strict=True)
    )
    return {
        "num_observations": count,
        **{
            f"mean_{name}": mean(row[name] for row in rows)
            for name in (
                "clean_scalar",
                "source_ablated_scalar",
                "patched_scalar",
                "total_drop",
                "rescue",
                "unrecovered",
            )
        },
        **{
            f"mean_abs_{name}": mean(abs(row[name]) for row in rows)
            for name in ("total_drop", "rescue", "unrecovered")
        },
        "mean_rescue_fraction_from_means": mean(rescues) / mean(drops)
        if abs(mean(drops)) > threshold
        else None,
        "num_recovery_fraction_rows": len(ratios),
        "mean_recovery_fraction_per_row": mean(ratios),
        "improved_fraction": mean(abs(row["unrecovered"]) < abs(row["total_drop"]) for row in rows),
        "rescue_vs_drop_r_squared": 1 - missed / spread if spread > 1e-12 else None,
        "rescue_vs_drop_correlation": together / math.sqrt(spread * moved)
        if count > 1 and spread * moved
        else None,
    }

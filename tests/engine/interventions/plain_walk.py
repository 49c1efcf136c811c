"""Interventions once more: one record at a time in float64 NumPy, with a callback at every place where something is edited."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from tests.plain_decoder import PlainDecoder, norm

_erf = np.vectorize(math.erf)


class Editor:
    """What may be changed; every method gets a value and returns the one that takes its place."""

    def head(self, layer, head, mixed, found):
        return mixed

    def neurons(self, layer, activations):
        return activations

    def mlp(self, layer, write):
        return write

    def stage(self, name, x):
        return x


def walk(decoder: PlainDecoder, tokens, editor=None):
    """`stages`, `mixed` (layer, head), `neurons` and `mlp` (layer), `parts` by component, `logits`."""
    editor = editor or Editor()
    got = SimpleNamespace(stages={}, mixed={}, found={}, neurons={}, mlp={}, parts={}, logits=None)
    length = len(tokens)
    x = decoder.U[tokens] + decoder.w["position_embedding.weight"][:length]
    got.parts["embedding"] = x
    x = got.stages["embedding"] = editor.stage("embedding", x)
    for layer in range(decoder.layers):
        y = norm(x, *decoder.part(layer, "ln_1"))
        writes = []
        for head in range(decoder.heads):
            (wq, bq), (wk, bk), (wv, bv) = (decoder.part(layer, f"attn.{p}_proj", head) for p in "qkv")
            scores = (y @ wq.T + bq) @ (y @ wk.T + bk).T / math.sqrt(decoder.width)
            scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
            attention = np.exp(scores - scores.max(-1, keepdims=True))
            attention /= attention.sum(-1, keepdims=True)
            values = y @ wv.T + bv
            got.found[layer, head] = attention, values
            mixed = editor.head(layer, head, attention @ values, (attention, values))
            got.mixed[layer, head] = mixed
            columns = slice(head * decoder.width, (head + 1) * decoder.width)
            writes.append(mixed @ decoder.w[f"blocks.{layer}.attn.out_proj.weight"][:, columns].T)
            got.parts[f"L{layer}H{head}"] = writes[-1]
        bias = decoder.w[f"blocks.{layer}.attn.out_proj.bias"]
        got.parts[f"L{layer}.attention_bias"] = np.broadcast_to(bias, x.shape)
        name = f"layer_{layer}_post_attn"
        x = got.stages[name] = editor.stage(name, x + sum(writes) + bias)
        (w1, b1), (w2, b2) = decoder.part(layer, "ff.fc_in"), decoder.part(layer, "ff.fc_out")
        inner = norm(x, *decoder.part(layer, "ln_2")) @ w1.T + b1
        got.neurons[layer] = editor.neurons(layer, 0.5 * inner * (1 + _erf(inner / math.sqrt(2))))
        got.mlp[layer] = got.parts[f"L{layer}MLP"] = editor.mlp(layer, got.neurons[layer] @ w2.T + b2)
        name = f"layer_{layer}_post_mlp"
        x = got.stages[name] = editor.stage(name, x + got.mlp[layer])
    got.stages["final_norm"] = editor.stage("final_norm", decoder.final(x))
    got.logits = got.stages["final_norm"] @ decoder.U.T
    return got


class Edits(Editor):
    """The edits of one intervention, as their TOML has them, on one event of a record.

    `clean` is its untouched walk; `roles` gives its positions, `partner` the walk and roles of the event before, and `other`
    the walk and roles of the pair's other record. `basis` turns an edit into an orthonormal basis, or None.
    """

    def __init__(self, edits, clean, roles, prediction, basis=None, partner=None, other=None):
        self.edits, self.clean, self.roles, self.p = edits, clean, roles, prediction
        self.basis, self.partner, self.other = basis, partner, other

    def head(self, layer, head, mixed, found):
        label = f"L{layer}H{head}"
        mixed = mixed.copy()
        for edit in self.edits:
            if edit.get("zero") == label:
                mixed[:] = 0
            if edit.get("restore") == label:
                mixed = self.clean.mixed[layer, head].copy()
            if edit.get("attend") == label:
                mixed[self.p] = np.mean([found[1][at] for at in self._up_to(edit["role"], self.roles)], 0)
            if edit.get("shuffle_values") == label:
                attention, values = found[0][self.p], found[1].copy()
                walked, roles, prediction = self.partner
                places = [at for at in roles[edit["role"]] if at <= prediction]
                mean = np.mean([walked.found[layer, head][1][at] for at in places], 0)
                for at in self._up_to(edit["role"], self.roles):
                    values[at] = mean
                mixed[self.p] = attention @ values
        return mixed

    def _up_to(self, role, roles):
        return [at for at in roles[role] if at <= self.p]

    def neurons(self, layer, activations):
        for edit in self.edits:
            for kind, label in edit.items():
                if kind in ("zero", "restore") and label.startswith(f"L{layer}N"):
                    at = int(label.split("N")[1])
                    activations = activations.copy()
                    activations[:, at] = 0 if kind == "zero" else self.clean.neurons[layer][:, at]
        return activations

    def mlp(self, layer, write):
        for edit in self.edits:
            if edit.get("zero") == f"L{layer}MLP":
                write = np.zeros_like(write)
            if edit.get("restore") == f"L{layer}MLP":
                write = self.clean.mlp[layer]
        return write

    def stage(self, name, x):
        for edit in self.edits:
            if edit.get("stage") != name:
                continue
            x = x.copy()
            role = edit.get("position_role")
            places = range(len(x)) if role is None else self.roles[role]
            basis = self.basis(edit)
            project = np.eye(x.shape[1]) if basis is None else basis @ basis.T
            for number, at in enumerate(places):
                if edit["operation"] == "remove":
                    x[at] = x[at] - x[at] @ project
                elif edit["operation"] == "keep":
                    x[at] = x[at] @ project
                else:
                    source = self.clean.stages[name][at]
                    if edit.get("source") == "counterpart":
                        walked, roles = self.other
                        source = walked.stages[name][roles[role][number]]
                    x[at] = x[at] + (source - x[at]) @ project
        return x

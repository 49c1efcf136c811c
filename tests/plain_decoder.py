"""The symbolic-KV decoder once more, in float64 NumPy with whole T × T attention: what measured numbers are checked against."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

_erf = np.vectorize(math.erf)


@dataclass
class Plain:
    """One record's forward pass."""

    stages: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """(layer, head) to Float[query, key], unmasked."""
    attention: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    values: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """(layer, head) to Float[position, d_model]: W_O of each position's value vector."""
    writes: dict[str, np.ndarray] = field(default_factory=dict)
    """Component to Float[position, d_model]."""
    logits: np.ndarray | None = None


def norm(x, gain, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias


class PlainDecoder:
    """Weights by state-dict name, any array type."""

    def __init__(self, weights, heads):
        self.w = {name: np.asarray(tensor, np.float64) for name, tensor in weights.items()}
        self.heads = heads
        self.layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.U = self.w["token_embedding.weight"]
        self.width = self.U.shape[1] // heads

    def part(self, layer, name, head=None):
        """A projection's weight and bias, or a head's rows of them."""
        weight, bias = (self.w[f"blocks.{layer}.{name}.{leaf}"] for leaf in ("weight", "bias"))
        rows = slice(None) if head is None else slice(head * self.width, (head + 1) * self.width)
        return weight[rows], bias[rows]

    def final(self, x):
        return norm(x, self.w["final_norm.weight"], self.w["final_norm.bias"])

    def run(self, tokens, without=None):
        """A pass over one unpadded record; `without` is a component whose output is zero."""
        got, length = Plain(), len(tokens)
        x = self.U[tokens] + self.w["position_embedding.weight"][:length]
        got.stages["embedding"] = got.writes["embedding"] = x
        for layer in range(self.layers):
            y = norm(x, *self.part(layer, "ln_1"))
            total = np.zeros_like(x)
            for head in range(self.heads):
                (wq, bq), (wk, bk), (wv, bv) = (self.part(layer, f"attn.{p}_proj", head) for p in "qkv")
                scores = (y @ wq.T + bq) @ (y @ wk.T + bk).T / math.sqrt(self.width)
                masked = np.where(np.tri(length, dtype=bool), scores, -np.inf)
                attention = np.exp(masked - masked.max(-1, keepdims=True))
                attention /= attention.sum(-1, keepdims=True)
                columns = slice(head * self.width, (head + 1) * self.width)
                out = self.w[f"blocks.{layer}.attn.out_proj.weight"][:, columns]
                got.scores[layer, head], got.attention[layer, head] = scores, attention
                got.values[layer, head] = (y @ wv.T + bv) @ out.T
                write = attention @ got.values[layer, head]
                got.writes[f"L{layer}H{head}"] = write
                total += 0 if without == f"L{layer}H{head}" else write
            bias = self.w[f"blocks.{layer}.attn.out_proj.bias"]
            got.writes[f"L{layer}.attention_bias"] = np.broadcast_to(bias, x.shape)
            x = x + total + bias
            got.stages[f"layer_{layer}_post_attn"] = x
            (w1, b1), (w2, b2) = self.part(layer, "ff.fc_in"), self.part(layer, "ff.fc_out")
            inner = norm(x, *self.part(layer, "ln_2")) @ w1.T + b1
            write = (0.5 * inner * (1 + _erf(inner / math.sqrt(2)))) @ w2.T + b2
            got.writes[f"L{layer}MLP"] = write
            x = x + (0 if without == f"L{layer}MLP" else write)
            got.stages[f"layer_{layer}_post_mlp"] = x
        got.stages["final_norm"] = self.final(x)
        got.logits = got.stages["final_norm"] @ self.U.T
        return got

"""The symbolic-KV decoder in numpy float64, straight from its definition, and a reader of its streams.

What the lake's numbers are held against. It shares no code with engine, extractors or SQL: weights come from the lake's
own arrays, roles from the tokens, and gradients from the formula of LayerNorm.
"""

import json
import math
from types import SimpleNamespace

import numpy as np

_ERF = np.vectorize(math.erf)


def load_weights(lake, run, step):
    """Stored weights of a step as float64, by name."""
    names = lake.axes.names(run, "weights")
    return {name: lake.tensor("weights", name, run).read([step])[0].astype(np.float64) for name in names}


def layer_norm(x, weight, bias, epsilon=1e-5):
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


class Decoder:
    """One checkpoint of the decoder."""

    def __init__(self, weights, heads):
        self.weights, self.heads = weights, heads
        self.layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        self.width = weights["token_embedding.weight"].shape[1] // heads

    def slice(self, layer, head, projection):
        """(W, b) of one head: rows of q, k and v."""
        rows = slice(head * self.width, (head + 1) * self.width)
        name = f"blocks.{layer}.attn.{projection}_proj"
        return self.weights[f"{name}.weight"][rows], self.weights[f"{name}.bias"][rows]

    def head_output(self, layer, head):
        """W_O of one head, Float64[d_model, d_head]."""
        columns = slice(head * self.width, (head + 1) * self.width)
        return self.weights[f"blocks.{layer}.attn.out_proj.weight"][:, columns]

    def norm(self, name, x):
        return layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def forward(self, tokens):
        """Stages by name, scores and probabilities [layer, head] by query and key, values [layer, head], logits."""
        w, count = self.weights, len(tokens)
        unembedding = w["token_embedding.weight"]
        x = unembedding[tokens] + w["position_embedding.weight"][:count]
        found = SimpleNamespace(stages={"embedding": x}, scores={}, probabilities={}, values={})
        for layer in range(self.layers):
            y = self.norm(f"blocks.{layer}.ln_1", x)
            for head in range(self.heads):
                q, k, v = (
                    y @ matrix.T + bias for matrix, bias in (self.slice(layer, head, p) for p in "qkv")
                )
                scores = q @ k.T / math.sqrt(self.width)
                masked = np.where(np.tri(count, dtype=bool), scores, -np.inf)
                weights = np.exp(masked - masked.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                found.scores[layer, head], found.probabilities[layer, head] = scores, weights
                found.values[layer, head] = v
                x = x + weights @ v @ self.head_output(layer, head).T
            x = x + w[f"blocks.{layer}.attn.out_proj.bias"]
            found.stages[f"layer_{layer}_post_attn"] = x
            y = self.norm(f"blocks.{layer}.ln_2", x)
            inner = y @ w[f"blocks.{layer}.ff.fc_in.weight"].T + w[f"blocks.{layer}.ff.fc_in.bias"]
            inner = 0.5 * inner * (1 + _ERF(inner / math.sqrt(2)))
            x = x + inner @ w[f"blocks.{layer}.ff.fc_out.weight"].T + w[f"blocks.{layer}.ff.fc_out.bias"]
            found.stages[f"layer_{layer}_post_mlp"] = x
        found.stages["final_norm"] = self.norm("final_norm", x)
        found.logits = found.stages["final_norm"] @ unembedding.T
        return found

    def readout_gradient(self, residual, answer, wrong):
        """Gradient of logit[answer] - logit[wrong] in the last residual vector, through the final LayerNorm."""
        unembedding = self.weights["token_embedding.weight"]
        v = self.weights["final_norm.weight"] * (unembedding[answer] - unembedding[wrong])
        centred = residual - residual.mean()
        scale = math.sqrt((centred**2).mean() + 1e-5)
        unit = centred / scale
        return (v - v.mean() - unit * (v * unit).mean()) / scale


def best_wrong(values, answer, candidates):
    """The candidate with the largest value, the answer apart."""
    return max((token for token in candidates if token != answer), key=lambda token: values[token])


def read_stream(texts):
    """The reads of a stream: position of the key, and the write that answers it, beside all writes' op positions."""
    writes, reads = [], []
    for at, text in enumerate(texts):
        if text == "W":
            writes.append(at)
        elif text == "R":
            support = next(w for w in reversed(writes) if texts[w + 1] == texts[at + 1])
            reads.append((at + 1, support))
    return writes, reads


def load_events(lake, run, probe):
    """Every query event of a probe, from the tokens alone: record, prediction position, answer, roles."""
    (vocabulary,) = lake.sql(
        "SELECT vocabulary FROM probes WHERE run = ? AND probe = ?", [run, probe]
    ).fetchall()[0]
    examples = lake.sql(
        "SELECT example, sample_id, split, tokens, record FROM probe_examples WHERE run = ? AND probe = ? ORDER BY example",
        [run, probe],
    ).fetchall()
    values = [token for token, text in enumerate(vocabulary) if text[0] == "V" and text[1:].isdigit()]
    events = []
    for example, sample_id, split, tokens, record in examples:
        texts = [vocabulary[token] for token in tokens]
        writes, reads = read_stream(texts)
        asked = [query["positions"]["key"] for query in json.loads(record)["query_events"]]
        for query, at in enumerate(asked):
            support = next(w for key, w in reads if key == at)
            others = [w for w in writes if w != support]
            events.append(
                SimpleNamespace(
                    event=len(events),
                    example=example,
                    sample_id=sample_id,
                    split=split,
                    query_index=query,
                    tokens=tokens,
                    prediction=at,
                    answer=tokens[support + 2],
                    texts=texts,
                    competitors=values,
                    roles={
                        "prediction": [at],
                        "query_key": [at],
                        "support_op": [support],
                        "support_key": [support + 1],
                        "support_value": [support + 2],
                        "support_write": [support, support + 1, support + 2],
                        "key_distractors": [w + 1 for w in others],
                        "value_distractors": [w + 2 for w in others],
                    },
                )
            )
    return events

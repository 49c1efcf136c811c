"""The symbolic-KV decoder in float64 torch, one record at a time, and what attributions of a head's match are made of.

Straight from the definitions (2 §F1; 3 §0, §A, §D); shares no code with engine, extractors or SQL. Weights are a mapping from
name to tensor, so that autograd and finite differences go through every parameter.
"""

import math
from types import SimpleNamespace

import torch
from torch.nn import functional

from .float64_decoder import load_events, load_weights

TIED = "lm_head.weight"


def weights_at(lake, run, step):
    """Float64 leaves by name; the tied unembedding is no parameter of its own."""
    return {
        name: torch.from_numpy(value).requires_grad_()
        for name, value in load_weights(lake, run, step).items()
        if name != TIED
    }


def decode(w, heads, tokens):
    """Stages, and per layer the LayerNorm that attention reads; queries and keys by (layer, head); logits."""
    count = len(tokens)
    embedding = w["token_embedding.weight"]
    x = embedding[tokens] + w["position_embedding.weight"][:count]
    out = SimpleNamespace(stages={"embedding": x}, inputs=[], queries={}, keys={}, attention={})
    width = x.shape[1] // heads
    causal = torch.ones(count, count).tril().bool()
    for layer in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        block = f"blocks.{layer}"
        y = layer_norm(w, f"{block}.ln_1", x)
        out.inputs.append(y)
        q, k, v = (linear(w, f"{block}.attn.{part}_proj", y) for part in "qkv")
        mixed = []
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            out.queries[layer, head], out.keys[layer, head] = q[:, rows], k[:, rows]
            scores = (q[:, rows] @ k[:, rows].T / math.sqrt(width)).masked_fill(~causal, -math.inf)
            out.attention[layer, head] = scores.softmax(-1)
            mixed.append(out.attention[layer, head] @ v[:, rows])
        x = x + linear(w, f"{block}.attn.out_proj", torch.cat(mixed, 1))
        out.stages[f"layer_{layer}_post_attn"] = x
        inner = functional.gelu(linear(w, f"{block}.ff.fc_in", layer_norm(w, f"{block}.ln_2", x)))
        x = x + linear(w, f"{block}.ff.fc_out", inner)
        out.stages[f"layer_{layer}_post_mlp"] = x
    out.stages["final_norm"] = layer_norm(w, "final_norm", x)
    out.logits = out.stages["final_norm"] @ embedding.T
    return out


def layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def keys_of(event, roles):
    """Query position, and the support and distractor positions up to it."""
    at = event.roles[roles[0]][0]
    return (at, *([p for p in sorted(event.roles[role]) if p <= at] for role in roles[1:]))


def separation(scores, supports, distractors):
    return scores[supports].mean() - scores[distractors].mean()


def head_scores(w, heads, head, event, roles, query_from=None, keys_from=None):
    """q · k / √d_head at every position, the query or the keys of other weights where they are given."""
    at = keys_of(event, roles)[0]
    here = decode(w, heads, event.tokens)
    q = (here if query_from is None else decode(query_from, heads, event.tokens)).queries[head][at]
    k = (here if keys_from is None else decode(keys_from, heads, event.tokens)).keys[head]
    return k @ q / math.sqrt(q.shape[-1])


def qk_basis(w, heads, head, rank):
    """First left and right singular vectors of W_Qᵀ W_K as columns, and its spectrum."""
    layer, number = head
    d_model = w["token_embedding.weight"].shape[1]
    rows = slice(number * d_model // heads, (number + 1) * d_model // heads)
    with torch.no_grad():
        matrix = (
            w[f"blocks.{layer}.attn.q_proj.weight"][rows].T @ w[f"blocks.{layer}.attn.k_proj.weight"][rows]
        )
        U, S, Vh = torch.linalg.svd(matrix)
    return U[:, :rank], Vh[:rank].T, S[: d_model // heads]


def rank_scores(w, heads, head, event, roles, basis, stage, mode="head_ln1"):
    """z_qᵀ U Uᵀ M V Vᵀ z / √d_head at every position."""
    layer, number = head
    z = decode(w, heads, event.tokens).stages[stage]
    if mode == "head_ln1":
        z = layer_norm(w, f"blocks.{layer}.ln_1", z)
    width = z.shape[1] // heads
    rows = slice(number * width, (number + 1) * width)
    W_Q, W_K = (w[f"blocks.{layer}.attn.{part}_proj.weight"][rows] for part in "qk")
    left, right, _ = basis
    form = left @ left.T @ W_Q.T @ W_K @ right @ right.T
    return z @ (z[keys_of(event, roles)[0]] @ form) / math.sqrt(width)


def gradient(value, w):
    """Gradients by name, zero where nothing reaches."""
    found = torch.autograd.grad(value, list(w.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(of) if g is None else g for (name, of), g in zip(w.items(), found, strict=True)
    }


def inner(a, b):
    return float(sum((a[name] * b[name]).sum() for name in a))


def norm(a):
    return math.sqrt(inner(a, a))


def batch_loss(w, heads, streams):
    """Mean next-token cross-entropy over all tokens of a batch."""
    losses = [
        functional.cross_entropy(
            decode(w, heads, tokens).logits[:-1], torch.tensor(tokens[1:]), reduction="sum"
        )
        for tokens in streams
    ]
    return sum(losses) / sum(len(tokens) - 1 for tokens in streams)


def adamw_terms(lake, run, step, w, settings):
    """AdamW's update from step - 1 to step, from the recorded gradient and the stored moments (3 §D), by term and name."""
    o, lr = settings.optimization, settings.optimization.learning_rate_at(step)
    g, m, v = (
        {
            name: torch.from_numpy(lake.tensor(of, name, run).read([at])[0]).double()
            # Before the first step the optimizer has no state.
            if at
            else torch.zeros_like(theta)
            for name, theta in w.items()
        }
        for of, at in (("gradients", step), ("exp_avg", step - 1), ("exp_avg_sq", step - 1))
    )
    total = norm(g)
    coefficient = min(1.0, o.grad_clip_norm / (total + 1e-6))
    out = {}
    for name, theta in w.items():
        clipped = coefficient * g[name]
        second = o.beta2 * v[name] + (1 - o.beta2) * clipped**2
        denominator = second.sqrt() / math.sqrt(1 - o.beta2**step) + 1e-8
        rate = lr / (1 - o.beta1**step)
        terms = {
            "raw_sgd": -lr * g[name],
            "clipped_sgd": -lr * clipped,
            "adam_current_gradient": -rate * (1 - o.beta1) * clipped / denominator,
            "adam_historical_momentum": -rate * o.beta1 * m[name] / denominator,
            "weight_decay": -lr * o.weight_decay * theta.detach(),
        }
        terms["adam_preconditioned"] = terms["adam_current_gradient"] + terms["adam_historical_momentum"]
        terms["reconstructed_adamw_update"] = terms["adam_preconditioned"] + terms["weight_decay"]
        for term, value in terms.items():
            out.setdefault(term, {})[name] = value
    return out, g, coefficient


def pairs_of(lake, run, pair_types, count, probe="probe"):
    """The first `count` pairs of each type: fields of table pairs, with the event of each side."""
    events = {
        side: {event.event: event for event in load_events(lake, run, name)}
        for side, name in (("clean", probe), ("corrupted", f"{probe}.corrupted"))
    }
    found = []
    for pair_type in pair_types:
        rows = lake.sql(
            "SELECT pair_id, split, pair_type, source_sample_id, source_query_index, clean_event, corrupted_event FROM pairs "
            "WHERE run = ? AND probe = ? AND pair_type = ? AND pair_id IS NOT NULL ORDER BY clean_event LIMIT ?",
            [run, probe, pair_type, count],
        )
        names = [column[0] for column in rows.description]
        for row in rows.fetchall():
            fields = SimpleNamespace(**dict(zip(names, row, strict=True)))
            fields.sides = {
                side: events[side].get(getattr(fields, f"{side}_event")) for side in ("clean", "corrupted")
            }
            found.append(fields)
    return found


def cells_of(pairs):
    """Pairs by (split, type), both also pooled."""
    cells = {}
    for pair in pairs:
        for split in (pair.split, "__all__"):
            for pair_type in (pair.pair_type, "__all__"):
                cells.setdefault((split, pair_type), []).append(pair)
    return cells


def score_change_rows(before, after, heads, head, event, roles):
    """Rows of table score_changes of one record, by (role, key position): every number (2 §F1)."""
    layer, number = head
    ends = [decode(w, heads, event.tokens) for w in (before, after)]
    at, *keys = keys_of(event, roles)
    x0, x1 = (end.inputs[layer] for end in ends)
    width = x0.shape[1] // heads
    rows = slice(number * width, (number + 1) * width)
    scale = math.sqrt(width)

    def parts(side, place):
        W0, W1 = (w[f"blocks.{layer}.attn.{side}_proj.weight"][rows] for w in (before, after))
        b0, b1 = (w[f"blocks.{layer}.attn.{side}_proj.bias"][rows] for w in (before, after))
        dx, dW = x1[place] - x0[place], W1 - W0
        return {"input": W0 @ dx, "weight": dW @ x0[place], "bias": b1 - b0, "weight_input_cross": dW @ dx}

    q0, q1 = (end.queries[head][at] for end in ends)
    all_keys = [end.keys[head][: at + 1] for end in ends]
    scores = [k @ q / scale for k, q in zip(all_keys, (q0, q1), strict=True)]
    attention, change = [of.softmax(0) for of in scores], scores[1] - scores[0]
    first_order = attention[0] * (change - attention[0] @ change)
    found = {}
    for role, positions in zip(roles[1:], keys, strict=True):
        for index, j in enumerate(positions):
            k0, k1 = (of[j] for of in all_keys)
            found[role, j] = {
                "role_position_index": index,
                "query_position": at,
                "source_attention": attention[0][j],
                "target_attention": attention[1][j],
                "softmax_first_order_attention_delta": first_order[j],
                "source_score": scores[0][j],
                "target_score": scores[1][j],
                "q_vector_delta_source_key": (q1 - q0) @ k0 / scale,
                "source_query_k_vector_delta": q0 @ (k1 - k0) / scale,
                **{f"q_{name}_source_key": of @ k0 / scale for name, of in parts("q", at).items()},
                **{f"source_query_k_{name}": q0 @ of / scale for name, of in parts("k", j).items()},
                "qk_vector_cross": (q1 - q0) @ (k1 - k0) / scale,
            }
    return {key: {name: float(value) for name, value in row.items()} for key, row in found.items()}

"""Route scores and language-model losses in numpy float64, straight from their definitions (part 2, A1-A4, I4)."""

import math
from types import SimpleNamespace

import numpy as np

from .float64_decoder import _ERF, Decoder, load_events


def span(decoder, subspace, rank, head=None, tokens=None):
    """Orthonormal columns of a subspace, by an SVD of the whole matrix; None for the full residual."""
    if subspace == "full_residual":
        return None
    if subspace.startswith("embedding"):
        rows = decoder.weights["token_embedding.weight"][tokens[subspace.split("_")[1]]]
        return np.linalg.svd(rows - rows.mean(0))[2][:rank].T
    layer, number = head
    if "_qk_" in subspace:
        matrix = decoder.slice(layer, number, "q")[0].T @ decoder.slice(layer, number, "k")[0]
    else:
        matrix = decoder.slice(layer, number, "v")[0].T @ decoder.head_output(layer, number).T
    left, _, right = np.linalg.svd(matrix)
    return left[:, :rank] if subspace in ("head_qk_query", "head_ov_input") else right[:rank].T


def resume(decoder, stage, x):
    """Logits of a run whose residual stage is `x`, Float64[position, d_model]."""
    w, causal = decoder.weights, np.tri(len(x), dtype=bool)
    places = ["embedding"]
    places += [f"layer_{layer}_post_{part}" for layer in range(decoder.layers) for part in ("attn", "mlp")]
    after = len(places) if stage == "final_norm" else places.index(stage)
    for layer in range(decoder.layers):
        block = f"blocks.{layer}"
        if after < 1 + 2 * layer:
            y, written = decoder.norm(f"{block}.ln_1", x), 0
            for head in range(decoder.heads):
                q, k, v = (y @ m.T + b for m, b in (decoder.slice(layer, head, p) for p in "qkv"))
                scores = np.where(causal, q @ k.T / math.sqrt(decoder.width), -np.inf)
                weights = np.exp(scores - scores.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                written = written + weights @ v @ decoder.head_output(layer, head).T
            x = x + written + w[f"{block}.attn.out_proj.bias"]
        if after < 2 + 2 * layer:
            inner = decoder.norm(f"{block}.ln_2", x) @ w[f"{block}.ff.fc_in.weight"].T
            inner = inner + w[f"{block}.ff.fc_in.bias"]
            inner = 0.5 * inner * (1 + _ERF(inner / math.sqrt(2)))
            x = x + inner @ w[f"{block}.ff.fc_out.weight"].T + w[f"{block}.ff.fc_out.bias"]
    return (x if stage == "final_norm" else decoder.norm("final_norm", x)) @ w["token_embedding.weight"].T


def positions(event, role):
    """Where a role stands, also those that follow from the others."""
    key, value, query = (event.roles[of][0] for of in ("support_key", "support_value", "query_key"))
    implied = {
        "causal_prefix": range(event.prediction + 1),
        "all_query_relation": (key, value, query),
    }
    return sorted(set(implied.get(role) or event.roles[role]))


def route(decoder, columns, stage, role, pair):
    """Route score and the margins of the three runs of one pair."""
    a, b = pair.transfer
    clean, corrupted = (decoder.forward(event.tokens) for event in (pair.clean, pair.corrupted))
    from_, to = (positions(event, role) for event in (pair.clean, pair.corrupted))
    x = corrupted.stages[stage].copy()
    moved = clean.stages[stage][from_] - x[to]
    x[to] += moved if columns is None else moved @ columns @ columns.T

    def margin(logits, event):
        return logits[event.prediction][a] - logits[event.prediction][b]

    margins = {
        "clean": margin(clean.logits, pair.clean),
        "corrupted": margin(corrupted.logits, pair.corrupted),
        "patched": margin(resume(decoder, stage, x), pair.corrupted),
    }
    return margins["patched"] - margins["corrupted"], margins


def lm_loss(decoder, events):
    """Summed next-token cross-entropy of whole records, and how many targets there are."""
    total, count = 0.0, 0
    for event in events:
        logits = decoder.forward(event.tokens).logits[:-1]
        largest = logits.max(1, keepdims=True)
        log_probs = logits - largest - np.log(np.exp(logits - largest).sum(1, keepdims=True))
        total -= log_probs[np.arange(len(logits)), event.tokens[1:]].sum()
        count += len(logits)
    return total, count


def load_pairs(lake, run, probe, pair_type, most=64):
    """The first pairs of each type in scan order: both events, and the tokens that are transferred."""
    sides = [load_events(lake, run, name) for name in (probe, f"{probe}.corrupted")]
    (vocabulary,) = lake.sql(
        "SELECT vocabulary FROM probes WHERE run = ? AND probe = ?", [run, probe]
    ).fetchall()[0]
    rows = (
        lake.sql("SELECT * FROM pairs WHERE pair_id IS NOT NULL AND corrupted_event IS NOT NULL")
        .pl()
        .to_dicts()
    )
    mine = sorted(
        (
            row
            for row in rows
            if row["run"] == run and row["probe"] == probe and row["pair_type"] in pair_type
        ),
        key=lambda row: (row["clean_event"], list(pair_type).index(row["pair_type"])),
    )
    taken = {kind: [row["pair_id"] for row in mine if row["pair_type"] == kind][:most] for kind in pair_type}
    return [
        SimpleNamespace(
            **row,
            clean=sides[0][row["clean_event"]],
            corrupted=sides[1][row["corrupted_event"]],
            transfer=[vocabulary.index(row[f"{side}_transfer_token"]) for side in ("clean", "corrupted")],
        )
        for row in mine
        if row["pair_id"] in taken[row["pair_type"]]
    ]


def gradient_along(value, weights, direction, size=1e-5):
    """Central difference of `value(Decoder)` along a direction, by parameter name."""
    heads = direction.pop("heads") if "heads" in direction else 4
    ends = [
        value(
            Decoder({name: of + sign * size * direction.get(name, 0) for name, of in weights.items()}, heads)
        )
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * size)

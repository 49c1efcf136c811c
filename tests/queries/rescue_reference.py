"""Reruns with replaced value codes in float64: the training decoder with hooks, a record at a time, and loops over events.

Shares no code with engine, extractors or SQL but the decoder that was trained.
"""

from collections import Counter

import numpy as np
import torch
from lakebed.engine.decoder import SymbolicKVDecoder
from torch.nn import functional

from tests import trained_probe_lake

from . import value_code_reference as reference
from .float64_decoder import load_weights
from .test_value_code_transfer_map_report import fit_number, fitted


class HookedDecoder:
    """The decoder in float64; stages are read, and added to, by hooks on what writes them."""

    def __init__(self, weights):
        config = trained_probe_lake.config().model
        self.model = SymbolicKVDecoder(config, len(weights["token_embedding.weight"])).double().eval()
        held = {name: torch.from_numpy(array) for name, array in weights.items()}
        self.model.load_state_dict(held, strict=False)
        self.writers = {"embedding": self.model.embedding_dropout}
        for layer, block in enumerate(self.model.blocks):
            self.writers[f"layer_{layer}_post_attn"] = block.attn
            self.writers[f"layer_{layer}_post_mlp"] = block.ff

    @torch.no_grad()
    def run(self, tokens, stage=None, change=None):
        """(stages {name: [position, d]}, logits [position, vocabulary]) of one record; `change` [position, d] is added."""
        stages, handles, stream = {}, [], []

        def listen(name):
            def hook(_, __, output):
                write = output[0] if isinstance(output, tuple) else output
                if name == stage:
                    write = write + torch.from_numpy(change)
                stream.append(write[0] if not stream else stream[-1] + write[0])
                stages[name] = stream[-1].numpy()
                return (write, *output[1:]) if isinstance(output, tuple) else write

            return hook

        for name, module in self.writers.items():
            handles.append(module.register_forward_hook(listen(name)))
        logits = self.model(torch.tensor([tokens]))[0].numpy()
        for handle in handles:
            handle.remove()
        return stages, logits


def random_basis(width, rank, seed):
    drawn = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0].double().numpy()


def rescued(lake, run, step, options, rank, splits=()):
    """{(sample_id, query_index, eval_kind): {scalar: (clean, removed, patched)}} of the eval examples, and their ẑ."""
    of = reference.facts(lake, run, splits)
    tokens = dict(
        lake.sql(
            f"SELECT example, tokens FROM probe_examples WHERE run = '{run}' AND probe = 'probe'"
        ).fetchall()
    )
    model = HookedDecoder(load_weights(lake, run, step))
    clean = {example: model.run(tokens[example]) for example in {event["example"] for event in of.events}}
    kinds, basis, judged = _codes(of, clean, step, options, rank)
    removed = np.zeros((len(judged), rank))
    own = kinds["oracle_actual_projected"]
    stage, role = options["target_stage"], options["target_position_role"]

    def rerun(coordinates):
        return _rerun(model, of, tokens, judged, stage, role, (coordinates - own) @ basis.T)

    without = rerun(removed)
    found = {}
    for kind, coordinates in kinds.items():
        with_it = rerun(coordinates)
        for at, i in enumerate(judged):
            event = of.events[i]
            own_logits = clean[event["example"]][1][event["prediction_position"]]
            found[event["sample_id"], event["query_index"], kind] = _scalars(
                of, event, own_logits, without[at], with_it[at]
            )
    return found, kinds, judged


def _codes(of, clean, step, options, rank):
    """({kind: ẑ of the eval examples}, target basis, eval examples)."""

    def mean(event, stage, places):
        return np.mean([clean[event["example"]][0][stage][place] for place in places], axis=0)

    def all_of(stage, role):
        return np.array([mean(e, options[stage], [p for p, _ in e["roles"][role]]) for e in of.events])

    def earlier(event):
        return [p for p, _ in event["roles"]["value_distractors"] if p <= event["prediction_position"]]

    fit = [i for i, e in enumerate(of.events) if fit_number(e["sample_id"], e["query_index"]) < 0.75]
    judged = [i for i in range(len(of.events)) if i not in set(fit)]
    x = all_of("source_stage", options["source_position_role"])
    t = all_of("target_stage", options["target_position_role"])

    def basis(vectors, by, size):
        held, tokens = [vectors[i] for i in fit], [by[i] for i in fit]
        found = reference.identity_basis(held, tokens, size)[0]
        means = np.array(list(reference.token_means(held, tokens).values()))
        along = (means - means.mean(0)) @ found
        # Only what sends other coordinates through a map of these ones depends on the signs.
        return found * np.sign(along[np.abs(along).argmax(0), np.arange(size)])

    answers = [event["answer_token"] for event in of.events]
    b_source, b_target = basis(x, answers, rank), basis(t, answers, rank)
    a, z = x @ b_source, t @ b_target
    following = [judged[(at + 1) % len(judged)] for at in range(len(judged))]

    def through(trained, used):
        return fitted(trained[fit], z[fit], 1e-4)(used)

    kinds = {"oracle_actual_projected": z[judged], "true_transfer": through(a, a[judged])}
    others = {"shuffled_answer_value": a[following]}
    if "wrong_support_value" in options["control"]:
        wrong = np.array([mean(e, options["source_stage"], earlier(e)) for e in of.events])
        others["wrong_support_value"] = (wrong @ b_source)[judged]
    kinds |= {kind: through(a, used) for kind, used in others.items()}
    keys = all_of("source_stage", "support_key")
    k = keys @ basis(keys, [e["roles"]["support_key"][0][1] for e in of.events], rank)
    kinds["key_identity"] = through(k, k[judged])
    r = x @ random_basis(x.shape[1], rank, options["random_seed"] + 1009 * step + 9176 * rank)
    kinds["random_subspace"] = through(r, r[judged])
    context = all_of("context_stage", options["context_position_role"])
    c = context @ basis(context, answers, options["context_rank"])
    both, random_both = np.hstack([a, c]), np.hstack([r, c])
    kinds["context_only"] = through(c, c[judged])
    kinds["source_plus_context"] = through(both, both[judged])
    for kind, used in others.items():
        kinds[f"source_plus_context_{kind}"] = through(both, np.hstack([used, c[judged]]))
    kinds["source_plus_context_random_subspace"] = through(random_both, random_both[judged])
    kinds["source_plus_context_random_subspace_not_refit"] = through(both, random_both[judged])
    return kinds, b_target, judged


def _rerun(model, of, tokens, judged, stage, role, changes):
    """Logits at the predictions of the eval examples. Those of a record are edited in one pass, unless they share a place."""
    turns, passes = Counter(), {}
    for at, i in enumerate(judged):
        event = of.events[i]
        ((place, _),) = event["roles"][role]
        example = event["example"]
        turn = turns[example, place]
        turns[example, place] += 1
        passes.setdefault((example, turn), []).append((at, event, place))
    found = {}
    for (example, _), inside in passes.items():
        change = np.zeros((len(tokens[example]), changes.shape[1]))
        for at, _, place in inside:
            change[place] = changes[at]
        _, logits = model.run(tokens[example], stage, change)
        for at, event, _ in inside:
            found[at] = logits[event["prediction_position"]]
    return found


def _scalars(of, event, clean, removed, patched):
    """{scalar: (clean, removed, patched)} of three rows of logits."""
    y = event["answer_token"]

    def best_wrong(logits):
        return max((token for token in of.values if token != y), key=lambda token: (logits[token], -token))

    def accuracy(logits):
        return float(max(of.values, key=lambda token: (logits[token], -token)) == y)

    runs = (clean, removed, patched)
    w_clean, w_removed = best_wrong(clean), best_wrong(removed)
    return {
        "correct_value_logit": [logits[y] for logits in runs],
        "value_margin": [logits[y] - logits[best_wrong(logits)] for logits in runs],
        "fixed_clean_competitor_margin": [logits[y] - logits[w_clean] for logits in runs],
        "fixed_removed_competitor_margin": [logits[y] - logits[w_removed] for logits in runs],
        "negative_answer_loss": [
            float(functional.log_softmax(torch.from_numpy(logits), -1)[y]) for logits in runs
        ],
        "value_accuracy": [accuracy(logits) for logits in runs],
    }

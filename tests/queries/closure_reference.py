"""Closures of routes in numpy float64, straight from their definition (part 4, §0.13, §D1), and a lake that has what they need."""

import shutil
from itertools import pairwise

import numpy as np
import torch
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.queries.registry import load_report

from tests.route_lake import HEADS, RUN

from .float64_decoder import Decoder, best_wrong, load_weights
from .route_reference import load_pairs, route, span

STEPS = (34, 36, 37, 40)
TYPES = ("query_key", "support_value")
MOST = 4
# Label to specification, not in alphabetical order.
ROUTES = {
    "query": {
        "stage": "layer_0_post_mlp",
        "subspace": "head_qk_query",
        "rank": 3,
        "head_layer": 1,
        "head": 2,
        "position_role": "query_key",
    },
    "all": {"stage": "layer_0_post_attn", "subspace": "full_residual", "position_role": "query_key"},
    "value": {
        "stage": "embedding",
        "subspace": "embedding_value_identity",
        "rank": 2,
        "position_role": "support_value",
    },
}
SPECS = tuple(
    ",".join(f"{key}={value}" for key, value in {"label": label, **of}.items())
    for label, of in ROUTES.items()
)
OPTIONS = {
    "run": RUN,
    "steps": ",".join(map(str, STEPS)),
    "route": SPECS,
    "route_pair_type": "__all__",
    "pair_type": TYPES,
    "max_pairs_per_type": MOST,
}


def margin_report(**options):
    """route-to-margin-closure as the tests ask for it; None leaves an option out."""
    given = {**OPTIONS, **options}
    return load_report("route-to-margin-closure").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def extracted(route_lake_path, folder):
    """A copy of the lake of routes with what margin closures of either record read."""
    torch.set_num_threads(1)
    path = folder / "closures.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as lake:
        for options in ({}, {"margin_side": "corrupted"}, {"route_pair_type": "support_value"}):
            extract(lake, RUN, margin_report(**options).needs(), OPTIONS["steps"])
    return path


class World:
    """Weights, pairs and everything of one probe that the reports name."""

    def __init__(self, lake):
        lake.refresh()
        self.weights = {step: load_weights(lake, RUN, step) for step in STEPS}
        self.decoders = {step: Decoder(of, HEADS) for step, of in self.weights.items()}
        self.pairs = load_pairs(lake, RUN, "probe", TYPES, MOST)
        (keys, values) = lake.sql(
            "SELECT key_tokens, value_tokens FROM probes WHERE probe = 'probe'"
        ).fetchall()[0]
        self.tokens = {"key": keys, "value": values}

    def columns(self, label, step):
        """The basis of a route at a step; None for the full residual."""
        of = ROUTES[label]
        head = (of["head_layer"], of["head"]) if "head" in of else None
        return span(self.decoders[step], of["subspace"], of.get("rank"), head, self.tokens)

    def score(self, label, step, basis_step, pair):
        """Route score and the three margins."""
        of = ROUTES[label]
        columns = self.columns(label, basis_step)
        return route(self.decoders[step], columns, of["stage"], of["position_role"], pair)

    def margin(self, step, pair, side):
        """What a margin row says of one record."""
        event = getattr(pair, side)
        logits = self.decoders[step].forward(event.tokens).logits[event.prediction]
        wrong = best_wrong(logits, event.answer, event.competitors)
        log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        a, b = pair.transfer
        return {
            "answer_target_id": event.answer,
            "answer_prediction_id": int(logits.argmax()),
            "answer_correct": bool(logits.argmax() == event.answer),
            "answer_margin": float(logits[event.answer] - logits[wrong]),
            "answer_loss": float(-log_probs[event.answer]),
            "clean_vs_corrupted_contrast": float(logits[a] - logits[b]),
        }

    def observations(self, scalar="answer_margin", side="clean", pair_type=TYPES):
        """(source, target, pair, margin at the source, margin at the target, deltas by label), interval by interval."""
        found = []
        for source, target in pairwise(STEPS):
            for pair in self.pairs:
                if pair.pair_type in pair_type:
                    ends = [self.margin(step, pair, side)[scalar] for step in (source, target)]
                    deltas = {
                        label: self.score(label, target, source, pair)[0]
                        - self.score(label, source, source, pair)[0]
                        for label in ROUTES
                    }
                    found.append((source, target, pair, *ends, deltas))
        return found


def least_squares(deltas, actual, intercept=False):
    """Coefficients by label (and of the constant, under None), predictions, R²: by normal equations."""
    labels = sorted(deltas[0])
    design = np.array([[*([1.0] if intercept else []), *(of[label] for label in labels)] for of in deltas])
    y = np.array(actual)
    found = np.linalg.solve(design.T @ design, design.T @ y)
    predicted = design @ found
    r_squared = 1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    names = [*([None] if intercept else []), *labels]
    return dict(zip(names, found, strict=True)), predicted, r_squared

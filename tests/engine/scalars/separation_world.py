"""Weights of two steps and a few pairs, as the extractors load them and as the float64 reference reads them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from lakebed.engine.scalars.measure import Task, measure
from lakebed.extractors.dataset import Context
from lakebed.extractors.forward import probe_of
from lakebed.extractors.pair_sets import PairSelection, load_pairs, side_probe
from lakebed.lake import Lake

from tests.attribution_lake import HEADS, RUN
from tests.queries.separation_reference import pairs_of, weights_at

SOURCE, NEAR, TARGET = 4, 6, 24
ROLES = ("prediction", "support_key", "key_distractors")
NAMED = dict(zip(("score_query_role", "support_key_role", "distractor_key_role"), ROLES, strict=True))


def load(path):
    """`pairs` in the order of the batches; `weights` float64 by step."""
    with Lake.open(path) as lake:
        context = Context(lake, RUN)
        chosen = load_pairs(
            context, PairSelection("probe", ("support_value",), (), 6), ["clean", "corrupted"]
        )
        probes = {side: probe_of(context, side_probe("probe", side)) for side in ("clean", "corrupted")}
        of = {pair.pair_id: pair for pair in pairs_of(lake, RUN, ["support_value"], 6)}
        return SimpleNamespace(
            batches=chosen.batches(probes, "cpu"),
            pairs=[of[pair_id] for pair_id in chosen.pair_id],
            weights={step: weights_at(lake, RUN, step) for step in (SOURCE, NEAR, TARGET)},
            adapter=context.adapter(),
        )


def evaluate(world, scalar, weights, frozen=None, differentiate=False):
    """A task after its measurement at float64 weights by name."""
    leaves = {name: of.detach().float().requires_grad_() for name, of in weights.items()}
    task = Task(scalar, frozen, cells=1 if differentiate else 0)
    measure(world.adapter.load_model(leaves), leaves, world.batches, [task])
    return task


def one_percent(world):
    """Weights after 1 % of the way to the near target, and the update that is."""
    source, near = world.weights[SOURCE], world.weights[NEAR]
    update = {name: 0.01 * (near[name] - before).detach() for name, before in source.items()}
    return {name: before.detach() + update[name] for name, before in source.items()}, update


def mean_gradient(world, task):
    """Gradient of the mean over the pairs, float64, zero where nothing reaches."""
    return {
        name: task.gradients[name][0].double() / len(world.pairs)
        if name in task.gradients
        else torch.zeros_like(of)
        for name, of in world.weights[SOURCE].items()
    }


def central_difference(value, weights, name, direction, step=1e-5):
    """Of `value(weights)` along `direction` in one parameter, in float64."""
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            ends.append(float(value({**weights, name: weights[name] + sign * step * direction})))
    return (ends[0] - ends[1]) / (2 * step)


__all__ = ["HEADS"]

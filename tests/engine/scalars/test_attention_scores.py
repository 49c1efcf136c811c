"""The score separation and its two sides on trained weights, against a float64 decoder: values, gradients, identities."""

import pytest
import torch
from lakebed.engine.scalars import ScalarError, build_scalar

from tests.engine.scalars.separation_world import (
    HEADS,
    NAMED,
    ROLES,
    SOURCE,
    TARGET,
    central_difference,
    evaluate,
    load,
    mean_gradient,
    one_percent,
)
from tests.queries.separation_reference import decode, head_scores, inner, keys_of, separation

HEAD = (1, 1)
COMPONENTS = ("score", "q_side", "k_side")


@pytest.fixture(scope="module")
def world(attribution_lake_path):
    torch.set_num_threads(1)
    return load(attribution_lake_path)


def scalar(component="score", head="L1H1", side="clean", **roles):
    return build_scalar(
        "attention_score_separation",
        {"head": head, "component": component, "record_side": side, **(roles or NAMED)},
    )


def expected(w, event, component, source, roles=ROLES, head=HEAD):
    """Separation with the other side of `source`, and its two means."""
    frozen = {"q_side": {"keys_from": source}, "k_side": {"query_from": source}}.get(component, {})
    scores = head_scores(w, HEADS, head, event, roles, **frozen)
    _, supports, distractors = keys_of(event, roles)
    return separation(scores, supports, distractors), scores[supports].mean(), scores[distractors].mean()


@torch.no_grad()
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("side", ["clean", "corrupted"])
def test_values_and_what_goes_with_them_are_those_of_the_definition(world, component, side):
    source = evaluate(world, scalar(component, side=side), world.weights[SOURCE])
    target = evaluate(world, scalar(component, side=side), world.weights[TARGET], source.frozen)
    for step, task in ((SOURCE, source), (TARGET, target)):
        for at, pair in enumerate(world.pairs):
            event = pair.sides[side]
            wanted = expected(world.weights[step], event, component, world.weights[SOURCE])
            found = [task.value, *(task.quantities[f"{of}_score_mean"] for of in ("support", "distractor"))]
            assert [float(of[at]) for of in found] == pytest.approx([float(of) for of in wanted], abs=2e-5)
            query, supports, distractors = keys_of(event, ROLES)
            attention = decode(world.weights[step], HEADS, event.tokens).attention[HEAD][query]
            for of, places in (("support", supports), ("distractor", distractors)):
                assert float(task.quantities[f"{of}_scores"][at]) == len(places)
                mean = float(attention[places].mean())
                assert float(task.quantities[f"{of}_attention_mean"][at]) == pytest.approx(mean, abs=1e-6)


@torch.no_grad()
def test_the_score_moves_by_its_query_side_its_key_side_and_both_at_once(world):
    moved = {}
    for component in COMPONENTS:
        source = evaluate(world, scalar(component), world.weights[SOURCE])
        target = evaluate(world, scalar(component), world.weights[TARGET], source.frozen)
        moved[component] = target.value - source.value
    for at, pair in enumerate(world.pairs):
        event = pair.sides["clean"]
        query, supports, distractors = keys_of(event, ROLES)
        before, after = (decode(world.weights[step], HEADS, event.tokens) for step in (SOURCE, TARGET))
        dq = after.queries[HEAD][query] - before.queries[HEAD][query]
        dk = after.keys[HEAD] - before.keys[HEAD]
        cross = float(separation(dk @ dq / 8**0.5, supports, distractors))
        total = moved["q_side"][at] + moved["k_side"][at] + cross
        assert float(moved["score"][at]) == pytest.approx(float(total), abs=2e-5)
        assert abs(cross) > 1e-4


@pytest.mark.parametrize("component", COMPONENTS)
def test_gradients_are_central_finite_differences(world, component):
    weights = world.weights[SOURCE]
    found = mean_gradient(world, evaluate(world, scalar(component), weights, differentiate=True))
    generator = torch.Generator().manual_seed(0)

    def value(w):
        each = [expected(w, pair.sides["clean"], component, weights)[0] for pair in world.pairs]
        return sum(each) / len(each)

    reached = 0
    for name, of in weights.items():
        direction = torch.randn(of.shape, generator=generator, dtype=torch.float64)
        wanted = central_difference(value, weights, name, direction)
        assert float((found[name] * direction).sum()) == pytest.approx(wanted, rel=2e-3, abs=2e-5), name
        reached += abs(wanted) > 1e-6
    assert reached > 15


def test_the_two_sides_gradients_add_up_to_the_score_s(world):
    gradients = [
        mean_gradient(world, evaluate(world, scalar(of), world.weights[SOURCE], differentiate=True))
        for of in COMPONENTS
    ]
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name] + gradients[2][name], whole, rtol=1e-4, atol=1e-6)
    # The head's own W_K moves the keys alone: nothing of it is in the query side.
    assert not gradients[1]["blocks.1.attn.k_proj.weight"].any()
    assert not gradients[2]["blocks.1.attn.q_proj.weight"].any()


def test_the_first_order_of_a_small_step_is_the_change(world):
    small, update = one_percent(world)
    for component in COMPONENTS:
        source = evaluate(world, scalar(component), world.weights[SOURCE], differentiate=True)
        change = (evaluate(world, scalar(component), small, source.frozen).value - source.value).mean()
        assert inner(mean_gradient(world, source), update) == pytest.approx(float(change), rel=1e-2)


@torch.no_grad()
def test_the_query_may_be_elsewhere_and_the_support_several_keys(world):
    roles = dict(zip(NAMED, ("support_value", "support_write", "causal_prefix"), strict=True))
    task = evaluate(world, scalar(**roles), world.weights[SOURCE])
    for at, pair in enumerate(world.pairs):
        event = pair.sides["clean"]
        event.roles["causal_prefix"] = range(event.prediction + 1)
        wanted, *_ = expected(world.weights[SOURCE], event, "score", None, tuple(roles.values()))
        assert float(task.value[at]) == pytest.approx(float(wanted), abs=1e-5)
        assert float(task.quantities["support_scores"][at]) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head": "L5H0"}, "no head L5H0; this run has layers 0–1, heads 0–1"),
        ({"head": "second"}, "cannot read head 'second'"),
        ({"support_key_role": "nowhere"}, "no role 'nowhere'; these pairs have"),
        ({"score_query_role": "support_write"}, "a query is exactly one"),
    ],
)
def test_what_is_not_there_is_refused(world, changed, message):
    wrong = build_scalar("attention_score_separation", {"head": "L1H1", **NAMED, **changed})
    with pytest.raises(ScalarError, match=message):
        evaluate(world, wrong, world.weights[SOURCE])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"component": "v_side"}, "component input should be 'score', 'q_side' or 'k_side'"),
        ({"support_key_role": "key_distractors"}, "support and distractor role are both 'key_distractors'"),
        ({"rank": 3}, "rank extra inputs are not permitted"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(changed, message):
    with pytest.raises(ScalarError, match=message):
        build_scalar("attention_score_separation", {"head": "L1H1", **NAMED, **changed})

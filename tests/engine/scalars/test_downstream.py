"""Downstream scalars on trained weights: values and gradients against a float64 decoder, identities, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.adapters import load_adapter
from lakebed.engine.capture import CaptureError
from lakebed.engine.scalars import ScalarError, build_scalar
from lakebed.engine.scalars.downstream import SCALARS
from lakebed.engine.scalars.measure import Task, measure
from lakebed.lake import Lake

from tests import downstream_lake
from tests.downstream_records import batch_of
from tests.queries.downstream_reference import SCALARS as NAMES
from tests.queries.downstream_reference import competitors, readout, scalars
from tests.queries.float64_decoder import Decoder, load_events, load_weights

SOURCE, TARGET = 38, 40
HEAD = (1, 2)
ROLES = ("prediction", "support_value", "value_distractors")
# The query is not the prediction; several positions are support.
ELSEWHERE = ("support_value", "support_write", "key_distractors")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Weights of two steps and the events whose every query has keys of both roles."""
    path = downstream_lake.build(tmp_path_factory.mktemp("engine"))
    with Lake.open(path) as lake:
        events = load_events(lake, downstream_lake.RUN, "probe")
        weights = {step: load_weights(lake, downstream_lake.RUN, step) for step in (SOURCE, TARGET)}
    fit = [
        event
        for event in events
        if all(min(event.roles[roles[2]]) < event.roles[roles[0]][0] for roles in (ROLES, ELSEWHERE))
    ]
    # Of several records and lengths, and two events of one.
    chosen = [*fit[:2], *fit[2 :: len(fit) // 5][:5]]
    assert len({event.example for event in chosen}) > 2
    assert len({len(event.tokens) for event in chosen}) > 1
    return SimpleNamespace(
        weights=weights,
        decoders={step: Decoder(of, downstream_lake.HEADS) for step, of in weights.items()},
        events=chosen,
        adapter=load_adapter("symbolic_kv", downstream_lake.config().canonical_json()),
    )


def scalar(name, head=HEAD, roles=ROLES):
    named = zip(("score_query_role", "support_key_role", "distractor_key_role"), roles, strict=True)
    return build_scalar(name, {"head": f"L{head[0]}H{head[1]}", **dict(named)})


def leaves_of(world, step):
    return {
        name: torch.from_numpy(of).float().requires_grad_()
        for name, of in world.weights[step].items()
        if name not in world.adapter.tied
    }


def measured(world, step, head=HEAD, roles=ROLES, names=NAMES, events=None, sources=None, model=None):
    """Tasks by name after a measurement, differentiated where nothing was frozen before."""
    leaves = leaves_of(world, step)
    tasks = {
        name: Task(scalar(name, head, roles), sources[name].frozen)
        if sources
        else Task(scalar(name, head, roles), cells=1)
        for name in names
    }
    model = model or world.adapter.load_model(leaves)
    measure(model, leaves, [batch_of(events or world.events)], list(tasks.values()))
    return tasks


def reference(world, step, head, roles, events=None):
    """Rows of the float64 scalars, the readout frozen at the source."""
    return [
        scalars(world.decoders[step], head, event, roles, readout(world.decoders[SOURCE], event))
        for event in events or world.events
    ]


def test_the_names_are_those_of_the_definition():
    assert set(SCALARS) == set(NAMES)
    assert all(build_scalar(name, scalar(name).model_dump()).name == name for name in NAMES)


@pytest.mark.parametrize(("head", "roles"), [(HEAD, ROLES), ((0, 1), ROLES), (HEAD, ELSEWHERE)])
def test_values_at_both_ends_are_the_definition(world, head, roles):
    at_source = measured(world, SOURCE, head, roles)
    at_target = measured(world, TARGET, head, roles, sources=at_source)
    for step, found in ((SOURCE, at_source), (TARGET, at_target)):
        wanted = reference(world, step, head, roles)
        for name in NAMES:
            np.testing.assert_allclose(
                found[name].value, [row[name] for row in wanted], rtol=2e-5, atol=5e-6, err_msg=name
            )


def test_each_margin_has_a_competitor_of_its_own(world):
    found = measured(world, SOURCE)
    wanted = [competitors(world.decoders[SOURCE], HEAD, event, ROLES) for event in world.events]
    for name in ("head_value_margin_dla", "support_ov_value_margin", "answer_margin"):
        assert found[name].quantities["best_wrong_token"].tolist() == [row[name] for row in wanted]
    assert found["qk_ov_product"].quantities["best_wrong_token"].tolist() == [
        row["support_ov_value_margin"] for row in wanted
    ]
    assert any(len(set(row.values())) > 1 for row in wanted)


def test_what_goes_with_a_value(world):
    for task in measured(world, SOURCE, roles=ELSEWHERE).values():
        for event, *of in zip(world.events, *(task.quantities[key] for key in (
            "answer_correct", "support_scores", "distractor_scores"
        )), strict=True):  # fmt: skip
            logits = world.decoders[SOURCE].forward(event.tokens).logits[event.prediction]
            before = [p for p in event.roles["key_distractors"] if p <= event.roles["support_value"][0]]
            assert of == [logits.argmax() == event.answer, 3, len(before)]


@pytest.mark.parametrize(("head", "roles"), [(HEAD, ROLES), ((0, 1), ELSEWHERE)])
def test_gradients_are_central_differences(world, head, roles):
    """Along a random direction of every parameter, each scalar written again on the float64 decoder."""
    events = world.events[1:4]
    found = measured(world, SOURCE, head, roles, events=events)
    gammas = [readout(world.decoders[SOURCE], event) for event in events]
    rng = np.random.default_rng(5)
    weights = world.weights[SOURCE]
    for name in leaves_of(world, SOURCE):
        direction = rng.normal(size=weights[name].shape)
        direction /= np.linalg.norm(direction)
        size = 1e-5
        ends = []
        for sign in (1, -1):
            moved = Decoder({**weights, name: weights[name] + sign * size * direction}, downstream_lake.HEADS)
            rows = [
                scalars(moved, head, event, roles, gamma) for event, gamma in zip(events, gammas, strict=True)
            ]
            ends.append({key: sum(row[key] for row in rows) for key in NAMES})
        for key in NAMES:
            wanted = (ends[0][key] - ends[1][key]) / (2 * size)
            gradient = found[key].gradients.get(name)
            got = 0.0 if gradient is None else float((gradient[0].double().numpy() * direction).sum())
            norm = max(float(of.norm()) for of in found[key].gradients.values())
            assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5 * norm), (key, name)


def reached(task):
    return {name for name, of in task.gradients.items() if bool((of != 0).any())}


def test_what_each_scalar_is_differentiated_through(world):
    found = {name: reached(task) for name, task in measured(world, SOURCE).items()}
    q, v, o = (f"blocks.1.attn.{part}_proj.weight" for part in ("q", "v", "out"))
    for name in ("attention_separation", "attention_mass_separation"):
        assert q in found[name]
        assert not {v, o} & found[name]
    assert {v, o} <= found["support_ov_value_margin"]
    assert q not in found["support_ov_value_margin"]
    for name in ("head_answer_logit_dla", "qk_ov_product", "head_margin_dla_fixed_readout"):
        assert {q, v, o} <= found[name]
    # The frozen readout goes through the final LayerNorm and the unembedding; its gradient does not.
    assert {name for name in NAMES if "final_norm.weight" in found[name]} == {
        "answer_margin",
        "negative_answer_loss",
    }
    assert all("blocks.1.attn.out_proj.bias" not in found[name] for name in NAMES if "answer_m" not in name
               and name != "negative_answer_loss")  # fmt: skip


def test_the_unembedding_of_a_frozen_readout_is_no_path(world):
    """Tokens that stand in no record are reached through the unembedding alone."""
    found = measured(world, SOURCE)
    seen = {token for event in world.events for token in event.tokens}
    unseen = [token for token in world.events[0].competitors if token not in seen]
    assert unseen
    rows = {
        name: float(found[name].gradients["token_embedding.weight"][0][unseen].abs().max()) for name in NAMES
    }
    through = {name for name, largest in rows.items() if largest > 0}
    assert "negative_answer_loss" in through
    assert not through & {
        "head_margin_dla_fixed_readout",
        "attention_separation",
        "attention_mass_separation",
    }


@settings(max_examples=25, deadline=None)
@given(
    head=st.tuples(st.integers(0, 1), st.integers(0, 3)),
    one=st.sampled_from(["support_op", "support_key", "support_value"]),
    distractors=st.sampled_from(["key_distractors", "value_distractors"]),
    chosen=st.sets(st.integers(0, 6), min_size=1),
)
def test_mean_and_mass_are_one_for_one_support_position(world, head, one, distractors, chosen):
    events = [world.events[at] for at in sorted(chosen)]
    found = measured(world, SOURCE, head, ("prediction", one, distractors), events=events)
    value = {name: task.value for name, task in found.items()}
    torch.testing.assert_close(
        value["support_mass_ov_value_margin"],
        value["attended_support_ov_value_margin"],
        rtol=1e-5,
        atol=1e-7,
    )
    ones = found["attention_separation"].quantities["distractor_scores"] == 1
    torch.testing.assert_close(
        value["attention_separation"][ones], value["attention_mass_separation"][ones], rtol=1e-5, atol=1e-7
    )
    # A margin cannot beat its answer's logit by less than the largest competitor would: moving ≤ any fixed one.
    for event, margin in zip(events, value["answer_margin"].tolist(), strict=True):
        logits = world.decoders[SOURCE].forward(event.tokens).logits[event.prediction]
        for wrong in set(event.competitors) - {event.answer}:
            assert margin <= logits[event.answer] - logits[wrong] + 1e-4


@settings(max_examples=15, deadline=None)
@given(head=st.tuples(st.integers(0, 1), st.integers(0, 3)), chosen=st.sets(st.integers(0, 6), min_size=1))
def test_attended_is_mean_attention_times_the_ov_margin(world, head, chosen):
    events = [world.events[at] for at in sorted(chosen)]
    found = measured(world, SOURCE, head, ELSEWHERE, events=events)
    attention = []
    for event in events:
        at = event.roles[ELSEWHERE[0]][0]
        row = world.decoders[SOURCE].forward(event.tokens).probabilities[head][at]
        attention.append(row[[p for p in event.roles[ELSEWHERE[1]] if p <= at]].mean())
    product = torch.tensor(attention) * found["support_ov_value_margin"].value
    torch.testing.assert_close(found["attended_support_ov_value_margin"].value, product, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found["support_mass_ov_value_margin"].value, 3 * product, rtol=2e-5, atol=5e-6)


def test_scalars_of_the_answer_do_not_depend_on_the_head(world):
    names = ("answer_margin", "negative_answer_loss")
    one, other = (measured(world, SOURCE, head, names=names) for head in (HEAD, (0, 0)))
    for name in names:
        torch.testing.assert_close(one[name].value, other[name].value, rtol=0, atol=0)


class Misread:
    """A model that is wrong about its final LayerNorm."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def final_norm_parameters(self):
        gain, shift = self._model.final_norm_parameters()
        return gain * 1.5, shift


@pytest.mark.parametrize("name", ["answer_margin", "head_margin_dla_fixed_readout"])
def test_a_margin_that_is_not_the_models_own_is_refused(world, name):
    model = Misread(world.adapter.load_model(leaves_of(world, SOURCE)))
    with pytest.raises(CaptureError, match="the value margin read off the last residual stage is"):
        measured(world, SOURCE, names=(name,), model=model)


def test_what_is_refused(world):
    with pytest.raises(ScalarError, match="support and distractor role are both 'support_value'"):
        scalar("qk_ov_product", roles=("prediction", "support_value", "support_value"))
    with pytest.raises(ScalarError, match=r"no scalar 'qk_ov'; there are .*qk_ov_product"):
        scalar("qk_ov")
    with pytest.raises(ScalarError, match="no head L2H0; this run has layers 0–1, heads 0–3"):
        measured(world, SOURCE, head=(2, 0), names=("answer_margin",))
    with pytest.raises(ScalarError, match="no role 'support'; these pairs have"):
        measured(world, SOURCE, roles=("prediction", "support", "key_distractors"))
    with pytest.raises(ScalarError, match="'support_value' has no position up to the query"):
        measured(world, SOURCE, roles=("support_key", "support_value", "key_distractors"))
    with pytest.raises(ScalarError, match="a query is exactly one"):
        measured(world, SOURCE, roles=("support_write", "support_key", "key_distractors"))

"""Rescue in the stacked walk: restoring writes is the definitions' stepwise procedure, and clean states are clean to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.interventions import Engine, read_interventions
from lakebed.extractors.dataset import Context
from lakebed.extractors.forward import probe_of
from lakebed.extractors.pair_sets import event_records
from lakebed.lake import Lake

from tests import trained_probe_lake as trained
from tests.stepwise_rescue import Stepwise, order

HEADS = [[f"L{layer}H{head}" for head in range(4)] for layer in range(2)]
COMPONENTS = [*HEADS[0], "L0MLP", *HEADS[1], "L1MLP"]
STAGES = ["embedding", "layer_0_post_attn", "layer_0_post_mlp", "layer_1_post_attn", "layer_1_post_mlp"]
EVENTS = 6


@pytest.fixture(scope="module")
def world(probe_lake_path):
    with Lake.open(probe_lake_path) as lake, torch.no_grad():
        context = Context(lake, trained.RUN)
        data = probe_of(context, "probe")
        weights = context.reader.read(150).weights
        # A record with several events, and others.
        events = np.unique([*np.flatnonzero(data.example == data.example[0])[:3], *range(9, 30, 7)])[:EVENTS]
        yield SimpleNamespace(
            model=context.adapter().load_model(weights),
            decoder=Stepwise(weights, 4),
            data=data,
            events=events,
            records=event_records(data, events, "cpu"),
        )


def run(world, **edits):
    """The runs by name, `Runs` fields of each: (last, final)."""
    listed = [{"name": name, "edits": of} for name, of in edits.items()]
    with torch.no_grad():
        found = Engine(world.model, world.records).run(read_interventions(listed))
    return {
        name: SimpleNamespace(last=found.last[at], final=found.final[at])
        for at, name in enumerate(found.names)
    }


def stepwise(world, make):
    """`Float64[event, vocabulary]` at the predictions, and the last stage there, of runs made one by one."""
    logits, last = [], []
    for event in world.events:
        example = world.data.example[event]
        tokens = world.data.tokens[example][: world.data.lengths[example]]
        found, at = make(tokens, event), int(world.data.prediction[event])
        logits.append(found["logits"][at])
        last.append(found["layer_1_post_mlp"][at])
    return np.stack(logits), np.stack(last)


def logits_of(world, found):
    return (found.final @ world.model.unembedding.mT).numpy()


def zero(label):
    return {"zero": label}


def restore(labels):
    return [{"restore": label} for label in labels]


def patch(stage, role=None):
    return {"stage": stage, "operation": "patch", "source": "clean", "position_role": role}


@st.composite
def groups(draw):
    """A source, and components strictly downstream of it in any order."""
    source = draw(st.sampled_from([label for label in COMPONENTS if label != "L1MLP"]))
    later = [label for label in COMPONENTS if order(label) > order(source)]
    return source, draw(st.lists(st.sampled_from(later), min_size=1, max_size=4, unique=True))


@settings(max_examples=15, deadline=None)
@given(groups())
def test_restoring_writes_is_the_stepwise_procedure(world, drawn):
    source, group = drawn
    found = run(world, group=[zero(source), *restore(group)])["group"]
    logits, last = stepwise(world, lambda tokens, _: world.decoder.restored_writes(tokens, source, group))
    np.testing.assert_allclose(logits_of(world, found), logits, atol=3e-5)
    np.testing.assert_allclose(found.last.numpy(), last, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(groups(), st.randoms())
def test_the_order_in_which_a_group_is_written_changes_no_bit(world, drawn, random):
    source, group = drawn
    edits = [zero(source), *restore(group)]
    shuffled = random.sample(edits, len(edits))
    found = run(world, one=edits, other=shuffled)
    assert torch.equal(found["one"].final, found["other"].final)


@pytest.mark.parametrize("source", ["L0H2", "L0MLP", "L1H1"])
def test_everything_downstream_restored_leaves_out_the_sources_write_alone(world, source):
    """Definitions 4 §K.5, against float64: h^F is the clean one less what the source writes in the clean run."""
    later = [label for label in COMPONENTS if order(label) > order(source)]
    # Heads beside a source do not read it, and what they write is clean already.
    found = run(world, all=[zero(source), *restore(later)])["all"]

    def wanted(tokens, _):
        clean = world.decoder.stages(tokens)
        return {**clean, "layer_1_post_mlp": clean["layer_1_post_mlp"] - world.decoder.write(source, clean)}

    _, last = stepwise(world, wanted)
    np.testing.assert_allclose(found.last.numpy(), last, atol=1e-5)


@pytest.mark.parametrize("source", COMPONENTS)
def test_a_clean_stream_is_the_clean_run_from_the_source_on_and_nothing_before_it(world, source):
    """Definitions 4 §K.4."""
    found = run(world, gone=[zero(source)], **{stage: [zero(source), patch(stage)] for stage in STAGES})
    assert not torch.equal(found["gone"].final, found["clean"].final)
    for place, stage in enumerate(STAGES):
        same = "clean" if place > order(source) else "gone"
        assert torch.equal(found[stage].final, found[same].final), stage
        assert torch.equal(found[stage].last, found[same].last), stage


@pytest.mark.parametrize("stage", [*STAGES, "final_norm"])
def test_a_clean_state_put_into_the_clean_run_changes_no_bit(world, stage):
    found = run(world, everywhere=[patch(stage)], there=[patch(stage, "causal_prefix")], gone=[zero("L0H1")])
    assert torch.equal(found["everywhere"].final, found["clean"].final)
    assert torch.equal(found["there"].final, found["clean"].final)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(COMPONENTS),
    st.sampled_from(STAGES),
    st.sampled_from(["prediction", "support_value", "support_write", "causal_prefix"]),
)
def test_a_clean_state_at_a_roles_positions_is_that_and_no_more(world, source, stage, role):
    found = run(world, there=[zero(source), patch(stage, role)])["there"]
    held = world.records.patch_positions(role)

    def wanted(tokens, event):
        row = int(np.flatnonzero(world.events == event)[0])
        positions = held[row].nonzero()[:, 0].numpy()
        return world.decoder.restored_state(tokens, source, stage, positions)

    logits, _ = stepwise(world, wanted)
    np.testing.assert_allclose(logits_of(world, found), logits, atol=3e-5)
    if role == "causal_prefix" and STAGES.index(stage) > order(source):
        # No position after the prediction can matter.
        assert np.abs(logits - logits_of(world, run(world)["clean"])).max() < 3e-5

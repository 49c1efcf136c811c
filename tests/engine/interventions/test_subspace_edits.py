"""Subspaces removed, kept and patched: against float64 with a projection put in, and by what must hold of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lakebed.engine.interventions import Bases, Engine, StageEdit, read_interventions
from lakebed.engine.interventions import run as run_module
from lakebed.engine.interventions.window import window_of
from lakebed.extractors.dataset import Context
from lakebed.extractors.forward import probe_of
from lakebed.extractors.pair_sets import PairSelection, event_records, load_pairs
from lakebed.lake import Lake

from tests import trained_probe_lake as trained
from tests.queries.float64_decoder import Decoder, load_events, load_weights
from tests.queries.route_reference import positions, resume, span

STEP, HEADS, WIDTH = 150, 4, 32
SUBSPACES = {
    "identity": {"subspace": "embedding_value_identity", "rank": 6},
    "head": {"subspace": "head_qk_key", "rank": 5, "head": "L1H1"},
    "random": {"subspace": "random", "rank": 7, "seed": 11},
}
STAGES = (
    "embedding",
    "layer_0_post_attn",
    "layer_0_post_mlp",
    "layer_1_post_attn",
    "layer_1_post_mlp",
    "final_norm",
)
ROLES = ("prediction", "support_value", "support_write", "query_key", "all_query_relation", "causal_prefix")


@pytest.fixture(scope="module")
def world(probe_lake_path):
    with Lake.open(probe_lake_path) as lake, torch.no_grad():
        context = Context(lake, trained.RUN)
        keys, values = lake.sql(
            "SELECT key_tokens, value_tokens FROM probes WHERE probe = 'probe'"
        ).fetchall()[0]
        pairs = load_pairs(context, PairSelection("probe", ("query_key",), (), 3), ["clean", "corrupted"])
        data = {"clean": probe_of(context, "probe"), "corrupted": probe_of(context, "probe.corrupted")}
        whole = np.flatnonzero(data["clean"].example < 3)
        yield SimpleNamespace(
            model=context.adapter().load_model(context.reader.read(STEP).weights),
            decoder=Decoder(load_weights(lake, trained.RUN, STEP), HEADS),
            tokens={"key": keys, "value": values},
            classes={"key": torch.tensor(keys), "value": torch.tensor(values)},
            data=data["clean"],
            whole=whole,
            records=event_records(data["clean"], whole, "cpu"),
            events={side: load_events(lake, trained.RUN, data[side].name) for side in data},
            pairs={side: pairs.events[side] for side in data},
            of_pairs={side: event_records(data[side], pairs.events[side], "cpu") for side in data},
        )


def edit(stage, operation, role, of, **more):
    return {"stage": stage, "operation": operation, "position_role": role, **of, **more}


def final(world, edits, records=None, counterpart=None, union=False):
    """Stage final_norm of each list of edits, `Float[1 + list, event, d_model]`; the first is the untouched run."""
    named = [{"name": str(number), "edits": of} for number, of in enumerate(edits)]
    with torch.no_grad():
        engine = Engine(world.model, records or world.records, counterpart, world.classes, union=union)
        return engine.run(read_interventions(named)).final


def columns(world, of):
    """A basis of the subspace: by an SVD of the whole matrix, or of the draw that a seed stands for."""
    if of["subspace"] == "random":
        drawn = torch.Generator().manual_seed(of["seed"])
        normal = torch.randn(WIDTH, of["rank"], generator=drawn, dtype=torch.float64).numpy()
        return np.linalg.svd(normal, full_matrices=False)[0]
    head = of.get("head")
    return span(
        world.decoder, of["subspace"], of["rank"], head and (int(head[1]), int(head[3])), world.tokens
    )


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("name", SUBSPACES)
@pytest.mark.parametrize("operation", ["remove", "keep"])
def test_a_projection_put_into_a_float64_pass_gives_the_same(world, operation, name, union):
    of, role, stages = SUBSPACES[name], "support_write", STAGES[:3]
    found = final(world, [[edit(stage, operation, role, of)] for stage in stages], union=union)
    basis = columns(world, of)
    events = [world.events["clean"][number] for number in world.whole]
    for number, stage in enumerate(stages, 1):
        for place, event in enumerate(events):
            mine = [other for other in events if other.example == event.example] if union else [event]
            at = sorted({position for other in mine for position in positions(other, role)})
            x = world.decoder.forward(event.tokens).stages[stage].copy()
            inside = x[at] @ basis @ basis.T
            x[at] = inside if operation == "keep" else x[at] - inside
            wanted = resume(world.decoder, stage, x)[event.prediction]
            logits = (world.model.unembedding @ found[number, place]).double().numpy()
            np.testing.assert_allclose(logits, wanted, atol=5e-5)


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("name", SUBSPACES)
@pytest.mark.parametrize(
    ("stage", "role"), [("layer_0_post_mlp", "query_key"), ("layer_1_post_attn", "prediction")]
)
def test_a_patch_takes_its_subspace_from_the_counterpart(world, stage, role, name, union):
    of = SUBSPACES[name]
    patch = edit(stage, "patch", role, of, source="counterpart")
    found = final(world, [[patch]], world.of_pairs["corrupted"], world.of_pairs["clean"], union)[1]
    basis = columns(world, of)
    moved = 0.0
    for place, numbers in enumerate(zip(world.pairs["clean"], world.pairs["corrupted"], strict=True)):
        clean, corrupted = (
            world.events[side][number] for side, number in zip(("clean", "corrupted"), numbers, strict=True)
        )
        x = world.decoder.forward(corrupted.tokens).stages[stage].copy()
        at, from_ = positions(corrupted, role), positions(clean, role)
        change = (world.decoder.forward(clean.tokens).stages[stage][from_] - x[at]) @ basis @ basis.T
        moved = max(moved, np.abs(change).max())
        x[at] += change
        wanted = resume(world.decoder, stage, x)[corrupted.prediction]
        logits = (world.model.unembedding @ found[place]).double().numpy()
        np.testing.assert_allclose(logits, wanted, atol=5e-5)
    assert moved > 1e-2


_STAGE, _ROLE, _OF = (
    st.sampled_from(STAGES),
    st.sampled_from(ROLES),
    st.sampled_from(list(SUBSPACES.values())),
)
_QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@settings(max_examples=25, **_QUIET)
@given(_STAGE, _ROLE, _OF, st.booleans())
def test_removing_twice_is_removing_once_and_keeping_twice_keeping_once(world, stage, role, of, union):
    once, again = ([edit(stage, operation, role, of)] for operation in ("remove", "keep"))
    found = final(world, [once, once * 2, again, again * 2], union=union)
    close(found[2], found[1])
    close(found[4], found[3])


@settings(max_examples=25, **_QUIET)
@given(_ROLE, _OF, st.booleans())
def test_what_is_removed_and_what_is_kept_add_up_to_the_stage(world, role, of, union):
    """At final_norm, where nothing comes after."""
    untouched, removed, kept = final(
        world, [[edit("final_norm", operation, role, of)] for operation in ("remove", "keep")], union=union
    )
    inside = torch.stack(
        [world.records.patch_positions(role)[n, p] for n, p in enumerate(world.records.prediction)]
    )
    close((removed + kept)[inside], untouched[inside])
    assert torch.equal(removed[~inside], untouched[~inside])


@settings(max_examples=15, **_QUIET)
@given(_STAGE, _ROLE, st.integers(0, 9), st.booleans())
def test_every_direction_kept_is_nothing_changed_and_none_left_without(world, stage, role, seed, union):
    whole = {"subspace": "random", "rank": WIDTH, "seed": seed}
    other = {"subspace": "random", "rank": WIDTH, "seed": seed + 1}
    edits = [
        [edit(stage, "keep", role, whole)],
        [edit(stage, "remove", role, whole)],
        [edit(stage, "remove", role, other)],
    ]
    untouched, kept, removed, again = final(world, edits, union=union)
    close(kept, untouched)
    # An all-zero vector, or what rounding leaves of it, which LayerNorm's ε keeps small.
    torch.testing.assert_close(removed, again, atol=2e-2, rtol=1e-2)


@settings(max_examples=20, **_QUIET)
@given(_STAGE, _ROLE, _OF, st.sampled_from(["remove", "keep"]), st.sets(st.integers(0, 2), min_size=1))
def test_a_record_with_one_event_is_the_same_in_both_modes(world, stage, role, of, operation, examples):
    firsts = [int(np.flatnonzero(world.data.example == example)[-1]) for example in sorted(examples)]
    records = event_records(world.data, np.array(firsts), "cpu")
    one, other = (
        final(world, [[edit(stage, operation, role, of)]], records, None, union) for union in (False, True)
    )
    close(one, other)


@settings(max_examples=30, **_QUIET)
@given(
    st.lists(
        st.tuples(_STAGE, _ROLE, _OF, st.sampled_from(["remove", "keep", "patch"])), min_size=1, max_size=3
    ),
    st.sampled_from([[], [{"restore": "L1H2"}], [{"restore": "L0MLP"}]]),
)
def test_the_positions_that_can_change_are_all_that_need_following(world, asked, restored):
    """Windows of any width give what whole records give, also those that begin before the record."""
    edits = [edit(stage, operation, role, of) for stage, role, of, operation in asked] + restored
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_windowed", lambda _: ())
        whole = final(world, [edits, edits])
    followed = final(world, [edits, edits])
    close(followed, whole)
    assert torch.equal(followed[1], followed[2])


@pytest.mark.parametrize("roles", [("prediction",), ("support_value", "query_key"), ("causal_prefix",)])
def test_a_window_ends_at_the_prediction_and_holds_its_roles(world, roles):
    window = window_of(world.records, roles)
    assert torch.equal(window[:, -1], world.records.prediction)
    assert bool((window.diff(dim=1) == 1).all())
    held = torch.stack([world.records.patch_positions(role) for role in roles]).any(0)
    earliest = held.int().argmax(1)
    assert bool((window[:, 0] <= earliest).all())
    assert bool((window[:, 0] == earliest).any())
    if roles == ("causal_prefix",):
        assert int(window.min()) < 0


def test_in_a_union_what_is_edited_at_another_query_is_felt_after_the_last_attention_too(world):
    """A role that stands, for the second event of a record, where the first predicts; the first has it elsewhere."""
    records, of = event_records(world.data, world.whole[:2], "cpu"), SUBSPACES["random"]
    role = torch.zeros_like(records.roles["prediction"])
    role[0, 0] = role[1, records.prediction[0]] = True
    records = replace(records, roles={**records.roles, "late": role})
    wanted = final(world, [[edit("layer_1_post_mlp", "remove", "prediction", of)]], records)[1]
    edits = [[edit("layer_1_post_mlp", "remove", "late", of)]]
    apart, together = (final(world, edits, records, None, union) for union in (False, True))
    assert torch.equal(apart[1], apart[0])
    close(together[1, 0], wanted[0])
    assert torch.equal(together[1, 1], together[0, 1])


def test_a_basis_is_cut_once_for_all_who_share_it_and_is_that_of_its_seed(world):
    bases = Bases(world.model, world.classes)
    asked = [StageEdit(**edit("embedding", "remove", "prediction", of)) for of in SUBSPACES.values()]
    for of in asked:
        assert bases.of(of) is bases.of(of)
        basis = columns(world, {**of.model_dump(), "rank": of.rank})
        np.testing.assert_allclose(
            bases.subspace(of).basis @ bases.subspace(of).basis.mT, basis @ basis.T, atol=1e-6
        )
    drawn = [
        bases.subspace(
            StageEdit(**edit("embedding", "remove", "prediction", {**SUBSPACES["random"], "seed": seed}))
        ).basis
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0] @ drawn[0].mT, drawn[2] @ drawn[2].mT, atol=0.1)

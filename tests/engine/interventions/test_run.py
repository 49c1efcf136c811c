"""Stacked interventions against one plain float64 pass per event and intervention, on a trained model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lakebed.engine.interventions import (
    CLEAN,
    Engine,
    InterventionError,
    part_names,
    read_answers,
    read_interventions,
    zero_each,
)
from lakebed.engine.interventions import run as run_module
from lakebed.engine.scalars import ScalarError
from lakebed.engine.subspaces import SubspaceError
from lakebed.extractors.dataset import Context
from lakebed.extractors.forward import probe_of
from lakebed.extractors.pair_sets import PairSelection, event_records, load_pairs
from lakebed.lake import Lake

from tests import trained_probe_lake as trained
from tests.engine.interventions.plain_walk import Edits, walk
from tests.plain_decoder import PlainDecoder

STEP = 150
VALUE = {"subspace": "embedding_value_identity", "rank": 5}
HEAD = {"subspace": "head_ov_output", "rank": 4, "head": "L0H2"}
KINDS = {
    "head": [{"zero": "L0H2"}],
    "last head": [{"zero": "L1H3"}],
    "mlp": [{"zero": "L0MLP"}],
    "last mlp": [{"zero": "L1MLP"}],
    "neuron": [{"zero": "L0N7"}],
    "last neuron": [{"zero": "L1N7"}],
    "two": [{"zero": "L1H0"}, {"zero": "L0H1"}],
    "restored mlp": [{"zero": "L0H2"}, {"restore": "L0MLP"}],
    "restored head": [{"zero": "L0MLP"}, {"restore": "L1H1"}],
    "restored group": [{"zero": "L0H2"}, {"restore": "L1MLP"}, {"restore": "L0MLP"}, {"restore": "L1H2"}],
    "restored neuron": [{"zero": "L0H2"}, {"restore": "L0N3"}],
    "removed": [
        {"stage": "layer_0_post_mlp", "operation": "remove", "position_role": "support_value", **VALUE}
    ],
    "removed late": [
        {"stage": "layer_1_post_mlp", "operation": "remove", "position_role": "prediction", **VALUE}
    ],
    "removed early": [
        {"stage": "embedding", "operation": "remove", "position_role": "support_write", **VALUE}
    ],
    "removed everywhere": [{"stage": "layer_0_post_attn", "operation": "remove", **HEAD}],
    "removed at the end": [
        {"stage": "final_norm", "operation": "remove", "position_role": "prediction", **VALUE}
    ],
    "kept": [{"stage": "layer_0_post_mlp", "operation": "keep", "position_role": "causal_prefix", **HEAD}],
    "kept late": [
        {"stage": "layer_1_post_attn", "operation": "keep", "position_role": "prediction", **VALUE}
    ],
    "put back": [{"zero": "L0H2"}, {"stage": "layer_1_post_attn", "operation": "patch"}],
    "put back in part": [
        {"zero": "L0H2"},
        {"stage": "layer_0_post_mlp", "operation": "patch", "position_role": "support_key", **VALUE},
    ],
    "attend": [{"attend": "L0H1", "role": "support_value"}],
    "attend last": [{"attend": "L1H1", "role": "support_write"}],
    "shuffle": [{"shuffle_values": "L0H1", "role": "support_value"}],
    "shuffle last": [{"shuffle_values": "L1H1", "role": "support_write"}],
    "attend and zero": [{"attend": "L0H1", "role": "support_value"}, {"zero": "L1H2"}],
}


@pytest.fixture(scope="module")
def world(probe_lake_path):
    with Lake.open(probe_lake_path) as lake:
        context = Context(lake, trained.RUN)
        data = probe_of(context, "probe")
        weights = context.reader.read(STEP).weights
        tokens = lake.sql("select key_tokens, value_tokens from probes where probe = 'probe'").fetchall()[0]
        classes = dict(zip(("key", "value"), map(torch.tensor, tokens), strict=True))
        # Whole records, so that events share rows.
        events = np.flatnonzero(data.example < 4)
        pairs = load_pairs(context, PairSelection("probe", ("support_value",), (), 4), ["clean", "corrupted"])
        corrupted = probe_of(context, "probe.corrupted")
        yield SimpleNamespace(
            model=context.adapter().load_model(weights),
            decoder=PlainDecoder(weights, 4),
            data=data,
            events=events,
            records=event_records(data, events, "cpu"),
            classes=classes,
            pairs=pairs,
            corrupted=corrupted,
        )


def engine(world, **options):
    return Engine(world.model, world.records, None, world.classes, **options)


def basis_of(world, edit):
    """Bases by dense float64 SVD of what the definitions name."""
    rank = edit.get("rank")
    if edit.get("subspace", "full_residual") == "full_residual":
        return None
    if edit["subspace"] == "embedding_value_identity":
        rows = world.decoder.U[world.classes["value"].numpy()]
        return np.linalg.svd(rows - rows.mean(0))[2][:rank].T
    assert edit["subspace"] == "head_ov_output"
    layer, head = int(edit["head"][1]), int(edit["head"][3])
    value, _ = world.decoder.part(layer, "attn.v_proj", head)
    width = world.decoder.width
    out = world.decoder.w[f"blocks.{layer}.attn.out_proj.weight"][:, head * width : (head + 1) * width]
    return np.linalg.svd(value.T @ out.T)[2][:rank].T


def roles_of(data, event):
    roles = {
        role: [int(at) for of, at in zip(*held, strict=True) if of == event]
        for role, held in data.roles.items()
    }
    return {**roles, "causal_prefix": list(range(int(data.prediction[event]) + 1))}


def plain(world, edits, events=None, data=None, other=None):
    """`Float64[event, vocabulary]` at the predictions, a walk per event."""
    data = data or world.data
    events = world.events if events is None else events
    records = [data.tokens[data.example[event]][: data.lengths[data.example[event]]] for event in events]
    clean = [walk(world.decoder, tokens) for tokens in records]
    found = []
    for number, event in enumerate(events):
        before = number - 1
        partner = (clean[before], roles_of(data, events[before]), int(data.prediction[events[before]]))
        p = int(data.prediction[event])
        editor = Edits(
            edits,
            clean[number],
            roles_of(data, event),
            p,
            lambda edit: basis_of(world, edit),
            partner,
            other and other(number),
        )
        found.append(walk(world.decoder, records[number], editor).logits[p])
    return np.stack(found)


def logits(world, runs, name):
    return (runs.final[runs.names.index(name)] @ world.model.unembedding.mT).double().numpy()


def test_every_kind_of_edit_in_one_stack_is_what_a_pass_of_its_own_gives(world):
    interventions = read_interventions([{"name": name, "edits": edits} for name, edits in KINDS.items()])
    with torch.no_grad():
        runs = engine(world).run(interventions)
    assert runs.names == [CLEAN, *KINDS]
    untouched = plain(world, [])
    np.testing.assert_allclose(logits(world, runs, CLEAN), untouched, atol=2e-5)
    for name, edits in KINDS.items():
        wanted = plain(world, edits)
        np.testing.assert_allclose(logits(world, runs, name), wanted, atol=5e-5, err_msg=name)
        if name != "put back":
            assert np.abs(wanted - untouched).max() > 1e-3, name


def test_union_edits_the_events_of_a_record_together(world):
    edits = KINDS["removed"]
    with torch.no_grad():
        (runs,) = [
            engine(world, union=True).run(read_interventions([{"name": "all", "edits": edits}])),
        ]
    data, wanted = world.data, []
    for event in world.events:
        example = data.example[event]
        mine = world.events[data.example[world.events] == example]
        roles = {"support_value": sorted({at for of in mine for at in roles_of(data, of)["support_value"]})}
        tokens = data.tokens[example][: data.lengths[example]]
        p = int(data.prediction[event])
        editor = Edits(edits, walk(world.decoder, tokens), roles, p, lambda edit: basis_of(world, edit))
        wanted.append(walk(world.decoder, tokens, editor).logits[p])
    np.testing.assert_allclose(logits(world, runs, "all"), np.stack(wanted), atol=5e-5)
    assert np.abs(np.stack(wanted) - plain(world, edits)).max() > 1e-3


@pytest.mark.parametrize("stage", ["embedding", "layer_0_post_mlp", "layer_1_post_mlp"])
def test_a_patch_from_the_counterpart_puts_the_clean_state_into_the_corrupted_record(world, stage):
    role = "support_value" if stage != "layer_1_post_mlp" else "prediction"
    edit = {"stage": stage, "operation": "patch", "source": "counterpart", "position_role": role, **VALUE}
    clean, corrupted = world.pairs.events["clean"], world.pairs.events["corrupted"]
    with torch.no_grad():
        runs = Engine(
            world.model,
            event_records(world.corrupted, corrupted, "cpu"),
            event_records(world.data, clean, "cpu"),
            world.classes,
        ).run(read_interventions([{"name": "patched", "edits": [edit]}]))

    def other(number):
        event = clean[number]
        example = world.data.example[event]
        tokens = world.data.tokens[example][: world.data.lengths[example]]
        return walk(world.decoder, tokens), roles_of(world.data, event)

    wanted = plain(world, [edit], corrupted, world.corrupted, other)
    np.testing.assert_allclose(logits(world, runs, "patched"), wanted, atol=5e-5)
    assert np.abs(wanted - plain(world, [], corrupted, world.corrupted)).max() > 1e-3


def test_parts_sum_to_the_last_stage_of_every_run_and_are_the_plain_ones(world):
    names = ["head", "last mlp", "restored group", "attend last", "last neuron"]
    interventions = read_interventions([{"name": name, "edits": KINDS[name]} for name in names])
    with torch.no_grad():
        runs = engine(world, parts=True).run(interventions)
        bare = engine(world).run(interventions)
    assert torch.equal(bare.final, runs.final)
    torch.testing.assert_close(runs.parts.sum(2), runs.last, atol=2e-6, rtol=1e-5)
    event = world.events[5]
    tokens = world.data.tokens[world.data.example[event]][: world.data.lengths[world.data.example[event]]]
    p, clean = int(world.data.prediction[event]), walk(world.decoder, tokens)
    for run, name in enumerate(names, 1):
        walked = walk(world.decoder, tokens, Edits(KINDS[name], clean, roles_of(world.data, event), p))
        for part, label in enumerate(part_names(world.model)):
            np.testing.assert_allclose(runs.parts[run, 5, part], walked.parts[label][p], atol=1e-5)


def test_logit_gradients_times_parts_are_autograds(world):
    interventions = zero_each(world.model)[:3]
    with torch.no_grad():
        runs = engine(world, parts=True).run(interventions)
        answers = read_answers(world.model, runs, world.records.choices)
    gain, bias = (of.double() for of in world.model.final_norm_parameters())
    U = world.model.unembedding.double()
    choices = world.records.choices
    for run, event in ((0, 0), (1, 3), (3, 7)):
        h = runs.last[run, event].double().requires_grad_()
        out = U @ torch.nn.functional.layer_norm(h, h.shape, gain, bias, world.model.layer_norm_eps)
        for candidate, token in enumerate(choices.candidates[:4]):
            (gradient,) = torch.autograd.grad(out[token], h, retain_graph=True)
            wanted = runs.parts[run, event].double() @ gradient
            torch.testing.assert_close(
                answers.dla[run, event, :, candidate].double(), wanted, atol=2e-5, rtol=1e-4
            )
        (gradient,) = torch.autograd.grad(out.log_softmax(0)[choices.answer_token[event]], h)
        wanted = runs.parts[run, event].double() @ gradient
        torch.testing.assert_close(answers.log_prob_dla[run, event].double(), wanted, atol=2e-5, rtol=1e-4)
    # LayerNorm is scale-invariant up to ε: the whole stream pushes no logit (definitions 4 §K.3).
    assert float(answers.dla.sum(2).abs().max()) < 1e-3 * float(answers.dla.abs().max())


_UNCHANGING = st.sampled_from(
    [
        {"restore": "L0H1"},
        {"restore": "L1MLP"},
        {"restore": "L0N5"},
        {"stage": "embedding", "operation": "patch"},
        {"stage": "layer_0_post_mlp", "operation": "patch", "position_role": "support_value", **VALUE},
        {"stage": "layer_1_post_mlp", "operation": "patch", "position_role": "prediction"},
    ]
)
_CHANGING = st.sampled_from([{"zero": "L0H1"}, {"zero": "L0MLP"}, {"zero": "L0N5"}, {"zero": "L1H0"}])
_FINISHING = st.sampled_from(
    [
        {"stage": "layer_1_post_attn", "operation": "patch"},
        {"stage": "layer_1_post_mlp", "operation": "patch"},
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_UNCHANGING, min_size=1, max_size=4), st.lists(_CHANGING, max_size=3), _FINISHING)
def test_what_changes_nothing_or_is_all_put_back_changes_no_bit(world, unchanging, changing, finishing):
    interventions = read_interventions(
        [
            {"name": "nothing", "edits": unchanging},
            {"name": "put back", "edits": [*changing, finishing]},
            {"name": "beside them", "edits": [{"zero": "L0H2"}]},
        ]
    )
    with torch.no_grad():
        runs = engine(world, parts=True).run(interventions)
    assert torch.equal(runs.final[1], runs.final[0])
    assert torch.equal(runs.parts[1], runs.parts[0])
    assert torch.equal(runs.final[2], runs.final[0])
    assert not torch.equal(runs.final[3], runs.final[0])


def test_restoring_everything_downstream_leaves_the_source_alone_missing(world):
    """Definitions 4 §K.5: the last stage is then the clean one less the clean write of the source."""
    later = ["L0MLP", *(f"L1H{head}" for head in range(4)), "L1MLP"]
    edits = [{"zero": "L0H2"}, *({"restore": label} for label in later)]
    with torch.no_grad():
        runs = engine(world, parts=True).run(read_interventions([{"name": "all", "edits": edits}]))
    write = runs.parts[0, :, part_names(world.model).index("L0H2")]
    torch.testing.assert_close(runs.last[1], runs.last[0] - write, atol=2e-6, rtol=1e-5)


def test_small_stacks_give_what_large_ones_do(world, monkeypatch):
    interventions = read_interventions([{"name": name, "edits": edits} for name, edits in KINDS.items()])
    with torch.no_grad():
        together = engine(world).run(interventions)
        monkeypatch.setattr(run_module, "_TOKENS", 1)
        apart = engine(world).run(interventions)
    torch.testing.assert_close(apart.final, together.final, atol=1e-5, rtol=1e-5)


def test_a_random_subspace_is_the_same_for_the_same_seed_and_another_for_another(world):
    def edit(seed):
        return {
            "stage": "layer_0_post_mlp",
            "operation": "remove",
            "subspace": "random",
            "rank": 5,
            "seed": seed,
            "position_role": "prediction",
        }

    named = [{"name": str(number), "edits": [edit(seed)]} for number, seed in enumerate((3, 3, 4))]
    with torch.no_grad():
        runs = engine(world).run(read_interventions(named))
    assert torch.equal(runs.final[1], runs.final[2])
    assert float((runs.final[1] - runs.final[3]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"zero": "L2H0"}, InterventionError, "no component L2H0; this run has layers 0–1"),
        ({"zero": "L0H4"}, InterventionError, "no component L0H4; this run has layers 0–1, heads 0–3"),
        ({"restore": "L0N64"}, InterventionError, "no component L0N64; .* neurons 0–63"),
        ({"attend": "L0H9", "role": "support_value"}, ScalarError, "no head L0H9"),
        ({"attend": "L0H0", "role": "z"}, ScalarError, "no role 'z'"),
        ({"stage": "z", "operation": "patch"}, ScalarError, "no stage 'z'; this run has embedding"),
        (
            {
                "stage": "embedding",
                "operation": "remove",
                "subspace": "head_ov_input",
                "head": "L0H0",
                "rank": 9,
                "position_role": "prediction",
            },
            InterventionError,
            "rank 9 exceeds that of subspace head_ov_input, which is 8",
        ),
        (
            {"stage": "embedding", "operation": "remove", "subspace": "embedding_key_identity", "rank": 4},
            SubspaceError,
            "rank 4 exceeds that of subspace embedding_key_identity, which is 3",
        ),
        (
            {**KINDS["removed"][0], "position_role": "value_distractors"},
            ScalarError,
            "Intervention positions must be in the causal prefix: role 'value_distractors'",
        ),
        (
            {
                "stage": "embedding",
                "operation": "patch",
                "source": "counterpart",
                "position_role": "prediction",
            },
            InterventionError,
            "needs causal patch pairs",
        ),
    ],
)
def test_what_the_model_or_the_records_lack_is_named(world, edit, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        engine(world).run(read_interventions([{"name": "x", "edits": [edit]}]))

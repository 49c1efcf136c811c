"""Which events are examples of a transfer, where their roles stand, and what cannot be rerun."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.value_code_rescue import Edited, is_pointwise, rerun
from lakebed.extractors.dataset import Context, build_extractor
from lakebed.extractors.forward import DeviceUnavailable
from lakebed.extractors.plan import extract
from lakebed.extractors.probe_batches import ProbeData
from lakebed.extractors.probes import build_probe
from lakebed.extractors.value_code_examples import Examples, NoExamples, PositionsMissing, load_examples
from lakebed.extractors.value_code_states import NonFiniteStates, _turns
from lakebed.lake.datasets import Need
from lakebed.lake.errors import UnknownName
from lakebed.lake.value_codes import VALUE_CODE_RESCUES, value_code_rescue_parameters

ENDS = {
    "source_stage": "layer_0_post_mlp",
    "target_stage": "layer_1_post_mlp",
    "source_position_role": "support_value",
    "target_position_role": "prediction",
    "group_by": "answer_value",
    "basis_rank": 2,
}


def need(**changed):
    return Need(VALUE_CODE_RESCUES, value_code_rescue_parameters(**{**ENDS, **changed}))


def examples(roles, prediction=(3, 5, 2), example=(0, 0, 1)):
    """Two records of six tokens, token = 10 · record + position."""
    tokens = np.arange(6) + 10 * np.arange(2)[:, None]
    data = ProbeData(
        "p", "", "jsonl", ["a", "b"], np.array([6, 6]), tokens, np.array(example), np.array(prediction),
        np.array([7, 8, 9]), np.array([1, 1, 1]), np.arange(3), {name: tuple(map(np.array, of)) for name, of in roles.items()}, {},
    )  # fmt: skip
    return Examples(data, np.arange(len(example)), np.array([True, False, False]))


def test_roles_are_places_and_tokens():
    of = examples({"k": ([0, 0, 1, 2], [1, 3, 4, 0]), "late": ([0, 1, 2, 2], [0, 5, 1, 4])})
    found = of.places("k")
    assert found.counts.tolist() == [2, 1, 1]
    assert found.first.tolist() == [1, 4, 0]
    assert of.tokens("k", found).tolist() == [1, 4, 10]
    assert of.tokens("answer_value", found).tolist() == [7, 8, 9]
    late = of.places("late", up_to_prediction=True)
    assert late.position.tolist() == [0, 5, 1]
    assert of.tokens("position_token", late).tolist() == [0, 5, 11]
    prefix = of.places("causal_prefix")
    assert prefix.counts.tolist() == [4, 6, 3]
    assert prefix.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_a_role_without_a_position_is_refused():
    of = examples({"k": ([0, 2], [1, 0]), "late": ([0, 1, 2], [0, 0, 4])})
    with pytest.raises(
        PositionsMissing,
        match=r"role 'k' resolves to no position in 1 of 3 events, such as event 1 of record 'a'",
    ):
        of.places("k")
    with pytest.raises(
        PositionsMissing, match="'late' resolves to no position up to the prediction in 1 of 3"
    ):
        of.places("late", up_to_prediction=True)
    with pytest.raises(PositionsMissing, match="1 of 3 events have no role 'k' to group by"):
        of.tokens("k", of.places("causal_prefix"))


@given(st.lists(st.integers(0, 5), max_size=20))
def test_turns_count_the_same_before(places):
    found = _turns(np.array(places, np.int64))
    assert found.tolist() == [places[:at].count(place) for at, place in enumerate(places)]


def test_batches_hold_every_record_once():
    of = examples({})
    last = np.array([5, 2])
    batches = list(of.batches(last))
    assert sum((batch.row >= 0).astype(int) for batch in batches).tolist() == [1, 1]
    (both,) = batches
    # By length: the shorter one first, each as long as the longest needs.
    assert both.row.tolist() == [1, 0]
    assert both.tokens.tolist() == [[10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5]]


def test_a_rerun_without_a_change_is_the_models_own_output(probed, config):
    context = Context(probed, "r")
    model = context.adapter().load_model(context.reader.read(48).weights, "cpu")
    tokens = torch.randint(0, model.vocabulary_size, (3, 9), generator=torch.Generator().manual_seed(1))
    row, position = torch.tensor([0, 0, 2]), torch.tensor([2, 7, 5])
    decoder = SymbolicKVDecoder(config.model, model.vocabulary_size)
    decoder.load_state_dict(context.reader.read(48).weights, strict=False)
    with torch.no_grad():
        wanted = decoder.eval()(tokens)[row, position]
        passed = model.forward(tokens, capture={"stages"})
    for stage in model.stages:
        assert is_pointwise(model, stage) == (stage in model.stages[-3:])
        edited = Edited(tokens, passed.stages[stage], row, position, position)
        final = rerun(model, stage, edited, torch.zeros(4, 3, model.d_model, dtype=torch.float64))
        assert final.shape == (4, 3, model.d_model)
        logits = final @ model.unembedding.T
        assert logits.numpy() == pytest.approx(wanted.expand(4, -1, -1).numpy(), abs=1e-4)


@pytest.fixture(scope="module")
def probed(tmp_path_factory, config, benchmark_data):
    from lakebed.extractors.training import train
    from lakebed.lake import Lake

    with Lake.create(tmp_path_factory.mktemp("codes") / "l.lake") as lake:
        train(lake, "r", config, benchmark=benchmark_data, anchor_every=16)
        build_probe(lake, "r", examples_per_split=8, benchmark=benchmark_data)
        yield lake


def test_the_first_records_of_the_splits_asked_for_are_examples(probed):
    context = Context(probed, "r")

    def events(**changed):
        return load_examples(context, need(**changed).parameters).event

    everything = events()
    assert (everything == np.arange(len(everything))).all()
    some = events(split=("heldout_pairs",), max_records=3)
    wanted = probed.sql(
        "SELECT event FROM events WHERE probe = 'probe' AND example IN (SELECT example FROM probe_examples WHERE "
        "probe = 'probe' AND split = 'heldout_pairs' ORDER BY example LIMIT 3) ORDER BY event"
    ).fetchall()
    assert some.tolist() == [event for (event,) in wanted]


def test_what_was_made_stands_and_another_probe_is_another_dataset(probed):
    first = extract(probed, "r", [need()], "16,32")
    assert first.made[VALUE_CODE_RESCUES] == [16, 32]
    again = extract(probed, "r", [need()], "16,32,48")
    assert again.made[VALUE_CODE_RESCUES] == [48]
    assert again.standing[VALUE_CODE_RESCUES] == 2


@pytest.mark.parametrize("stage", ["layer_1_post_mlp", "layer_0_post_attn"])
def test_the_clean_run_is_the_readout_of_the_model(probed, stage):
    asked = need(target_stage=stage)
    extract(probed, "r", [asked, Need("readouts", {"probe": "probe"})], "48")
    differing = probed.sql(
        "SELECT max(abs(v.answer_logit - r.answer_logit)), max(abs(list_max(v.competitor_logits) - r.best_wrong_logit)), "
        "max(abs(v.answer_log_prob - r.answer_log_prob)), count(*) FILTER (v.best_token <> r.best_token), count(*) "
        "FROM value_code_runs AS v JOIN readouts AS r USING (run, probe, step, event) JOIN specs AS s USING (run, spec) "
        f"WHERE r.stage = 'logits' AND v.eval_kind = 'clean' AND s.parameters->>'$.target_stage' = '{stage}'"
    ).fetchall()[0]
    assert differing[:3] == pytest.approx([0, 0, 0], abs=2e-5)
    assert differing[3] == 0
    assert differing[4] == probed.sql("SELECT count(*) FROM events WHERE probe = 'probe'").fetchall()[0][0]


def test_a_split_without_events_a_control_and_ends_that_are_missing_are_refused(probed):
    with pytest.raises(NoExamples, match="has no query event in split nowhere"):
        extract(probed, "r", [need(split=("nowhere",))], "48")
    with pytest.raises(UnknownName, match="no control 'chance'; there are shuffled_answer_value"):
        build_extractor(VALUE_CODE_RESCUES, {**need().parameters, "controls": ["chance"]})
    with pytest.raises(UnknownName, match="make them with lakebed extract --for value-code-transfer-rescue"):
        build_extractor(VALUE_CODE_RESCUES, {})
    with pytest.raises(DeviceUnavailable, match="there is cpu"):
        extract(probed, "r", [need(basis_rank=3)], "48", device="tpu")


def test_a_run_that_diverged_is_refused_at_its_step(probed, monkeypatch):
    from lakebed.extractors import states

    stored = states.StateReader._stored

    def broken(self, step, moments):
        state = stored(self, step, moments)
        state.weights["blocks.0.attn.q_proj.weight"][0, 0] = torch.nan
        return state

    monkeypatch.setattr(states.StateReader, "_stored", broken)
    with pytest.raises(
        NonFiniteStates,
        match=r"step 48 of run 'r': layer_0_post_mlp holds NaN or infinite values; leave it out",
    ):
        extract(probed, "r", [need(basis_rank=4)], "48")

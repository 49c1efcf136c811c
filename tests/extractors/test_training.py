"""Training into a lake: exact replay on the real task, resumption, branching, windows, evaluations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lakebed.engine.config import load_config
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.engine.training import TrainingLoop
from lakebed.extractors.runs import RecordingError
from lakebed.extractors.states import StateReader
from lakebed.extractors.training import RecordWindow, evaluation_rows, trace, train
from lakebed.lake.errors import InputMismatch, MissingData
from lakebed.lake.steps import StepSyntax

from tests.extractors.conftest import NUM_STEPS, small_config


def assert_same_state(ours, theirs):
    for quantity in ("weights", "exp_avg", "exp_avg_sq"):
        left, right = getattr(ours, quantity), getattr(theirs, quantity)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), (ours.step, quantity, name)
    assert ours.step_counts == theirs.step_counts


def test_replay_equals_a_run_that_stored_everything(trained_lake):
    exact, full = StateReader(trained_lake, "exact"), StateReader(trained_lake, "full")
    assert exact.anchors() == [0, 16, 32, 48]
    assert full.anchors() == list(range(NUM_STEPS + 1))
    for ours, theirs in zip(exact.iterate(exact.steps), full.iterate(full.steps), strict=True):
        assert_same_state(ours, theirs)


def test_recording_changes_no_bit_of_training(trained_lake, config, benchmark_data):
    loop = TrainingLoop(config, benchmark_data)
    recorded = trained_lake.sql(
        "select loss, clip_coefficient, pre_clip_grad_norm, learning_rate from training_steps where run = 'exact' order by step"
    ).fetchall()
    for step, (loss, coefficient, norm, rate) in enumerate(recorded, start=1):
        metrics = loop.train_step()
        assert (metrics.loss, metrics.clip_coefficient, metrics.learning_rate) == (loss, coefficient, rate)
        assert norm == pytest.approx(metrics.pre_clip_grad_norm, rel=1e-5)
        if step % config.eval_every_steps == 0:
            loop.evaluate()
    final = StateReader(trained_lake, "exact").read(NUM_STEPS)
    for name, parameter in loop.model.named_parameters():
        assert torch.equal(parameter.detach(), final.weights[name])


def test_the_stored_gradient_is_that_of_the_loss(trained_lake, config, benchmark_data):
    """Central differences in float64 on the recorded batch, from the replayed weights."""
    step = 30
    state = StateReader(trained_lake, "exact").read(step - 1)
    loop = TrainingLoop(config, benchmark_data)
    model = loop.model.double()
    model.load_state_dict({**state.weights, "lm_head.weight": state.weights["token_embedding.weight"]})
    ids = trained_lake.sql(
        f"select unnest(sample_ids) from training_batches where run = 'exact' and step = {step}"
    ).fetchall()
    encoded = loop.encoded("train")
    batch = encoded.batch(torch.tensor([encoded.sample_ids.index(name) for (name,) in ids]))

    def loss() -> float:
        with torch.no_grad():
            logits = model(batch.token_ids, batch.attention_mask)[:, :-1]
        targets, mask = batch.token_ids[:, 1:], batch.attention_mask[:, 1:].bool()
        return float(torch.nn.functional.cross_entropy(logits[mask], targets[mask]))

    assert loss() == pytest.approx(
        trained_lake.sql(f"select loss from training_steps where run = 'exact' and step = {step}").fetchall()[
            0
        ][0],
        rel=1e-6,
    )
    generator = np.random.default_rng(0)
    for name in (
        "blocks.1.attn.q_proj.weight",
        "token_embedding.weight",
        "blocks.0.ff.fc_in.bias",
        "final_norm.weight",
    ):
        gradient = trained_lake.tensor("gradients", name, "exact").read(step)
        weight = dict(model.named_parameters())[name]
        direction = torch.from_numpy(generator.standard_normal(gradient.shape))
        expected = float((torch.from_numpy(gradient).double() * direction).sum())
        with torch.no_grad():
            weight.add_(1e-5 * direction)
            above = loss()
            weight.sub_(2e-5 * direction)
            below = loss()
            weight.add_(1e-5 * direction)
        assert (above - below) / 2e-5 == pytest.approx(expected, rel=2e-4, abs=1e-7), name


def test_an_interrupted_run_goes_on_with_the_same_bits(lake, trained_lake, config, benchmark_data):
    first = train(lake, "r", config, num_steps=23, benchmark=benchmark_data, anchor_every=8)
    assert (first.step, first.recorded) == (23, 23)
    assert "validation_iid" in first.metrics
    train(lake, "r", config, benchmark=benchmark_data, anchor_every=8)
    ours, theirs = StateReader(lake, "r"), StateReader(trained_lake, "exact")
    for step in (20, 24, 33, NUM_STEPS):
        assert_same_state(ours.read(step), theirs.read(step))
    again = train(lake, "r", config, benchmark=benchmark_data, anchor_every=8)
    assert again.steps_taken == 0
    assert again.metrics["validation_iid"]["answer_accuracy"] is not None


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_trace_from_the_middle_repeats_the_original(lake, benchmark_data, dropout):
    config = small_config(**{"model.dropout": dropout})
    train(lake, "r", config, benchmark=benchmark_data, anchor_every=16)
    result = trace(lake, "r", 21, 14, anchor_every=8)
    assert (result.run, result.step) == ("r@21", 35)
    ours, theirs = StateReader(lake, "r@21"), StateReader(lake, "r")
    for step in (21, 22, 29, 35):
        assert_same_state(ours.read(step), theirs.read(step))
    losses = lake.sql(
        "select count(distinct loss), count(*) from training_steps where step between 22 and 35"
    ).fetchall()
    assert losses == [(14, 28)]
    parent = lake.sql("select parent_run, parent_step, source from runs where run = 'r@21'").fetchall()
    assert parent == [("r", 21, "trace")]
    assert trace(lake, "r", 21, 14, anchor_every=8).steps_taken == 0


def test_trace_from_the_end_continues_the_run_itself(lake, config, benchmark_data):
    train(lake, "r", config, num_steps=20, benchmark=benchmark_data, anchor_every=8)
    result = trace(lake, "r", 20, 6, anchor_every=8)
    assert (result.run, result.step) == ("r", 26)
    assert StateReader(lake, "r").steps == list(range(27))


def test_a_window_is_recorded_and_the_rest_has_checkpoints(lake, trained_lake, config, benchmark_data):
    train(lake, "r", config, benchmark=benchmark_data, record="20:30", anchor_every=8)
    reader = StateReader(lake, "r")
    assert reader.steps == [0, 16, *range(20, 31), 32, 48]
    assert_same_state(reader.read(48), StateReader(trained_lake, "exact").read(48))
    assert lake.sql("select min(step), max(step), count(*) from training_steps").fetchall() == [(21, 30, 10)]
    train(lake, "none", config, benchmark=benchmark_data, record="none")
    assert StateReader(lake, "none").steps == [0, 16, 32, 48]
    branch = trace(lake, "none", 32, 8, anchor_every=8)
    assert_same_state(StateReader(lake, branch.run).read(40), StateReader(trained_lake, "exact").read(40))


def test_evaluations_are_rows(trained_lake):
    rows = trained_lake.sql(
        "select step, metric, value from evaluations where run = 'exact' and metric in ('loss', 'answer_accuracy') order by all"
    ).fetchall()
    assert [row[0] for row in rows] == [20, 20, 40, 40, 48, 48]
    assert trained_lake.sql(
        "select count(*) from evaluations where metric like 'slice_accuracy[active_keys=%]'"
    ).fetchall()[0][0]
    nested = evaluation_rows(3, {"v": {"loss": 1.0, "slices": {"axis": {"2": 0.5}}, "none": None}})
    assert [(row["metric"], row["value"]) for row in nested] == [("loss", 1.0), ("slices[axis=2]", 0.5)]


def test_examples_make_batches_readable(trained_lake, benchmark_data):
    rows = trained_lake.sql(
        "select b.sample_ids, list(e.tokens order by list_position(b.sample_ids, e.sample_id)) "
        "from training_batches b join examples e on e.run = b.run and list_contains(b.sample_ids, e.sample_id) "
        "where b.run = 'exact' and b.step = 1 group by all"
    ).fetchall()
    by_id = {record["sample_id"]: record["tokens"] for record in benchmark_data.splits["train"]}
    ids, tokens = rows[0]
    assert len(ids) == 12
    assert tokens == [by_id[name] for name in ids]


def test_slices_cover_every_parameter_once_per_kind(trained_lake):
    rows = trained_lake.sql(
        "select s.slice_kind, s.parameter, p.numel, "
        "sum((row_stop - row_start) * coalesce(column_stop - column_start, 1)) "
        "from slices s join parameters p using (run, parameter) where run = 'exact' group by all"
    ).fetchall()
    for kind, parameter, numel, covered in rows:
        assert covered == numel, (kind, parameter)
    assert {kind for kind, *_ in rows} == {"module", "projection", "head", "head_projection", "neuron"}


def test_another_config_of_the_same_name_is_refused(trained_lake, benchmark_data):
    with pytest.raises(InputMismatch, match=r"run unit 'run' of run 'exact' stands in the lake.*config"):
        train(trained_lake, "exact", small_config(seed=8), benchmark=benchmark_data)


def test_wrong_requests_are_one_line(trained_lake, config, benchmark_data):
    with pytest.raises(
        RecordingError, match="num_steps is 49; it must lie between 1 and the config's num_steps 48"
    ):
        train(trained_lake, "x", config, num_steps=49, benchmark=benchmark_data)
    with pytest.raises(MissingData, match="run 'exact' has no step 77; it has 0:48"):
        trace(trained_lake, "exact", 77, 1)
    with pytest.raises(RecordingError, match=r"step 40 \+ 9 exceeds the config's num_steps 48"):
        trace(trained_lake, "exact", 40, 9)
    with pytest.raises(RecordingError, match="device 'cuda' is not available"):
        train(trained_lake, "x", config, benchmark=benchmark_data, device="cuda")
    for text in ("5", "9:3", "a:b", "3:3", "1:2:3"):
        with pytest.raises(StepSyntax, match="write all, none, or A:B"):
            RecordWindow.parse(text, 48)
    assert "x" not in trained_lake.runs()


def test_anchors_of_the_formation_config(lake):
    """Losses, norms and updates of the first four steps, as definitions 1 §K publishes them."""
    config = load_config("formation")
    benchmark = generate_benchmark(config.benchmark)
    train(lake, "formation", config, num_steps=4, benchmark=benchmark, anchor_every=4)
    rows = lake.sql(
        "select t.step, loss, pre_clip_grad_norm, learning_rate, sqrt(sum(delta_l2 * delta_l2)), sample_ids[1:4] "
        "from training_steps t join parameter_updates u using (run, step) join training_batches b using (run, step) "
        "group by all order by t.step"
    ).fetchall()
    losses, norms = [90.04179, 89.97298, 90.05561, 89.83049], [21.36716, 21.34350, 21.55622, 21.43854]
    deltas = [0.00157417, 0.00302706, 0.00447710, 0.00593713]
    for row, loss, norm, delta in zip(rows, losses, norms, deltas, strict=True):
        assert row[1] == pytest.approx(loss, abs=5e-5)
        assert row[2] == pytest.approx(norm, abs=2e-5)
        assert row[3] == pytest.approx(2e-6 * row[0], rel=1e-12)
        assert row[4] == pytest.approx(delta, rel=1e-5)
    assert rows[0][5] == ["train_003421", "train_006962", "train_007555", "train_003403"]
    count = lake.sql("select count(*), sum(numel) from parameters").fetchall()
    assert count == [(52, 626048)]
    assert json.loads(lake.sql("select config from runs").fetchall()[0][0])["seed"] == 7

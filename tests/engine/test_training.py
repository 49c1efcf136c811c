"""The training loop: published first steps, the loader's record order, and resuming bit for bit."""

import json
import math

import pytest
import torch
from lakebed.engine.config import load_config
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.engine.training import BatchStream, TrainingLoop
from torch.utils.data import DataLoader

SMALL = {
    "batch_size": 16,
    "benchmark": {
        # 40 records make epochs of 16, 16 and 8.
        "train": {"num_samples": 40},
        "validation_iid": {"num_samples": 20},
        "test_iid": {"num_samples": 20},
        "heldout_pairs": {"num_samples": 20},
        "structural_ood": {"num_samples": 20},
        "counterfactual": {"num_samples": 10},
    },
    "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "embedding_std": 0.1},
    "optimization": {"learning_rate": 0.01, "warmup_steps": 5},
}


def small(**overrides):
    return load_config("formation", **SMALL, **overrides)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These matrices are tiny: on a busy machine a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def benchmark():
    return generate_benchmark(small().benchmark)


def flat(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.model.parameters()])


def checkpoint(loop):
    """What a checkpoint holds: copies, as the loop goes on changing the originals."""
    optimizer = loop.optimizer.state_dict()
    moments = {
        key: {name: value.clone() for name, value in entry.items()}
        for key, entry in optimizer["state"].items()
    }
    return {
        "step": loop.step,
        "model_state": {name: value.clone() for name, value in loop.model.state_dict().items()},
        "optimizer_state": {"state": moments, "param_groups": optimizer["param_groups"]},
        "loop_state": json.loads(json.dumps(loop.loop_state())),
        "rng_state": torch.get_rng_state(),
    }


def test_first_steps_of_the_formation_run_are_the_published_ones():
    loop = TrainingLoop(load_config("formation"))
    published = [
        (90.04179, 21.36716, 0.00157417),
        (89.97298, 21.34350, 0.00302706),
        (90.05561, 21.55622, 0.00447710),
        (89.83049, 21.43854, 0.00593713),
    ]
    for step, (loss, norm, moved) in enumerate(published, start=1):
        before = flat(loop).double()
        metrics = loop.train_step()
        assert metrics.step == loop.step == step
        assert metrics.loss == pytest.approx(loss, rel=1e-6)
        assert metrics.pre_clip_grad_norm == pytest.approx(norm, rel=1e-5)
        assert metrics.learning_rate == pytest.approx(2e-6 * step)
        assert metrics.clip_coefficient == pytest.approx(1 / norm, rel=1e-5)
        assert float((flat(loop).double() - before).norm()) == pytest.approx(moved, rel=1e-5)
        assert metrics.batch_size == len(metrics.sample_ids) == 128
        if step == 1:
            assert metrics.sample_ids[:4] == ("train_003421", "train_006962", "train_007555", "train_003403")
            records = {record["sample_id"]: record for record in loop.benchmark.splits["train"]}
            events = sum(len(records[name]["query_events"]) for name in metrics.sample_ids)
            assert metrics.query_event_count == events
    (group,) = loop.optimizer.param_groups
    assert len(group["params"]) == 52
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.01)
    assert group["lr"] == metrics.learning_rate


@pytest.mark.parametrize(("records", "batch_size"), [(40, 16), (32, 16), (5, 8), (7, 1)])
def test_the_batch_stream_is_a_shuffling_loader_with_its_draws(records, batch_size):
    def loader_order(epochs):
        loader = DataLoader(range(records), batch_size=batch_size, shuffle=True)
        other = DataLoader(range(3), batch_size=2)
        for epoch in range(epochs):
            for batch in loader:
                yield batch.tolist()
            if epoch == 1:
                # An evaluation between two epochs costs one draw.
                assert len(list(other)) == 2

    torch.manual_seed(11)
    expected = list(loader_order(4))
    end = torch.get_rng_state()
    torch.manual_seed(11)
    stream = BatchStream(records, batch_size)
    batches = []
    for position in range(len(expected)):
        if position == 2 * stream.batches_per_epoch:
            stream.skip_draw()
        batches.append(stream.next().tolist())
    assert batches == expected
    assert torch.equal(end, torch.get_rng_state())
    assert stream.draws == 9


def test_an_evaluation_moves_later_epochs_only(benchmark):
    def orders(evaluate):
        loop = TrainingLoop(small(), benchmark)
        ids = []
        for step in range(1, 10):
            ids.append(loop.train_step().sample_ids)
            if evaluate and step == 4:
                loop.evaluate()
        return ids

    plain, evaluated = orders(False), orders(True)
    # Step 4 is the first of epoch 2, which ends at step 6.
    assert plain[:6] == evaluated[:6]
    assert plain[6:] != evaluated[6:]
    assert all(sorted(sum(ids[3:6], ())) == sorted(sum(ids[:3], ())) for ids in (plain, evaluated))


def run_to(config, benchmark, stop, evaluate_at=(5,), take_at=None):
    loop = TrainingLoop(config, benchmark)
    losses, taken = [], None
    while loop.step < stop:
        losses.append(loop.train_step().loss)
        if loop.step in evaluate_at:
            loop.evaluate()
        if loop.step == take_at:
            taken = checkpoint(loop)
    return loop, losses, taken


@pytest.mark.parametrize("take_at", [1, 3, 5, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_continues_bit_for_bit_from_any_step(benchmark, take_at, dropout):
    config = small(**{"model.dropout": dropout})
    whole, losses, taken = run_to(config, benchmark, 12, take_at=take_at)
    copies = {name: value.clone() for name, value in taken["optimizer_state"]["state"][0].items()}
    resumed = TrainingLoop(config, benchmark)
    resumed.train_step()
    resumed.restore(**taken)
    assert resumed.step == take_at
    continued = []
    while resumed.step < 12:
        continued.append(resumed.train_step().loss)
        if resumed.step == 5:
            resumed.evaluate()
    assert continued == losses[take_at:]
    assert torch.equal(flat(resumed), flat(whole))
    for mine, theirs in zip(
        resumed.optimizer.state_dict()["state"].values(),
        whole.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # What was handed in is still what it was.
    assert all(
        torch.equal(taken["optimizer_state"]["state"][0][name], value) for name, value in copies.items()
    )


def test_without_dropout_the_generator_can_be_rebuilt_from_the_seed(benchmark):
    whole, losses, taken = run_to(small(), benchmark, 12, take_at=5)
    resumed = TrainingLoop(small(), benchmark)
    torch.rand(17)
    resumed.restore(**taken | {"rng_state": None})
    assert [resumed.train_step().loss for _ in range(7)] == losses[5:]
    assert torch.equal(flat(resumed), flat(whole))


def test_with_dropout_the_generator_state_is_required(benchmark):
    config = small(**{"model.dropout": 0.2})
    _, _, taken = run_to(config, benchmark, 2, take_at=2)
    with pytest.raises(ValueError, match="dropout needs the checkpoint's generator state"):
        TrainingLoop(config, benchmark).restore(**taken | {"rng_state": None})


def test_without_loop_state_the_stream_restarts_at_the_seeds_first_permutation(benchmark):
    first = TrainingLoop(small(), benchmark).train_step().sample_ids
    _, _, taken = run_to(small(), benchmark, 4, take_at=4)
    resumed = TrainingLoop(small(), benchmark)
    resumed.train_step()
    resumed.restore(**taken | {"loop_state": None, "rng_state": None})
    metrics = resumed.train_step()
    assert (metrics.step, metrics.sample_ids) == (5, first)
    assert metrics.learning_rate == 0.01


def test_a_step_zero_checkpoint_and_a_state_without_the_tied_alias_restore(benchmark):
    loop = TrainingLoop(small(), benchmark)
    taken = checkpoint(loop)
    losses = [loop.train_step().loss for _ in range(2)]
    del taken["model_state"]["lm_head.weight"]
    loop.restore(**taken)
    assert [loop.train_step().loss for _ in range(2)] == losses
    assert loop.model.lm_head.weight is loop.model.token_embedding.weight


def test_states_of_another_run_are_refused(benchmark):
    _, _, taken = run_to(small(), benchmark, 1, take_at=1)
    with pytest.raises(ValueError, match="batch_size 16, not 8"):
        TrainingLoop(load_config("formation", **SMALL | {"batch_size": 8}), benchmark).restore(**taken)
    with pytest.raises(ValueError, match="trained on train, not test_iid"):
        TrainingLoop(small(), benchmark, train_split="test_iid").restore(**taken)
    wider = TrainingLoop(small(**{"model.d_ff": 48}), benchmark)
    with pytest.raises(RuntimeError, match="size mismatch"):
        wider.restore(**taken)
    with pytest.raises(ValueError, match="generated from another configuration"):
        TrainingLoop(small(**{"benchmark.seed": 8}), benchmark)
    with pytest.raises(ValueError, match="no split 'validation'; splits: train, validation_iid"):
        TrainingLoop(small(), benchmark).evaluate(["validation"])
    with pytest.raises(ValueError, match="device 'xpu' is not available here; available: cpu"):
        TrainingLoop(small(), benchmark, device="xpu")


def test_a_step_is_clipped_adamw_done_by_hand(benchmark):
    config = small(**{"optimization.grad_clip_norm": 0.05, "optimization.weight_decay": 0.1})
    loop, hand = TrainingLoop(config, benchmark), TrainingLoop(config, benchmark)
    first = [torch.zeros_like(p, dtype=torch.float64) for p in hand.model.parameters()]
    second = [moment.clone() for moment in first]
    weights = [p.detach().double() for p in hand.model.parameters()]
    for step in range(1, 5):
        metrics = loop.train_step()
        records = [r for r in benchmark.splits["train"] if r["sample_id"] in metrics.sample_ids]
        with torch.no_grad():
            for parameter, weight in zip(hand.model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        hand.model.zero_grad()
        total, count = 0.0, 0
        for record in records:
            tokens = torch.tensor([record["token_ids"]])
            log_probabilities = hand.model(tokens)[0, :-1].log_softmax(dim=-1)
            total = total - log_probabilities.gather(1, tokens[0, 1:, None]).sum()
            count += tokens.shape[1] - 1
        (total / count).backward()
        gradients = [p.grad.double() for p in hand.model.parameters()]
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        assert metrics.loss == pytest.approx(total.item() / count, rel=1e-5)
        assert metrics.pre_clip_grad_norm == pytest.approx(norm, rel=1e-4)
        assert metrics.clip_coefficient == pytest.approx(min(1, 0.05 / (norm + 1e-6)), rel=1e-4)
        assert metrics.clip_coefficient < 1
        rate = 0.01 * min(1, step / 5)
        for place, gradient in enumerate(gradients):
            clipped = gradient * min(1, 0.05 / (norm + 1e-6))
            first[place] = 0.9 * first[place] + 0.1 * clipped
            second[place] = 0.95 * second[place] + 0.05 * clipped**2
            direction = (first[place] / (1 - 0.9**step)) / ((second[place] / (1 - 0.95**step)).sqrt() + 1e-8)
            weights[place] = weights[place] * (1 - rate * 0.1) - rate * direction
        # A few gradients are near rounding noise, and Adam's first steps keep little but their sign.
        difference = (flat(loop).double() - torch.cat([weight.flatten() for weight in weights])).abs()
        assert difference.quantile(0.99) < 1e-7
        assert difference.max() < 1e-5
        weights = [p.detach().double() for p in loop.model.parameters()]


def test_a_loss_that_is_not_a_number_is_reported_and_the_loop_goes_on(benchmark):
    loop = TrainingLoop(small(), benchmark)
    loop.train_step()
    with torch.no_grad():
        loop.model.final_norm.weight[0] = math.nan
    for step in (2, 3):
        metrics = loop.train_step()
        assert metrics.step == step
        assert math.isnan(metrics.loss)
        assert math.isnan(metrics.pre_clip_grad_norm)
        assert math.isnan(metrics.clip_coefficient)
    assert math.isnan(loop.evaluate(["validation_iid"])["validation_iid"]["loss"])


def test_evaluating_changes_no_weight_and_no_mode(benchmark):
    loop = TrainingLoop(small(**{"model.dropout": 0.3}), benchmark)
    loop.train_step()
    before = flat(loop)
    first = loop.evaluate()
    assert torch.equal(flat(loop), before)
    assert loop.model.training
    assert loop.evaluate() == first
    assert list(first) == ["validation_iid", "heldout_pairs"]
    assert "q" in first["validation_iid"]
    assert "q" not in first["heldout_pairs"]
    # Two passes over the analysed split, one over the other; twice.
    assert loop.stream.draws == 2 + 2 * 3


def test_the_demo_is_on_its_way_after_250_steps():
    loop = TrainingLoop(load_config("demo"))
    assert loop.evaluate(["validation_iid"])["validation_iid"]["answer_accuracy"] < 0.15
    while loop.step < 250:
        loop.train_step()
    assert loop.evaluate(["validation_iid"])["validation_iid"]["answer_accuracy"] > 0.35

"""What the tap copies besides gradients: state, random numbers, other optimizers; and whose memory it is."""

import json

import pytest
import torch
from lakebed.engine.optimizer import AdamReplay, UnsupportedOptimizer, bits_equal
from lakebed.engine.tap import OptimizerTap
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 11)
        self.rare = nn.Linear(6, 6)

    def forward(self, tokens):
        return self.body(self.token(tokens))


TRAINED = {"token.weight", "body.weight", "body.bias"}


class Loop:
    def __init__(self, kind=torch.optim.AdamW, **options):
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = kind(self.model.parameters(), **({"lr": 1e-2, "weight_decay": 0.1} | options))
        self.generator = torch.Generator().manual_seed(1)

    def loss(self):
        tokens = torch.randint(0, 11, (16,), generator=self.generator)
        return nn.functional.cross_entropy(self.model(tokens[:-1]), tokens[1:])

    def gradients(self):
        named = self.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


def same(left, right):
    return left.keys() == right.keys() and all(bits_equal(left[name], right[name]) for name in left)


def test_state_before_and_after_are_copies_of_their_moment():
    loop = Loop()
    kept = []
    asked = []

    def want(kind):
        asked.append(kind)
        return (len(asked) - 1) // 2 % 2 == 0  # both sides of every second step

    with OptimizerTap(loop.model, loop.optimizer, kept.append, want):
        states = []
        for _ in range(4):
            states.append(snapshot(loop))
            loop.optimizer.zero_grad()
            loop.loss().backward()
            loop.optimizer.step()
        states.append(snapshot(loop))
    assert asked == ["before", "after"] * 4
    assert [step.before is None for step in kept] == [False, True, False, True]
    for index in (0, 2):
        for state, (weights, moments, count) in (
            (kept[index].before, states[index]),
            (kept[index].after, states[index + 1]),
        ):
            assert same(state.weights, weights)
            assert state.optimizer.keys() == moments.keys()
            assert all(same(state.optimizer[key], moments[key]) for key in moments)
            assert state.step_counts["body.bias"] == count
            assert state.step_counts["rare.bias"] == 0
    resumed = AdamReplay(
        kept[2].before.weights,
        kept[2].before.optimizer["exp_avg"],
        kept[2].before.optimizer["exp_avg_sq"],
        kept[2].before.step_counts,
    )
    for step in kept[2:]:
        resumed.step(step.gradients, step.clip_coefficient, step.groups, step.group_of)
    weights, moments, count = states[4]
    assert resumed.mismatches(weights, *moments.values(), dict.fromkeys(TRAINED, count)) == []


def snapshot(loop):
    named = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    state = {
        n: loop.optimizer.state[p] for n, p in loop.model.named_parameters() if p in loop.optimizer.state
    }
    moments = {
        key: {n: s[key].clone() for n, s in state.items()} for key in ("exp_avg", "exp_avg_sq") if state
    }
    return named, moments, int(state["body.bias"]["step"]) if state else 0


def test_buffers_stay_valid_until_released_and_are_reused_then():
    loop = Loop()
    kept = []
    with OptimizerTap(loop.model, loop.optimizer, kept.append, lambda kind: True):
        expected = []
        for _ in range(3):
            loop.optimizer.zero_grad()
            loop.loss().backward()
            expected.append(loop.gradients())
            loop.optimizer.step()
        assert all(same(step.gradients, raw) for step, raw in zip(kept, expected, strict=True))
        places = {step.gradients["body.bias"].data_ptr() for step in kept}
        weights = {step.before.weights["body.bias"].data_ptr() for step in kept}
        assert len(places) == len(weights) == 3
        for step in kept:
            step.release()
            step.release()  # harmless
        for _ in range(3):
            loop.optimizer.zero_grad()
            loop.loss().backward()
            loop.optimizer.step()
            kept[-1].release()
            weights_now = kept[-1].before.weights["body.bias"].data_ptr()
            assert weights_now in weights | {s.after.weights["body.bias"].data_ptr() for s in kept}
        assert any(step.gradients["body.bias"].data_ptr() in places for step in kept[3:])


def test_random_state_brackets_the_step():
    loop = Loop()
    torch.manual_seed(7)
    states = [torch.get_rng_state()]
    kept = []
    with OptimizerTap(loop.model, loop.optimizer, kept.append, record_rng=True):
        for _ in range(3):
            torch.rand(5)  # a shuffle, a dropout
            loop.optimizer.zero_grad()
            loop.loss().backward()
            loop.optimizer.step()
            states.append(torch.get_rng_state())
    for index, step in enumerate(kept):
        assert torch.equal(step.rng_before, states[index])
        assert torch.equal(step.rng_after, states[index + 1])
    assert not torch.equal(states[0], states[1])


def test_other_optimizers_only_in_full_mode():
    loop = Loop(torch.optim.SGD, momentum=0.9)
    with pytest.raises(UnsupportedOptimizer, match='store="full"'):
        OptimizerTap(loop.model, loop.optimizer, print)
    assert not loop.optimizer._optimizer_step_pre_hooks
    kept = []
    with OptimizerTap(loop.model, loop.optimizer, kept.append, lambda kind: True, replayable=False):
        for _ in range(3):
            loop.optimizer.zero_grad()
            loop.loss().backward()
            raw = loop.gradients()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
            assert same(kept[-1].gradients, raw)
            assert kept[-1].clip_coefficient < 1
    last = kept[-1]
    assert json.loads(json.dumps(last.groups))[0]["momentum"] == 0.9
    assert same(last.after.weights, dict(loop.model.named_parameters()))
    body = loop.model.body.weight
    assert bits_equal(
        last.after.optimizer["momentum_buffer"]["body.weight"], loop.optimizer.state[body]["momentum_buffer"]
    )
    assert not bits_equal(last.before.weights["body.weight"], body.detach())


def test_an_optimizer_that_overwrites_the_gradient_in_full_mode():
    class Overwriting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(-1).add_(parameter.detach())
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(0.5)
            return loss

    loop = Loop(Overwriting, weight_decay=0.0)
    kept, asked = [], []

    def want(kind):
        asked.append(kind)
        return True

    with OptimizerTap(loop.model, loop.optimizer, kept.append, want, replayable=False):
        for _ in range(2):
            loop.optimizer.zero_grad()
            loop.loss().backward()
            raw = loop.gradients()
            loop.optimizer.step()  # torch calls the hooks twice: for this step, and for the one it calls
            assert kept[-1].clip_coefficient == 1.0
            assert same(kept[-1].gradients, raw)
            assert same(kept[-1].after.weights, dict(loop.model.named_parameters()))
    assert asked == ["before", "after"] * 2
    assert len(kept) == 2

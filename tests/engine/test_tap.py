"""The tap inside the training loops people write: what it reports must replay their weights bit for bit."""

import math

import pytest
import torch
from lakebed.engine.optimizer import (
    AdamReplay,
    OptimizerError,
    ParameterMismatch,
    UnsupportedOptimizer,
    bits_equal,
)
from lakebed.engine.tap import OptimizerTap
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model(nn.Module):
    """Tied embedding, a part used on request only, a frozen part."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.rare = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.unembed = nn.Linear(6, 11, bias=False)
        self.unembed.weight = self.token.weight

    def forward(self, tokens, rare=False):
        x = self.body(self.token(tokens)).tanh() + self.frozen(self.token(tokens))
        return self.unembed(self.rare(x) if rare else x)


class Follower:
    """Replays every captured step and keeps what the tests look at; hands its buffers back as a recorder would."""

    def __init__(self, model):
        self.replay = AdamReplay(dict(model.named_parameters()))
        self.steps, self.gradients = [], []

    def __call__(self, step):
        self.replay.step(step.applied or step.gradients, step.clip_coefficient, step.groups, step.group_of)
        self.steps.append(step)
        self.gradients.append({name: gradient.clone() for name, gradient in step.gradients.items()})
        step.release()

    def check(self, model, optimizer):
        named = dict(model.named_parameters())
        stepped = {name: optimizer.state[p] for name, p in named.items() if p in optimizer.state}
        moments = ({n: s[key] for n, s in stepped.items()} for key in ("exp_avg", "exp_avg_sq"))
        counts = {n: int(s["step"]) for n, s in stepped.items()}
        assert self.replay.mismatches(named, *moments, counts) == []
        assert self.steps[-1].step_counts == counts | dict.fromkeys(
            set(self.steps[-1].group_of) - set(counts), 0
        )


class Loop:
    def __init__(self, kind=torch.optim.AdamW, groups=None, **options):
        torch.manual_seed(0)
        self.model = Model()
        parameters = groups(self.model) if groups else self.model.parameters()
        self.optimizer = kind(parameters, **({"lr": 1e-2, "weight_decay": 0.1} | options))
        self.generator = torch.Generator().manual_seed(1)
        self.follower = Follower(self.model)

    def tap(self, **options):
        return OptimizerTap(self.model, self.optimizer, self.follower, **options)

    def loss(self, **options):
        tokens = torch.randint(0, 11, (16,), generator=self.generator)
        return nn.functional.cross_entropy(self.model(tokens[:-1], **options), tokens[1:])

    def gradients(self):
        named = self.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


def same(left, right):
    return left.keys() == right.keys() and all(bits_equal(left[name], right[name]) for name in left)


TRAINED = {"token.weight", "body.weight", "body.bias"}


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"weight_decay": 0.0}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_plain_loop_with_schedule(kind, options, set_to_none):
    loop = Loop(kind, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: (1 + step) / 10)
    rates = []
    with loop.tap():
        for _ in range(10):
            loop.optimizer.zero_grad(set_to_none=set_to_none)
            loop.loss().backward()
            raw = loop.gradients()
            rates.append(loop.optimizer.param_groups[0]["lr"])
            loop.optimizer.step()
            scheduler.step()
            assert same(loop.follower.gradients[-1], raw)
    loop.follower.check(loop.model, loop.optimizer)
    steps = loop.follower.steps
    assert (
        set(steps[-1].gradients) == TRAINED
    )  # the tied name once, the frozen and the unused part not at all
    assert [step.groups[0].learning_rate for step in steps] == rates
    assert rates[0] != rates[1]
    assert [step.index for step in steps] == list(range(10))
    assert {step.clip_coefficient for step in steps} == {1.0}
    assert all(step.applied is None and step.before is None and step.after is None for step in steps)
    assert steps[-1].step_counts["frozen.weight"] == 0
    assert steps[-1].step_counts["body.bias"] == 10


def test_norm_clipping_active_and_not():
    loop = Loop()
    expected = []
    with loop.tap():
        for step in range(12):
            loop.optimizer.zero_grad()
            loop.loss().backward()
            raw, limit = loop.gradients(), 0.05 if step % 2 else 1e6
            norm = nn.utils.clip_grad_norm_(loop.model.parameters(), limit)
            expected.append(float(torch.clamp(limit / (norm + 1e-6), max=1.0)))
            loop.optimizer.step()
            assert same(loop.follower.gradients[-1], raw)
    assert [step.clip_coefficient for step in loop.follower.steps] == expected
    assert sum(coefficient < 1 for coefficient in expected) == 6
    loop.follower.check(loop.model, loop.optimizer)


def test_value_clipping_has_no_scalar():
    loop = Loop()
    with loop.tap():
        for _ in range(5):
            loop.optimizer.zero_grad()
            loop.loss().backward()
            raw = loop.gradients()
            nn.utils.clip_grad_value_(loop.model.parameters(), 0.01)
            loop.optimizer.step()
            step = loop.follower.steps[-1]
            assert step.clip_coefficient is None
            assert same(loop.follower.gradients[-1], raw)
            assert same(step.applied, loop.gradients())
    loop.follower.check(loop.model, loop.optimizer)


def test_gradient_accumulation_reports_the_sum():
    loop = Loop()
    with loop.tap():
        for _ in range(5):
            loop.optimizer.zero_grad()
            loop.loss(rare=True).backward()
            loop.loss().backward()  # `rare` has its whole gradient from the first micro-batch
            raw = loop.gradients()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
            assert same(loop.follower.gradients[-1], raw)
            assert loop.follower.steps[-1].clip_coefficient < 1
    assert "rare.weight" in loop.follower.steps[0].gradients
    loop.follower.check(loop.model, loop.optimizer)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_parameter_unused_in_some_steps(set_to_none):
    loop = Loop()
    with loop.tap():
        for step in range(9):
            loop.optimizer.zero_grad(set_to_none=set_to_none)
            loop.loss(rare=step % 3 == 1).backward()
            raw = loop.gradients()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
            assert same(loop.follower.gradients[-1], raw)
            assert loop.follower.steps[-1].clip_coefficient is not None
    # Zeroed instead of dropped, the gradient is there in every step after its first.
    present = [step for step in range(9) if "rare.bias" in loop.follower.gradients[step]]
    assert present == ([1, 4, 7] if set_to_none else [1, 2, 3, 4, 5, 6, 7, 8])
    loop.follower.check(loop.model, loop.optimizer)


def test_a_batch_that_is_thrown_away_leaves_no_trace():
    loop = Loop()
    with loop.tap():
        for _ in range(3):
            loop.loss(rare=True).backward()
            loop.optimizer.zero_grad(set_to_none=False)  # a skipped batch: seen, zeroed, never applied
            loop.loss().backward()
            raw = loop.gradients()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
            assert same(loop.follower.gradients[-1], raw)
            assert loop.follower.steps[-1].clip_coefficient < 1
            loop.optimizer.zero_grad(set_to_none=False)
    assert not loop.follower.gradients[-1]["rare.weight"].any()
    loop.follower.check(loop.model, loop.optimizer)


def test_gradients_set_by_hand():
    loop = Loop()
    with loop.tap():
        for _ in range(3):
            loop.optimizer.zero_grad()
            parameters = [p for p in loop.model.parameters() if p.requires_grad]
            found = torch.autograd.grad(loop.loss(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            loop.optimizer.step()
            assert same(loop.follower.gradients[-1], loop.gradients())
    loop.follower.check(loop.model, loop.optimizer)


@pytest.mark.parametrize("as_keyword", [True, False])
def test_closure(as_keyword):
    loop = Loop()
    seen = []

    def closure():
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        seen.append(loop.gradients())
        nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
        return loss

    with loop.tap():
        for _ in range(4):
            loss = loop.optimizer.step(closure=closure) if as_keyword else loop.optimizer.step(closure)
            assert loss.ndim == 0
    assert len(seen) == 4
    assert all(same(*pair) for pair in zip(loop.follower.gradients, seen, strict=True))
    assert all(step.clip_coefficient < 1 for step in loop.follower.steps)
    loop.follower.check(loop.model, loop.optimizer)


def test_two_groups_one_of_them_added_late_and_a_part_unfrozen():
    loop = Loop(groups=lambda model: [{"params": [model.token.weight], "lr": 5e-2}])
    with loop.tap():
        for step in range(8):
            if step == 3:
                decayed = {"params": loop.model.body.parameters(), "weight_decay": 0.5}
                loop.optimizer.add_param_group(decayed)
                loop.optimizer.add_param_group(
                    {"params": loop.model.frozen.parameters(), "betas": (0.5, 0.6)}
                )
            if step == 5:
                loop.model.frozen.requires_grad_(True)
            loop.model.zero_grad()
            loop.loss().backward()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
    steps = loop.follower.steps
    assert [len(step.groups) for step in steps] == [1] * 3 + [3] * 5
    assert steps[-1].group_of["body.bias"] == 1
    assert steps[-1].groups[1].weight_decay == 0.5
    assert (steps[-1].groups[2].beta1, steps[-1].groups[2].beta2) == (0.5, 0.6)
    assert all(step.clip_coefficient is not None for step in steps)  # first steps of late parameters too
    assert ["frozen.bias" in step.gradients for step in steps] == [False] * 5 + [True] * 3
    loop.follower.check(loop.model, loop.optimizer)


def test_a_norm_that_is_not_finite():
    loop = Loop()
    with loop.tap():
        for factor in (1.0, math.nan):
            loop.optimizer.zero_grad()
            (loop.loss() * factor).backward()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
    assert loop.follower.steps[1].clip_coefficient == 1.0  # already all NaN: nothing was changed
    assert loop.model.body.weight.isnan().all()
    loop.follower.check(loop.model, loop.optimizer)


def test_the_tap_changes_nothing_and_leaves_nothing():
    def train(tapped):
        loop = Loop()
        tap = loop.tap() if tapped else None
        for step in range(6):
            if step == 4 and tap:
                tap.detach()
                tap.detach()  # harmless
            loop.optimizer.zero_grad()
            loop.loss(rare=True).backward()
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            loop.optimizer.step()
        return loop

    tapped, bare = train(True), train(False)
    assert same(dict(tapped.model.named_parameters()), dict(bare.model.named_parameters()))
    assert len(tapped.follower.steps) == 4
    assert not tapped.optimizer._optimizer_step_pre_hooks
    assert not tapped.optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in tapped.model.parameters())
    assert [p.requires_grad for p in tapped.model.parameters()] == [
        p.requires_grad for p in bare.model.parameters()
    ]


def test_an_exception_in_on_step_stops_the_training_loop():
    loop = Loop()

    def fail(step):
        raise OSError("disk full")

    with OptimizerTap(loop.model, loop.optimizer, fail):
        loop.loss().backward()
        with pytest.raises(OSError, match="disk full"):
            loop.optimizer.step()


def test_gradients_that_vanish_after_the_update_are_an_error():
    loop = Loop()
    loop.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
    with loop.tap():
        loop.loss().backward()
        with pytest.raises(OptimizerError, match=r"token\.weight was updated 1 time\(s\) .* left 0 gradient"):
            loop.optimizer.step()


def test_clipping_in_a_hook_that_runs_after_the_taps():
    loop = Loop()
    with loop.tap():
        loop.optimizer.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1) and None
        )
        for _ in range(3):
            loop.optimizer.zero_grad()
            loop.loss().backward()
            loop.optimizer.step()
    assert all(step.clip_coefficient < 1 for step in loop.follower.steps)
    loop.follower.check(loop.model, loop.optimizer)


def test_what_cannot_be_recorded_is_refused():
    loop = Loop()
    foreign = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ParameterMismatch, match="does not name"):
        OptimizerTap(loop.model, foreign, loop.follower)
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with OptimizerTap(model, optimizer, loop.follower, replayable=False):
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(UnsupportedOptimizer, match="gradient of weight is sparse"):
            optimizer.step()
    with loop.tap():
        loop.loss().backward()
        loop.optimizer.grad_scale = torch.tensor(2.0)
        with pytest.raises(UnsupportedOptimizer, match="inside the step"):
            loop.optimizer.step()

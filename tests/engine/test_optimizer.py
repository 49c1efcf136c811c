"""The replay against live torch optimizers, bit for bit, and against float64 written from the papers."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine import optimizer as module
from lakebed.engine.optimizer import (
    AdamGroup,
    AdamReplay,
    ParameterMismatch,
    UnsupportedOptimizer,
    check_supported,
    clip_coefficient,
    numeric_environment,
    parameter_groups,
)
from torch import nn

IMPLEMENTATIONS = [{}, {"foreach": True}, {"fused": True}]
KINDS = [torch.optim.AdamW, torch.optim.Adam]


@pytest.fixture(autouse=True)
def _one_thread():
    """These tensors are tiny: a second thread only waits for the first, and slows a busy machine down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TinyTransformer(nn.Module):
    """One attention block with tied embeddings and sizes that are no multiple of a vector register."""

    def __init__(self, vocabulary=37, width=12, length=7):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.hidden = nn.Linear(width, 45)
        self.back = nn.Linear(45, width)
        self.extra = nn.Parameter(torch.randn(5))
        self.unembed = nn.Linear(width, vocabulary, bias=False)
        self.unembed.weight = self.token.weight

    def forward(self, tokens, use_extra=True):
        x = self.token(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.back(nn.functional.gelu(self.hidden(self.norm(x))))
        logits = self.unembed(x)
        return logits + self.extra.sum() * logits.detach().cos() if use_extra else logits


def loss_of(model, generator, **options):
    tokens = torch.randint(0, 37, (4, 8), generator=generator)
    logits = model(tokens[:, :-1], **options)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def adam_state(model, optimizer):
    named = dict(model.named_parameters())
    stepped = {name: optimizer.state[p] for name, p in named.items() if p in optimizer.state}
    moments = ({n: s[key] for n, s in stepped.items()} for key in ("exp_avg", "exp_avg_sq"))
    return named, *moments, {n: int(s["step"]) for n, s in stepped.items()}


def train_step(model, optimizer, generator, max_norm, use_extra=True):
    """One step of a plain loop; returns what a recorder would store: gradients, coefficient, groups, group_of."""
    optimizer.zero_grad()
    loss_of(model, generator, use_extra=use_extra).backward()
    named, group_of = parameter_groups(model, optimizer)
    raw = {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    present = {n: g for n, g in raw.items() if g is not None}
    coefficient = clip_coefficient(present, {n: named[n].grad for n in present})
    expected = float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    assert coefficient == expected
    groups = [AdamGroup.from_param_group(optimizer, group) for group in optimizer.param_groups]
    optimizer.step()
    return raw, coefficient, groups, group_of


@pytest.mark.parametrize("unused_sometimes", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_replay_bit_for_bit(kind, implementation, weight_decay, unused_sometimes):
    torch.manual_seed(1)
    model, generator = TinyTransformer(), torch.Generator().manual_seed(2)
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=weight_decay, **implementation)
    replay = AdamReplay(dict(model.named_parameters()))
    start = {name: weight.clone() for name, weight in replay.weights.items()}
    coefficients = []
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.sin(step))
        if step == 30:
            optimizer.param_groups[0].update(betas=(0.8, 0.95), weight_decay=2 * weight_decay)
        use_extra = not unused_sometimes or step % 3 == 1  # so its first gradient, and state, come late
        record = train_step(model, optimizer, generator, 0.5 if step % 2 else 1e9, use_extra)
        coefficients.append(record[1])
        replay.step(*record)
        assert replay.mismatches(*adam_state(model, optimizer)) == []
    assert set(coefficients[::2]) == {1.0}
    assert max(coefficients[1::2]) < 1.0
    assert replay.step_counts["extra"] == (17 if unused_sometimes else 50)
    assert not any(torch.equal(start[name], weight) for name, weight in replay.weights.items())


def test_replay_starts_anywhere_and_sees_every_bit():
    torch.manual_seed(1)
    model, generator = TinyTransformer(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        train_step(model, optimizer, generator, 1.0)
    replay = AdamReplay(*adam_state(model, optimizer))
    for _ in range(5):
        replay.step(*train_step(model, optimizer, generator, 1.0))
    assert replay.mismatches(*adam_state(model, optimizer)) == []
    weights, m, v, counts = adam_state(model, optimizer)
    pattern = m["out.bias"].view(torch.int32)
    pattern[3] ^= 1
    counts["qkv.bias"] += 1
    assert replay.mismatches(weights, m, v, counts) == ["exp_avg out.bias", "step qkv.bias"]
    del weights["token.weight"]
    assert "weight token.weight" in replay.mismatches(weights, m, v, counts)


def test_parameter_group_added_on_the_way():
    torch.manual_seed(1)
    model, generator = TinyTransformer(), torch.Generator().manual_seed(2)
    late = [model.out.weight, model.extra]
    early = [p for p in model.parameters() if all(p is not other for other in late)]
    optimizer = torch.optim.AdamW(early, lr=1e-3)
    replay = AdamReplay(dict(model.named_parameters()))
    for step in range(12):
        if step == 4:
            optimizer.add_param_group({"params": late, "lr": 5e-3, "weight_decay": 0.0, "eps": 1e-6})
        replay.step(*train_step(model, optimizer, generator, 1.0))
    assert replay.mismatches(*adam_state(model, optimizer)) == []
    assert replay.step_counts["extra"] == 8


AWKWARD = {"long": (98_312 + 5,), "matrix": (181, 367), "row": (1, 33), "one": (1,), "scalar": ()}


def awkward_gradients(steps):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield {
            name: torch.randn(shape, generator=generator)
            * torch.randn(shape, generator=generator).mul(4).exp()
            for name, shape in AWKWARD.items()
        }


def replay_awkward(threads, implementation, kind):
    torch.set_num_threads(threads)
    replay = AdamReplay({name: torch.ones(shape) for name, shape in AWKWARD.items()})
    group = AdamGroup(1e-3, 0.9, 0.999, 1e-8, 0.1, kind is torch.optim.AdamW, **implementation)
    for raw in awkward_gradients(4):
        replay.step(raw, 0.25, [group], dict.fromkeys(AWKWARD, 0))
    return replay


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_thread_nor_thread_count_changes_a_bit(kind, implementation):
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in AWKWARD.items()})
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1, **implementation)
    torch.set_num_threads(2)
    for raw in awkward_gradients(4):
        for name, parameter in model.items():
            parameter.grad = raw[name] * 0.25
        optimizer.step()
    for threads in (1, 2):
        replays = []
        worker = threading.Thread(
            target=lambda n=threads, out=replays: out.append(replay_awkward(n, implementation, kind))
        )
        worker.start()
        worker.join()
        assert replays[0].mismatches(*adam_state(model, optimizer)) == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flat_and_separate_buffers_agree(monkeypatch, implementation):
    flat = replay_awkward(2, implementation, torch.optim.AdamW)
    monkeypatch.setattr(module, "_position_independent", lambda *_: False)
    separate = replay_awkward(2, implementation, torch.optim.AdamW)
    state = separate.weights, separate.exp_avg, separate.exp_avg_sq, separate.step_counts
    assert flat.mismatches(*state) == []


def test_a_kernel_whose_tail_rounds_differently_is_not_run_flat(monkeypatch):
    module._position_independent.cache_clear()
    update = module._update

    def uneven(group, weights, *rest, counts):
        update(group, weights, *rest, counts=counts)
        for weight in weights:
            weight[weight.numel() // 16 * 16 :] += 1e-3  # a "tail" that comes out otherwise

    flags = torch.float32, torch.device("cpu"), True, False, None, None
    assert module._position_independent(*flags)
    module._position_independent.cache_clear()
    monkeypatch.setattr(module, "_update", uneven)
    assert not module._position_independent(*flags)
    module._position_independent.cache_clear()


def test_replay_leaves_the_random_numbers_alone():
    module._position_independent.cache_clear()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    replay_awkward(1, {}, torch.optim.AdamW)
    assert torch.equal(state, torch.get_rng_state())


def adam_by_hand(theta, gradients, rates, beta1, beta2, eps, decay, decoupled):
    """Kingma & Ba's algorithm 1 (with Loshchilov & Hutter's line 12), in float64 NumPy."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        if decoupled:
            theta = theta - rate * decay * theta
        else:
            g = g + decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * np.square(g)
        m_hat, v_hat = m / (1 - np.power(beta1, t)), v / (1 - np.power(beta2, t))
        theta = theta - rate * m_hat / (np.sqrt(v_hat) + eps)
    return theta, m, v


@pytest.mark.parametrize("decoupled", [True, False])
def test_replay_follows_the_papers(decoupled):
    source = np.random.default_rng(0)
    theta, gradients = source.normal(size=(6, 4)), source.normal(size=(40, 6, 4))
    rates = 1e-2 * (1 + np.arange(40)) / 40
    replay = AdamReplay({"w": torch.tensor(theta, dtype=torch.float32)})
    for gradient, rate in zip(gradients, rates, strict=True):
        group = AdamGroup(float(rate), 0.9, 0.99, 1e-6, 0.05, decoupled)
        replay.step({"w": torch.tensor(gradient, dtype=torch.float32)}, 0.5, [group], {"w": 0})
    expected = adam_by_hand(theta, gradients / 2, rates, 0.9, 0.99, 1e-6, 0.05, decoupled)
    for tensor, array in zip((replay.weights, replay.exp_avg, replay.exp_avg_sq), expected, strict=True):
        np.testing.assert_allclose(tensor["w"].numpy(), array, rtol=2e-6, atol=1e-6)
    wrong = adam_by_hand(theta, gradients / 2, rates, 0.9, 0.99, 1e-6, 0.05, not decoupled)
    assert np.abs(replay.weights["w"].numpy() - wrong[0]).max() > 1e-4


def test_replay_names_what_does_not_fit():
    replay, group = AdamReplay({"w": torch.ones(3)}), AdamGroup(1e-3, 0.9, 0.999, 1e-8, 0.0)
    with pytest.raises(ParameterMismatch, match="no weights of v"):
        replay.step({}, None, [group], {"w": 0, "v": 0})
    with pytest.raises(ParameterMismatch, match="no optimizer group: v"):
        replay.step({"v": torch.ones(3)}, None, [group], {"w": 0})
    with pytest.raises(ParameterMismatch, match=r"gradient of w .*\(3,\)"):
        replay.step({"w": torch.ones(4)}, None, [group], {"w": 0})


# -- which optimizers, which parameters ------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(numbers=st.tuples(*[st.floats(0, 1, allow_subnormal=True)] * 5), flags=st.tuples(*[st.booleans()] * 3))
def test_group_survives_json(numbers, flags):
    group = AdamGroup(*numbers, *flags[:2], foreach=None, fused=flags[2])
    assert AdamGroup.from_json(json.loads(json.dumps(group.to_json()))) == group


def test_group_reads_what_torch_will_apply():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, fused=True)
    group = AdamGroup.from_param_group(optimizer, optimizer.param_groups[0])
    assert group == AdamGroup(1.0, 0.8, 0.9, 1e-6, 0.3, decoupled=True, foreach=None, fused=True)
    optimizer = torch.optim.Adam([parameter], maximize=True, foreach=False)
    group = AdamGroup.from_param_group(optimizer, optimizer.param_groups[0])
    assert group == AdamGroup(1e-3, 0.9, 0.999, 1e-8, 0.0, decoupled=False, maximize=True, foreach=False)


class OwnStep(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class OnlyRenamed(torch.optim.Adam):
    pass


def test_supported_optimizers():
    parameters = [nn.Parameter(torch.ones(2))]
    for optimizer in (torch.optim.AdamW(parameters), torch.optim.Adam(parameters), OnlyRenamed(parameters)):
        check_supported(optimizer)
    with pytest.raises(UnsupportedOptimizer, match=r'SGD .*store="full"'):
        check_supported(torch.optim.SGD(parameters))
    with pytest.raises(UnsupportedOptimizer, match=r"OwnStep .*overrides AdamW\.step"):
        check_supported(OwnStep(parameters))
    for options in ({"amsgrad": True}, {"capturable": True}, {"differentiable": True}):
        with pytest.raises(UnsupportedOptimizer, match=f"{next(iter(options))}=True"):
            check_supported(torch.optim.AdamW(parameters, **options))
    with pytest.raises(UnsupportedOptimizer, match="learning_rate is a Tensor"):
        check_supported(torch.optim.AdamW(parameters, lr=torch.tensor(1e-3)))
    optimizer = torch.optim.AdamW(parameters)
    optimizer.param_groups[0]["lr"] = np.float32(1e-3)
    with pytest.raises(UnsupportedOptimizer, match="learning_rate is a float32"):
        check_supported(optimizer)
    with pytest.raises(UnsupportedOptimizer, match="complex"):
        check_supported(torch.optim.Adam([nn.Parameter(torch.ones(2, dtype=torch.complex64))]))


def test_parameters_are_named_once_and_all():
    model = TinyTransformer()
    optimizer = torch.optim.AdamW([{"params": [model.extra]}, {"params": model.qkv.parameters()}])
    named, group_of = parameter_groups(model, optimizer)
    assert group_of == {"extra": 0, "qkv.weight": 1, "qkv.bias": 1}
    assert named["extra"] is model.extra
    tied = parameter_groups(model, torch.optim.AdamW(model.parameters()))[0]
    assert "token.weight" in tied
    assert "unembed.weight" not in tied
    with pytest.raises(ParameterMismatch, match=r"1 parameter\(s\) .*\(2, 3\)"):
        parameter_groups(model, torch.optim.AdamW([model.extra, nn.Parameter(torch.ones(2, 3))]))
    optimizer.param_groups[1]["params"].append(model.extra)
    with pytest.raises(ParameterMismatch, match="groups 0 and 1"):
        parameter_groups(model, optimizer)


def test_numeric_environment_tells_what_can_change_bits():
    environment = numeric_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["threads"] == torch.get_num_threads()
    if torch.set_flush_denormal(True):
        try:
            assert numeric_environment()["flush_denormal"]
        finally:
            torch.set_flush_denormal(False)
    assert not numeric_environment()["flush_denormal"]

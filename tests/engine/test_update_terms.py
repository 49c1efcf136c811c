"""The split of an update against the real update, and against the papers' formula in plain Python floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.optimizer import split_update
from torch import nn


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_terms_add_up_to_the_real_update(kind, maximize):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(9, 5))
    optimizer = kind([parameter], lr=3e-3, betas=(0.85, 0.97), eps=1e-5, weight_decay=0.2, maximize=maximize)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 8):
        raw = torch.randn(9, 5, generator=generator)
        before = parameter.detach().clone()
        state = {key: value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
        parameter.grad = raw * 0.125
        optimizer.step()
        actual = parameter.detach() - before
        terms = split_update(
            before,
            raw,
            state.get("exp_avg"),
            state.get("exp_avg_sq"),
            step=step,
            learning_rate=3e-3,
            beta1=0.85,
            beta2=0.97,
            eps=1e-5,
            weight_decay=0.2,
            clip_coefficient=0.125,
            decoupled=kind is torch.optim.AdamW,
            maximize=maximize,
            actual=actual,
        )
        # One rounding per operation on the weight: a few units in the last place of the weight, of the update.
        rounding = 3e-7 * before.abs().double() + 1e-6 * terms.reconstructed.abs()
        assert (terms.residual.abs() <= rounding).all()
        assert torch.equal(terms.residual, actual.double() - terms.reconstructed)
        assert torch.equal(terms.adam_historical_momentum, torch.zeros(9, 5).double()) == (step == 1)
        sign = -1 if maximize else 1
        assert torch.allclose(terms.raw_sgd, -sign * 3e-3 * raw.double(), rtol=1e-12)
        assert torch.allclose(terms.clipped_sgd, 0.125 * terms.raw_sgd, rtol=1e-12)
        assert terms.weight_decay.abs().max() > 1e-5


finite = st.floats(-10, 10, width=32)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(finite, finite, finite, st.floats(0, 10, width=32)), min_size=1, max_size=6),
    step=st.integers(1, 10_000),
    rate=st.floats(1e-7, 1.0),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.1, 0.9999),
    decay=st.floats(0.0, 0.5),
    clip=st.floats(1e-3, 1.0),
    decoupled=st.booleans(),
)
def test_identities_and_the_textbook_formula(values, step, rate, beta1, beta2, decay, clip, decoupled):
    weight, gradient, m, v = (
        torch.tensor(column, dtype=torch.float32) for column in zip(*values, strict=True)
    )
    terms = split_update(
        weight,
        gradient,
        m,
        v,
        step=step,
        learning_rate=rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        clip_coefficient=clip,
        decoupled=decoupled,
    )
    assert terms.residual is None
    assert "residual" not in terms.as_dict()
    for one, two, total in [
        (terms.adam_current_gradient, terms.adam_historical_momentum, terms.adam_preconditioned),
        (terms.adam_preconditioned, terms.weight_decay, terms.reconstructed),
    ]:
        scale = 1e-12 * (one.abs() + two.abs()).max().item()
        torch.testing.assert_close(one + two, total, rtol=1e-9, atol=scale)
    for i, (theta, g, m_i, v_i) in enumerate(values):
        g_used = clip * g + (0.0 if decoupled else decay * theta)
        m_new, v_new = beta1 * m_i + (1 - beta1) * g_used, beta2 * v_i + (1 - beta2) * g_used**2
        denominator = math.sqrt(v_new) / math.sqrt(1 - beta2**step) + 1e-8
        expected = -rate / (1 - beta1**step) * m_new / denominator - (
            rate * decay * theta if decoupled else 0
        )
        tolerance = 1e-9 * float(
            terms.adam_current_gradient[i].abs() + terms.adam_historical_momentum[i].abs()
        )
        np.testing.assert_allclose(terms.reconstructed[i].item(), expected, 1e-9, tolerance + 1e-18)


def test_many_steps_at_once_equal_one_by_one():
    generator = torch.Generator().manual_seed(0)
    weight, gradient, m, v, actual = (torch.randn(4, 3, 2, generator=generator) for _ in range(5))
    v = v.square()
    rates, clips, steps = [1e-3, 2e-3, 3e-3, 4e-3], [1.0, 0.5, 0.25, 0.1], [7, 8, 9, 10]
    options = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-6}
    together = split_update(
        weight,
        gradient,
        m,
        v,
        step=steps,
        learning_rate=rates,
        clip_coefficient=clips,
        actual=actual,
        **options,
    ).as_dict()
    for i in range(4):
        one = split_update(
            weight[i],
            gradient[i],
            m[i],
            v[i],
            step=steps[i],
            learning_rate=rates[i],
            clip_coefficient=clips[i],
            actual=actual[i],
            **options,
        ).as_dict()
        assert one.keys() == together.keys()
        for name, term in one.items():
            assert term.dtype == torch.float64
            torch.testing.assert_close(together[name][i], term, rtol=1e-14, atol=0)


def test_split_takes_the_applied_gradient_where_no_scalar_explains_it():
    weight, raw = torch.ones(3), torch.tensor([4.0, -5.0, 0.5])
    terms = split_update(
        weight, raw, None, None, step=1, learning_rate=0.1, applied_gradient=raw.clamp(-1, 1), eps=0.0
    )
    torch.testing.assert_close(
        terms.clipped_sgd, torch.tensor([-0.1, 0.1, -0.05]).double(), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(terms.raw_sgd, -0.1 * raw.double())
    torch.testing.assert_close(terms.reconstructed, -0.1 * raw.double().sign(), rtol=1e-7, atol=0)


def test_split_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="exp_avg has shape"):
        split_update(torch.ones(2), torch.ones(2), torch.ones(3), torch.ones(2), step=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="one per step"):
        split_update(torch.ones(2, 3), torch.ones(2, 3), None, None, step=1, learning_rate=[0.1, 0.2, 0.3])

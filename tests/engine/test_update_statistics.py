"""Norms, products and terms of one step against NumPy written out by hand, on a model trained a little."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.optimizer import AdamGroup, AdamReplay, split_update
from lakebed.engine.update_statistics import ParameterStep, parameter_statistics


def stepped(seed=0, size=40, steps=4, clip=0.3, group=None, dtype=torch.float32):
    """The last of a few Adam steps on noisy quadratics, as a ParameterStep, with its group."""
    generator = torch.Generator().manual_seed(seed)
    group = group or AdamGroup(3e-2, 0.9, 0.95, 1e-8, 0.1)
    replay = AdamReplay({"w": torch.randn(size, generator=generator).to(dtype)})
    for _ in range(steps):
        before, m, v = (
            replay.weights["w"].clone(),
            replay.exp_avg["w"].clone(),
            replay.exp_avg_sq["w"].clone(),
        )
        gradient = replay.weights["w"] + torch.randn(size, generator=generator).to(dtype)
        replay.step({"w": gradient}, clip, [group], {"w": 0})
    after, m1, v1 = replay.weights["w"], replay.exp_avg["w"], replay.exp_avg_sq["w"]
    return ParameterStep(before, after, gradient, gradient * clip, m, m1, v, v1, group, steps)


def by_hand(step: ParameterStep) -> dict:
    w0, w1, g, gc, m0, m1, v0, v1 = (
        tensor.double().numpy()
        for tensor in (
            step.weight_before, step.weight_after, step.gradient, step.applied,
            step.exp_avg_before, step.exp_avg_after, step.exp_avg_sq_before, step.exp_avg_sq_after,
        )
    )  # fmt: skip
    group, k = step.group, step.step_count
    update = w1 - w0
    coupled = 0 if group.decoupled else group.weight_decay * w0
    v = group.beta2 * v0 + (1 - group.beta2) * (gc + coupled) ** 2
    rate = group.learning_rate / (1 - group.beta1**k) / (np.sqrt(v / (1 - group.beta2**k)) + group.eps)
    current, momentum = -rate * (1 - group.beta1) * gc, -rate * group.beta1 * m0
    decay = (
        -group.learning_rate * group.weight_decay * w0
        if group.decoupled
        else -rate * (1 - group.beta1) * coupled
    )
    residual = update - current - momentum - decay
    cosine = lambda a, b: (a @ b) / np.sqrt((a @ a) * (b @ b))  # noqa: E731
    norm = lambda a: np.sqrt((a * a).sum())  # noqa: E731
    return {
        "numel": w0.size,
        "has_gradient": True,
        "optimizer_step": k,
        "nonfinite_gradient_entries": 0,
        "weight_l2_before": norm(w0),
        "weight_l2": norm(w1),
        "gradient_l2": norm(g),
        "gradient_max_abs": abs(g).max(),
        "clipped_gradient_l2": norm(gc),
        "delta_l2": norm(update),
        "delta_max_abs": abs(update).max(),
        "exp_avg_l2": norm(m1),
        "exp_avg_sq_l2": norm(v1),
        "update_dot_negative_gradient": -update @ g,
        "update_dot_negative_clipped_gradient": -update @ gc,
        "update_dot_weight": update @ w0,
        "gradient_dot_weight": g @ w0,
        "gradient_dot_exp_avg_before": gc @ m0,
        "update_gradient_cosine": cosine(update, -g),
        "update_weight_cosine": cosine(update, w0),
        "gradient_momentum_cosine": cosine(gc, m0),
        "update_momentum_cosine": cosine(update, -m1),
        "current_gradient_l2": norm(current),
        "momentum_l2": norm(momentum),
        "weight_decay_l2": norm(decay),
        "residual_l2": norm(residual),
        "raw_sgd_l2": group.learning_rate * norm(g),
        "clipped_sgd_l2": group.learning_rate * norm(gc),
        "current_gradient_dot_update": current @ update,
        "momentum_dot_update": momentum @ update,
        "weight_decay_dot_update": decay @ update,
        "residual_dot_update": residual @ update,
    }


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 40, 1003])
def test_every_number_is_the_definition(size, dtype, decoupled):
    step = stepped(size=size, group=AdamGroup(3e-2, 0.9, 0.95, 1e-8, 0.1, decoupled), dtype=dtype)
    found, expected = parameter_statistics(step), by_hand(step)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-15), name


@given(
    seed=st.integers(0, 10_000), size=st.integers(1, 300), steps=st.integers(1, 6), clip=st.floats(1e-3, 1.0)
)
@settings(max_examples=40, deadline=None)
def test_the_terms_sum_to_the_update(seed, size, steps, clip):
    row = parameter_statistics(stepped(seed, size, steps, clip))
    products = sum(
        row[f"{name}_dot_update"] for name in ("current_gradient", "momentum", "weight_decay", "residual")
    )
    assert products == pytest.approx(row["delta_l2"] ** 2, rel=1e-9, abs=1e-18)
    # What is left is the float32 rounding of the weights.
    assert row["residual_l2"] <= 4e-7 * max(row["weight_l2"], row["weight_l2_before"]) * size**0.5
    if steps == 1:
        assert row["momentum_l2"] == 0
    assert abs(row["update_weight_cosine"]) <= 1


def test_a_parameter_without_gradient_has_no_gradient_columns():
    weight = torch.randn(5)
    row = parameter_statistics(ParameterStep(weight, weight.clone(), None, None))
    assert row == {
        "numel": 5,
        "has_gradient": False,
        "optimizer_step": 0,
        "nonfinite_gradient_entries": 0,
        "weight_l2_before": row["weight_l2"],
        "weight_l2": pytest.approx(float(weight.double().norm())),
        "delta_l2": 0.0,
        "delta_max_abs": 0.0,
        "update_dot_weight": 0.0,
        "update_weight_cosine": None,
        "update_gradient_cosine": None,
        "gradient_momentum_cosine": None,
        "update_momentum_cosine": None,
    }


def test_nan_is_counted_and_shown():
    step = stepped()
    gradient = step.gradient.clone()
    gradient[[3, 17]] = torch.tensor([float("nan"), float("-inf")])
    row = parameter_statistics(
        ParameterStep(
            step.weight_before, step.weight_after, gradient, gradient, group=step.group, step_count=4
        )
    )
    assert row["nonfinite_gradient_entries"] == 2
    assert np.isnan(row["gradient_l2"])
    assert np.isnan(row["gradient_max_abs"])
    assert row["delta_l2"] > 0


def test_an_empty_and_a_scalar_parameter():
    empty = torch.zeros(0)
    assert parameter_statistics(ParameterStep(empty, empty, empty, empty))["numel"] == 0
    one = torch.tensor(2.0)
    row = parameter_statistics(ParameterStep(one, one + 1, one, one))
    assert (row["delta_l2"], row["gradient_l2"], row["update_dot_weight"]) == (1.0, 2.0, 2.0)


@given(seed=st.integers(0, 10_000), size=st.integers(1, 60), decoupled=st.booleans(), maximize=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_sums_are_those_of_the_split(seed, size, decoupled, maximize):
    """The compiled loop has the algebra of `split_update` once more, element by element."""
    group = AdamGroup(3e-2, 0.9, 0.95, 1e-8, 0.1, decoupled, maximize)
    step = stepped(seed, size, 1 + seed % 4, group=group)
    update = step.weight_after.double() - step.weight_before.double()
    terms = split_update(
        step.weight_before,
        step.gradient,
        step.exp_avg_before,
        step.exp_avg_sq_before,
        step=step.step_count,
        learning_rate=group.learning_rate,
        beta1=group.beta1,
        beta2=group.beta2,
        eps=group.eps,
        weight_decay=group.weight_decay,
        applied_gradient=step.applied,
        decoupled=decoupled,
        maximize=maximize,
        actual=update,
    )
    row = parameter_statistics(step)
    for name, term in {
        "current_gradient": terms.adam_current_gradient,
        "momentum": terms.adam_historical_momentum,
        "weight_decay": terms.weight_decay,
        "residual": terms.residual,
    }.items():
        # The terms are near 0.03: what a different order of the same operations leaves is below this.
        assert row[f"{name}_l2"] == pytest.approx(float(term.norm()), rel=1e-9, abs=1e-15), name
        assert row[f"{name}_dot_update"] == pytest.approx(float(term @ update), rel=1e-9, abs=1e-15), name
    assert row["raw_sgd_l2"] == pytest.approx(float(terms.raw_sgd.norm()), rel=1e-12)
    assert row["clipped_sgd_l2"] == pytest.approx(float(terms.clipped_sgd.norm()), rel=1e-12)


def test_an_infinite_weight_and_a_nan_moment_stay_where_they_are():
    step = stepped(size=9)
    for broken in (float("inf"), float("nan")):
        weight, moment = step.weight_after.clone(), step.exp_avg_after.clone()
        weight[4], moment[5] = broken, float("nan")
        row = parameter_statistics(replace(step, weight_after=weight, exp_avg_after=moment))
        assert not np.isfinite(row["weight_l2"])
        assert not np.isfinite(row["delta_max_abs"])
        assert np.isnan(row["exp_avg_l2"])
        assert np.isnan(row["update_momentum_cosine"])
        assert np.isfinite(row["gradient_max_abs"])
        assert np.isfinite(row["current_gradient_l2"])
        assert row["nonfinite_gradient_entries"] == 0


def test_a_finite_gradient_whose_square_overflows_is_finite():
    gradient = torch.full((3,), 1e200, dtype=torch.float64)
    row = parameter_statistics(ParameterStep(torch.ones(3), torch.ones(3), gradient, gradient))
    assert row["nonfinite_gradient_entries"] == 0
    assert row["gradient_max_abs"] == 1e200

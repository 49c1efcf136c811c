"""The search for the clip coefficient against what torch's clipping really multiplied by."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.optimizer import bits_equal, clip_coefficient
from torch import nn


def gradients(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()).to(
            dtype
        )
        for name, shape in {"a": (50, 7), "b": (13,), "c": ()}.items()
    }


@settings(max_examples=80, deadline=None)
@given(scale=st.floats(2.0**-40, 100.0, width=32), seed=st.integers(0, 1000))
def test_any_scalar_is_found(scale, seed):
    raw = gradients(seed)
    applied = {name: gradient.clone().mul_(torch.tensor(scale)) for name, gradient in raw.items()}
    found = clip_coefficient(raw, applied)
    assert found is not None
    assert found == pytest.approx(scale, rel=1e-6)
    assert found == float(np.float32(found))
    assert all(bits_equal(raw[name] * found, applied[name]) for name in raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    raw = gradients(dtype=dtype)
    parameters = [nn.Parameter(gradient.clone()) for gradient in raw.values()]
    for parameter, gradient in zip(parameters, raw.values(), strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(parameters, 0.7)
    applied = {name: parameter.grad for name, parameter in zip(raw, parameters, strict=True)}
    found = clip_coefficient(raw, applied)
    assert found is not None
    assert found < 1
    assert all(bits_equal(raw[name] * found, applied[name]) for name in raw)


def test_no_scalar():
    raw = gradients()
    assert clip_coefficient(raw, {name: gradient.clamp(-0.1, 0.1) for name, gradient in raw.items()}) is None
    assert clip_coefficient(raw, {n: g * (0.5 if n == "a" else 0.25) for n, g in raw.items()}) is None
    assert clip_coefficient(raw, {n: g * 0.5 + 1e-4 for n, g in raw.items()}) is None
    assert clip_coefficient(raw, {n: g for n, g in raw.items() if n != "a"}) is None
    assert clip_coefficient(raw, {n: g.double() for n, g in raw.items()}) is None
    one_bit = {name: gradient * 0.3 for name, gradient in raw.items()}
    one_bit["b"].view(torch.int32)[2] ^= 1
    assert clip_coefficient(raw, one_bit) is None


def test_untouched_and_zero_gradients():
    raw = gradients()
    zeros = {name: torch.zeros_like(gradient) for name, gradient in raw.items()}
    assert clip_coefficient({}, {}) == 1.0
    assert clip_coefficient(raw, raw) == 1.0
    assert clip_coefficient(zeros, zeros) == 1.0
    assert clip_coefficient({"e": torch.zeros(0)}, {"e": torch.zeros(0)}) == 1.0
    assert clip_coefficient(zeros, raw) is None
    assert clip_coefficient(raw, {name: gradient * 0.0 for name, gradient in raw.items()}) == 0.0
    assert clip_coefficient({"z": torch.zeros(2)}, {"z": -torch.zeros(2)}) is None  # signs of zero count


def test_gradients_that_are_not_finite():
    for bad in (math.nan, math.inf):
        raw = gradients()
        raw["a"][3, 2] = bad
        assert clip_coefficient(raw, raw) == 1.0
        assert clip_coefficient(raw, {name: g * 0.25 for name, g in raw.items()}) == 0.25
        parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in raw.values()]
        for parameter, gradient in zip(parameters, raw.values(), strict=True):
            parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        found = clip_coefficient(raw, {n: p.grad for n, p in zip(raw, parameters, strict=True)})
        assert found == 0.0 if bad == math.inf else math.isnan(found)
    nothing_finite = {"a": torch.full((3,), math.inf)}
    assert clip_coefficient(nothing_finite, {"a": torch.full((3,), math.nan)}) == 0.0
    hopeless = {"a": torch.full((3,), math.nan)}
    assert clip_coefficient(hopeless, {"a": torch.ones(3)}) is None

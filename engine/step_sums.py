"""The sums over one parameter that `update_statistics` is made of, in one pass over its memory.

Compiled by Numba, because the recorder takes these sums beside a training that needs every core: some fifty torch calls
over the same numbers take fifteen times the CPU. The algebra of the terms is `update_terms.split_update`'s, element by
element; a test holds the two together.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

INPUTS = (
    *("weight_before", "weight_after", "gradient", "applied"),
    *("exp_avg_before", "exp_avg_after", "exp_avg_sq_before", "exp_avg_sq_after"),
)
# What `step_sums` returns, in this order: squares first, then products of two vectors.
SQUARES = (
    *("weight_before", "weight_after", "update", "gradient", "applied"),
    *("exp_avg_before", "exp_avg_after", "exp_avg_sq_after"),
    *("current_gradient", "momentum", "weight_decay", "residual"),
)
PRODUCTS = (
    ("update", "weight_before"),
    ("update", "gradient"),
    ("update", "applied"),
    ("update", "exp_avg_after"),
    ("gradient", "weight_before"),
    ("applied", "exp_avg_before"),
    ("current_gradient", "update"),
    ("momentum", "update"),
    ("weight_decay", "update"),
    ("residual", "update"),
)


# Reassociation lets a sum be taken in vector lanes. NaN and infinity keep their meaning.
@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def step_sums(
    inputs: tuple[Array, ...],
    step: float,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    decoupled: bool,
    sign: float,
) -> tuple[float, ...]:
    """Float64 sums `SQUARES` and `PRODUCTS` over the arrays `INPUTS`, all of one shape [elements] and dtype.

    `step` counts this update, from 1; `sign` is −1 with `maximize`.
    """
    weight_before, weight_after, gradient, applied = inputs[:4]
    exp_avg_before, exp_avg_after, exp_avg_sq_before, exp_avg_sq_after = inputs[4:]
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    ww = aa = uu = gg = cc = mm = nn = qq = tt = hh = dd = rr = 0.0
    uw = ug = uc = un = gw = cm = tu = hu = du = ru = 0.0
    for i in range(weight_before.size):
        w, after = np.float64(weight_before[i]), np.float64(weight_after[i])
        g, c = np.float64(gradient[i]), np.float64(applied[i])
        m, n = np.float64(exp_avg_before[i]), np.float64(exp_avg_after[i])
        v, q = np.float64(exp_avg_sq_before[i]), np.float64(exp_avg_sq_after[i])
        u = after - w
        seen = sign * c if decoupled else sign * c + decay * w
        denominator = math.sqrt(beta2 * v + (1 - beta2) * (seen * seen)) / math.sqrt(correction2) + eps
        scale = -learning_rate / correction1 / denominator
        t = scale * (1 - beta1) * (sign * c)
        h = scale * beta1 * m
        d = -learning_rate * decay * w if decoupled else scale * (1 - beta1) * decay * w
        r = u - t - h - d
        ww += w * w
        aa += after * after
        uu += u * u
        gg += g * g
        cc += c * c
        mm += m * m
        nn += n * n
        qq += q * q
        tt += t * t
        hh += h * h
        dd += d * d
        rr += r * r
        uw += u * w
        ug += u * g
        uc += u * c
        un += u * n
        gw += g * w
        cm += c * m
        tu += t * u
        hu += h * u
        du += d * u
        ru += r * u
    return (
        *(ww, aa, uu, gg, cc, mm, nn, qq, tt, hh, dd, rr),
        *(uw, ug, uc, un, gw, cm, tu, hu, du, ru),
    )


# A maximum has vector lanes only where NaN may be ignored: callers look at the sums first.
@njit(nogil=True, fastmath=True)
def step_peaks(weight_before: Array, weight_after: Array, gradient: Array) -> tuple[float, float]:
    """The largest |update| and |gradient| of finite float arrays of one shape [elements]; 0 of empty ones."""
    update, largest = 0.0, 0.0
    for i in range(weight_before.size):
        update = max(update, abs(np.float64(weight_after[i]) - np.float64(weight_before[i])))
        largest = max(largest, abs(np.float64(gradient[i])))
    return update, largest

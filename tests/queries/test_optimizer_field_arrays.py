"""Identities of the fields of an update, and thin spectra against dense ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.queries.arrays.adam_fields import FIELDS, Hyperparameters, multiples, update_fields
from lakebed.queries.arrays.thin_svd import first_order_factors, product_spectra, spectra

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)
# From the size of a reconstruction error to that of a weight.
scales = st.floats(-12, 1).map(lambda power: 10.0**power)


def normal(rng, *shape, rank=None, scale=1.0):
    """Of a given rank, with singular values that fall off over six orders of magnitude."""
    if rank is None:
        return scale * rng.normal(size=shape)
    *batch, rows, columns = shape
    fall = np.logspace(0, -6, rank)
    return scale * (rng.normal(size=(*batch, rows, rank)) * fall) @ rng.normal(size=(*batch, rank, columns))


def check(found, dense, ranks):
    """`found` is what dense SVDs say, its vectors are singular, and ‖M‖² is the sum of squares."""
    whole = np.linalg.svd(dense, compute_uv=False)
    count = found.values.shape[1]
    near = 1e-11 * np.abs(dense).max(initial=1e-300) * dense.shape[-1]
    np.testing.assert_allclose(found.values, whole[:, :count], rtol=1e-9, atol=near)
    np.testing.assert_allclose(whole[:, count:], 0, atol=near)
    np.testing.assert_allclose((found.values**2).sum(-1), (dense**2).sum((1, 2)), rtol=1e-10, atol=near**2)
    assert found.left.shape == (len(dense), min(ranks, count), dense.shape[1])
    assert found.right.shape == (len(dense), min(ranks, count), dense.shape[2])
    kept = found.values[:, : found.left.shape[1]]
    clear = kept > 1e-3 * found.values[:, :1]
    for vectors in (found.left, found.right):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1)[clear], 1, rtol=1e-9)
    along = np.einsum("ntr,nrc,ntc->nt", found.left, dense, found.right)
    np.testing.assert_allclose(along[clear], kept[clear], rtol=1e-9)
    place = np.abs(found.left).argmax(-1)[..., None]
    assert (np.take_along_axis(found.left, place, -1) >= 0).all()


@given(seeds, sizes, sizes, st.one_of(st.none(), st.integers(1, 4)), st.integers(1, 3), scales)
@settings(max_examples=150, deadline=None)
def test_spectra_are_those_of_dense_decompositions(seed, rows, columns, rank, ranks, scale):
    dense = normal(np.random.default_rng(seed), 3, rows, columns, rank=rank, scale=scale)
    check(spectra(dense, ranks), dense, ranks)


@given(seeds, sizes, sizes, sizes, st.integers(1, 3), scales)
@settings(max_examples=150, deadline=None)
def test_products_are_decomposed_as_if_written_out(seed, rows, columns, inner, ranks, scale):
    rng = np.random.default_rng(seed)
    left, right = normal(rng, 3, rows, inner), normal(rng, 3, inner, columns, scale=scale)
    found = product_spectra(left, right, ranks)
    assert found.values.shape[1] == min(rows, inner, columns)
    check(found, left @ right, ranks)


@given(seeds, sizes, sizes, scales)
@settings(max_examples=150, deadline=None)
def test_the_first_order_field_of_a_product(seed, width, size, scale):
    rng = np.random.default_rng(seed)
    a, b = normal(rng, 2, width, size + 4), normal(rng, 2, width, size)
    da, db = normal(rng, 2, width, size + 4, scale=scale), normal(rng, 2, width, size, scale=scale)
    dense = da.mT @ b + a.mT @ db
    left, right = first_order_factors(a, da, b, db)
    np.testing.assert_allclose(left @ right, dense, rtol=1e-12, atol=1e-12 * np.abs(dense).max())
    check(product_spectra(left, right, 2), dense, 2)


@given(seeds, st.integers(-300, 300).map(lambda percent: percent / 100))
@settings(max_examples=50, deadline=None)
def test_a_multiple_has_the_spectrum_of_what_it_is_a_multiple_of(seed, factor):
    dense = normal(np.random.default_rng(seed), 2, 5, 3)
    factors = np.array([factor, -1.5])
    found, direct = spectra(dense, 2).scaled(factors), spectra(dense * factors[:, None, None], 2)
    np.testing.assert_allclose(found.values, direct.values, rtol=1e-9, atol=1e-300)
    scaled = dense * factors[:, None, None]
    along = np.einsum("ntr,nrc,ntc->nt", found.left, scaled, found.right)
    np.testing.assert_allclose(along, found.values[:, :2], rtol=1e-9, atol=1e-300)


def test_zero_matrices_and_one_that_is_steep_in_a_batch():
    rng = np.random.default_rng(0)
    dense = np.stack([np.zeros((6, 4)), rng.normal(size=(6, 4)), np.outer(rng.normal(size=6), np.ones(4))])
    dense[2] += 1e-9 * rng.normal(size=(6, 4))
    found = spectra(dense, 2)
    np.testing.assert_allclose(found.values, np.linalg.svd(dense, compute_uv=False), rtol=1e-6, atol=1e-15)
    assert not found.values[0].any()
    assert np.isfinite(found.left).all()
    assert np.isfinite(found.right).all()
    # So small that its squares are zero.
    found = spectra(1e-200 * dense[1:2], 2)
    np.testing.assert_allclose(found.values, 1e-200 * spectra(dense[1:2], 2).values, rtol=1e-12, atol=0)


@given(seeds, st.floats(2, 12), st.sampled_from([(8, 40), (24, 24), (33, 20)]))
@settings(max_examples=100, deadline=None)
def test_steep_spectra_are_those_of_dense_decompositions(seed, fall, shape):
    rng = np.random.default_rng(seed)
    count = min(shape)
    left, right = (np.linalg.qr(rng.normal(size=(2, size, count)))[0] for size in shape)
    dense = (left * np.logspace(0, -fall, count)) @ right.mT
    found = spectra(dense, 2)
    np.testing.assert_allclose(found.values, np.linalg.svd(dense, compute_uv=False), rtol=1e-10, atol=2e-12)
    assert (np.diff(found.values) <= 0).all()


@st.composite
def hyperparameters(draw, count=3):
    def numbers(low, high):
        # A grid: nobody trains at a learning rate that is no normal number.
        return np.array([low + (high - low) * draw(st.integers(0, 1000)) / 1000 for _ in range(count)])

    def switches():
        return np.array([float(draw(st.booleans())) for _ in range(count)])

    steps = np.array([float(draw(st.integers(1, 5000))) for _ in range(count)])
    return Hyperparameters(
        learning_rate=numbers(0, 0.1),
        beta1=numbers(0, 0.99),
        beta2=numbers(0.5, 0.9999),
        eps=numbers(1e-10, 1e-3),
        weight_decay=numbers(0, 0.5),
        decoupled=switches(),
        maximize=switches(),
        clip_coefficient=numbers(0.01, 1),
        step_count=steps,
        stepped=np.array([float(draw(st.integers(0, 4)) > 0) for _ in range(count)]),
    )


@given(seeds, hyperparameters(), scales)
@settings(max_examples=200, deadline=None)
def test_the_terms_add_up(seed, of, scale):
    rng = np.random.default_rng(seed)
    weight, gradient, m = rng.normal(size=(3, 3, 4, 2)) * np.array([1, scale, scale])[:, None, None, None]
    v = (scale * rng.normal(size=(3, 4, 2))) ** 2
    skipped = of.stepped == 0
    gradient[skipped] = np.nan
    fields = update_fields(weight, weight + 1e-3, gradient, m, v, of)
    assert tuple(fields) == FIELDS

    def same(left, right):
        np.testing.assert_allclose(
            left, right, rtol=1e-12, atol=1e-15 * np.abs(fields["adam_preconditioned"]).max()
        )

    same(fields["adam_current_gradient"] + fields["adam_historical_momentum"], fields["adam_preconditioned"])
    same(fields["adam_preconditioned"] + fields["weight_decay"], fields["reconstructed_adamw_update"])
    same(
        fields["reconstructed_adamw_update"] - fields["actual_parameter_delta"],
        fields["reconstruction_error"],
    )
    same(fields["clipped_sgd"], of.clip_coefficient[:, None, None] * fields["raw_sgd"])
    for name in ("raw_sgd", "adam_preconditioned", "weight_decay"):
        assert not fields[name][skipped].any()
    for name, (other, factors) in multiples(of).items():
        np.testing.assert_allclose(
            fields[name], factors[:, None, None] * fields[other], rtol=1e-9, atol=1e-300
        )
    assert ("weight_decay" in multiples(of)) == bool(of.decoupled.all())


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_the_update_is_torchs(decoupled, maximize):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    weight, gradient, m = rng.normal(size=(3, 1, 4, 3))
    v = rng.normal(size=(1, 4, 3)) ** 2
    parameter = torch.nn.Parameter(torch.tensor(weight))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, maximize=maximize)
    optimizer.state[parameter] = {
        "step": torch.tensor(6.0),
        "exp_avg": torch.tensor(m),
        "exp_avg_sq": torch.tensor(v),
    }
    parameter.grad = torch.tensor(0.5 * gradient)
    optimizer.step()
    each = {
        "learning_rate": 0.1,
        "beta1": 0.8,
        "beta2": 0.95,
        "eps": 1e-3,
        "weight_decay": 0.3,
        "clip_coefficient": 0.5,
    }
    flags = {"decoupled": decoupled, "maximize": maximize, "step_count": 7, "stepped": 1}
    of = Hyperparameters(**{name: np.array([float(value)]) for name, value in {**each, **flags}.items()})
    fields = update_fields(weight, parameter.detach().numpy(), gradient, m, v, of)
    np.testing.assert_allclose(fields["reconstruction_error"], 0, atol=1e-14)

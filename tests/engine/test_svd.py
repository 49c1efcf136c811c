"""Factored spectra against dense ones, and against NumPy where the formula is restated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine import svd as module
from lakebed.engine.svd import (
    MATRICES,
    SVD,
    NonFiniteMatrix,
    ZeroSpectrum,
    align_signs,
    effective_rank,
    matrix_svd,
    ov_factors,
    product_svd,
    qk_factors,
    share_key_value_heads,
    spectral_mass,
    split_heads,
    split_output_heads,
    weight_matrix_svd,
)
from lakebed.lake.datasets import VECTOR_LABELS


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(result: SVD, matrix, tolerance=1e-12):
    """Orthonormal factors, a descending spectrum, the matrix itself, and NumPy's singular values."""
    U, S, Vh = result
    rank, scale = S.shape[-1], max(1.0, float(matrix.abs().max()))
    identity = torch.eye(rank, dtype=torch.float64).expand(*S.shape[:-1], rank, rank)
    assert U.dtype == S.dtype == Vh.dtype == torch.float64
    torch.testing.assert_close(U.mT @ U, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(Vh @ Vh.mT, identity, rtol=0, atol=1e-12)
    assert (S[..., :-1] >= S[..., 1:]).all()
    assert (S >= 0).all()
    torch.testing.assert_close(
        (U * S.unsqueeze(-2)) @ Vh, matrix.double(), rtol=0, atol=tolerance * scale * 100
    )
    dense = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[..., :rank]
    np.testing.assert_allclose(S.numpy(), dense, rtol=0, atol=tolerance * max(1.0, dense.max()))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 12),
    e=st.integers(1, 9),
    n=st.integers(1, 12),
    batch=st.sampled_from([(), (3,), (2, 1, 3)]),
    seed=st.integers(0, 10**6),
)
def test_product_equals_the_dense_spectrum(m, e, n, batch, seed):
    left, right = normal(*batch, m, e, seed=seed), normal(*batch, e, n, seed=seed + 1)
    result = product_svd(left, right)
    assert result.U.shape == (*batch, m, min(m, e, n))
    assert result.Vh.shape == (*batch, min(m, e, n), n)
    check(result, left @ right)


def test_product_never_forms_the_matrix():
    wide = 400_000  # its square would be 1.28 TB
    left, right = normal(wide, 2), normal(2, wide, seed=1)
    squares = torch.linalg.eigvals((left.mT @ left) @ (right @ right.mT)).real.sort(descending=True).values
    torch.testing.assert_close(product_svd(left, right).S, squares.sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("graded", [False, True])
def test_rank_deficient_factors(graded):
    left, right = normal(2, 20, 5), normal(2, 5, 15, seed=1)
    left[..., 3] = left[..., 1] * (1 + 1e-9 if graded else 2.0)
    right[..., 4, :] = 0.0
    result = product_svd(left, right)
    check(result, left @ right)
    assert (result.S[..., 2] > 1e-2).all()
    assert (result.S[..., 3:] < 1e-12).all()


def test_zero_product_is_still_orthonormal_and_its_spectrum_refused():
    result = product_svd(torch.zeros(6, 3), torch.zeros(3, 8))
    check(result, torch.zeros(6, 8))
    for measure in (effective_rank, spectral_mass):
        with pytest.raises(ZeroSpectrum):
            measure(result.S)
        with pytest.raises(ZeroSpectrum):
            measure(torch.tensor([[1.0, 0.5], [0.0, 0.0]]))


def test_float32_weights_are_computed_in_float64():
    left, right = normal(40, 4, dtype=torch.float32), normal(4, 30, seed=1, dtype=torch.float32)
    check(product_svd(left, right), left.double() @ right.double())
    check(matrix_svd(left), left)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_matrices_that_are_not_finite(bad):
    left, right = normal(2, 4, 2), normal(2, 2, 4)
    right[1, 0, 0] = bad
    with pytest.raises(NonFiniteMatrix, match=r"\(2, 2, 4\)"):
        product_svd(left, right)
    with pytest.raises(NonFiniteMatrix):
        product_svd(right, left)
    with pytest.raises(NonFiniteMatrix):
        matrix_svd(right)


@pytest.mark.parametrize("shapes", [((3, 2), (3, 4)), ((3,), (3, 4)), ((3, 2), (2,))])
def test_factors_that_do_not_multiply(shapes):
    with pytest.raises(ValueError, match="cannot multiply"):
        product_svd(*(torch.ones(shape) for shape in shapes))


# -- when LAPACK gives up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 9), (14, 5), (5, 14), (1, 4), (4, 1), (2, 3, 8, 6)])
@pytest.mark.parametrize("failing", ["batched", "all but transposed", "all"])
def test_a_solver_that_does_not_converge(monkeypatch, shape, failing):
    solver, calls = torch.linalg.svd, []

    def gives_up(matrix, full_matrices=True):
        calls.append(tuple(matrix.shape))
        works = {"batched": len(calls) > 1, "all but transposed": len(calls) > 1 and len(calls) % 2 == 1}
        if works.get(failing, False):
            return solver(matrix, full_matrices=full_matrices)
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    matrix = normal(*shape)
    check(matrix_svd(matrix), matrix)
    assert len(calls) > 1


def test_jacobi_on_hard_matrices():
    graded = normal(12, 12) @ torch.diag(10.0 ** -torch.arange(12.0).double())
    for matrix in (
        torch.zeros(5, 3).double(),
        torch.eye(7).double(),
        normal(30, 3) @ normal(3, 20, seed=1),
        normal(6, 1) @ normal(1, 6, seed=1),
        1e-200 * normal(5, 5),
        1e150 * normal(5, 5),
        graded,
    ):
        scale = max(float(matrix.abs().max()), 1e-300)
        U, S, Vh = module._jacobi_svd(matrix)
        check(SVD(U, S / scale, Vh), matrix / scale)
    # Small singular values keep their relative accuracy, which a Gram matrix would have squared away.
    expected = np.linalg.svd(graded.numpy(), compute_uv=False)
    np.testing.assert_allclose(module._jacobi_svd(graded).S.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_every_pair_meets_once(n):
    rounds = [list(zip(p.tolist(), q.tolist(), strict=True)) for p, q in module._tournament(n)]
    met = sorted(tuple(sorted(pair)) for one in rounds for pair in one)
    assert met == [(a, b) for a in range(n) for b in range(a + 1, n)]
    assert all(len({player for pair in one for player in pair}) == 2 * len(one) for one in rounds)


# -- measures and signs ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.integers(1, 5))
def test_measures_follow_their_formulas(values, k):
    values = sorted(values, reverse=True)
    S = torch.tensor(values, dtype=torch.float64)
    rank = effective_rank(S).item()
    assert rank == pytest.approx(sum(values) ** 2 / sum(value**2 for value in values), rel=1e-9)
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    assert spectral_mass(S, k).item() == pytest.approx(sum(values[:k]) / sum(values), rel=1e-9)


def test_measures_are_batched_and_bounded():
    S = torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert effective_rank(S).tolist() == [1.0, 4.0]
    assert spectral_mass(S).tolist() == [1.0, 0.75]
    assert effective_rank(S * 1e-200).tolist() == pytest.approx([1.0, 4.0])
    with pytest.raises(ValueError, match="k=0"):
        spectral_mass(S, 0)


@given(st.integers(0, 10**6), st.lists(st.booleans(), min_size=4, max_size=4))
def test_signs_do_not_depend_on_the_solver(seed, flips):
    matrix = normal(3, 6, 4, seed=seed)
    U, S, Vh = matrix_svd(matrix)
    sign = torch.where(torch.tensor(flips), -1.0, 1.0).double()
    first, second = align_signs(U, Vh), align_signs(U * sign, Vh * sign.unsqueeze(-1))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    largest = first[0].gather(-2, first[0].abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    check(SVD(first[0], S, first[1]), matrix)


# -- the eight matrices ----------------------------------------------------------------------------------------

LAYERS, HEADS, D_HEAD, D_MODEL, D_MLP = 2, 3, 4, 12, 20


@pytest.fixture(scope="module")
def projections():
    shapes = {"q": (12, 12), "k": (12, 12), "v": (12, 12), "o": (12, 12), "in": (20, 12), "out": (12, 20)}
    return {name: normal(LAYERS, *shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module")
def weights(projections):
    return {
        "W_Q": split_heads(projections["q"], HEADS),
        "W_K": split_heads(projections["k"], HEADS),
        "W_V": split_heads(projections["v"], HEADS),
        "W_O": split_output_heads(projections["o"], HEADS),
        "W_in": projections["in"],
        "W_out": projections["out"],
    }


def dense_matrix(name, projections, layer, head):
    """definitions' table, row by row, from the projections as they are stored."""
    s = slice(head * D_HEAD, (head + 1) * D_HEAD)
    q, k, v, o = (projections[key][layer] for key in "qkvo")
    return {
        "W_QK": q[s, :].T @ k[s, :],
        "W_OV": v[s, :].T @ o[:, s].T,
        "W_Q": q[s, :],
        "W_K": k[s, :],
        "W_V": v[s, :],
        "W_O": o[:, s],
        "W_in": projections["in"][layer],
        "W_out": projections["out"][layer],
    }[name]


@pytest.mark.parametrize("name", MATRICES)
def test_each_matrix_against_its_definition(name, weights, projections):
    result = weight_matrix_svd(name, weights)
    per_head = name not in ("W_in", "W_out")
    assert result.S.shape[:-1] == ((LAYERS, HEADS) if per_head else (LAYERS,))
    assert result.S.shape[-1] == (D_HEAD if per_head else D_MODEL)
    for layer in range(LAYERS):
        for head in range(HEADS if per_head else 1):
            place = (layer, head) if per_head else (layer,)
            one = SVD(*(part[place] for part in result))
            check(one, dense_matrix(name, projections, layer, head))


def test_sides_are_what_the_labels_say(weights):
    """A query vector along u and a key vector along v score σ; x along u writes σ v."""
    U, S, Vh = weight_matrix_svd("W_QK", weights)
    u, v, head = U[1, 2, :, 0], Vh[1, 2, 0], (1, 2)
    score = (weights["W_Q"][head] @ u) @ (weights["W_K"][head] @ v)
    torch.testing.assert_close(score, S[1, 2, 0])
    U, S, Vh = weight_matrix_svd("W_OV", weights)
    written = weights["W_O"][head] @ (weights["W_V"][head] @ U[1, 2, :, 1])
    torch.testing.assert_close(written, S[1, 2, 1] * Vh[1, 2, 1])
    sizes = {"residual": D_MODEL, "mlp_hidden": D_MLP, "head": D_HEAD}
    assert VECTOR_LABELS.keys() == MATRICES.keys()
    for name, labels in VECTOR_LABELS.items():
        U, _, Vh = weight_matrix_svd(name, weights)
        for label, size in zip(labels, (U.shape[-2], Vh.shape[-1]), strict=True):
            known = next(sizes[kind] for kind in ("residual", "mlp_hidden", "head") if kind in label)
            assert known == size, (name, label)


def test_grouped_query_heads(weights):
    key_heads = weights["W_K"][:, :2]
    shared = share_key_value_heads(key_heads, 4)
    assert shared.shape == (LAYERS, 4, D_HEAD, D_MODEL)
    assert all(torch.equal(shared[:, head], key_heads[:, head // 2]) for head in range(4))
    with pytest.raises(ValueError, match="heads"):
        share_key_value_heads(key_heads, 3)


def test_splits_and_factors_by_shape(weights):
    left, right = qk_factors(weights["W_Q"], weights["W_K"])
    assert left.shape == (LAYERS, HEADS, D_MODEL, D_HEAD)
    assert right.shape == (LAYERS, HEADS, D_HEAD, D_MODEL)
    left, right = ov_factors(weights["W_V"], weights["W_O"])
    assert left.shape == (LAYERS, HEADS, D_MODEL, D_HEAD)
    assert right.shape == (LAYERS, HEADS, D_HEAD, D_MODEL)
    for split in (split_heads, split_output_heads):
        with pytest.raises(ValueError, match="12 does not divide into 5 heads"):
            split(torch.ones(12, 12), 5)


def test_unknown_matrix_names_the_known_ones(weights):
    with pytest.raises(KeyError, match="W_QK, W_OV"):
        weight_matrix_svd("W_VO", weights)

"""Bases, maps and edits of value codes, against the reports' own NumPy, which shares no code with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.value_code_rescue import code_changes
from lakebed.engine.value_code_transfer import CONTEXT_ONLY, Ends, Fitting, fit_transfers
from lakebed.engine.value_codes import (
    BasisRankTooHigh,
    Side,
    SingularFit,
    TooFewExamples,
    identity_basis,
    random_basis,
    ridge_map,
)
from lakebed.lake.value_codes import BASES, CONTROLS, eval_kinds
from lakebed.queries.arrays.groups import group_by_token
from lakebed.queries.arrays.subspaces import identity_subspace
from lakebed.queries.arrays.transfer import ridge_map as numpy_ridge_map


def drawn(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def side(seed, count=40, width=9, tokens=6, name="a side"):
    vectors, ids = drawn(seed, count, width), torch.arange(count) % tokens
    return Side(vectors + 3 * drawn(seed + 1, tokens, width)[ids] + 1, ids + 10, name)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_an_identity_basis_is_that_of_the_reports(seed, rank):
    of = side(seed)
    found = identity_basis(of, rank)
    wanted = identity_subspace(of.vectors.numpy(), group_by_token(of.tokens.numpy()), rank, "it")
    basis = wanted.identity.basis
    assert found.basis.numpy() @ found.basis.numpy().T == pytest.approx(basis @ basis.T, abs=1e-7)
    assert (found.basis.mT @ found.basis).numpy() == pytest.approx(np.eye(rank), abs=1e-12)
    for ours, theirs in ((found.identity, wanted.identity), (found.all_vectors, wanted.all_vectors)):
        assert ours.singular_values.numpy() == pytest.approx(theirs.singular_values, rel=1e-9)
        assert ours.centered_rank == theirs.centered_rank
    assert found.tokens.tolist() == list(range(10, 16))
    assert found.num_vectors == 40


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.0, 1e-4, 1.0, 100.0]))
def test_a_ridge_map_is_that_of_the_reports(seed, width, out, ridge):
    source, target = drawn(seed, 12, width), drawn(seed + 1, 12, out) + 3
    found = ridge_map(source, target, ridge, "it")(source).numpy()
    assert found == pytest.approx(
        numpy_ridge_map(source.numpy(), target.numpy(), ridge, "it")(source.numpy()), abs=1e-8
    )
    assert (found - target.numpy()).sum(0) == pytest.approx(np.zeros(out), abs=1e-8)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_without_a_penalty_what_is_linear_is_recovered(seed, width, out):
    source, weights, offset = drawn(seed, 30, width), drawn(seed + 1, width, out), drawn(seed + 2, out)
    target = source @ weights + offset
    for ridge in (0.0, 1e-10):
        mapping = ridge_map(source, target, ridge, "it")
        assert mapping.weights.numpy() == pytest.approx(weights.numpy(), abs=1e-7)
        elsewhere = drawn(seed + 3, 5, width)
        assert mapping(elsewhere).numpy() == pytest.approx((elsewhere @ weights + offset).numpy(), abs=1e-6)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_nothing_is_left_of_a_removed_code_and_the_oracle_changes_nothing(seed, rank):
    of = side(seed)
    basis = identity_basis(of, rank).basis
    own, wanted = of.vectors @ basis, drawn(seed, 40, rank)
    changes = code_changes(basis, own, torch.stack([torch.zeros_like(own), own, wanted]))
    removed, oracle, replaced = of.vectors + changes
    assert (removed @ basis).abs().max() < 1e-10
    assert torch.equal(oracle, of.vectors)
    assert (replaced @ basis - wanted).abs().max() < 1e-10
    # Across the basis everything stays.
    across = torch.eye(9, dtype=torch.float64) - basis @ basis.mT
    assert ((replaced - of.vectors) @ across).abs().max() < 1e-10


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_a_random_basis_is_orthonormal_and_spans_what_its_seed_draws(seed, rank):
    basis = random_basis(6, rank, seed)
    assert (basis.mT @ basis).numpy() == pytest.approx(np.eye(rank), abs=1e-12)
    normals = torch.randn(6, rank, generator=torch.Generator().manual_seed(seed)).double()
    left = normals - basis @ (basis.mT @ normals)
    assert left.abs().max() < 1e-10


def ends(context=True, fit=None):
    chosen = torch.arange(40) % 4 != 0 if fit is None else fit
    return Ends(
        side(0, name="the source"),
        side(2, name="the target"),
        chosen,
        drawn(4, 40, 9),
        side(5, tokens=5, name="the key"),
        side(7, name="the context") if context else None,
    )


def fitting(rank=3, controls=CONTROLS):
    return Fitting(rank, 2, 1e-4, 17, controls)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("controls", [(), CONTROLS[:1], CONTROLS])
def test_kinds_and_bases_are_those_that_the_lake_names(context, controls):
    found = fit_transfers(ends(context), fitting(controls=controls))
    assert list(found.replacements) == eval_kinds(controls, context)
    assert set(found.bases) <= set(BASES)
    for kind, of in found.replacements.items():
        assert of.coordinates.shape == (10, 3)
        assert (of.source is None) == (kind in ("oracle_actual_projected", CONTEXT_ONLY))


def test_controls_are_other_sources_through_the_same_map_or_a_map_of_their_own():
    of, asked = ends(), fitting()
    found = fit_transfers(of, asked)
    fit, judge = of.fit, ~of.fit
    a = of.source.vectors @ found.bases["source_value_identity"].basis
    z = of.target.vectors @ found.basis
    c = of.context.vectors @ found.bases["prediction_context_identity"].basis
    k = of.key.vectors @ found.bases["source_key_identity_control"].basis
    x = of.source.vectors @ found.bases["random_source_control"]
    wrong = of.wrong_source @ found.bases["source_value_identity"].basis

    def through(trained, used):
        return ridge_map(trained[fit], z[fit], 1e-4, "it")(used)

    def join(*parts):
        return torch.cat(parts, 1)

    own, shifted = a[judge], a[judge][[*range(1, 10), 0]]
    wanted = {
        "oracle_actual_projected": z[judge],
        "true_transfer": through(a, own),
        "shuffled_answer_value": through(a, shifted),
        "wrong_support_value": through(a, wrong[judge]),
        "key_identity": through(k, k[judge]),
        "random_subspace": through(x, x[judge]),
        "context_only": through(c, c[judge]),
        "source_plus_context": through(join(a, c), join(own, c[judge])),
        "source_plus_context_shuffled_answer_value": through(join(a, c), join(shifted, c[judge])),
        "source_plus_context_wrong_support_value": through(join(a, c), join(wrong[judge], c[judge])),
        "source_plus_context_random_subspace": through(join(x, c), join(x, c)[judge]),
        "source_plus_context_random_subspace_not_refit": through(join(a, c), join(x, c)[judge]),
    }
    assert found.replacements.keys() == wanted.keys()
    for kind, coordinates in wanted.items():
        assert found.replacements[kind].coordinates.numpy() == pytest.approx(coordinates.numpy(), abs=1e-10)
    assert found.replacements["shuffled_answer_value"].source.tolist() == [*range(1, 10), 0]
    # Bases know nothing of the examples that judge.
    assert torch.equal(found.basis, identity_basis(of.target.of(fit), 3).basis)


def test_what_cannot_be_fitted_is_refused_by_its_limit():
    def refused(kind, message, of=None, **asked):
        with pytest.raises(kind, match=message) as caught:
            fit_transfers(of or ends(), fitting(**asked))
        assert "\n" not in str(caught.value)

    refused(BasisRankTooHigh, "basis rank 6 is above what the source allows: 6 tokens .* most rank 5", rank=6)
    refused(BasisRankTooHigh, "basis rank 5 is above what the key allows: 5 tokens .* most rank 4", rank=5)
    everyone = torch.ones(40, dtype=torch.bool)
    refused(TooFewExamples, "of 40 examples 40 fit and 0 judge", ends(fit=everyone))
    refused(TooFewExamples, "of 40 examples 0 fit and 40 judge", ends(fit=~everyone))
    all_but_one = everyone.clone()
    all_but_one[3] = False
    refused(TooFewExamples, "shuffled_answer_value needs at least two eval examples", ends(fit=all_but_one))
    one = ~everyone
    one[0] = True
    refused(TooFewExamples, "needs at least two tokens among the fit examples, there is 1", ends(fit=one))
    few = torch.arange(40) < 5
    few_ends = ends(fit=few)
    refused(TooFewExamples, "the map of source_plus_context at rank 3 has 5 fit examples for 5", few_ends)


def test_a_basis_and_a_fit_have_their_limits():
    flat = Side(torch.ones(8, 3).double() * torch.arange(8)[:, None], torch.arange(8), "it")
    with pytest.raises(
        BasisRankTooHigh, match="above the numerical rank of the token means of it, which is 1"
    ):
        identity_basis(flat, 2)
    with pytest.raises(BasisRankTooHigh, match="basis rank 4 exceeds the 3 dimensions"):
        random_basis(3, 4, 0)
    with pytest.raises(SingularFit, match="singular with --ridge-lambda 0; give a positive one"):
        ridge_map(torch.zeros(5, 2).double(), torch.ones(5, 2).double(), 0.0, "it")

"""Identity subspaces of token embeddings and the tokens a direction points to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.queries.arrays.token_geometry import subspace_alignment, token_subspace, top_tokens
from lakebed.queries.report import ReportFailed

WIDTH = 6


def embedding_of(seed, tokens):
    return np.random.default_rng(seed).normal(size=(tokens, WIDTH))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 12))
def test_the_subspace_holds_every_difference_of_two_tokens(seed, tokens):
    embedding = embedding_of(seed, tokens)
    subspace = token_subspace(embedding, "tokens")
    assert subspace.rank == min(tokens - 1, WIDTH)
    np.testing.assert_allclose(subspace.basis.T @ subspace.basis, np.eye(subspace.rank), atol=1e-12)
    differences = embedding[1:] - embedding[0]
    np.testing.assert_allclose(subspace_alignment(differences, subspace), 1, atol=1e-9)
    # Energy is kept: the squares of the singular values are the variance of the tokens.
    assert np.square(subspace.singular_values).sum() == pytest.approx(
        np.square(embedding - embedding.mean(0)).sum()
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 6), scale=st.floats(1e-3, 1e3))
def test_alignment_is_a_share_that_neither_length_nor_sign_changes(seed, tokens, scale):
    subspace = token_subspace(embedding_of(seed, tokens), "tokens")
    direction = np.random.default_rng(seed + 1).normal(size=WIDTH)
    share = subspace_alignment(direction, subspace)
    assert 0 <= share <= 1 + 1e-12
    assert subspace_alignment(-scale * direction, subspace) == pytest.approx(share)
    outside = direction - subspace.basis @ (subspace.basis.T @ direction)
    rest = np.linalg.norm(outside) / np.linalg.norm(direction)
    assert share**2 + rest**2 == pytest.approx(1)


def test_rounding_is_no_direction():
    embedding = np.zeros((4, WIDTH))
    embedding[:, 0] = [1, 2, 3, 4]
    embedding[:, 1] = [0, 1e-9, 0, 1e-9]
    assert token_subspace(embedding, "tokens").rank == 1


def test_one_token_and_equal_tokens_have_no_subspace():
    with pytest.raises(
        ReportFailed, match="identity subspace of the key tokens needs at least two of them, there is 1"
    ):
        token_subspace(np.ones((1, WIDTH)), "key tokens")
    with pytest.raises(ReportFailed, match="the embeddings of the value tokens are all alike"):
        token_subspace(np.ones((3, WIDTH)), "value tokens")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 20), count=st.integers(1, 25))
def test_top_tokens_are_the_first_of_a_sort(seed, tokens, count):
    embedding = embedding_of(seed, tokens)
    directions = np.random.default_rng(seed + 1).normal(size=(2, 3, WIDTH))
    ids, signed = top_tokens(directions, embedding, count)
    assert ids.shape == signed.shape == (2, 3, min(count, tokens))
    for place in np.ndindex(2, 3):
        scores = [float(row @ directions[place]) for row in embedding]
        wanted = sorted(range(tokens), key=lambda token: -abs(scores[token]))[:count]
        assert ids[place].tolist() == wanted
        assert signed[place].tolist() == pytest.approx([scores[token] for token in wanted])

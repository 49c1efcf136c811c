"""Bases against SVDs of whole matrices, their numerical rank, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.adapters import load_adapter
from lakebed.engine.subspaces import HEAD_SUBSPACES, IDENTITY_SUBSPACES, SubspaceError, cut_subspace
from lakebed.lake import Lake

from tests import route_lake
from tests.queries.float64_decoder import Decoder, load_weights
from tests.queries.route_reference import span

TOKENS = {"key": list(range(10, 16)), "value": list(range(20, 50))}
CLASSES = {name: torch.tensor(of) for name, of in TOKENS.items()}


@pytest.fixture(scope="module")
def weights(route_lake_path):
    with Lake.open(route_lake_path) as lake:
        lake.refresh()
        return load_weights(lake, route_lake.RUN, 40)


def model_of(weights):
    adapter = load_adapter("symbolic_kv", route_lake.config().canonical_json())
    return adapter.load_model({name: torch.from_numpy(of).float() for name, of in weights.items()})


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from([*HEAD_SUBSPACES, *IDENTITY_SUBSPACES]),
    rank=st.integers(1, 5),
    layer=st.integers(0, 1),
    head=st.integers(0, 3),
)
def test_the_basis_spans_what_the_whole_matrix_does(weights, name, rank, layer, head):
    of_head = (layer, head) if name in HEAD_SUBSPACES else None
    found = cut_subspace(name, model_of(weights), rank, head=of_head, token_classes=CLASSES)
    basis = found.basis.numpy()
    assert basis.shape == (32, rank)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)
    wanted = span(Decoder(weights, route_lake.HEADS), name, rank, of_head, TOKENS)
    np.testing.assert_allclose(basis @ basis.T, wanted @ wanted.T, atol=1e-9)


def test_the_two_sides_of_a_matrix_have_its_spectrum(weights):
    model, decoder = model_of(weights), Decoder(weights, route_lake.HEADS)
    whole = decoder.slice(1, 2, "v")[0].T @ decoder.head_output(1, 2).T
    for name in ("head_ov_input", "head_ov_output"):
        found = cut_subspace(name, model, 2, head=(1, 2))
        assert found.available_rank == len(found.singular_values) == 8
        np.testing.assert_allclose(
            found.singular_values, np.linalg.svd(whole, compute_uv=False)[:8], rtol=1e-9
        )


def test_identity_has_one_direction_fewer_than_tokens_and_at_most_the_width(weights):
    model = model_of(weights)
    assert cut_subspace("embedding_key_identity", model, 5, token_classes=CLASSES).available_rank == 5
    many = {"value": torch.arange(60)}
    assert cut_subspace("embedding_value_identity", model, 32, token_classes=many).available_rank == 32
    with pytest.raises(
        SubspaceError, match="rank 6 exceeds that of subspace embedding_key_identity, which is 5"
    ):
        cut_subspace("embedding_key_identity", model, 6, token_classes=CLASSES)


def test_directions_that_weights_do_not_have_are_not_made_up(weights):
    """A head with five rows of zeros has three directions."""
    rows = weights["blocks.1.attn.q_proj.weight"].copy()
    rows[16:21] = 0
    model = model_of({**weights, "blocks.1.attn.q_proj.weight": rows})
    assert cut_subspace("head_qk_key", model, 3, head=(1, 2)).available_rank == 3
    with pytest.raises(SubspaceError, match="rank 4 exceeds that of subspace head_qk_key, which is 3"):
        cut_subspace("head_qk_key", model, 4, head=(1, 2))


@pytest.mark.parametrize(
    ("name", "rank", "head", "message"),
    [
        ("sideways", 1, None, "no subspace 'sideways'; there are embedding_key_identity"),
        ("full_residual", 1, None, "full_residual is the whole residual vector: it takes no rank"),
        ("head_qk_query", 1, None, "head_qk_query is of a head"),
        ("head_qk_query", 0, (1, 2), "head_qk_query needs a rank of at least 1"),
        ("head_qk_query", 9, (1, 2), "rank 9 exceeds that of subspace head_qk_query, which is 8"),
        ("embedding_key_identity", 1, (1, 2), "embedding_key_identity is of no head"),
        ("embedding_value_identity", 1, None, "needs two value tokens or more, and the probe names 0"),
    ],
)
def test_what_there_is_not_is_refused(weights, name, rank, head, message):
    with pytest.raises(SubspaceError, match=message):
        cut_subspace(name, model_of(weights), rank, head=head, token_classes={"key": CLASSES["key"]})

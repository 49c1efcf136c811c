"""Subspaces of the residual stream that weights single out: an orthonormal basis each, cut at a rank (definitions 2 §A1).

`embedding_key_identity`, `embedding_value_identity`: what tells the embeddings of the task's keys, or values, apart.
`head_qk_query`, `head_qk_key`: singular directions of a head's W_QK = W_Qᵀ W_K, left and right.
`head_ov_input`, `head_ov_output`: those of W_OV = W_Vᵀ W_Oᵀ. `full_residual`: everything, without a basis.

Everything is float64. Biases, the LayerNorm's gain and 1/√d_head are not folded in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import LakebedError
from .forward import Model
from .svd import align_signs, matrix_svd, ov_factors, product_svd, qk_factors

FULL_RESIDUAL = "full_residual"
# Name to the class of tokens.
IDENTITY_SUBSPACES: Mapping[str, str] = {
    "embedding_key_identity": "key",
    "embedding_value_identity": "value",
}
# Name to the head's matrix, and the side of its singular vectors.
HEAD_SUBSPACES: Mapping[str, tuple[Literal["W_QK", "W_OV"], Literal["left", "right"]]] = {
    "head_qk_query": ("W_QK", "left"),
    "head_qk_key": ("W_QK", "right"),
    "head_ov_input": ("W_OV", "left"),
    "head_ov_output": ("W_OV", "right"),
}
SUBSPACES = (*IDENTITY_SUBSPACES, *HEAD_SUBSPACES, FULL_RESIDUAL)


class SubspaceError(LakebedError, ValueError):
    """A subspace that there is not, or not with that rank or head."""


@dataclass(frozen=True)
class Subspace:
    """The span of the first columns of `basis`."""

    basis: Tensor
    """`Float64[d_model, rank]`, orthonormal."""
    singular_values: Tensor
    """`Float64[…]`: the whole spectrum that it was cut from, largest first."""
    available_rank: int
    """The numerical rank: more directions there are not."""


def check_subspace(name: str, rank: int | None, head: object | None) -> None:
    """Raises SubspaceError unless a subspace is given the rank and the head that it takes, and no others."""
    if name not in SUBSPACES:
        raise SubspaceError(f"no subspace {name!r}; there are {', '.join(SUBSPACES)}")
    if name == FULL_RESIDUAL and rank is not None:
        raise SubspaceError(f"{name} is the whole residual vector: it takes no rank")
    if name not in HEAD_SUBSPACES and head is not None:
        raise SubspaceError(f"{name} is of no head: it takes none")
    if name in HEAD_SUBSPACES and head is None:
        raise SubspaceError(f"{name} is of a head: name its layer and number")
    if name != FULL_RESIDUAL and (rank is None or rank < 1):
        raise SubspaceError(f"{name} needs a rank of at least 1")


def cut_subspace(
    name: str,
    model: Model,
    rank: int,
    *,
    head: tuple[int, int] | None = None,
    token_classes: Mapping[str, Tensor] | None = None,
) -> Subspace:
    """The first `rank` directions of a subspace of this model; detached.

    `head` is (layer, head), `token_classes` has `Int[token]` ids by class (key, value). Raises SubspaceError for a rank
    above the one there is, and for a class without at least two tokens.
    """
    check_subspace(name, rank, head)
    if name == FULL_RESIDUAL:
        raise SubspaceError(f"{name} has no basis")
    if name in IDENTITY_SUBSPACES:
        directions, spectrum, entries = _identity(name, model, token_classes or {})
    else:
        assert head is not None
        directions, spectrum, entries = _of_head(name, model, head)
    # The weights are float32, whatever they are decomposed in.
    smallest = entries * torch.finfo(torch.float32).eps * spectrum[:1]
    available = int((spectrum > smallest).sum())
    if rank > available:
        raise SubspaceError(f"rank {rank} exceeds that of subspace {name}, which is {available}")
    return Subspace(directions[:, :rank], spectrum, available)


def _identity(name: str, model: Model, token_classes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Right singular vectors of the tokens' embeddings less their mean, the spectrum, and the longer side."""
    kind = IDENTITY_SUBSPACES[name]
    tokens = token_classes.get(kind)
    if tokens is None or len(tokens) < 2:
        held = 0 if tokens is None else len(tokens)
        raise SubspaceError(f"{name} needs two {kind} tokens or more, and the probe names {held}")
    rows = model.unembedding.detach()[tokens.to(model.unembedding.device)].double().cpu()
    found = matrix_svd(rows - rows.mean(0))
    return align_signs(found.U, found.Vh)[1].mT, found.S, max(rows.shape)


def _of_head(name: str, model: Model, head: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
    """Singular vectors of one side of a head's product, the spectrum, and the longer side."""
    matrix, side = HEAD_SUBSPACES[name]
    factors, names = (qk_factors, ("W_Q", "W_K")) if matrix == "W_QK" else (ov_factors, ("W_V", "W_O"))
    first, second = (model.head_weights[weight][head].detach().double().cpu() for weight in names)
    found = product_svd(*factors(first, second))
    left, right = align_signs(found.U, found.Vh)
    return left if side == "left" else right.mT, found.S, model.d_model

"""Residual vectors in the singular directions of a head's W_QK: a score cut at any rank is a sum over the first ranks.

y_qᵀ W_Qᵀ W_K y_k = Σ_r σ_r (u_r·y_q)(v_r·y_k). Source: definitions 1 §J.3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .forward import Model
from .parallel_columns import ParallelColumns
from .svd import align_signs, product_svd, qk_factors

LAYERNORM_MODES = ("head_ln1", "none")


@dataclass(frozen=True, order=True)
class QKForm:
    """A head, the stage its form is applied to, and how that is normalised: through the head's own LayerNorm, or not."""

    layer: int
    head: int
    stage: str
    layernorm_mode: str = "head_ln1"
    layout: str = "roles"

    @staticmethod
    def parse_head(label: str) -> tuple[int, int]:
        """Layer and head of a label such as L2H1; raises ValueError."""
        match = re.fullmatch(r"L(\d+)H(\d+)", label)
        if match is None:
            raise ValueError(f"cannot read head {label!r}: write it as L2H1, layer and head from 0")
        return int(match[1]), int(match[2])

    def prepare(self, model: Model) -> PreparedForm:
        """The form with a model's weights."""
        weights = {
            name: model.head_weights[name][self.layer, self.head] for name in ("W_Q", "W_K", "b_Q", "b_K")
        }
        found = product_svd(*qk_factors(weights["W_Q"].double().cpu(), weights["W_K"].double().cpu()))
        left, right = (side.to(weights["W_Q"]) for side in align_signs(found.U, found.Vh))
        query_bias, key_bias = weights["b_K"] @ weights["W_Q"], weights["b_Q"] @ weights["W_K"]
        # One product for everything: query and key coordinates, then the two bias terms.
        directions = torch.cat([left, right.mT, query_bias[:, None], key_bias[:, None]], 1)
        return PreparedForm(self, directions, weights["b_Q"] @ weights["b_K"])


@dataclass(frozen=True)
class PreparedForm:
    """A form with the weights of one step."""

    form: QKForm
    directions: Tensor
    """`Float[d_model, 2 · rank + 2]`."""
    constant: Tensor
    """b_Q·b_K."""


@dataclass(frozen=True)
class QKCoordinates(ParallelColumns):
    """Of each place: the full score is (Σ σ · query · key + query_bias + key_bias) / √d_head."""

    query: Tensor
    """`Float[place, rank]`, on the left singular directions."""
    key: Tensor
    """`Float[place, rank]`, on the right ones."""
    query_bias: Tensor
    """`Float[place]`: (W_Q y)·b_K + b_Q·b_K."""
    key_bias: Tensor
    """`Float[place]`: b_Q·(W_K y)."""


def qk_coordinates(model: Model, prepared: PreparedForm, x: Tensor) -> QKCoordinates:
    """Coordinates of residual vectors `Float[place, d_model]` of the form's stage."""
    form = prepared.form
    y = model.attention_norm(form.layer, x) if form.layernorm_mode == "head_ln1" else x
    found = y @ prepared.directions
    rank = (found.shape[1] - 2) // 2
    query, key, biases = found[:, :rank], found[:, rank : 2 * rank], found[:, 2 * rank :]
    return QKCoordinates(query.contiguous(), key.contiguous(), biases[:, 0] + prepared.constant, biases[:, 1])

"""Scalar qk_rank_separation: does a head's QK form, cut to its first singular directions, score the support above the
distractors?  (definitions 3 §A)

With M(θ) = W_Qᵀ W_K and its first r singular vectors U_r, V_r *at the source*, frozen there:
M_r(θ) = U_r U_rᵀ M(θ) V_r V_rᵀ and s_r(a, b) = z_aᵀ M_r z_b / √d_head, biases left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from ..forward import Model
from ..svd import align_signs, product_svd, qk_factors
from . import (
    Basis,
    Evaluation,
    Passes,
    ScalarError,
    check_stage,
    mean_over,
)
from .roles import HeadScalar


class QKRankSeparation(HeadScalar):
    """Mean over support keys minus mean over distractor keys of the score cut to `rank` singular directions."""

    name = "qk_rank_separation"
    rank: int = Field(ge=1)
    stage: str
    layernorm_mode: str = Field("head_ln1", pattern="^(head_ln1|none)$")

    def check(self, model: Model) -> None:
        """The head, the stage, and a rank within the head's width."""
        super().check(model)
        check_stage(self.stage, model)
        if self.rank > model.d_head:
            raise ScalarError(
                f"rank {self.rank} exceeds the width of a head, {model.d_head}: W_QK has no more"
            )

    def basis(self, model: Model, token_classes: Mapping[str, Tensor]) -> Basis:
        """Left and right singular vectors, `Float[d_model, rank]`, and the whole spectrum, by float64 SVD."""
        W_Q, W_K = (model.head_weights[name][self.head_of].detach().double().cpu() for name in ("W_Q", "W_K"))
        found = product_svd(*qk_factors(W_Q, W_K))
        if not float(found.S.sum()) > 0:
            raise ScalarError(f"W_QK of head {self.head} is zero: it has no singular directions")
        left, right = align_signs(found.U, found.Vh)
        device = model.unembedding
        return Basis(
            {"left": left[:, : self.rank].to(device), "right": right[: self.rank].mT.to(device)}, found.S
        )

    def evaluate(self, passes: Passes, basis: Basis, frozen: Mapping[str, Tensor]) -> Evaluation:
        """Separations and what they are made of."""
        model = passes.model
        records, passed = self.on(passes, self.record_side)
        layer, head = self.head_of
        z = passed.stages[self.stage]
        if self.layernorm_mode == "head_ln1":
            z = model.attention_norm(layer, z)
        W_Q, W_K = (model.head_weights[name][layer, head] for name in ("W_Q", "W_K"))
        left, right = basis.tensors["left"], basis.tensors["right"]
        query, support, distractors = self.positions(records)
        place = query[:, None, None].expand(-1, 1, z.shape[-1])
        q = (z.gather(1, place)[:, 0] @ left) @ (W_Q @ left).mT
        k = (z @ right) @ (W_K @ right).mT
        scores = (k @ q[..., None])[..., 0] / math.sqrt(model.d_head)
        return self.separation(scores, support, distractors, mean_over)


SCALARS = {QKRankSeparation.name: QKRankSeparation}

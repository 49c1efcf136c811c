"""Scalar route_score: how much of what the clean record knows passes through one subspace, at one stage and role.
(definitions 2 §A2-A4, 3 §E)

With transfer tokens a (clean) and b (corrupted), m(run) = logit_a − logit_b at the run's prediction. The corrupted run is
patched, z ← z + (z_clean − z) B Bᵀ, with B *of the source*, frozen; `full_residual`: z ← z_clean. Then
route_score = m(patched) − m(corrupted), and gradients flow through all three passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..forward import Interventions, Model
from ..subspaces import FULL_RESIDUAL, check_subspace, cut_subspace
from . import SIDES, Basis, Evaluation, Passes, Scalar, ScalarError, Side, check_stage, parse_head


class RouteScore(Scalar):
    """Contrast margin of the patched corrupted run less that of the corrupted run."""

    name = "route_score"
    stage: str
    subspace: str
    rank: int | None = Field(None, ge=1)
    head: str | None = None
    position_role: str

    @model_validator(mode="after")
    def _subspace_is_whole(self) -> Self:
        check_subspace(self.subspace, self.rank, self.head)
        return self

    @property
    def sides(self) -> tuple[Side, ...]:
        """Both: the state of one is put into the other."""
        return SIDES

    @property
    def head_of(self) -> tuple[int, int] | None:
        """The head whose subspace it is."""
        return None if self.head is None else parse_head(self.head)

    def check(self, model: Model) -> None:
        """The stage, and the head if it has one."""
        check_stage(self.stage, model)
        if self.head is not None:
            parse_head(self.head, model)

    def basis(self, model: Model, token_classes: Mapping[str, Tensor]) -> Basis:
        """The orthonormal columns, `Float[d_model, rank]`; nothing for the full residual."""
        if self.subspace == FULL_RESIDUAL or self.rank is None:
            return Basis()
        found = cut_subspace(self.subspace, model, self.rank, head=self.head_of, token_classes=token_classes)
        return Basis({"basis": found.basis.to(model.unembedding)}, found.singular_values)

    def evaluate(self, passes: Passes, basis: Basis, frozen: Mapping[str, Tensor]) -> Evaluation:
        """Route scores, and the margins of the three runs."""
        pair, from_, to = self._matched(passes)
        # Rows: the patched positions of all pairs, one after the other.
        z_clean = passes.of["clean"].distinct.stages[self.stage][passes.pairs.sides["clean"].row[pair], from_]
        stream = passes.of["corrupted"].stages[self.stage]
        z = stream[pair, to]
        patched = z_clean
        if "basis" in basis.tensors:
            columns = basis.tensors["basis"]
            patched = z + (z_clean - z) @ columns @ columns.mT
        margins = {side: self._margin(passes, passes.of[side].final, side) for side in SIDES}
        margin = self._margin(passes, self._rerun(passes, stream.index_put((pair, to), patched)), "corrupted")
        score = margin - margins["corrupted"]
        # A pair whose patch changes nothing scores exactly 0. What the two passes, of different shapes, leave is rounding;
        # the gradient is not touched.
        moved = torch.zeros(passes.pairs.count, device=z.device)
        moved.index_add_(0, pair, (patched.detach() != z.detach()).any(-1).float())
        score = score - torch.where(moved > 0, 0, score.detach())
        return Evaluation(
            score,
            {
                "transfer_margin_clean": margins["clean"].detach(),
                "transfer_margin_corrupted": margins["corrupted"].detach(),
                "transfer_margin_patched": (margins["corrupted"] + score).detach(),
            },
        )

    def _matched(self, passes: Passes) -> tuple[Tensor, Tensor, Tensor]:
        """Pair, clean position and corrupted position of everything that is patched, `Int[patched position]` each.

        The positions of a pair are matched in ascending order. Raises ScalarError where their numbers differ.
        """
        held = {side: passes.pairs.sides[side].patch_positions(self.position_role) for side in SIDES}
        counts = {side: of.sum(-1) for side, of in held.items()}
        differing = (counts["clean"] != counts["corrupted"]).nonzero()
        if len(differing):
            first = int(differing[0])
            raise ScalarError(
                f"role {self.position_role!r} has {int(counts['clean'][first])} clean and "
                f"{int(counts['corrupted'][first])} corrupted positions in pair {first} (in {len(differing)} of "
                f"{passes.pairs.count} pairs the two differ): they are patched one to one"
            )
        pair, from_ = held["clean"].nonzero(as_tuple=True)
        return pair, from_, held["corrupted"].nonzero(as_tuple=True)[1]

    def _rerun(self, passes: Passes, stream: Tensor) -> Tensor:
        """The final stage at the prediction, `Float[pair, d_model]`, of corrupted runs whose stage holds `stream`."""
        records = passes.pairs.sides["corrupted"]
        first = torch.arange(passes.pairs.count, device=records.tokens.device) * records.tokens.shape[1]
        interventions = Interventions(residual_patches={self.stage: stream})
        ended = passes.model.forward(
            records.tokens, interventions=interventions, places=first + records.prediction
        )
        return ended.final

    @staticmethod
    def _margin(passes: Passes, final: Tensor, side: Side) -> Tensor:
        """`Float[pair]`: logit of the first transfer token less that of the second, at the prediction.

        `final` is `Float[pair, position, d_model]`, or `Float[pair, d_model]` where it is there already.
        """
        if final.ndim == 3:
            at = passes.pairs.sides[side].prediction
            final = final[torch.arange(len(at), device=at.device), at]
        a, b = passes.model.unembedding[passes.pairs.transfer].unbind(1)
        return ((a - b) * final).sum(-1)


SCALARS = {RouteScore.name: RouteScore}

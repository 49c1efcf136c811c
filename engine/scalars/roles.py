"""The three roles of a separation: one query position, the keys it should find, and those it should not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from pydantic import BaseModel, model_validator
from torch import Tensor

from ..forward import Model
from . import Evaluation, Records, Scalar, Side, parse_head


class SeparationRoles(BaseModel):
    """Base of scalars that hold support keys against distractor keys."""

    score_query_role: str = "prediction"
    support_key_role: str
    distractor_key_role: str

    @model_validator(mode="after")
    def _two_roles(self) -> Self:
        if self.support_key_role == self.distractor_key_role:
            raise ValueError(f"support and distractor role are both {self.support_key_role!r}")
        return self

    def positions(self, records: Records) -> tuple[Tensor, Tensor, Tensor]:
        """Query `Int[pair]`, support and distractor keys up to it, `Bool[pair, position]`. Raises ScalarError."""
        query = records.query_positions(self.score_query_role)
        return (
            query,
            records.key_positions(self.support_key_role, query),
            records.key_positions(self.distractor_key_role, query),
        )

    @staticmethod
    def separation(
        scores: Tensor, support: Tensor, distractors: Tensor, mean: Callable[[Tensor, Tensor], Tensor]
    ) -> Evaluation:
        """Mean score `Float[pair, position]` over the support minus that over the distractors, and the usual company."""
        of_support, of_distractors = mean(support, scores), mean(distractors, scores)
        held = scores.detach()
        lowest = float("-inf")
        best_support = held.masked_fill(~support, lowest).amax(-1)
        best_distractor = held.masked_fill(~distractors, lowest).amax(-1)
        return Evaluation(
            of_support - of_distractors,
            {
                "support_score_mean": of_support.detach(),
                "distractor_score_mean": of_distractors.detach(),
                "max_margin": of_support.detach() - best_distractor,
                "support_beats_all": (best_support > best_distractor).to(held),
                "support_scores": support.sum(-1).to(held),
                "distractor_scores": distractors.sum(-1).to(held),
            },
        )


class HeadScalar(SeparationRoles, Scalar):
    """Base of scalars of one head that hold its support against its distractors, on one record of a pair."""

    head: str
    record_side: Side = "clean"

    @property
    def sides(self) -> tuple[Side, ...]:
        """The side that is measured."""
        return (self.record_side,)

    @property
    def head_of(self) -> tuple[int, int]:
        """Layer and head."""
        return parse_head(self.head)

    def check(self, model: Model) -> None:
        """The head must be one of the model's."""
        parse_head(self.head, model)

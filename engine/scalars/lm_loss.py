"""Scalar lm_loss: the language-model loss of the records of pairs, token by token.  (definitions 2 §I4)

Mean next-token cross-entropy over every target of a record: other reads, writes and the end too. A pair weighs as many
tokens as it has targets, so that the mean over pairs is the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from . import SIDES, Basis, Evaluation, Passes, Scalar, Side

LossSide = Literal["clean", "corrupted", "both"]


class LanguageModelLoss(Scalar):
    """Cross-entropy of the clean record, the corrupted one, or both."""

    name = "lm_loss"
    loss_side: LossSide = "clean"

    @property
    def sides(self) -> tuple[Side, ...]:
        """Those of `loss_side`."""
        return SIDES if self.loss_side == "both" else (self.loss_side,)

    def evaluate(self, passes: Passes, basis: Basis, frozen: Mapping[str, Tensor]) -> Evaluation:
        """Mean over the targets of each pair, nats; quantities say how many there are."""
        measured = [_cross_entropy(passes, side) for side in self.sides]
        total = torch.stack([of for of, _ in measured]).sum(0)
        tokens = torch.stack([targets for _, targets in measured]).sum(0)
        records = torch.full_like(tokens, len(measured))
        return Evaluation(total / tokens, {"num_tokens": tokens, "num_records": records}, tokens)


def _cross_entropy(passes: Passes, side: Side) -> tuple[Tensor, Tensor]:
    """Sum over the targets of each pair's record, and their number: `Float[pair]` each.

    Many pairs ask about one record: it is unembedded once.
    """
    records, passed = passes.pairs.sides[side], passes.of[side].distinct
    length = torch.zeros(len(records.distinct), dtype=records.length.dtype, device=records.length.device)
    length[records.row] = records.length
    targets = records.distinct[:, 1:]
    is_target = torch.arange(1, records.distinct.shape[1], device=length.device) < length[:, None]
    losses = functional.cross_entropy(
        functional.linear(passed.final[:, :-1], passed.unembedding).flatten(0, 1),
        targets.flatten(),
        reduction="none",
    ).view_as(targets)
    return (losses * is_target).sum(-1)[records.row], (records.length - 1).to(losses)


SCALARS = {LanguageModelLoss.name: LanguageModelLoss}

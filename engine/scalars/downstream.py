"""What follows from a head's match: its attention, what it writes, and the answer. Eleven scalars, one base.

Symbols (definitions 3 §F, 2 §G): q the query, S and D support and distractor keys up to it; s_j = q·k_j/√d_head with biases,
a_j their softmax over the keys up to q; w = W_O Σ a_j v_j and w_S = W_O mean_S v, output bias out; E the unembedding, y the
answer; vm(u) = E_y·u − max E_v·u over the pair's competitors v, chosen anew for each u. A margin is differentiated through
the competitor that is best now: a switch of competitors between two steps shows in what first order leaves over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..capture import require_margin
from ..readout import final_readout, readout_gradient
from . import Basis, Evaluation, Passes, mean_over
from .retrieval import Margin, Retrieval, at_prediction
from .roles import HeadScalar


class DownstreamScalar(HeadScalar):
    """Base. Scalars of the answer name a head too, so that all of them have the same parameters.

    Beside the value a pair has `answer_correct` (1 where the answer is the most probable token), `support_scores` and
    `distractor_scores` (number of keys), and, for a margin, `best_wrong_token` (the competitor it is held against).
    """

    def evaluate(self, passes: Passes, basis: Basis, frozen: Mapping[str, Tensor]) -> Evaluation:
        """The scalar and its company."""
        of = self.retrieval(passes)
        found = self.measure(of, frozen)
        value = found.value if isinstance(found, Margin) else found
        named = {"best_wrong_token": found.wrong} if isinstance(found, Margin) else {}
        with torch.no_grad():
            final = at_prediction(of.records, of.passed.distinct.final)
            correct = (final @ of.model.unembedding.mT).argmax(-1) == of.records.choices.answer_token
        return Evaluation(
            value,
            {
                "answer_correct": correct.to(value),
                "support_scores": of.support.sum(-1).to(value),
                "distractor_scores": of.distractors.sum(-1).to(value),
                **{name: token.to(value) for name, token in named.items()},
            },
        )

    def retrieval(self, passes: Passes) -> Retrieval:
        """The head at its queries."""
        records, passed = self.on(passes, self.record_side)
        return Retrieval(passes.model, records, passed, self.head_of, *self.positions(records))

    @abstractmethod
    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Tensor | Margin:
        """`Float[pair]`, or a margin."""


class AttentionSeparation(DownstreamScalar):
    """mean_S a − mean_D a."""

    name = "attention_separation"

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Tensor:
        """Through q, k, the softmax and what is upstream of them."""
        return of.mean_separation(of.attention)


class AttentionMassSeparation(DownstreamScalar):
    """sum_S a − sum_D a."""

    name = "attention_mass_separation"

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Tensor:
        """Through q, k, the softmax and what is upstream of them."""
        return (of.attention * of.support).sum(-1) - (of.attention * of.distractors).sum(-1)


class HeadAnswerLogitDLA(DownstreamScalar):
    """E_y · w: what the head writes, read by the raw unembedding of the answer."""

    name = "head_answer_logit_dla"

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Tensor:
        """Through attention, values, W_O and the unembedding."""
        return of.answer_logit(of.write)


class HeadValueMarginDLA(DownstreamScalar):
    """vm(w)."""

    name = "head_value_margin_dla"

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Margin:
        """Through attention, values, W_O and the unembedding."""
        return of.value_margin(of.write)


class SupportOVValueMargin(DownstreamScalar):
    """vm(w_S): the OV circuit on the support alone."""

    name = "support_ov_value_margin"

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Margin:
        """Through values, W_O and the unembedding: not through attention."""
        return of.value_margin(of.write_of_support)


class _TimesOVMargin(DownstreamScalar):
    """A factor of the QK side times vm(w_S)."""

    @abstractmethod
    def factor(self, of: Retrieval) -> Tensor:
        """`Float[pair]`."""

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Margin:
        """Through both factors."""
        margin = of.value_margin(of.write_of_support)
        return Margin(self.factor(of) * margin.value, margin.wrong)


class AttendedSupportOVValueMargin(_TimesOVMargin):
    """(mean_S a) · vm(w_S)."""

    name = "attended_support_ov_value_margin"

    def factor(self, of: Retrieval) -> Tensor:
        """mean_S a."""
        return mean_over(of.support, of.attention)


class SupportMassOVValueMargin(_TimesOVMargin):
    """(sum_S a) · vm(w_S)."""

    name = "support_mass_ov_value_margin"

    def factor(self, of: Retrieval) -> Tensor:
        """sum_S a."""
        return (of.attention * of.support).sum(-1)


class QKOVProduct(_TimesOVMargin):
    """(mean_S s − mean_D s) · vm(w_S)."""

    name = "qk_ov_product"

    def factor(self, of: Retrieval) -> Tensor:
        """mean_S s − mean_D s, before the softmax."""
        return of.mean_separation(of.scores)


class HeadMarginDLAFixedReadout(DownstreamScalar):
    """w · γ, γ the gradient of the answer's margin in the last residual stage, through the final LayerNorm, *at the source*
    and frozen there: the readout does not move, so what changes is the write."""

    name = "head_margin_dla_fixed_readout"

    def freeze(self, passes: Passes, basis: Basis) -> Mapping[str, Tensor]:
        """`readout`: γ, `Float[pair, d_model]`. Raises CaptureError where its margin is not the model's own."""
        return {"readout": _readout(self.retrieval(passes))}

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Tensor:
        """Through attention, values and W_O: not through γ."""
        return (of.write * frozen["readout"]).sum(-1)


class AnswerMargin(DownstreamScalar):
    """Logit of the answer less that of its best competitor at the prediction; the competitor moves."""

    name = "answer_margin"

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Margin:
        """Through everything. Raises CaptureError where the margin off the last stage is not the model's own."""
        _readout(of)
        return of.value_margin(at_prediction(of.records, of.passed.distinct.final))


class NegativeAnswerLoss(DownstreamScalar):
    """log p(y) at the prediction, over the full vocabulary."""

    name = "negative_answer_loss"

    def measure(self, of: Retrieval, frozen: Mapping[str, Tensor]) -> Tensor:
        """Through everything."""
        logits = at_prediction(of.records, of.passed.distinct.final) @ of.model.unembedding.mT
        answer = of.records.choices.answer_token
        return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


@torch.no_grad()
def _readout(of: Retrieval) -> Tensor:
    """γ of the last residual stage, `Float[pair, d_model]`, its margin held against the model's own."""
    model, choices = of.model, of.records.choices
    own = final_readout(model, at_prediction(of.records, of.passed.distinct.final), choices)
    last = at_prediction(of.records, of.passed.distinct.stages[model.stages[-2]])
    gradient = readout_gradient(model, last, choices, own)
    require_margin(gradient, own)
    return gradient.both[0]


SCALARS: dict[str, type[DownstreamScalar]] = {
    kind.name: kind
    for kind in (
        AttentionSeparation,
        AttentionMassSeparation,
        HeadAnswerLogitDLA,
        HeadValueMarginDLA,
        SupportOVValueMargin,
        AttendedSupportOVValueMargin,
        SupportMassOVValueMargin,
        QKOVProduct,
        HeadMarginDLAFixedReadout,
        AnswerMargin,
        NegativeAnswerLoss,
    )
}

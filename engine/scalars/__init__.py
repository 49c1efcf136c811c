"""Differentiable scalars: what a circuit is worth, one number per causal patch pair. One short file per family.

A scalar takes forward passes over the records of some pairs and gives a value per pair, through which gradients flow to
the weights. What must not move between the two ends of an interval (a singular basis, a readout direction) is *frozen* at
the source: `freeze` returns it, detached, and `evaluate` takes it at both ends. Others register a `Scalar` subclass under
entry-point group `lakebed.scalars`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ... import LakebedError
from ..forward import ForwardPass, Model
from ..readout import Choices

Side = Literal["clean", "corrupted"]
SIDES: tuple[Side, ...] = ("clean", "corrupted")

_BUILT_IN = {
    "qk_rank_separation": "lakebed.engine.scalars.qk_rank",
    "attention_score_separation": "lakebed.engine.scalars.attention_scores",
    "route_score": "lakebed.engine.scalars.route",
    "lm_loss": "lakebed.engine.scalars.lm_loss",
    "attention_separation": "lakebed.engine.scalars.downstream",
    "attention_mass_separation": "lakebed.engine.scalars.downstream",
    "head_answer_logit_dla": "lakebed.engine.scalars.downstream",
    "head_value_margin_dla": "lakebed.engine.scalars.downstream",
    "support_ov_value_margin": "lakebed.engine.scalars.downstream",
    "attended_support_ov_value_margin": "lakebed.engine.scalars.downstream",
    "support_mass_ov_value_margin": "lakebed.engine.scalars.downstream",
    "qk_ov_product": "lakebed.engine.scalars.downstream",
    "head_margin_dla_fixed_readout": "lakebed.engine.scalars.downstream",
    "answer_margin": "lakebed.engine.scalars.downstream",
    "negative_answer_loss": "lakebed.engine.scalars.downstream",
}


class ScalarError(LakebedError, ValueError):
    """A scalar that this model or these pairs do not have; the message names what there is."""


@dataclass(frozen=True)
class Records:
    """One record of every pair: the clean or the corrupted one."""

    tokens: Tensor
    """`Int[pair, position]`, right-padded with any token of the vocabulary."""
    distinct: Tensor
    """`Int[record, position]`: the same without repeats; many pairs ask different questions of one record."""
    row: Tensor
    """`Int[pair]`: the pair's row among the distinct records."""
    length: Tensor
    """`Int[pair]`: tokens before the padding."""
    prediction: Tensor
    """`Int[pair]`: position whose logits answer."""
    choices: Choices
    """Answer and competitors of each pair."""
    roles: Mapping[str, Tensor]
    """Role to `Bool[pair, position]`: where it stands, also after the prediction."""

    def query_positions(self, role: str) -> Tensor:
        """`Int[pair]`: the one position of a query role, at or before the prediction. Raises ScalarError."""
        held = self._role(role)
        if bool((held.sum(-1) != 1).any()):
            worst = int((held.sum(-1) != 1).nonzero()[0])
            raise ScalarError(
                f"query role {role!r} has {int(held[worst].sum())} positions in pair {worst}: a query is exactly one"
            )
        position = held.int().argmax(-1)
        if bool((position > self.prediction).any()):
            raise ScalarError(
                f"positions must be in the causal prefix, and role {role!r} lies after the prediction"
            )
        return position

    def key_positions(self, role: str, query: Tensor) -> Tensor:
        """`Bool[pair, position]`: a role's positions up to the query position, `Int[pair]`. Raises ScalarError if none."""
        held = self._role(role)
        held = held & (torch.arange(held.shape[1], device=held.device) <= query[:, None])
        if bool((~held.any(-1)).any()):
            missing = int((~held.any(-1)).sum())
            raise ScalarError(
                f"role {role!r} has no position up to the query in {missing} of {len(held)} pairs"
            )
        return held

    def patch_positions(self, role: str) -> Tensor:
        """`Bool[pair, position]`: where a role is patched: all of it, at least one position, none after the prediction.

        Raises ScalarError (definitions 2 §A3, the intervention resolver).
        """
        held = self._role(role)
        after = held & (torch.arange(held.shape[1], device=held.device) > self.prediction[:, None])
        if bool(after.any()):
            raise ScalarError(
                f"Intervention positions must be in the causal prefix: role {role!r} lies after the prediction in "
                f"{int(after.any(-1).sum())} of {len(held)} query events"
            )
        if bool((~held.any(-1)).any()):
            missing = int((~held.any(-1)).sum())
            raise ScalarError(
                f"role {role!r} has no position to patch in {missing} of {len(held)} query events"
            )
        return held

    def _role(self, role: str) -> Tensor:
        if role == "causal_prefix":
            place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
            return place <= self.prediction[:, None]
        if role not in self.roles:
            raise ScalarError(f"no role {role!r}; these pairs have {', '.join(sorted(self.roles))}")
        return self.roles[role]


@dataclass(frozen=True)
class Pairs:
    """Causal patch pairs whose clean records go through the model together, and so do their corrupted ones."""

    sides: Mapping[str, Records]
    """The sides somebody wants."""
    transfer: Tensor
    """`Int[pair, 2]`: tokens that the change takes from the clean record and gives to the corrupted one."""
    token_classes: Mapping[str, Tensor] = field(default_factory=dict)
    """Class of tokens of the task (key, value) to its `Int[token]` ids; empty where the task has none."""

    @property
    def count(self) -> int:
        """Number of pairs."""
        return len(self.transfer)


class PairPass:
    """A forward pass over distinct records, as one over pairs: what is asked for is repeated when it is asked for."""

    def __init__(self, passed: ForwardPass, row: Tensor) -> None:
        self.distinct = passed
        """The pass itself, a row per distinct record."""
        self.stages: Mapping[str, Tensor] = _Repeated(passed.stages, row)
        """Stage name to `Float[pair, position, d_model]`."""
        self.queries: Mapping[int, Tensor] = _Repeated(dict(enumerate(passed.queries)), row)
        """Layer to `Float[pair, head, position, d_head]`, biases in, not yet scaled; `keys` and `values` alike."""
        self.keys: Mapping[int, Tensor] = _Repeated(dict(enumerate(passed.keys)), row)
        self.values: Mapping[int, Tensor] = _Repeated(dict(enumerate(passed.values)), row)

    @property
    def final(self) -> Tensor:
        """Stage final_norm, `Float[pair, position, d_model]`."""
        return self.stages["final_norm"]


_Key = TypeVar("_Key")


class _Repeated(Mapping[_Key, Tensor]):
    """Tensors by name, their rows repeated on access."""

    def __init__(self, held: Mapping[_Key, Tensor], row: Tensor) -> None:
        self._held, self._row = held, row

    def __getitem__(self, key: _Key) -> Tensor:
        return self._held[key].index_select(0, self._row)

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@dataclass(frozen=True)
class Passes:
    """The model of one step and what it did on the pairs: residual stages, queries, keys and values captured."""

    model: Model
    pairs: Pairs
    of: Mapping[str, PairPass]
    """By side."""


@dataclass(frozen=True)
class Evaluation:
    """A scalar on some pairs."""

    value: Tensor
    """`Float[pair]`: differentiable; the objective of a cell of pairs is its mean."""
    quantities: Mapping[str, Tensor] = field(default_factory=dict)
    """`Float[pair]` by name: what else a reader wants to know, not differentiated."""
    weight: Tensor | None = None
    """`Float[pair]`: weights of that mean; None for equal ones."""


@dataclass(frozen=True)
class Basis:
    """What of a scalar is frozen at the source and follows from its weights alone."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    singular_values: Tensor | None = None
    """`Float64[rank]`: the whole spectrum that the basis was cut from; None for a scalar without one."""


class Scalar(BaseModel, ABC):
    """One differentiable scalar. Its fields are its parameters, in the lake's table `specs` too."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]

    @property
    @abstractmethod
    def sides(self) -> tuple[Side, ...]:
        """Records that must go through the model."""

    @property
    def head_of(self) -> tuple[int, int] | None:
        """Layer and head the scalar is about, if it is about one."""
        return None

    def check(self, model: Model) -> None:
        """Raises ScalarError, naming what there is, for a head, stage or rank that the model does not have."""

    def basis(self, model: Model, token_classes: Mapping[str, Tensor]) -> Basis:
        """What is frozen and follows from the weights alone; detached. `token_classes` as those of `Pairs`."""
        return Basis()

    def freeze(self, passes: Passes, basis: Basis) -> Mapping[str, Tensor]:
        """What is frozen per pair, `Tensor[pair, …]`; detached."""
        return {}

    @abstractmethod
    def evaluate(self, passes: Passes, basis: Basis, frozen: Mapping[str, Tensor]) -> Evaluation:
        """The scalar at the weights of `passes`, with `basis` and `frozen` of the source."""

    def on(self, passes: Passes, side: str) -> tuple[Records, PairPass]:
        """Records and forward pass of a side."""
        return passes.pairs.sides[side], passes.of[side]


def scalar_names() -> list[str]:
    """Scalars there are."""
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group="lakebed.scalars"))})


def build_scalar(name: str, parameters: Mapping[str, Any]) -> Scalar:
    """The scalar of that name; raises ScalarError listing those there are, or naming the parameter that is wrong."""
    others = {entry.name: entry for entry in entry_points(group="lakebed.scalars")}
    if name in _BUILT_IN:
        kind = importlib.import_module(_BUILT_IN[name]).SCALARS[name]
    elif name in others:
        kind = others[name].load()
    else:
        raise ScalarError(f"no scalar {name!r}; there are {', '.join(scalar_names())}")
    try:
        scalar: Scalar = kind(**parameters)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, of['loc']))} {of['msg'].removeprefix('Value error, ').lower()}".strip()
            for of in error.errors()
        )
        raise ScalarError(f"scalar {name}: {wrong}; it takes {', '.join(kind.model_fields)}") from error
    return scalar


def parse_head(label: str, model: Model | None = None) -> tuple[int, int]:
    """Layer and head of a label such as L2H1; raises ScalarError, also for a head the model does not have."""
    layer, _, head = label.removeprefix("L").partition("H")
    if not (label.startswith("L") and layer.isdigit() and head.isdigit()):
        raise ScalarError(f"cannot read head {label!r}: write it as L2H1, layer and head from 0")
    if model is not None and (int(layer) >= model.n_layers or int(head) >= model.n_heads):
        raise ScalarError(
            f"no head {label}; this run has layers 0–{model.n_layers - 1}, heads 0–{model.n_heads - 1}"
        )
    return int(layer), int(head)


def check_stage(stage: str, model: Model) -> None:
    """Raises ScalarError, listing the stages."""
    if stage not in model.stages:
        raise ScalarError(f"no stage {stage!r}; this run has {', '.join(model.stages)}")


def mean_over(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of `Float[pair, position]` over `Bool[pair, position]`: `Float[pair]`."""
    return (values * mask).sum(-1) / mask.sum(-1)

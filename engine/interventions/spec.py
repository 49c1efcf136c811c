"""What an intervention is: a name, and edits of the forward pass. Each edit is one of five kinds, told by its first key.

`{zero = "L0H1"}` and `{restore = "L0MLP"}` change what a component writes; `{stage = …, operation = …}` the residual
stream; `{attend = "L1H2", role = …}` and `{shuffle_values = "L1H2", role = …}` what a head finds. Source: definitions
2 §A, §H, 3 §G, 4 §0.12, §I, §J.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ... import LakebedError
from ..forward import Model
from ..scalars import check_stage, parse_head
from ..subspaces import FULL_RESIDUAL, HEAD_SUBSPACES, check_subspace

RANDOM_SUBSPACE = "random"
CLEAN = "clean"

_COMPONENT = re.compile(r"L(\d+)(?:(MLP)|([HN])(\d+))")


class InterventionError(LakebedError, ValueError):
    """An intervention that cannot be read, or that this model or these records do not have."""


@dataclass(frozen=True)
class Component:
    """A head, an MLP, or one of its neurons."""

    label: str
    kind: Literal["head", "mlp", "neuron"]
    layer: int
    index: int = 0
    """Head or neuron; 0 for an MLP."""

    def stage(self, model: Model) -> str:
        """The stage it writes: attention before MLP."""
        return model.stages[2 * self.layer + (1 if self.kind == "head" else 2)]


def component_of(label: str, model: Model | None = None) -> Component:
    """L0H1, L0MLP or L0N17. Raises InterventionError, also for what the model does not have."""
    match = _COMPONENT.fullmatch(label)
    if match is None:
        raise InterventionError(
            f"cannot read component {label!r}: write a head as L0H1, an MLP as L0MLP, a neuron as L0N17; the embedding "
            "is no component that can be taken away"
        )
    layer, mlp, letter, index = match.groups()
    kind: Literal["head", "mlp", "neuron"] = "mlp" if mlp else "head" if letter == "H" else "neuron"
    found = Component(label, kind, int(layer), int(index or 0))
    if model is not None:
        layers = f"this run has layers 0–{model.n_layers - 1}"
        if found.layer >= model.n_layers:
            raise InterventionError(f"no component {label}; {layers}")
        most = {"head": model.n_heads, "mlp": 1, "neuron": model.n_neurons}[kind]
        if found.index >= most:
            raise InterventionError(f"no component {label}; {layers}, {kind}s 0–{most - 1}")
    return found


class _Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Zero(_Edit):
    """A component's output times 0 at every position: a head's before W_O, so that the output bias stays."""

    zero: str

    @property
    def component(self) -> Component:
        """What is edited."""
        return component_of(self.zero)

    def check(self, model: Model) -> None:
        """The component must be there."""
        component_of(self.zero, model)


class Restore(_Edit):
    """A component's output as in the untouched run, at every position."""

    restore: str

    @property
    def component(self) -> Component:
        """What is edited."""
        return component_of(self.restore)

    def check(self, model: Model) -> None:
        """The component must be there."""
        component_of(self.restore, model)


class StageEdit(_Edit):
    """A residual stage, at every position or at a role's."""

    stage: str
    operation: Literal["remove", "keep", "patch"]
    subspace: str = FULL_RESIDUAL
    rank: int | None = None
    head: str | None = None
    position_role: str | None = None
    source: Literal["clean", "counterpart"] | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        made = dict(values)
        if made.get("operation") == "patch" and made.get("source") is None:
            made["source"] = "clean"
        if made.get("subspace") == RANDOM_SUBSPACE and made.get("seed") is None:
            made["seed"] = 0
        return made

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.subspace == RANDOM_SUBSPACE:
            if self.rank is None or self.rank < 1 or self.head is not None:
                raise ValueError(
                    f"subspace {RANDOM_SUBSPACE} needs a rank of at least 1, a seed, and no head"
                )
        else:
            check_subspace(self.subspace, self.rank, self.head)
            if self.seed is not None:
                raise ValueError(f"a seed is for subspace {RANDOM_SUBSPACE} alone")
        if self.operation != "patch" and self.source is not None:
            raise ValueError(f"{self.operation} has no source: that is of operation patch")
        if self.operation != "patch" and self.subspace == FULL_RESIDUAL:
            raise ValueError(f"{self.operation} needs a subspace: of the full residual nothing is left")
        return self

    def check(self, model: Model) -> None:
        """Stage, head and rank must be there."""
        check_stage(self.stage, model)
        if self.head is not None:
            parse_head(self.head, model)
        most = model.d_head if self.subspace in HEAD_SUBSPACES else model.d_model
        if self.rank is not None and self.rank > most:
            raise InterventionError(
                f"rank {self.rank} exceeds that of subspace {self.subspace}, which is {most}"
            )


class Attend(_Edit):
    """A head that attends, at the prediction, to a role's positions alone and equally."""

    attend: str
    role: str

    @property
    def component(self) -> Component:
        """What is edited."""
        return component_of(self.attend)

    def check(self, model: Model) -> None:
        """The head must be there."""
        parse_head(self.attend, model)


class ShuffleValues(_Edit):
    """A head that finds, at a role's positions, the mean value vector of the event before; the first that of the last."""

    shuffle_values: str
    role: str

    @property
    def component(self) -> Component:
        """What is edited."""
        return component_of(self.shuffle_values)

    def check(self, model: Model) -> None:
        """The head must be there."""
        parse_head(self.shuffle_values, model)


Edit = Zero | Restore | StageEdit | Attend | ShuffleValues
_KINDS: Mapping[str, type[Zero] | type[Restore] | type[StageEdit] | type[Attend] | type[ShuffleValues]] = {
    "zero": Zero,
    "restore": Restore,
    "stage": StageEdit,
    "attend": Attend,
    "shuffle_values": ShuffleValues,
}


class Intervention(_Edit):
    """A name and its edits, which happen in the order of the forward pass."""

    name: str = Field(min_length=1)
    edits: tuple[Edit, ...] = Field(min_length=1)

    def check(self, model: Model) -> None:
        """Raises InterventionError, ScalarError or SubspaceError for what the model does not have."""
        for edit in self.edits:
            edit.check(model)

    @property
    def takes_counterpart(self) -> bool:
        """Whether something comes from the pair's other record."""
        return any(isinstance(edit, StageEdit) and edit.source == "counterpart" for edit in self.edits)

    @property
    def takes_previous_event(self) -> bool:
        """Whether something comes from the event before."""
        return any(isinstance(edit, ShuffleValues) for edit in self.edits)

    @property
    def roles(self) -> set[str]:
        """Roles whose positions, event by event, are edited."""
        found = set()
        for edit in self.edits:
            if isinstance(edit, StageEdit) and edit.position_role is not None:
                found.add(edit.position_role)
            elif isinstance(edit, Attend | ShuffleValues):
                found.add(edit.role)
        return found


def read_intervention(value: Any) -> Intervention:
    """Reads a name and edits. Raises InterventionError naming the key that is wrong and those there are."""
    if not isinstance(value, Mapping):
        raise InterventionError(f"an intervention has a name and edits, and this is {value!r}")
    unknown = sorted(value.keys() - {"name", "edits"})
    name = value.get("name")
    if unknown or not isinstance(name, str) or not name or not isinstance(value.get("edits"), list | tuple):
        wrong = f"it has an unknown key {unknown[0]!r}" if unknown else "one of them is missing"
        raise InterventionError(f"intervention {name!r}: it takes name and edits (a list), and {wrong}")
    if name == CLEAN:
        raise InterventionError(f"intervention {name!r}: that is the name of the untouched run")
    if not value["edits"]:
        raise InterventionError(f"intervention {name!r} edits nothing: the untouched run is always there")
    return Intervention(name=name, edits=tuple(_read_edit(name, edit) for edit in value["edits"]))


def _read_edit(name: str, value: Any) -> Edit:
    kinds = [kind for kind in _KINDS if isinstance(value, Mapping) and kind in value]
    if len(kinds) != 1:
        raise InterventionError(
            f"intervention {name!r}: an edit has exactly one of {', '.join(_KINDS)}, and this is {value!r}"
        )
    kind = _KINDS[kinds[0]]
    try:
        return kind(**value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = (
            f"unknown key {key!r}"
            if first["type"] == "extra_forbidden"
            else f"{key} {first['msg'].removeprefix('Value error, ')}".strip()
        )
        raise InterventionError(
            f"intervention {name!r}, edit {kinds[0]}: {what}; it takes {', '.join(kind.model_fields)}"
        ) from error


def read_interventions(values: Sequence[Any]) -> list[Intervention]:
    """Reads a list. Raises InterventionError, also for a name that comes twice."""
    found = [read_intervention(value) for value in values]
    names = [of.name for of in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InterventionError(f"two interventions are named {twice!r}")
    return found


def zero_each(model: Model) -> list[Intervention]:
    """Every head and every MLP zeroed, one at a time, by the name of the component."""
    labels = [f"L{layer}H{head}" for layer in range(model.n_layers) for head in range(model.n_heads)]
    labels += [f"L{layer}MLP" for layer in range(model.n_layers)]
    return [Intervention(name=label, edits=(Zero(zero=label),)) for label in labels]

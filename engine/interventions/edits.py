"""The edits of a stack of interventions, stage by stage.

Axes: `run` interventions of the stack, `row` what goes through the model (a record, or an event where events of one record
are edited apart), `event` a prediction. Up to the last attention a state is `Float[run, row, position, …]`, the positions
those of the record or of a window, after it `Float[run, event, …]`: no position is read any more but the predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forward import Attended, Model
from ..scalars import Records
from ..subspaces import FULL_RESIDUAL, Subspace, cut_subspace
from .clean import Clean
from .spec import (
    RANDOM_SUBSPACE,
    Attend,
    Component,
    Intervention,
    InterventionError,
    Restore,
    ShuffleValues,
    StageEdit,
    Zero,
    component_of,
)


class Bases:
    """Subspaces of a model's residual stream that interventions edit, each cut once."""

    def __init__(self, model: Model, token_classes: Mapping[str, Tensor]) -> None:
        self._model, self._classes = model, token_classes
        self._held: dict[tuple[str, int | None, str | None, int | None], tuple[Subspace, Tensor] | None] = {}

    def of(self, edit: StageEdit) -> Tensor | None:
        """`Float[d_model, rank]`, as the model's weights; None for the full residual. Raises SubspaceError."""
        found = self._cut(edit)
        return None if found is None else found[1]

    def subspace(self, edit: StageEdit) -> Subspace | None:
        """What the basis was cut from; None for the full residual. A random one has no spectrum."""
        found = self._cut(edit)
        return None if found is None else found[0]

    def _cut(self, edit: StageEdit) -> tuple[Subspace, Tensor] | None:
        key = (edit.subspace, edit.rank, edit.head, edit.seed)
        if key not in self._held:
            found = self._make(edit)
            self._held[key] = None if found is None else (found, found.basis.to(self._model.unembedding))
        return self._held[key]

    def _make(self, edit: StageEdit) -> Subspace | None:
        if edit.subspace == FULL_RESIDUAL or edit.rank is None:
            return None
        if edit.subspace == RANDOM_SUBSPACE:
            width = self._model.d_model
            drawn = torch.Generator().manual_seed(edit.seed or 0)
            normal = torch.randn(width, edit.rank, generator=drawn, dtype=torch.float64)
            return Subspace(torch.linalg.qr(normal).Q, normal.new_empty(0), width)
        head = None if edit.head is None else component_of(edit.head)
        return cut_subspace(
            edit.subspace,
            self._model,
            edit.rank,
            head=None if head is None else (head.layer, head.index),
            token_classes=self._classes,
        )


@dataclass
class Stack:
    """Interventions that go through the model together from a common start, and where they have changed anything."""

    interventions: Sequence[Intervention]
    apart: bool
    """Whether a row is an event, not a record."""
    union: bool
    """Whether what is edited for one event of a record is edited for all of them."""
    records: Records
    changed: Tensor
    """`Bool[run, row]`, then `Bool[run, event]`: rows that may differ from the untouched run."""
    ended: bool = False
    """Whether the last attention is done."""
    window: Tensor | None = None
    """`Int[event, place]`: the positions that are followed where events are apart, see `window`; None for all."""

    @classmethod
    def of(
        cls,
        interventions: Sequence[Intervention],
        apart: bool,
        union: bool,
        records: Records,
        ended: bool,
        window: Tensor | None,
    ) -> Stack:
        """A stack in which nothing has changed yet."""
        rows = len(records.row) if apart or ended else len(records.distinct)
        changed = torch.zeros(len(interventions), rows, dtype=torch.bool, device=records.row.device)
        return cls(interventions, apart, union, records, changed, ended, window)

    @property
    def row(self) -> Tensor:
        """`Int[event]`: the row of each event."""
        return (
            torch.arange(len(self.records.row), device=self.records.row.device)
            if self.apart
            else self.records.row
        )

    def rows_of(self, x: Tensor) -> Tensor:
        """`[record, position, …]` as `[row, position, …]`."""
        if self.window is not None:
            return x[self.records.row[:, None], self.window.clamp(min=0)]
        return x.index_select(0, self.records.row) if self.apart else x

    def repeat(self, x: Tensor) -> Tensor:
        """`[…]` for every run, without a copy: `[run, …]`."""
        return x.expand(len(self.interventions), *x.shape)

    def at_predictions(self, x: Tensor) -> Tensor:
        """`[run, row, position, …]` as `[run, event, …]`."""
        if self.window is not None:
            return x[:, :, -1]
        return x[:, self.row, self.records.prediction]

    def places(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Index of positions of rows, `Int[place]` each, in a state before the last attention is done."""
        return (row, position) if self.window is None else (row, position - self.window[row, 0])

    def end(self) -> None:
        """The last attention is done: rows are events from here on."""
        if not self.ended:
            self.changed, self.ended = self.changed[:, self.row], True

    def edits(self, stage: str, model: Model) -> Iterator[tuple[int, Component | None, object]]:
        """Run, component and edit of everything that happens at a stage; the component is None for the stage itself."""
        for run, intervention in enumerate(self.interventions):
            for edit in intervention.edits:
                component = None if isinstance(edit, StageEdit) else edit.component
                written = edit.stage if isinstance(edit, StageEdit) else component and component.stage(model)
                if written == stage:
                    yield run, component, edit

    def note(self, run: int, before: Tensor, after: Tensor) -> None:
        """Marks the rows of a run in which an edit changed something."""
        self.changed[run] |= (before != after).flatten(1).any(1)


def edit_heads(
    stack: Stack, stage: str, model: Model, attended: Attended | None, mixed: Tensor, clean: Attended
) -> Tensor:
    """What heads mix, `Float[run, row, position, head, d_head]` or at the predictions, with the edits of a layer.

    `attended` is of the whole stack, None within a window, where no head is made to attend; `clean` of the untouched run.
    """
    edits = list(stack.edits(stage, model))
    held = [of for of in edits if of[1] is not None]
    if not held:
        return mixed
    mixed = mixed.clone()
    for run, component, edit in held:
        assert component is not None
        of = mixed[run].select(-2, component.index)
        before = of.clone()
        if isinstance(edit, Zero):
            of.zero_()
        elif isinstance(edit, Restore):
            untouched = clean.mixed.select(-2, component.index)
            if stack.ended:
                of.copy_(untouched[stack.records.row, stack.records.prediction])
            else:
                of.copy_(stack.rows_of(untouched))
            continue
        elif isinstance(edit, Attend | ShuffleValues):
            assert attended is not None
            heads = [
                part[run].select(-2, component.index)
                for part in (attended.query, attended.key, attended.value)
            ]
            found = _found(stack, edit, *heads)
            if stack.ended:
                of.copy_(found)
            else:
                of[stack.row, stack.records.prediction] = found
        stack.note(run, before, of)
    return mixed


def _found(stack: Stack, edit: Attend | ShuffleValues, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a head finds at the predictions, `Float[event, d_head]`; query, key, value: `Float[row, position, d_head]`."""
    records = stack.records
    held = records.key_positions(edit.role, records.prediction)
    row = stack.row
    values = value[row]
    mean = (values * held[..., None]).sum(1) / held.sum(1, keepdim=True)
    if isinstance(edit, Attend):
        return mean
    # definitions 3 §G: o − c_S + A_S vbar~, the mean of the event before in place of the values at S.
    scores = (key[row] @ query[row, records.prediction][..., None])[..., 0] / query.shape[-1] ** 0.5
    places = torch.arange(scores.shape[1], device=scores.device)
    attention = scores.masked_fill(places > records.prediction[:, None], -torch.inf).softmax(-1)
    kept = torch.where(held, 0, attention)
    mass = torch.where(held, attention, 0).sum(1, keepdim=True)
    return (kept[..., None] * values).sum(1) + mass * mean.roll(1, 0)


def edit_mlp(
    stack: Stack, stage: str, model: Model, layer: int, before: Tensor, clean: Clean, first: bool
) -> Tensor:
    """What an MLP writes, shaped as the stage `before` it, with the edits of a layer; `first`: nothing changed yet."""
    edits = [
        (run, component, edit) for run, component, edit in stack.edits(stage, model) if component is not None
    ]
    of_neurons = [of for of in edits if of[1].kind == "neuron"]
    untouched = clean.mlp[layer] if stack.ended else stack.rows_of(clean.mlp[layer])
    if first and not of_neurons:
        write = stack.repeat(untouched)
    else:
        neurons = model.neurons(layer, before)
        if of_neurons:
            own = model.neurons(layer, clean.stages[2 * layer + 1])
            own = own if stack.ended else stack.rows_of(own)
            neurons = neurons.clone()
            for run, component, edit in of_neurons:
                activation = neurons[run, ..., component.index]
                held = activation.clone()
                if isinstance(edit, Zero):
                    activation.zero_()
                    stack.note(run, held[..., None], activation[..., None])
                else:
                    activation.copy_(own[..., component.index])
        write = model.mlp_write(layer, neurons)
    for run, component, edit in edits:
        if component.kind != "mlp":
            continue
        write = write.clone()
        held = write[run].clone()
        if isinstance(edit, Zero):
            write[run] = 0
            stack.note(run, held, write[run])
        else:
            write[run] = untouched
    return write


@dataclass(frozen=True)
class Counterpart:
    """The other records of pairs, and their untouched stages at every position."""

    records: Records
    stages: Mapping[str, Tensor]


def edit_stage(
    stack: Stack,
    stage: str,
    model: Model,
    h: Tensor,
    untouched: Tensor,
    bases: Bases,
    other: Counterpart | None,
) -> Tensor:
    """A residual stage, `Float[run, row, position, d_model]` or `Float[run, event, d_model]`, with its edits.

    `h` is overwritten; `untouched` is that of the untouched run, without the first axis.
    """
    edits = [(run, edit) for run, _, edit in stack.edits(stage, model) if isinstance(edit, StageEdit)]
    for run, edit in edits:
        basis = bases.of(edit)
        if edit.source == "counterpart":
            places, source = _from_counterpart(stack, edit, other)
        else:
            places = _places(stack, edit)
            source = untouched[places]
        z = h[run][places]
        edited = _operate(edit, z, source, basis)
        h[run][places] = edited
        stack.changed[run, places[0][(edited != z).any(-1)]] = True
        if edit.operation == "patch":
            # What was put back as it was is the untouched run again.
            stack.changed[run] &= (h[run] != untouched).flatten(1).any(1)
    return h


def _operate(edit: StageEdit, z: Tensor, source: Tensor, basis: Tensor | None) -> Tensor:
    if basis is None:
        return source
    moved = source - z if edit.operation == "patch" else z
    projected = moved @ basis @ basis.mT
    if edit.operation == "keep":
        return projected
    return z + projected if edit.operation == "patch" else z - projected


def _places(stack: Stack, edit: StageEdit) -> tuple[Tensor, ...]:
    """Index of the places that are edited: (row, position), or (event,) once the last attention is done."""
    records = stack.records
    events = torch.arange(len(records.row), device=records.row.device)
    if edit.position_role is None:
        held = torch.ones_like(records.tokens if stack.apart else records.distinct, dtype=torch.bool)
        return (events,) if stack.ended else held.nonzero(as_tuple=True)
    held = records.patch_positions(edit.position_role)
    if stack.union:
        event, position = held.nonzero(as_tuple=True)
        together = torch.zeros_like(records.distinct, dtype=torch.bool)
        together[records.row[event], position] = True
        held = together[records.row] if stack.ended else together
    if stack.ended:
        return (events[held[events, records.prediction]],)
    return stack.places(*held.nonzero(as_tuple=True))


def _from_counterpart(
    stack: Stack, edit: StageEdit, other: Counterpart | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Places, and what stands at their counterparts: the positions of a role are matched in ascending order."""
    if other is None:
        raise InterventionError(
            "a patch from the counterpart needs causal patch pairs, whose other record it takes: name --pair-type"
        )
    if edit.position_role is None:
        raise InterventionError(
            "a patch from the counterpart needs a position_role: records differ in length"
        )
    here, there = (of.patch_positions(edit.position_role) for of in (stack.records, other.records))
    counts = here.sum(1), there.sum(1)
    if bool((counts[0] != counts[1]).any()):
        first = int((counts[0] != counts[1]).nonzero()[0])
        raise InterventionError(
            f"role {edit.position_role!r} has {int(counts[0][first])} positions in the record of pair {first} and "
            f"{int(counts[1][first])} in its counterpart: they are patched one to one"
        )
    event, position = here.nonzero(as_tuple=True)
    from_ = there.nonzero(as_tuple=True)[1]
    source = other.stages[edit.stage][other.records.row[event], from_]
    if stack.ended:
        kept = position == stack.records.prediction[event]
        return (event[kept],), source[kept]
    return stack.places(stack.row[event], position), source

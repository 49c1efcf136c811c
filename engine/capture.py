"""One forward pass, and everything that is measured in it: readouts, attention, head writes, components, coordinates.

torch in, tensors out; nothing here knows of files. Axes: `batch` records, `position`, `event` query events of the batch in
record order, `candidate` the tokens that answer or compete somewhere, `role`, `layer`, `head`, `d_model`, `d_head`.

Records are right-padded and no mask is passed: attention is causal, so no position before the padding sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .. import LakebedError
from .attention import Queries, attend
from .forward import Model
from .qk_coordinates import QKCoordinates, QKForm, qk_coordinates
from .readout import Choices, Readout, ReadoutGradient, final_readout, readout_gradient, stage_readouts
from .writes import HeadWrites, OVReader, component_contributions, head_writes

# How far the margin read off the last residual stage may be from the model's own (definitions 2 §C).
MARGIN_TOLERANCE = 1e-4


class CaptureError(LakebedError):
    """The parts of a forward pass do not add up to its output."""


@dataclass(frozen=True)
class Batch:
    """Records and their query events."""

    tokens: Tensor
    """`Int[batch, position]`, right-padded with any token of the vocabulary."""
    row: Tensor
    """`Int[event]`: row of the batch, ascending."""
    position: Tensor
    """`Int[event]`: prediction position."""
    choices: Choices
    """The answer of each event and the tokens it competes with."""
    queries: dict[str, Queries] = field(default_factory=dict)
    """Query role to the query position of each event, and the roles it may attend to."""
    places: dict[str, Tensor] = field(default_factory=dict)
    """Layout to `Int[place]`: row · length + position, the places whose residual stream is kept."""

    def kept(self, layouts: Iterable[str]) -> Kept:
        """Where the residual stream is wanted for some layouts."""
        predictions = self.row * self.tokens.shape[1] + self.position
        wanted = {layout: self.places[layout] for layout in layouts}
        places = torch.unique(torch.cat([predictions, *wanted.values()]))

        def find(of: Tensor) -> Tensor | None:
            return None if torch.equal(of, places) else torch.searchsorted(places, of)

        return Kept(
            places,
            torch.searchsorted(places, predictions),
            {layout: find(of) for layout, of in wanted.items()},
        )


@dataclass(frozen=True)
class Kept:
    """The places of a batch where its residual stream is wanted."""

    places: Tensor
    """`Int[place]`: row · length + position, ascending."""
    events: Tensor
    """`Int[event]`: where among them each event predicts."""
    layouts: dict[str, Tensor | None]
    """Layout to `Int[place]`, where among them its own are; None if they are all of them, in order."""

    def of(self, layout: str, x: Tensor) -> Tensor:
        """A layout's places among `Float[place, d_model]`."""
        index = self.layouts[layout]
        return x if index is None else x.index_select(0, index)


@dataclass(frozen=True)
class Request:
    """What to measure; whatever is asked for shares one forward pass."""

    readouts: bool = False
    attention: frozenset[str] = frozenset()
    """Query roles whose attention is kept."""
    head_writes: frozenset[str] = frozenset()
    """Query roles at which heads write."""
    components: bool = False
    activations: frozenset[str] = frozenset()
    """Layouts whose residual stream is kept."""
    qk_coordinates: frozenset[QKForm] = frozenset()

    def __or__(self, other: Request) -> Request:
        """Both."""
        return Request(
            self.readouts or other.readouts,
            self.attention | other.attention,
            self.head_writes | other.head_writes,
            self.components or other.components,
            self.activations | other.activations,
            self.qk_coordinates | other.qk_coordinates,
        )

    @property
    def roles(self) -> frozenset[str]:
        """Query roles that attention is computed for."""
        components = {"prediction"} if self.components else set()
        return self.attention | self.head_writes | components

    @property
    def layouts(self) -> frozenset[str]:
        """Layouts at whose places the residual stream is read."""
        return self.activations | {form.layout for form in self.qk_coordinates}


@dataclass(frozen=True)
class Attention:
    """Attention from one query position per event."""

    scores: Tensor
    """`Float[value]`: for each event, layer and head the scaled scores of keys 0 to the query position."""
    probabilities: Tensor
    """`Float[value]`: their softmax."""

    def reordered(self, events: Tensor | None, queries: Tensor) -> Attention:
        """With `Int[event]` as the new order of events, whose query positions are then `queries`."""
        if events is None:
            return self
        total = self.scores.numel() // int((queries + 1).sum())
        counts = (queries + 1) * total
        before = torch.empty_like(counts)
        before[events] = counts
        start = (torch.cumsum(before, 0) - before)[events]
        shift = start - (torch.cumsum(counts, 0) - counts)
        place = torch.arange(self.scores.numel()) + shift.repeat_interleave(counts)
        return Attention(self.scores.index_select(0, place), self.probabilities.index_select(0, place))


@dataclass
class Captured:
    """What was asked for of one batch, on the CPU; the rest is empty."""

    readouts: Readout | None = None
    """`[event, stage]`: the stages in order, then the model's own logits."""
    attention: dict[str, Attention] = field(default_factory=dict)
    head_writes: dict[str, HeadWrites] = field(default_factory=dict)
    """By query role, `[event, layer, head, role]`: the query's roles, then what the head does write."""
    components: Tensor | None = None
    """`Float[event, component, 2]`: contributions with the LayerNorm differentiated, and with its scale frozen."""
    activations: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    """(layout, stage) to `Float[place, d_model]` of each batch: together they are large, so that a stage is joined when
    it is written (`stage`)."""
    qk_coordinates: dict[QKForm, QKCoordinates] = field(default_factory=dict)

    def stage(self, layout: str, stage: str, order: Tensor | None, out: Tensor) -> None:
        """Puts a stage into `Float[place, d_model]`, in the order `Int[place]`; None for that of the batches."""
        parts = self.activations[layout, stage]
        if order is None:
            torch.cat(parts, out=out)
        else:
            torch.index_select(torch.cat(parts), 0, order, out=out)

    def shape(self, layout: str, stage: str) -> tuple[int, int]:
        """Places and d_model of a stage."""
        parts = self.activations[layout, stage]
        return sum(len(part) for part in parts), parts[0].shape[1]

    def reordered(
        self, events: Tensor | None, places: Mapping[str, Tensor | None], queries: Mapping[str, Tensor]
    ) -> Captured:
        """In another order of events and, by layout, of places: `Int[event]` and `Int[place]`, None for the one it has.
        Activations stay as they are, see `stage`.

        `queries` gives the query position of each event in the new order, by role.
        """

        def event(values: Tensor) -> Tensor:
            return values if events is None else values.index_select(0, events)

        def place(layout: str, values: Tensor) -> Tensor:
            order = places.get(layout)
            return values if order is None else values.index_select(0, order)

        return Captured(
            None if self.readouts is None else self.readouts.apply(event),
            {role: of.reordered(events, queries[role]) for role, of in self.attention.items()},
            {role: of.apply(event) for role, of in self.head_writes.items()},
            None if self.components is None else event(self.components),
            self.activations,
            {form: of.apply(partial(place, form.layout)) for form, of in self.qk_coordinates.items()},
        )


class Capture:
    """Measures one model. What follows from its weights alone is computed once, here."""

    def __init__(self, model: Model, candidates: Tensor, request: Request) -> None:
        """`candidates` is `Int[candidate]`, those of the batches' choices."""
        self.model, self.request = model, request
        self.writes = OVReader(model, candidates) if request.head_writes or request.components else None
        self.forms = {form: form.prepare(model) for form in sorted(request.qk_coordinates)}

    @torch.no_grad()
    def run(self, batch: Batch) -> Captured:
        """One forward pass over a batch. Raises CaptureError."""
        request, model = self.request, self.model
        captured = Captured()
        capture = {"stages"} | ({"attention"} if request.roles else set())
        kept = batch.kept(request.layouts)
        passed = model.forward(batch.tokens, capture=capture, places=kept.places)
        own = final_readout(model, passed.final.index_select(0, kept.events), batch.choices)
        # [stage, event, d_model]
        residual = torch.stack([x.index_select(0, kept.events) for x in passed.stages.values()])
        gradient = readout_gradient(model, residual[-2], batch.choices, own)
        require_margin(gradient, own)
        if request.readouts:
            read = stage_readouts(model, residual[:-1], batch.choices)
            # The final stage unembedded is the model's own output.
            captured.readouts = read.append(own).append(own).cpu()
        parts = []
        for role in sorted(request.roles):
            queries = batch.queries[role]
            if role in request.attention:
                attended = attend(queries, passed.queries, passed.keys)
                captured.attention[role] = Attention(
                    queries.lists(attended.scores).cpu(), queries.lists(attended.probabilities).cpu()
                )
            if self.writes is not None and role in request.head_writes | {"prediction"}:
                mixes = [queries.mixes(*of) for of in zip(passed.values, passed.mixed, strict=True)]
                found = head_writes(self.writes, mixes, batch.choices, gradient)
                if role == "prediction":
                    parts = [found.contributions[..., -1, :]]
                if role in request.head_writes:
                    captured.head_writes[role] = found.cpu()
        if request.components:
            captured.components = component_contributions(model, residual, parts[0], gradient).cpu()
        for layout in request.activations:
            for stage, x in passed.stages.items():
                captured.activations[layout, stage] = [kept.of(layout, x).cpu()]
        for form, prepared in self.forms.items():
            x = kept.of(form.layout, passed.stages[form.stage])
            captured.qk_coordinates[form] = qk_coordinates(model, prepared, x).cpu()
        return captured


def require_margin(gradient: ReadoutGradient, own: Readout) -> None:
    """Raises CaptureError where the margin read off the last stage is not the model's own, `Float[event]` each."""
    expected = own.value_margin
    difference = (gradient.margin - expected).abs()
    allowed = MARGIN_TOLERANCE * (1 + expected.abs())
    if bool((difference <= allowed).all()):
        return
    worst = int((difference - allowed).nan_to_num(torch.inf).argmax())
    raise CaptureError(
        f"the value margin read off the last residual stage is {float(gradient.margin[worst]):.6g}, the model's own "
        f"{float(expected[worst]):.6g}: its final LayerNorm or unembedding is not what the adapter says, or its weights are "
        "not finite"
    )


def concatenate(parts: Sequence[Captured]) -> Captured:
    """What several batches gave, one after the other along the event or place axis."""
    first = parts[0]
    return Captured(
        None if first.readouts is None else Readout.join([part.readouts for part in parts if part.readouts]),
        {
            role: Attention(
                torch.cat([part.attention[role].scores for part in parts]),
                torch.cat([part.attention[role].probabilities for part in parts]),
            )
            for role in first.attention
        },
        {role: HeadWrites.join([part.head_writes[role] for part in parts]) for role in first.head_writes},
        _joined([part.components for part in parts]),
        {key: [of for part in parts for of in part.activations[key]] for key in first.activations},
        {
            form: QKCoordinates.join([part.qk_coordinates[form] for part in parts])
            for form in first.qk_coordinates
        },
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held) if held else None

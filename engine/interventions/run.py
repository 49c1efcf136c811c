"""Many interventions on the same records, stacked along the batch axis, each from the first stage that it changes.

The untouched run is computed once. Interventions that begin at the same stage go on together from there, and after the last
attention only the predictions are followed. A row in which nothing changed *is* the untouched run, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forward import Attended, Model
from ..scalars import Records
from .clean import clean_run
from .edits import Bases, Counterpart, Stack, edit_heads, edit_mlp, edit_stage
from .spec import CLEAN, Intervention, Restore, StageEdit
from .window import attend_window, window_of

# Tokens of a stack: a layer's activations stay in cache, and small stacks do not pay for every operation.
_TOKENS = 8192


@dataclass(frozen=True)
class Runs:
    """What came of some runs at the prediction of each event."""

    names: list[str]
    last: Tensor
    """The stage before the final LayerNorm, `Float[run, event, d_model]`."""
    final: Tensor
    """Stage final_norm, `Float[run, event, d_model]`."""
    parts: Tensor | None
    """What each of `part_names` writes, `Float[run, event, part, d_model]`; None unless asked for."""


def part_names(model: Model) -> list[str]:
    """What the stage before the final LayerNorm is the sum of: embedding, and by layer heads, attention bias, MLP."""
    found = ["embedding"]
    for layer in range(model.n_layers):
        found += [f"L{layer}H{head}" for head in range(model.n_heads)]
        found += [f"L{layer}.attention_bias", f"L{layer}MLP"]
    return found


class Engine:
    """Runs interventions on the records of some events. `counterpart` are the other records of their pairs.

    `union`: the events of a record are edited together, in one run of the record; else each in a run of its own. `bases`
    that several engines share are cut once.
    """

    def __init__(
        self,
        model: Model,
        records: Records,
        counterpart: Records | None = None,
        token_classes: Mapping[str, Tensor] | None = None,
        *,
        bases: Bases | None = None,
        union: bool = False,
        parts: bool = False,
    ) -> None:
        self._model, self._records, self._union, self._wants_parts = model, records, union, parts
        self._bases = bases or Bases(model, token_classes or {})
        self._counterpart = counterpart
        self._other: Counterpart | None = None
        self._clean = clean_run(model, records)

    def run(self, interventions: Sequence[Intervention]) -> Runs:
        """The untouched run, then every intervention. Raises InterventionError, ScalarError or SubspaceError."""
        for of in interventions:
            of.check(self._model)
        made = self._untouched(1 + len(interventions))
        for places, start, stack in self._stacks(interventions):
            found = self._walk(start, stack)
            to = torch.tensor(places, device=stack.changed.device) + 1
            for new, into in ((found.last, made.last), (found.final, made.final), (found.parts, made.parts)):
                if new is not None and into is not None:
                    changed = stack.changed.reshape(*stack.changed.shape, *[1] * (new.ndim - 2))
                    into[to] = torch.where(changed, new, into[to])
        made.names.extend(of.name for of in interventions)
        return made

    def _untouched(self, count: int) -> Runs:
        """The untouched run, `count` times."""
        clean = self._clean
        parts = None
        if self._wants_parts:
            named = [
                part for index in range(len(self._model.stages) - 1) for part in self._clean_parts(index)
            ]
            parts = torch.stack(named, 1).expand(count, -1, -1, -1).clone()
        last, final = (of.expand(count, -1, -1).clone() for of in clean.stages[-2:])
        return Runs([CLEAN], last, final, parts)

    def _stacks(self, interventions: Sequence[Intervention]) -> Iterator[tuple[list[int], int, Stack]]:
        """Where each of a stack stands among all, the place of the stage at which it begins, and the stack."""
        by_kind: dict[tuple[int, bool, tuple[str, ...]], list[int]] = {}
        for at, of in enumerate(interventions):
            start = self._start(of)
            if start is not None:
                # What the last attention reads is the same for all events of a record until something before it changes.
                apart = bool(of.roles) and not self._union and start < self._last_attention
                by_kind.setdefault((start, apart, _windowed(of) if apart else ()), []).append(at)
        records = self._records
        for (start, apart, roles), held in sorted(by_kind.items()):
            ended = start > self._last_attention
            window = window_of(records, roles) if roles else None
            tokens = window if window is not None else records.tokens if apart else records.distinct
            size = max(1, _TOKENS // (len(records.row) if ended else tokens.numel()))
            for first in range(0, len(held), size):
                part = held[first : first + size]
                chosen = [interventions[at] for at in part]
                yield part, start, Stack.of(chosen, apart, self._union, records, ended, window)

    def _start(self, intervention: Intervention) -> int | None:
        """Place of the first stage that can differ; None where nothing does: what is put back changes nothing by itself."""
        stages = self._model.stages
        changing = [
            stages.index(edit.stage if isinstance(edit, StageEdit) else edit.component.stage(self._model))
            for edit in intervention.edits
            if not isinstance(edit, Restore) and not (isinstance(edit, StageEdit) and edit.source == "clean")
        ]
        return min(changing, default=None)

    @property
    def _last_attention(self) -> int:
        """Place of the stage that the last attention writes."""
        return 2 * self._model.n_layers - 1

    def _walk(self, start: int, stack: Stack) -> Runs:
        """From the start to the end."""
        model, stages = self._model, self._model.stages
        parts = [stack.repeat(of) for index in range(start) for of in self._clean_parts(index)]
        h, last = self._untouched_stage(start - 1, stack), self._untouched_stage(-2, stack, ended=True)
        for index in range(start, len(stages)):
            first = index == start
            if index == len(stages) - 1:
                last, h = h, model.final_norm(h)
            else:
                h, written = self._next(index, h, stack, first)
                parts += written
            untouched = self._clean.stages[index] if stack.ended else stack.rows_of(self._clean.stages[index])
            h = edit_stage(stack, stages[index], model, h, untouched, self._bases, self._others(stack))
        joined = torch.stack(parts, 2) if self._wants_parts else None
        return Runs([], last, h, joined)

    def _next(self, index: int, h: Tensor, stack: Stack, first: bool) -> tuple[Tensor, list[Tensor]]:
        """The stage after `h`, and the parts that were added to it, at the predictions."""
        model, stage = self._model, self._model.stages[index]
        if index == 0:
            # A copy per run, since edits write into a stage.
            made = stack.repeat(stack.rows_of(self._clean.stages[0])).clone()
            return made, self._seen([made], stack)
        if index % 2 == 0:
            write = edit_mlp(stack, stage, model, index // 2 - 1, h, self._clean, first)
            return h + write, self._seen([write], stack)
        layer = index // 2
        last = index == self._last_attention
        attended, mixed = self._attend(layer, h, stack, first, last)
        if last:
            h, mixed = stack.at_predictions(h), stack.at_predictions(mixed)
            stack.end()
        mixed = edit_heads(stack, stage, model, attended, mixed, self._clean.attended[layer])
        written = []
        if self._wants_parts:
            written = self._head_parts(layer, mixed if stack.ended else stack.at_predictions(mixed))
        return h + model.attention_write(layer, mixed), written

    def _attend(
        self, layer: int, h: Tensor, stack: Stack, first: bool, last: bool
    ) -> tuple[Attended | None, Tensor]:
        """A layer's heads on the stage before them, and what they mix; within a window that alone."""
        clean = self._clean.attended[layer]
        if stack.window is not None:
            if first:
                return None, stack.repeat(stack.rows_of(clean.mixed))
            row = self._records.row
            return None, attend_window(self._model, layer, h, stack.window, clean, row, last)
        if first:
            attended = Attended(*(stack.repeat(stack.rows_of(of)) for of in _parts_of(clean)))
        else:
            found = self._model.attend(layer, h.flatten(0, 1))
            attended = Attended(*(of.reshape(*h.shape[:2], *of.shape[1:]) for of in _parts_of(found)))
        return attended, attended.mixed

    def _seen(self, writes: list[Tensor], stack: Stack) -> list[Tensor]:
        """Parts at the predictions; none unless they are wanted."""
        if not self._wants_parts:
            return []
        return [of if stack.ended else stack.at_predictions(of) for of in writes]

    def _untouched_stage(self, index: int, stack: Stack, ended: bool = False) -> Tensor:
        """For every run of a stack; before the embedding there is nothing."""
        if index == -1:
            return torch.empty(0)
        stage = self._clean.stages[index]
        return stack.repeat(stage if ended or (stack.ended and stage.ndim == 2) else stack.rows_of(stage))

    def _clean_parts(self, index: int) -> list[Tensor]:
        """`Float[event, d_model]` each: what makes an untouched stage out of the one before it."""
        if not self._wants_parts:
            return []
        clean, records = self._clean, self._records

        def at(x: Tensor, full: int) -> Tensor:
            return x[records.row, records.prediction] if x.ndim == full else x

        if index == 0:
            return [at(clean.stages[0], 3)]
        if index % 2:
            return self._head_parts(index // 2, at(clean.attended[index // 2].mixed, 4))
        return [at(clean.mlp[index // 2 - 1], 3)]

    def _head_parts(self, layer: int, mixed: Tensor) -> list[Tensor]:
        """Writes of `Float[…, head, d_head]`, `Float[…, d_model]` each: of the heads, then of the output bias."""
        weights = self._model.head_weights
        heads = torch.einsum("...hf,hdf->...hd", mixed, weights["W_O"][layer])
        return [*heads.unbind(-2), weights["b_O"][layer].expand(*mixed.shape[:-2], -1)]

    def _others(self, stack: Stack) -> Counterpart | None:
        """The pairs' other records, run once, and only if somebody takes something from them."""
        wanted = any(of.takes_counterpart for of in stack.interventions)
        if wanted and self._other is None and self._counterpart is not None:
            found = clean_run(self._model, self._counterpart, everywhere=True)
            self._other = Counterpart(
                self._counterpart, dict(zip(self._model.stages, found.stages, strict=True))
            )
        return self._other


def _windowed(intervention: Intervention) -> tuple[str, ...]:
    """Roles before whose first position nothing changes; none where something may change at every position."""
    for edit in intervention.edits:
        if not isinstance(edit, Restore) and not (isinstance(edit, StageEdit) and edit.position_role):
            return ()
    return tuple(sorted(intervention.roles))


def _parts_of(of: Attended) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return of.query, of.key, of.value, of.mixed

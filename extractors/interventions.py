"""Dataset interventions: what the model answers when something inside it is changed, many changes at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from ..engine.forward import Model
from ..engine.interventions import (
    Answers,
    Bases,
    Engine,
    Intervention,
    InterventionError,
    StageEdit,
    part_names,
    read_answers,
    read_interventions,
    zero_each,
)
from ..engine.scalars import SIDES, Records
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, INTERVENTIONS
from ..lake.errors import UnknownName
from ..lake.interventions import QUERY_MODES, ZERO_EACH, intervention_parameters
from ..lake.names import spec_id
from . import dataset
from .columns import constant, flat, grid, lists, sorted_order, texts
from .forward import probe_of
from .pair_sets import PairSelection, event_records, load_pairs, select_pairs, side_probe, token_classes
from .probe_batches import Integers, ProbeData
from .states import State
from .threads import thread_pool

# Tokens of a batch: the untouched run of all its records, every stage and layer, is held beside what is changed.
_TOKENS = 4096


@dataclass(frozen=True)
class _Batch:
    """Events that go through the model together, by number and as records."""

    events: Integers
    records: Records
    counterpart: Records | None


class InterventionsExtractor(dataset.Extractor):
    """Tables intervention_runs, intervention_subspaces and, if components are asked for, intervention_components."""

    name = INTERVENTIONS
    version = 2
    needs_moments: ClassVar[bool] = False

    def __init__(
        self,
        probe: str,
        record_side: str,
        pairs: PairSelection | None,
        query_mode: str,
        components: bool,
        interventions: Sequence[Intervention] | None,
    ) -> None:
        self.probe, self.record_side, self.pairs = probe, record_side, pairs
        self.query_mode, self.components, self.interventions = query_mode, components, interventions
        self._made: tuple[dataset.Context, list[_Batch]] | None = None

    def parameters(self) -> Mapping[str, Any]:
        """Probe, record side, pairs, and the interventions."""
        pairs = self.pairs or PairSelection(self.probe, (), (), 0)
        return intervention_parameters(
            ZERO_EACH
            if self.interventions is None
            else [of.model_dump(mode="json") for of in self.interventions],
            probe=self.probe,
            record_side=self.record_side,
            query_mode=self.query_mode,
            components=self.components,
            pair_type=pairs.pair_type,
            split=pairs.split,
            max_pairs_per_type=pairs.max_pairs_per_type,
        )

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """Identities of the probes whose records are read."""
        return {side: probe_of(context, side_probe(self.probe, side)).sha256 for side in self._sides()}

    def _sides(self) -> list[str]:
        return list(SIDES) if self._takes_counterparts else [self.record_side]

    @property
    def _takes_counterparts(self) -> bool:
        return any(of.takes_counterpart for of in self.interventions or ())

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes one step."""
        model = context.adapter().load_model(state.weights, context.device)
        batches = self._batches(context, model)
        interventions = zero_each(model) if self.interventions is None else list(self.interventions)
        bases = Bases(model, token_classes(context, self.probe))
        for of in interventions:
            of.check(model)
        # Cut here, before threads share them.
        subspaces = self._subspaces(
            state.step, side_probe(self.probe, self.record_side), interventions, bases
        )
        run = partial(self._run, model, interventions, bases)
        answers = Answers.join(_side_by_side(run, batches, context.device))
        data = probe_of(context, side_probe(self.probe, self.record_side))
        events = np.concatenate([batch.events for batch in batches])
        self._write(writer, state.step, data, events, answers, part_names(model))
        if subspaces:
            writer.rows("intervention_subspaces", subspaces)

    @torch.no_grad()
    def _run(
        self,
        model: Model,
        interventions: Sequence[Intervention],
        bases: Bases,
        batch: _Batch,
    ) -> Answers:
        union = self.query_mode == "batch_union"
        engine = Engine(
            model, batch.records, batch.counterpart, bases=bases, union=union, parts=self.components
        )
        return read_answers(model, engine.run(interventions), batch.records.choices)

    def _batches(self, context: dataset.Context, model: Model) -> list[_Batch]:
        """The same for every step."""
        if self._made is None or self._made[0] is not context:
            data = probe_of(context, side_probe(self.probe, self.record_side))
            data.require_fit(model)
            other: tuple[ProbeData, Integers] | None = None
            if self.pairs is None:
                events = np.arange(data.events)
            else:
                pairs = load_pairs(context, self.pairs, self._sides())
                events, first = np.unique(pairs.events[self.record_side], return_index=True)
                if self._takes_counterparts:
                    far = next(side for side in SIDES if side != self.record_side)
                    other = (probe_of(context, side_probe(self.probe, far)), pairs.events[far][first])
            together = any(of.takes_previous_event for of in self.interventions or ())
            cuts = [np.arange(len(events))] if together else _cut(data, events)
            made = []
            for part in cuts:
                counterpart = None
                if other is not None:
                    counterpart = event_records(other[0], other[1][part], context.device)
                made.append(
                    _Batch(events[part], event_records(data, events[part], context.device), counterpart)
                )
            self._made = (context, made)
        return self._made[1]

    def _subspaces(
        self, step: int, probe: str, interventions: Sequence[Intervention], bases: Bases
    ) -> list[dict[str, Any]]:
        """Rows of intervention_subspaces. Raises SubspaceError for a rank that there is not."""
        spec = spec_id(dict(self.parameters()))
        rows = []
        for of in interventions:
            for place, edit in enumerate(of.edits):
                found = bases.subspace(edit) if isinstance(edit, StageEdit) else None
                if found is None or not isinstance(edit, StageEdit):
                    continue
                rows.append(
                    {
                        "probe": probe,
                        "spec": spec,
                        "step": step,
                        "intervention": of.name,
                        "edit": place,
                        "subspace": edit.subspace,
                        "rank": edit.rank,
                        "head": edit.head,
                        "seed": edit.seed,
                        "available_rank": found.available_rank,
                        "singular_values": found.singular_values.tolist() or None,
                    }
                )
        return rows

    def _write(
        self,
        writer: UnitWriter,
        step: int,
        data: ProbeData,
        events: Integers,
        answers: Answers,
        parts: Sequence[str],
    ) -> None:
        names, order = sorted_order(answers.names)
        event, run = grid(len(events), len(names))
        count = np.bincount(data.competitor_event, minlength=data.events)[events]
        # Which candidates compete: those of an event stand in the order of its competitors.
        competes = np.zeros((len(events), len(data.candidates)), bool)
        place = np.full(data.events, -1)
        place[events] = np.arange(len(events))
        mine = place[data.competitor_event]
        competes[mine[mine >= 0], np.searchsorted(data.candidates, data.competitors[mine >= 0])] = True
        answer = torch.from_numpy(np.searchsorted(data.candidates, data.answer[events]))
        common = {
            "probe": constant(data.name, len(event)),
            "spec": constant(spec_id(dict(self.parameters())), len(event)),
            "step": np.full(len(event), step),
            "event": events[event],
            "intervention": texts(names, run),
        }
        read = answers.readout.apply(lambda column: column[:, order])
        logits = answers.logits[order].transpose(0, 1).numpy()
        writer.rows(
            "intervention_runs",
            {
                **common,
                "answer_logit": flat(read.answer_logit),
                "best_wrong_token": flat(read.best_wrong_token.int()),
                "best_wrong_logit": flat(read.best_wrong_logit),
                "value_margin": flat(read.value_margin),
                "best_token": flat(read.best_token.int()),
                "answer_log_prob": flat(read.answer_log_prob),
                "correct": flat(read.correct),
                "competitor_logits": _competitor_lists(logits, competes, count),
            },
            in_order=True,
        )
        if answers.dla is None or answers.log_prob_dla is None:
            return
        parts, part_order = sorted_order(parts)
        _, _, part = grid(len(events), len(names), len(parts))
        dla = answers.dla[order][:, :, part_order].transpose(0, 1)
        own = dla.take_along_dim(answer[:, None, None, None], -1)
        place_of = pa.array(np.repeat(np.arange(len(event)), len(parts)))
        writer.rows(
            "intervention_components",
            {
                **{name: pa.array(column).take(place_of) for name, column in common.items()},
                "component": texts(parts, part),
                "answer_dla": flat(own),
                "competitor_dla": _competitor_lists(dla.flatten(1, 2).numpy(), competes, count),
                "log_prob_dla": flat(answers.log_prob_dla[order][:, :, part_order].transpose(0, 1)),
            },
            in_order=True,
        )


def _competitor_lists(
    values: np.ndarray[Any, Any], competes: np.ndarray[Any, Any], count: Integers
) -> pa.Array:
    """A list per cell of `Float[event, row, candidate]`: the candidates that compete in the event."""
    rows = values.shape[1]
    if bool((count == count[0]).all()):
        index = np.nonzero(competes)[1].reshape(len(count), 1, -1)
        kept = np.take_along_axis(values, index, -1).reshape(-1)
    else:
        kept = values[np.broadcast_to(competes[:, None], values.shape)]
    return lists(np.ascontiguousarray(kept), np.repeat(count, rows))


def _cut(data: ProbeData, events: Integers) -> list[Integers]:
    """Places of events, which are in record order, so that the records of each part have about `_TOKENS` tokens."""
    examples = data.example[events]
    distinct, first = np.unique(examples, return_index=True)
    size = max(1, _TOKENS // int(data.lengths[distinct].max()))
    return np.split(np.arange(len(events)), first[size::size])


def _side_by_side(run: Callable[[_Batch], Answers], batches: Sequence[_Batch], device: str) -> list[Answers]:
    """Batches at once, a torch thread each: two threads on one wait for each other at every operation."""
    count = torch.get_num_threads()
    workers = min(count, len(batches)) if device == "cpu" else 1
    if workers < 2:
        return [run(batch) for batch in batches]
    with thread_pool(workers, "lakebed-interventions", count // workers) as pool:
        return list(pool.map(run, batches))


def build(
    probe: str = DEFAULT_PROBE,
    record_side: str = "clean",
    pairs: Mapping[str, Any] | None = None,
    query_mode: str = "single_query",
    components: bool = False,
    interventions: Sequence[Any] | str = ZERO_EACH,
) -> InterventionsExtractor:
    """The extractor, for the registry. Raises UnknownName or InterventionError, naming what there is."""
    for option, value, there in (
        ("record_side", record_side, SIDES),
        ("query_mode", query_mode, QUERY_MODES),
    ):
        if value not in there:
            raise UnknownName(f"no {option} {value!r}; there are {', '.join(there)}")
    if isinstance(interventions, str) and interventions != ZERO_EACH:
        raise UnknownName(f"no interventions {interventions!r}: name {ZERO_EACH}, or a list of them")
    listed = None if isinstance(interventions, str) else read_interventions(interventions)
    selection = None if pairs is None else select_pairs(probe, **pairs)
    takes = any(of.takes_counterpart for of in listed or ())
    if takes and (selection is None or record_side != "corrupted"):
        raise InterventionError(
            "a patch from the counterpart goes from the clean into the corrupted record of a causal patch pair: name "
            "record_side corrupted, and pairs"
        )
    return InterventionsExtractor(probe, record_side, selection, query_mode, components, listed)

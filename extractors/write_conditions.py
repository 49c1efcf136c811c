"""Dataset write_conditions: what every head writes of causal patch pairs, with its attention and values real or replaced.

The reference toolkit takes shuffled values from the previous pair of an evaluation batch, so that its numbers depend on
the batch size. Here the partner of a pair is the one before it among the pairs of its type in scan order, the last for the
first. (Not among all types: two types may share a clean event, whose values would then be shuffled into themselves.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..engine.capture import CaptureError
from ..engine.readout import Choices
from ..engine.scalars import SIDES, PairPass, ScalarError
from ..engine.scalars.measure import PairBatch
from ..engine.scalars.roles import SeparationRoles
from ..engine.write_conditions import (
    Answers,
    ConditionWrites,
    HeadsAtQuery,
    condition_writes,
    heads_at_query,
)
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE
from ..lake.errors import LakebedError, UnknownName
from ..lake.names import spec_id
from ..lake.write_conditions import CONDITIONS, WRITE_CONDITIONS, write_condition_parameters
from . import dataset
from .columns import Array, constant, flat, grid, lists, texts
from .forward import probe_of
from .pair_sets import PairSelection, PairSet, load_pairs, select_pairs, side_probe
from .probe_batches import Integers, ProbeData, event_choices
from .states import State


class NothingToShuffle(LakebedError):
    """A type with a single pair: shuffled values would be its own."""


@dataclass(frozen=True)
class _Prepared:
    """What is the same at every step."""

    context: dataset.Context
    pairs: PairSet
    probe: ProbeData
    batches: Sequence[PairBatch]
    choices: Choices
    partner: Integers
    """`Int[pair]`."""


class WriteConditionsExtractor(dataset.Extractor):
    """Tables write_answers, write_attention and write_conditions: all heads of the model, in one forward pass per batch."""

    name = WRITE_CONDITIONS
    version = 1
    needs_moments = False

    def __init__(self, selection: PairSelection, record_side: str, roles: SeparationRoles) -> None:
        self.selection, self.record_side, self.roles = selection, record_side, roles
        self._prepared: _Prepared | None = None

    def parameters(self) -> Mapping[str, Any]:
        """Roles, record side and pairs."""
        selection = self.selection
        return write_condition_parameters(
            self.roles.model_dump(),
            self.record_side,
            pair_type=selection.pair_type,
            probe=selection.probe,
            split=selection.split,
            max_pairs_per_type=selection.max_pairs_per_type,
        )

    @property
    def _probe(self) -> str:
        return side_probe(self.selection.probe, self.record_side)

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """Identity of the probe whose records are read."""
        return {self.record_side: probe_of(context, self._probe).sha256}

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes one step. Raises NothingToShuffle, ScalarError for a role without a place, and CaptureError."""
        held = self._prepare(context)
        model = context.adapter().load_model(state.weights, context.device)
        held.probe.require_fit(model)
        parts = []
        for batch in held.batches:
            records = batch.pairs.sides[self.record_side]
            with torch.no_grad():
                passed = model.forward(records.distinct, capture=("stages", "attention"))
            parts.append(heads_at_query(model, records, PairPass(passed, records.row), self.roles))
        heads = HeadsAtQuery.join(parts)
        try:
            writes, answers = condition_writes(
                model, heads, held.choices, torch.from_numpy(held.partner).to(context.device)
            )
        except CaptureError as error:
            raise CaptureError(f"step {state.step} of run {context.run!r}: {error}") from error
        self._write(writer, state.step, held, heads, writes, answers)

    def _prepare(self, context: dataset.Context) -> _Prepared:
        if self._prepared is None or self._prepared.context is not context:
            pairs = load_pairs(context, self.selection, (self.record_side,))
            probe = probe_of(context, self._probe)
            events = pairs.events[self.record_side]
            self._prepared = _Prepared(
                context,
                pairs,
                probe,
                pairs.batches({self.record_side: probe}, context.device),
                _pair_choices(probe, events, context.device),
                shuffle_partners(pairs),
            )
        return self._prepared

    def _write(
        self,
        writer: UnitWriter,
        step: int,
        held: _Prepared,
        heads: HeadsAtQuery,
        writes: ConditionWrites,
        answers: Answers,
    ) -> None:
        pair, layer, head, condition = grid(*writes.head_margin_dla.shape)
        every_pair = np.arange(held.pairs.count)
        writer.rows(
            "write_answers",
            {**self._ids(step, held, every_pair), **_answer_columns(held, heads, answers)},
        )
        one = condition == 0
        columns = ("support_score", "distractor_score", "support_attention", "distractor_attention")
        masses = ("support_mass", "distractor_mass")
        writer.rows(
            "write_attention",
            {
                **self._ids(step, held, pair[one]),
                "layer": layer[one],
                "head": head[one],
                **{name: flat(getattr(heads, name)) for name in (*columns, *masses)},
            },
        )
        writer.rows(
            "write_conditions",
            {
                **self._ids(step, held, pair),
                "layer": layer,
                "head": head,
                "condition": texts(CONDITIONS, condition),
                "ov_map_value_margin": flat(writes.ov_map_value_margin),
                "head_value_margin_dla": flat(writes.head_value_margin_dla),
                "head_best_wrong_token": flat(writes.head_best_wrong_token.int()),
                "head_answer_logit_dla": flat(writes.head_answer_logit_dla),
                "head_margin_dla": flat(writes.head_margin_dla),
            },
        )

    def _ids(self, step: int, held: _Prepared, pair: Array) -> dict[str, Any]:
        return {
            "spec": constant(spec_id(dict(self.parameters())), len(pair)),
            "record_side": constant(self.record_side, len(pair)),
            "step": np.full(len(pair), step),
            "split": texts(held.pairs.split, pair),
            "pair_type": texts(held.pairs.pair_type, pair),
            "pair_id": texts(held.pairs.pair_id, pair),
        }


def _answer_columns(held: _Prepared, heads: HeadsAtQuery, answers: Answers) -> dict[str, Any]:
    read, choices = answers.readout, held.choices
    competes = choices.wrong == 0
    return {
        "shuffled_pair_id": texts(held.pairs.pair_id, held.partner),
        "query_position": flat(heads.query.int()),
        "answer_token": flat(choices.answer_token.int()),
        "answer_logit": flat(read.answer_logit),
        "best_wrong_token": flat(read.best_wrong_token.int()),
        "best_wrong_logit": flat(read.best_wrong_logit),
        # Candidates ascend, and so do the competitors of an event.
        "competitor_logits": lists(
            answers.candidate_logits[competes].cpu().numpy(), competes.sum(-1).cpu().numpy().astype(np.int32)
        ),
        "answer_log_prob": flat(read.answer_log_prob),
        "best_token": flat(read.best_token.int()),
        "correct": pa.array(read.correct.numpy()),
    }


def shuffle_partners(pairs: PairSet) -> Integers:
    """`Int[pair]`: the pair before each in scan order, among those of its type; the last for the first.

    Raises NothingToShuffle where a type has one pair.
    """
    types = np.array(pairs.pair_type)
    event = pairs.events["clean"]
    partner = np.empty(pairs.count, np.int64)
    for pair_type in np.unique(types):
        held = np.flatnonzero(types == pair_type)
        if len(held) == 1:
            raise NothingToShuffle(
                f"values are shuffled between the pairs of a type, and of type {pair_type} there is one: raise "
                "--max-pairs-per-type, or build a probe with more --examples-per-split"
            )
        held = held[np.argsort(event[held], kind="stable")]
        partner[held] = np.roll(held, 1)
    return partner


def _pair_choices(probe: ProbeData, events: Integers, device: str) -> Choices:
    """Answer and competitors of each pair; several pairs may be of one event."""
    distinct, place = np.unique(events, return_inverse=True)
    of = event_choices(probe, distinct, device)
    rows = torch.from_numpy(place).to(device)
    return Choices(of.candidates, of.answer[rows], of.wrong[rows])


def build(
    record_side: str = "clean",
    score_query_role: str = "prediction",
    support_key_role: str = "",
    distractor_key_role: str = "",
    probe: str = DEFAULT_PROBE,
    pair_type: Sequence[str] = (),
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> WriteConditionsExtractor:
    """The extractor, for the registry. Raises ScalarError or UnknownName, naming what there is."""
    if record_side not in SIDES:
        raise UnknownName(f"no record side {record_side!r}; there are {', '.join(SIDES)}")
    if support_key_role == distractor_key_role:
        raise ScalarError(f"{WRITE_CONDITIONS}: support and distractor role are both {support_key_role!r}")
    roles = SeparationRoles(
        score_query_role=score_query_role,
        support_key_role=support_key_role,
        distractor_key_role=distractor_key_role,
    )
    return WriteConditionsExtractor(
        select_pairs(probe, pair_type, split, max_pairs_per_type), record_side, roles
    )

"""Dataset value_code_rescues: a position's value code taken away, and what transfers and their controls put in its place.

A unit is one rank at one step. Ranks share the untouched run of a step when they are made together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import torch

from ..engine.forward import Model
from ..engine.value_code_rescue import Outcome, code_changes
from ..engine.value_code_transfer import Ends, Fitting, Transfers, fit_transfers
from ..engine.value_codes import IdentityBasis, Side, ValueCodeError
from ..lake import UnitWriter
from ..lake.errors import UnknownName
from ..lake.names import spec_id
from ..lake.value_codes import (
    CLEAN,
    CONTEXT_BASIS,
    CONTROLS,
    DISTRACTORS,
    KEY,
    KEY_BASIS,
    RANDOM,
    RANDOM_BASIS,
    REMOVED,
    SOURCE_BASIS,
    SUPPORT_KEY,
    TARGET_BASIS,
    VALUE_CODE_RESCUES,
    WRONG,
    value_code_rescue_parameters,
)
from . import dataset
from .columns import constant, flat, grid, lists, texts
from .forward import probe_of, require_device, require_stage
from .probe_batches import Integers, event_choices
from .states import State
from .value_code_examples import Examples, load_examples
from .value_code_states import CleanRun, NonFiniteStates, Reading, read_clean, rerun_all, run_clean

_Held = tuple[Any, Model, Examples, CleanRun, Outcome]
# The last untouched run of a context, for the other ranks of its step.
_LATEST: WeakKeyDictionary[dataset.Context, _Held] = WeakKeyDictionary()


class ValueCodeRescuesExtractor(dataset.Extractor):
    """Tables value_code_runs and value_code_bases."""

    name = VALUE_CODE_RESCUES
    version = 1
    needs_moments = False

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = dict(parameters)
        self._context: Mapping[str, Any] = self._parameters["context"] or {}

    def parameters(self) -> Mapping[str, Any]:
        """Ends, rank, controls, events."""
        return self._parameters

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """The probe's identity."""
        return {"probe": probe_of(context, self._parameters["probe"]).sha256}

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes one step. Raises ValueCodeError, ExampleError or NonFiniteStates, the step named."""
        try:
            model, examples, clean, outcome = self._untouched(context, state)
            asked = self._parameters
            transfers = fit_transfers(self._ends(examples, clean), self._fitting(state.step))
            wanted = [of.coordinates for of in transfers.replacements.values()]
            coordinates = torch.stack([torch.zeros_like(transfers.target), *wanted])
            changes = code_changes(transfers.basis, transfers.target, coordinates)
            target = examples.target(asked["target_position_role"])
            replaced = rerun_all(
                model, asked["target_stage"], clean, changes, examples, target, context.device
            )
        except (ValueCodeError, NonFiniteStates) as error:
            raise type(error)(f"step {state.step} of run {context.run!r}: {error}") from error
        rows = _Rows(self._parameters, state.step, examples)
        rows.write_runs(writer, [CLEAN], np.arange(len(examples.event)), outcome)
        judges = np.flatnonzero(~examples.fit)
        rows.write_runs(writer, [REMOVED, *transfers.replacements], judges, replaced, transfers)
        rows.write_bases(writer, transfers, self._bases())

    def _untouched(self, context: dataset.Context, state: State) -> tuple[Model, Examples, CleanRun, Outcome]:
        """The run of the step that every rank shares; computed once while ranks follow each other."""
        own = ("basis_rank", "ridge_lambda", "random_seed", "context")
        shared = {name: value for name, value in self._parameters.items() if name not in own}
        held_context = {name: value for name, value in self._context.items() if name != "context_rank"}
        key = (state.step, state.identity, spec_id({**shared, "context": held_context}))
        held = _LATEST.get(context)
        if held is None or held[0] != key:
            device = require_device(context.device)
            model = context.adapter().load_model(state.weights, device)
            examples = load_examples(context, self._parameters)
            examples.data.require_fit(model)
            for stage in (self._parameters["source_stage"], self._parameters["target_stage"]):
                require_stage(stage, model)
            clean = run_clean(model, examples, self._readings(examples, model), device)
            held = (key, model, examples, clean, read_clean(model, clean, examples, device))
            _LATEST[context] = held
        return held[1:]

    def _readings(self, examples: Examples, model: Model) -> dict[str, Reading]:
        asked, controls = self._parameters, self._parameters["controls"]
        source, target = asked["source_stage"], asked["target_stage"]
        found = {
            "source": Reading(source, examples.places(asked["source_position_role"])),
            "target": Reading(target, examples.target(asked["target_position_role"])),
        }
        if WRONG in controls:
            found["wrong"] = Reading(source, examples.places(DISTRACTORS, up_to_prediction=True))
        if KEY in controls:
            found["key"] = Reading(source, examples.places(SUPPORT_KEY))
        if self._context:
            require_stage(self._context["context_stage"], model)
            places = examples.places(self._context["context_position_role"])
            found["context"] = Reading(self._context["context_stage"], places)
        return found

    def _bases(self) -> dict[str, tuple[str, str, str]]:
        """Basis to (stage, role, grouping)."""
        asked = self._parameters
        source = (asked["source_stage"], asked["source_position_role"])
        found = {
            SOURCE_BASIS: (*source, asked["group_by"]),
            TARGET_BASIS: (asked["target_stage"], asked["target_position_role"], asked["group_by"]),
            KEY_BASIS: (asked["source_stage"], SUPPORT_KEY, SUPPORT_KEY),
            RANDOM_BASIS: (*source, RANDOM),
        }
        if self._context:
            context = (self._context["context_stage"], self._context["context_position_role"])
            found[CONTEXT_BASIS] = (*context, asked["group_by"])
        return found

    def _ends(self, examples: Examples, clean: CleanRun) -> Ends:
        asked, read = self._parameters, clean.vectors
        group_by, names = asked["group_by"], self._bases()
        source = examples.places(asked["source_position_role"])
        target_tokens = examples.tokens(group_by, examples.target(asked["target_position_role"]))

        def side(reading: str, basis: str, tokens: Integers) -> Side:
            stage, role, grouping = names[basis]
            return Side(read[reading], torch.from_numpy(tokens), f"{stage} / {role}, grouped by {grouping}")

        key = None
        if "key" in read:
            keys = examples.tokens(SUPPORT_KEY, examples.places(SUPPORT_KEY))
            key = side("key", KEY_BASIS, keys)
        return Ends(
            side("source", SOURCE_BASIS, examples.tokens(group_by, source)),
            side("target", TARGET_BASIS, target_tokens),
            torch.from_numpy(examples.fit),
            read.get("wrong"),
            key,
            side("context", CONTEXT_BASIS, target_tokens) if "context" in read else None,
        )

    def _fitting(self, step: int) -> Fitting:
        asked = self._parameters
        rank = asked["basis_rank"]
        return Fitting(
            rank,
            self._context.get("context_rank", 0),
            asked["ridge_lambda"],
            asked["random_seed"] + 1009 * step + 9176 * rank,
            frozenset(asked["controls"]),
        )


class _Rows:
    """Writes the rows of one step."""

    def __init__(self, parameters: Mapping[str, Any], step: int, examples: Examples) -> None:
        self._shared = {"probe": parameters["probe"], "spec": spec_id(parameters)}
        self._step, self._examples = step, examples

    def write_runs(
        self,
        writer: UnitWriter,
        kinds: Sequence[str],
        chosen: Integers,
        outcome: Outcome,
        transfers: Transfers | None = None,
    ) -> None:
        """Rows of some examples, `Int[event]`, in some runs; what was put in the code's place comes from `transfers`."""
        event, run = grid(len(chosen), len(kinds))
        events = self._examples.event[chosen]
        logits, lengths = self._competitors(outcome, events)
        writer.rows(
            "value_code_runs",
            {
                **{name: constant(value, len(event)) for name, value in self._shared.items()},
                "step": np.full(len(event), self._step),
                "event": events[event].astype(np.int32),
                "eval_kind": texts(kinds, run),
                **({} if transfers is None else _replacements(transfers, events)),
                "answer_logit": flat(outcome.answer_logit),
                "competitor_logits": lists(logits, np.repeat(lengths, len(kinds))),
                "answer_log_prob": flat(outcome.answer_log_prob),
                "best_token": flat(outcome.best_token.int()),
            },
        )

    def _competitors(self, outcome: Outcome, events: Integers) -> tuple[Any, Integers]:
        """Logits of each event's competitors in each run, one after the other, and how many an event has."""
        competes = event_choices(self._examples.data, events, "cpu").wrong == 0
        logits = outcome.candidate_logits
        chosen = logits[competes[:, None].expand(logits.shape)]
        return chosen.numpy(), competes.sum(1).numpy()

    def write_bases(
        self, writer: UnitWriter, transfers: Transfers, names: Mapping[str, tuple[str, str, str]]
    ) -> None:
        """Rows of the bases."""
        rows = []
        for role, found in transfers.bases.items():
            basis = found.basis if isinstance(found, IdentityBasis) else found
            stage, position_role, group_by = names[role]
            rows.append(
                {
                    **self._shared,
                    "step": self._step,
                    "basis_role": role,
                    "basis_rank": basis.shape[1],
                    "stage": stage,
                    "position_role": position_role,
                    "group_by": group_by,
                    "ambient_dim": len(basis),
                    **(_spectra(found) if isinstance(found, IdentityBasis) else {}),
                    "directions": basis.mT.tolist(),
                }
            )
        writer.rows("value_code_bases", rows)


def _spectra(found: IdentityBasis) -> dict[str, Any]:
    spectra = {"identity": found.identity, "all_vector": found.all_vectors}
    return {
        "num_vectors": found.num_vectors,
        "tokens": found.tokens.tolist(),
        **{f"{name}_centered_rank": of.centered_rank for name, of in spectra.items()},
        **{f"{name}_singular_values": of.singular_values.tolist() for name, of in spectra.items()},
    }


def _replacements(transfers: Transfers, events: Integers) -> dict[str, Any]:
    """Columns of what was put in the code's place, event by event; in the first run nothing was."""
    made = list(transfers.replacements.values())
    count, rank = transfers.target.shape
    nothing = np.tile([True, *(False for _ in made)], count)
    coordinates = torch.stack([of.coordinates for of in made], 1).reshape(-1).numpy()
    sources = np.full((count, 1 + len(made)), -1)
    for column, of in enumerate(made, 1):
        if of.source is not None:
            sources[:, column] = events[of.source.numpy()]
    source = sources.reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(np.where(nothing, 0, rank))]).astype(np.int32)
    return {
        "source_event": pa.array(source.astype(np.int32), mask=source < 0),
        "coordinates": pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(coordinates), mask=pa.array(nothing)
        ),
    }


def build(
    context: Mapping[str, Any] | None = None,
    controls: Sequence[str] = (),
    **ends: Any,
) -> ValueCodeRescuesExtractor:
    """The extractor, for the registry. Raises UnknownName, naming the controls there are, or what is missing."""
    for control in controls:
        if control not in CONTROLS:
            raise UnknownName(f"no control {control!r}; there are {', '.join(CONTROLS)}")
    of_context = ("context_stage", "context_position_role", "context_rank")
    try:
        parameters = value_code_rescue_parameters(
            controls=controls,
            context=None if context is None else tuple(context[name] for name in of_context),
            **ends,
        )
    except TypeError:
        raise UnknownName(
            "value_code_rescues are of two ends, a grouping and a rank: make them with lakebed extract --for "
            "value-code-transfer-rescue and its options"
        ) from None
    return ValueCodeRescuesExtractor(parameters)

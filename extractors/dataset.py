"""What an extractor is: one short file that turns the state of a step into rows and tensors.

A module `extractors/NAME.py` with `build() -> Extractor` is dataset NAME; others register `build` under entry-point
group `lakebed.extractors`. The plan (`plan.py`) decides which steps are missing, reads each state once for all datasets
that want it, and commits one unit per dataset and step.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar

import numpy as np

from ..engine.adapters import Adapter, load_adapter
from ..lake import Lake, RowBlock, UnitWriter
from ..lake.datasets import (
    ACTIVATIONS,
    ATTENTION,
    ATTRIBUTIONS,
    COMPONENT_LOGITS,
    GRADIENT_PRODUCTS,
    HEAD_WRITES,
    INTERVENTIONS,
    MOMENTS,
    QK_COORDINATES,
    READOUTS,
    SCALAR_CHANGES,
    SCALAR_GRADIENTS,
    SCORE_CHANGES,
    SVD,
    UPDATE_NORMS,
    WEIGHTS,
)
from ..lake.errors import UnknownName
from ..lake.value_codes import VALUE_CODE_RESCUES
from ..lake.write_conditions import WRITE_CONDITIONS
from .runs import RecordingError
from .states import State, StateReader

# Datasets of forward passes over a probe; the other built-in ones are of weights alone.
OF_FORWARD_PASSES = (
    ACTIVATIONS,
    ATTENTION,
    READOUTS,
    HEAD_WRITES,
    COMPONENT_LOGITS,
    QK_COORDINATES,
)
_OF_SCALARS = (
    ATTRIBUTIONS,
    UPDATE_NORMS,
    SCALAR_CHANGES,
    SCORE_CHANGES,
    GRADIENT_PRODUCTS,
    SCALAR_GRADIENTS,
    WRITE_CONDITIONS,
)
_BUILT_IN = (SVD, WEIGHTS, MOMENTS, INTERVENTIONS, *OF_FORWARD_PASSES, VALUE_CODE_RESCUES, *_OF_SCALARS)


class Context:
    """The run an extractor works on, and how it writes tensors."""

    def __init__(self, lake: Lake, run: str, device: str = "cpu") -> None:
        self.lake, self.run, self.device = lake, run, device
        self.reader = StateReader(lake, run)
        self.probes: dict[str, Any] = {}
        self._blocks: dict[tuple[int, str], RowBlock] = {}

    def adapter(self) -> Adapter:
        """The model family of the run; raises RecordingError for a run that no adapter describes."""
        info = self.reader.info
        if info["adapter"] is None or info["config"] is None:
            raise RecordingError(
                f"run {self.run!r} has no model adapter, so its layers and heads are unknown: record it with "
                "RunInfo(adapter=…, config=…), or import it with --config"
            )
        return self._adapter

    @cached_property
    def _adapter(self) -> Adapter:
        return load_adapter(self.reader.info["adapter"], self.reader.info["config"])

    def write_tensor(
        self,
        writer: UnitWriter,
        quantity: str,
        name: str,
        step: int,
        array: np.ndarray[Any, Any],
        dimension_names: Sequence[str] | None = None,
    ) -> None:
        """Writes one step of one array; all arrays of a unit's quantity share its row."""
        key = (id(writer), quantity)
        if key not in self._blocks:
            self._blocks = {held: block for held, block in self._blocks.items() if held[0] == id(writer)}
            self._blocks[key] = writer.tensor_rows(quantity, [step])
        self._blocks[key].write(name, array[None], dimension_names=dimension_names)


class Extractor(ABC):
    """One dataset. `version` goes up when the same inputs would give other numbers."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs_moments: ClassVar[bool]

    def parameters(self) -> Mapping[str, Any]:
        """The dataset's parameters, JSON-able; they are its spec."""
        return {}

    def inputs(self, context: Context) -> Mapping[str, Any]:
        """Content hashes of what the dataset is made from beside the state."""
        return {}

    def wants(self, context: Context, step: int) -> bool:
        """Whether there is anything to make at a step."""
        return True

    @abstractmethod
    def extract(self, context: Context, state: State, writer: UnitWriter) -> None:
        """Writes one step."""


def dataset_names() -> list[str]:
    """Datasets that `lakebed extract` can make."""
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group="lakebed.extractors"))})


def build_extractor(name: str, parameters: Mapping[str, Any]) -> Extractor:
    """The extractor of a dataset; raises UnknownName listing those there are."""
    if name in _BUILT_IN:
        build = importlib.import_module(f".{name}", __package__).build
    else:
        found = [entry for entry in entry_points(group="lakebed.extractors") if entry.name == name]
        if not found:
            raise UnknownName(f"no dataset {name!r} to extract; there are {', '.join(dataset_names())}")
        build = found[0].load()
    extractor: Extractor = build(**parameters)
    return extractor

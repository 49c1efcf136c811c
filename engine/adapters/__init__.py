"""Model families: how each names its parameters, layers and heads. One file per family, found by entry point."""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from ... import LakebedError

if TYPE_CHECKING:
    from torch import Tensor

    from ..forward import Model

_BUILT_IN = {
    "gpt2": "lakebed.engine.adapters.gpt2",
    "symbolic_kv": "lakebed.engine.adapters.symbolic_kv",
}


class UnknownAdapter(LakebedError):
    """No model family of that name is installed."""


class UnsupportedModel(LakebedError, ValueError):
    """A configuration of another family, or one whose arithmetic the adapter does not have."""


@dataclass(frozen=True)
class ParameterDescription:
    """Where a parameter stands: module block (L0.attention), layer, kind (q_proj), and its TransformerLens name."""

    module: str
    layer: int | None
    kind: str
    is_bias: bool
    transformer_lens_name: str | None


@dataclass(frozen=True)
class ParameterSlice:
    """A part of a parameter; rows and columns half-open, columns None for vectors."""

    slice_kind: str
    slice: str
    parameter: str
    layer: int | None
    head: int | None
    neuron: int | None
    row_start: int
    row_stop: int
    column_start: int | None
    column_stop: int | None

    @classmethod
    def whole(
        cls, kind: str, label: str, parameter: str, shape: tuple[int, ...], layer: int | None
    ) -> ParameterSlice:
        """The whole parameter."""
        return cls.cut(kind, label, parameter, shape, 0, slice(0, shape[0]), layer)

    @classmethod
    def cut(
        cls,
        kind: str,
        label: str,
        parameter: str,
        shape: tuple[int, ...],
        axis: int,
        part: builtins.slice,
        layer: int | None,
        head: int | None = None,
        neuron: int | None = None,
    ) -> ParameterSlice:
        """Rows (axis 0) or columns (axis 1) `part` of a vector or matrix."""
        rows = part if axis == 0 else slice(0, shape[0])
        columns = (part if axis == 1 else slice(0, shape[1])) if len(shape) > 1 else slice(None, None)
        return cls(
            kind, label, parameter, layer, head, neuron, rows.start, rows.stop, columns.start, columns.stop
        )


class Adapter(Protocol):
    """What a model family tells about itself."""

    name: str
    layer_norm_eps: float
    """Epsilon of every LayerNorm."""
    tied: Mapping[str, Collection[str]]
    """Other state-dict name of a tied parameter, to the names which that parameter may have."""

    def describe(self, parameter: str) -> ParameterDescription:
        """Where a parameter stands; KeyError for a foreign name."""
        ...

    def slices(self, shapes: Mapping[str, tuple[int, ...]]) -> list[ParameterSlice]:
        """Module blocks, projections, heads and neurons as slices of parameters."""
        ...

    def parameter_shapes(self, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter in the model's order, a tied one once; where the family knows several spellings,
        that of `names`, which are a checkpoint's."""
        ...

    def is_buffer(self, name: str) -> bool:
        """Whether a checkpoint's tensor is no weight, such as a stored causal mask; import leaves it out."""
        ...

    def head_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as the interpretability formulas take them, every layer of one step.

        W_Q, W_K, W_V: Float[layer, head, d_head, d_model]; W_O: Float[layer, head, d_model, d_head];
        W_in: Float[layer, d_ff, d_model]; W_out: Float[layer, d_model, d_ff].
        """
        ...

    def load_model(self, weights: Mapping[str, Tensor], device: str = "cpu") -> Model:
        """A model with one step's weights (by state-dict name; a tied tensor once), in eval mode. Raises LakebedError for
        weights of another shape, naming the first that differs."""
        ...

    def stages(self) -> tuple[str, ...]:
        """Residual stages, in forward order; see `engine.forward.residual_stages`."""
        ...


def check_weights(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], aliases: Collection[str] = ()
) -> None:
    """Raises WeightMismatch, naming the first that differs, unless the weights are those of the model with `shapes`.

    `aliases` are other names of tied tensors, which may be there or not.
    """
    from ..forward import WeightMismatch

    for name, shape in shapes.items():
        if name not in weights:
            raise WeightMismatch(f"{name} is missing, the config's model has {shape}")
        if tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape)
            raise WeightMismatch(f"{name} has shape {found}, the config's model has {shape}")
    extra = sorted(weights.keys() - shapes.keys() - set(aliases))
    if extra:
        raise WeightMismatch(f"it holds {extra[0]!r}, which the config's model does not have")


def load_adapter(name: str, config_json: str) -> Adapter:
    """The adapter of a run, from its family's name and its configuration.

    A family is a module with `from_config(config_json) -> Adapter`; others than the built-in ones register it in
    entry-point group `lakebed.adapters`. Raises UnknownAdapter naming those installed.
    """
    others = {entry.name: entry.value for entry in entry_points(group="lakebed.adapters")}
    modules = {**others, **_BUILT_IN}
    if name not in modules:
        raise UnknownAdapter(f"no model adapter {name!r}; installed are {', '.join(sorted(modules))}")
    adapter: Adapter = importlib.import_module(modules[name]).from_config(config_json)
    return adapter

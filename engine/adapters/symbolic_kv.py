"""The symbolic-KV decoder: where its layers, heads and neurons stand in its parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..decoder import SymbolicKVDecoder
from ..forward import Model, residual_stages
from ..svd import split_heads, split_output_heads
from . import ParameterDescription, ParameterSlice

NAME = "symbolic_kv"

_BLOCK = re.compile(
    r"blocks\.(\d+)\.(ln_1|attn|ln_2|ff)\.(?:(q_proj|k_proj|v_proj|out_proj|fc_in|fc_out)\.)?(weight|bias)"
)
_MODULE = {"ln_1": "ln_1", "attn": "attention", "ln_2": "ln_2", "ff": "mlp"}
_TRANSFORMER_LENS = {
    ("q_proj", "weight"): "attn.W_Q",
    ("q_proj", "bias"): "attn.b_Q",
    ("k_proj", "weight"): "attn.W_K",
    ("k_proj", "bias"): "attn.b_K",
    ("v_proj", "weight"): "attn.W_V",
    ("v_proj", "bias"): "attn.b_V",
    ("out_proj", "weight"): "attn.W_O",
    ("out_proj", "bias"): "attn.b_O",
    ("fc_in", "weight"): "mlp.W_in",
    ("fc_in", "bias"): "mlp.b_in",
    ("fc_out", "weight"): "mlp.W_out",
    ("fc_out", "bias"): "mlp.b_out",
    ("ln_1", "weight"): "ln1.w",
    ("ln_1", "bias"): "ln1.b",
    ("ln_2", "weight"): "ln2.w",
    ("ln_2", "bias"): "ln2.b",
}
_OUTSIDE = {
    "token_embedding.weight": ("token_embedding", "embedding", "embed.W_E"),
    "position_embedding.weight": ("position_embedding", "embedding", "pos_embed.W_pos"),
    "final_norm.weight": ("final_norm", "layer_norm", "ln_final.w"),
    "final_norm.bias": ("final_norm", "layer_norm", "ln_final.b"),
}


class SymbolicKVAdapter:
    """Describes the decoder of one configuration. Head h owns rows [h·d_head, (h+1)·d_head) of q, k and v, and those
    columns of the output projection; the output bias belongs to no head."""

    name = NAME
    layer_norm_eps = 1e-5
    tied: Mapping[str, Collection[str]] = {"lm_head.weight": ("token_embedding.weight",)}

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def describe(self, parameter: str) -> ParameterDescription:
        """Module block, layer and kind of a parameter; raises KeyError for a name this model does not have."""
        if parameter in _OUTSIDE:
            module, kind, lens = _OUTSIDE[parameter]
            return ParameterDescription(module, None, kind, parameter.endswith("bias"), lens)
        match = _BLOCK.fullmatch(parameter)
        if match is None:
            raise KeyError(parameter)
        layer, part, projection, leaf = match.groups()
        lens = f"blocks.{layer}.{_TRANSFORMER_LENS[projection or part, leaf]}"
        # A LayerNorm's shift is no additive bias of a projection, yet it is one of its parameters.
        return ParameterDescription(
            f"L{layer}.{_MODULE[part]}", int(layer), projection or "layer_norm", leaf == "bias", lens
        )

    def slices(self, shapes: Mapping[str, tuple[int, ...]]) -> list[ParameterSlice]:
        """Every module block, projection, head, head projection and neuron as slices of parameters."""
        found: list[ParameterSlice] = []
        for parameter, shape in shapes.items():
            about = self.describe(parameter)
            found.append(ParameterSlice.whole("module", about.module, parameter, shape, about.layer))
            if about.layer is None or about.kind == "layer_norm":
                continue
            label = f"L{about.layer}.{about.kind}"
            found.append(ParameterSlice.whole("projection", label, parameter, shape, about.layer))
            found += self._head_slices(about, parameter, shape)
            found += self._neuron_slices(about, parameter, shape)
        return found

    def _head_slices(
        self, about: ParameterDescription, parameter: str, shape: tuple[int, ...]
    ) -> list[ParameterSlice]:
        if about.kind not in ("q_proj", "k_proj", "v_proj", "out_proj") or (
            about.kind == "out_proj" and about.is_bias
        ):
            return []
        width, axis = self.config.model.d_head, 1 if about.kind == "out_proj" else 0
        found = []
        for head in range(self.config.model.n_heads):
            part = slice(head * width, (head + 1) * width)
            for kind, label in (
                ("head_projection", f"L{about.layer}H{head}.{about.kind}"),
                ("head", f"L{about.layer}H{head}.qkvo"),
            ):
                found.append(
                    ParameterSlice.cut(kind, label, parameter, shape, axis, part, about.layer, head=head)
                )
        return found

    def _neuron_slices(
        self, about: ParameterDescription, parameter: str, shape: tuple[int, ...]
    ) -> list[ParameterSlice]:
        if about.kind not in ("fc_in", "fc_out") or (about.kind == "fc_out" and about.is_bias):
            return []
        axis = 1 if about.kind == "fc_out" else 0
        return [
            ParameterSlice.cut(
                "neuron",
                f"L{about.layer}N{n}",
                parameter,
                shape,
                axis,
                slice(n, n + 1),
                about.layer,
                neuron=n,
            )
            for n in range(self.config.model.d_ff)
        ]

    def head_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per-head matrices of one step's weights; see `Adapter.head_weights` for the shapes."""
        heads = self.config.model.n_heads

        def layers(name: str) -> Tensor:
            return torch.stack(
                [weights[f"blocks.{i}.{name}.weight"] for i in range(self.config.model.n_layers)]
            )

        return {
            "W_Q": split_heads(layers("attn.q_proj"), heads),
            "W_K": split_heads(layers("attn.k_proj"), heads),
            "W_V": split_heads(layers("attn.v_proj"), heads),
            "W_O": split_output_heads(layers("attn.out_proj"), heads),
            "W_in": layers("ff.fc_in"),
            "W_out": layers("ff.fc_out"),
        }

    def parameter_shapes(self, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, in the model's order; there is one spelling."""
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        # Not on device "meta", where drawing the first weights imports a compiler for two seconds.
        with torch.random.fork_rng(devices=[]):
            model = SymbolicKVDecoder(self.config.model, self.config.benchmark.vocabulary_size)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def is_buffer(self, name: str) -> bool:
        """The decoder's state dict holds weights only."""
        return False

    def stages(self) -> tuple[str, ...]:
        """Residual stages, in forward order."""
        return residual_stages(self.config.model.n_layers)

    def load_model(self, weights: Mapping[str, Tensor], device: str = "cpu") -> Model:
        """A model with one step's weights; see `Adapter.load_model`. Raises WeightMismatch."""
        from .symbolic_kv_model import load_model

        return load_model(self, weights, device)


def from_config(config_json: str) -> Any:
    """The adapter of a run whose configuration the lake holds."""
    return SymbolicKVAdapter(RunConfig.from_json(config_json))

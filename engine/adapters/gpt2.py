"""GPT-2 as `transformers` saves it: where its layers, heads and neurons stand in its parameters. Needs no transformers.

Its linear layers ("Conv1D") hold weights as [input, output]: y = x W + b. Names come with or without `transformer.`, as the
checkpoint has them. Source: Radford et al. 2019; `modeling_gpt2.py` of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..forward import Model, residual_stages
from ..svd import split_heads, split_output_heads
from . import ParameterDescription, ParameterSlice, UnsupportedModel

NAME = "gpt2"

_PREFIX = "transformer."
_BLOCK = re.compile(r"h\.(\d+)\.(ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)")
# Causal masks, which old checkpoints hold beside the weights.
_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
# Module block, kind, and the names of weight and bias in TransformerLens, where q, k and v are three tensors.
_PARTS: dict[str, tuple[str, str, str | None]] = {
    "ln_1": ("ln_1", "layer_norm", "ln1.{}"),
    "ln_2": ("ln_2", "layer_norm", "ln2.{}"),
    "attn.c_attn": ("attention", "qkv_proj", None),
    "attn.c_proj": ("attention", "out_proj", "attn.{}_O"),
    "mlp.c_fc": ("mlp", "fc_in", "mlp.{}_in"),
    "mlp.c_proj": ("mlp", "fc_out", "mlp.{}_out"),
}
_OUTSIDE = {
    "wte.weight": ("token_embedding", "embedding", "embed.W_E"),
    "wpe.weight": ("position_embedding", "embedding", "pos_embed.W_pos"),
    "ln_f.weight": ("final_norm", "layer_norm", "ln_final.w"),
    "ln_f.bias": ("final_norm", "layer_norm", "ln_final.b"),
}
_GELU: dict[str, Literal["none", "tanh"]] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
# Options that change the arithmetic, and the one value of each that is supported.
_REQUIRED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class GPT2Config:
    """What of a `config.json` decides the forward pass; the defaults are those of transformers."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def from_json(cls, text: str) -> GPT2Config:
        """Raises UnsupportedModel for another family, and for an option that would change the arithmetic, by its name."""
        try:
            held = json.loads(text)
        except ValueError as error:
            raise UnsupportedModel(f"this is no config.json of a model: {error}") from error
        family = held.get("model_type") if isinstance(held, dict) else None
        if family != NAME:
            raise UnsupportedModel(f"no gpt2 config: its model_type is {family!r}")
        for option, wanted in _REQUIRED.items():
            if held.get(option, wanted) != wanted:
                raise UnsupportedModel(
                    f"adapter gpt2 cannot run {option}={held[option]}: only {option}={wanted} is supported"
                )
        config = cls(**{name: held[name] for name in cls.__dataclass_fields__ if name in held})
        if config.activation_function not in _GELU:
            raise UnsupportedModel(
                f"adapter gpt2 cannot run activation_function={config.activation_function!r}; it has {', '.join(_GELU)}"
            )
        for size in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(config, size)
            given = value is not None or size != "n_inner"
            if given and (not isinstance(value, int) or value < 1):
                raise UnsupportedModel(f"{size} of a gpt2 config is a positive number, not {value!r}")
        if config.n_embd % config.n_head:
            raise UnsupportedModel(
                f"n_embd {config.n_embd} does not divide into n_head {config.n_head} heads"
            )
        return config

    @property
    def gelu(self) -> Literal["none", "tanh"]:
        """The GELU's approximation, as torch calls it."""
        return _GELU[self.activation_function]

    @property
    def d_mlp(self) -> int:
        """Neurons of an MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


class GPT2Adapter:
    """Describes the GPT-2 of one configuration. Head h owns columns [h·d_head, (h+1)·d_head) of the q, the k and the v third
    of `c_attn`, and those rows of the attention's `c_proj`; the output bias belongs to no head."""

    name = NAME
    tied: Mapping[str, Collection[str]] = {"lm_head.weight": ("wte.weight", f"{_PREFIX}wte.weight")}

    def __init__(self, config: GPT2Config) -> None:
        self.config = config
        self.layer_norm_eps = config.layer_norm_epsilon

    def describe(self, parameter: str) -> ParameterDescription:
        """Module block, layer and kind of a parameter; raises KeyError for a name this model does not have."""
        name = parameter.removeprefix(_PREFIX)
        if name in _OUTSIDE:
            module, kind, lens = _OUTSIDE[name]
            return ParameterDescription(module, None, kind, name.endswith("bias"), lens)
        match = _BLOCK.fullmatch(name)
        if match is None:
            raise KeyError(parameter)
        layer, part, leaf = match.groups()
        module, kind, pattern = _PARTS[part]
        letter = leaf[0] if kind == "layer_norm" or leaf == "bias" else "W"
        lens_name = None if pattern is None else f"blocks.{layer}.{pattern.format(letter)}"
        return ParameterDescription(f"L{layer}.{module}", int(layer), kind, leaf == "bias", lens_name)

    def slices(self, shapes: Mapping[str, tuple[int, ...]]) -> list[ParameterSlice]:
        """Every module block, projection, head, head projection and neuron as slices of parameters."""
        found: list[ParameterSlice] = []
        for parameter, shape in shapes.items():
            about = self.describe(parameter)
            found.append(ParameterSlice.whole("module", about.module, parameter, shape, about.layer))
            if about.layer is None or about.kind == "layer_norm":
                continue
            # Outputs are the columns of a Conv1D weight and the elements of its bias.
            outputs = 0 if about.is_bias else 1
            if about.kind == "qkv_proj":
                for third, kind in enumerate(("q_proj", "k_proj", "v_proj")):
                    start = third * self.config.n_embd
                    part = slice(start, start + self.config.n_embd)
                    label = f"L{about.layer}.{kind}"
                    found.append(
                        ParameterSlice.cut("projection", label, parameter, shape, outputs, part, about.layer)
                    )
                    found += self._heads(about.layer, kind, parameter, shape, outputs, start)
                continue
            label = f"L{about.layer}.{about.kind}"
            found.append(ParameterSlice.whole("projection", label, parameter, shape, about.layer))
            if about.kind == "out_proj" and not about.is_bias:
                found += self._heads(about.layer, about.kind, parameter, shape, 0, 0)
            elif about.kind == "fc_in" or (about.kind == "fc_out" and not about.is_bias):
                axis = outputs if about.kind == "fc_in" else 0
                found += self._neurons(about.layer, parameter, shape, axis)
        return found

    def _heads(
        self, layer: int, kind: str, parameter: str, shape: tuple[int, ...], axis: int, start: int
    ) -> list[ParameterSlice]:
        """Of every head, its slice as this projection and as part of the head."""
        width = self.config.n_embd // self.config.n_head
        return [
            ParameterSlice.cut(
                slice_kind,
                f"L{layer}H{head}.{suffix}",
                parameter,
                shape,
                axis,
                slice(start + head * width, start + (head + 1) * width),
                layer,
                head=head,
            )
            for head in range(self.config.n_head)
            for slice_kind, suffix in (("head_projection", kind), ("head", "qkvo"))
        ]

    def _neurons(self, layer: int, parameter: str, shape: tuple[int, ...], axis: int) -> list[ParameterSlice]:
        return [
            ParameterSlice.cut(
                "neuron", f"L{layer}N{n}", parameter, shape, axis, slice(n, n + 1), layer, neuron=n
            )
            for n in range(self.config.d_mlp)
        ]

    def parameter_shapes(self, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, in the model's order; spelled with `transformer.` if `names` are."""
        d, neurons = self.config.n_embd, self.config.d_mlp
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.config.vocab_size, d),
            "wpe.weight": (self.config.n_positions, d),
        }
        linear = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d)}
        mlp = {"mlp.c_fc": (d, neurons), "mlp.c_proj": (neurons, d)}
        norms = [{f"{norm}.weight": (d,), f"{norm}.bias": (d,)} for norm in ("ln_1", "ln_2", "ln_f")]
        attention, feed_forward = (
            {
                f"{name}.{leaf}": size
                for name, shape in part.items()
                for leaf, size in (("weight", shape), ("bias", shape[1:]))
            }
            for part in (linear, mlp)
        )
        block = {**norms[0], **attention, **norms[1], **feed_forward}
        for layer in range(self.config.n_layer):
            shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= norms[2]
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in names) else ""
        return {prefix + name: shape for name, shape in shapes.items()}

    def is_buffer(self, name: str) -> bool:
        """Whether a checkpoint's tensor is a stored causal mask."""
        return _BUFFER.fullmatch(name) is not None

    def head_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per-head matrices of one step's weights; see `Adapter.head_weights` for the shapes."""
        held = self.plain_names(weights)
        heads = self.config.n_head

        def layers(name: str) -> Tensor:
            return torch.stack([held[f"h.{i}.{name}.weight"].mT for i in range(self.config.n_layer)])

        W_Q, W_K, W_V = (split_heads(part, heads) for part in layers("attn.c_attn").chunk(3, dim=1))
        return {
            "W_Q": W_Q,
            "W_K": W_K,
            "W_V": W_V,
            "W_O": split_output_heads(layers("attn.c_proj"), heads),
            "W_in": layers("mlp.c_fc"),
            "W_out": layers("mlp.c_proj"),
        }

    def plain_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by name without `transformer.`, and without buffers."""
        return {
            name.removeprefix(_PREFIX): weight for name, weight in weights.items() if not self.is_buffer(name)
        }

    def stages(self) -> tuple[str, ...]:
        """Residual stages, in forward order."""
        return residual_stages(self.config.n_layer)

    def load_model(self, weights: Mapping[str, Tensor], device: str = "cpu") -> Model:
        """A model with one step's weights; see `Adapter.load_model`. Raises WeightMismatch."""
        from .gpt2_model import load_model

        return load_model(self, weights, device)


def from_config(config_json: str) -> Any:
    """The adapter of a run whose `config.json` the lake holds."""
    return GPT2Adapter(GPT2Config.from_json(config_json))

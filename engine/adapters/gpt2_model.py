"""GPT-2 for measuring: its weights where `PreNormModel` wants them, transposed from [input, output] to y = W x + b."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..forward import Model
from ..pre_norm import PreNormModel, PreNormWeights
from . import check_weights

if TYPE_CHECKING:
    from .gpt2 import GPT2Adapter


def load_model(adapter: GPT2Adapter, weights: Mapping[str, Tensor], device: str = "cpu") -> Model:
    """The model of one step's weights, by state-dict name. Raises WeightMismatch naming the first that differs."""
    config = adapter.config
    held = adapter.plain_names(weights)
    check_weights(held, adapter.parameter_shapes(), adapter.tied)

    def layers(name: str) -> Tensor:
        return torch.stack([held[f"h.{layer}.{name}"].mT for layer in range(config.n_layer)])

    def vectors(name: str) -> Tensor:
        return torch.stack([held[f"h.{layer}.{name}"] for layer in range(config.n_layer)])

    def norms(name: str) -> Tensor:
        return torch.stack([vectors(f"{name}.weight"), vectors(f"{name}.bias")], dim=1)

    stacked = PreNormWeights(
        token_embedding=held["wte.weight"],
        position_embedding=held["wpe.weight"],
        norm_1=norms("ln_1"),
        qkv=layers("attn.c_attn.weight").reshape(config.n_layer, 3, config.n_embd, config.n_embd),
        qkv_bias=vectors("attn.c_attn.bias").view(config.n_layer, 3, config.n_embd),
        out=layers("attn.c_proj.weight"),
        out_bias=vectors("attn.c_proj.bias"),
        norm_2=norms("ln_2"),
        mlp_in=layers("mlp.c_fc.weight"),
        mlp_in_bias=vectors("mlp.c_fc.bias"),
        mlp_out=layers("mlp.c_proj.weight"),
        mlp_out_bias=vectors("mlp.c_proj.bias"),
        final_norm=torch.stack([held["ln_f.weight"], held["ln_f.bias"]]),
    )
    return PreNormModel(stacked, config.n_head, config.layer_norm_epsilon, config.gelu, device)

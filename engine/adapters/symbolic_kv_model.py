"""The symbolic-KV decoder for measuring: the training decoder's arithmetic, its weights where `PreNormModel` wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..forward import Model
from ..pre_norm import PreNormModel, PreNormWeights
from . import check_weights

if TYPE_CHECKING:
    from .symbolic_kv import SymbolicKVAdapter


def load_model(adapter: SymbolicKVAdapter, weights: Mapping[str, Tensor], device: str = "cpu") -> Model:
    """The model of one step's weights, by state-dict name. Raises WeightMismatch naming the first that differs."""
    config = adapter.config
    check_weights(weights, adapter.parameter_shapes(), adapter.tied)
    blocks = [f"blocks.{layer}" for layer in range(config.model.n_layers)]

    def layers(name: str) -> Tensor:
        return torch.stack([weights[f"{block}.{name}"] for block in blocks])

    def norms(name: str) -> Tensor:
        return torch.stack([layers(f"{name}.weight"), layers(f"{name}.bias")], dim=1)

    def qkv(leaf: str) -> Tensor:
        return torch.stack([layers(f"attn.{part}_proj.{leaf}") for part in "qkv"], dim=1)

    stacked = PreNormWeights(
        token_embedding=weights["token_embedding.weight"],
        position_embedding=weights["position_embedding.weight"],
        norm_1=norms("ln_1"),
        qkv=qkv("weight"),
        qkv_bias=qkv("bias"),
        out=layers("attn.out_proj.weight"),
        out_bias=layers("attn.out_proj.bias"),
        norm_2=norms("ln_2"),
        mlp_in=layers("ff.fc_in.weight"),
        mlp_in_bias=layers("ff.fc_in.bias"),
        mlp_out=layers("ff.fc_out.weight"),
        mlp_out_bias=layers("ff.fc_out.bias"),
        final_norm=torch.stack([weights["final_norm.weight"], weights["final_norm.bias"]]),
    )
    return PreNormModel(stacked, config.model.n_heads, adapter.layer_norm_eps, "none", device)

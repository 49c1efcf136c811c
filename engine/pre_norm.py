"""The decoder most small models share, as a function of its weights: pre-LayerNorm, learned positions, causal attention
with biases, a two-layer MLP, tied unembedding. A family that has this form only says where each weight stands.

Weights are y = W x + b, layers stacked. Source of the formulas: symbolic-KV definitions, B; Radford et al. 2019, GPT-2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .forward import (
    NO_INTERVENTIONS,
    Attended,
    ForwardPass,
    Interventions,
    InvalidForward,
    residual_stages,
)

CAPTURES = ("stages", "attention")

_Attention = tuple[list[Tensor], list[Tensor]]
"""Queries, keys and values of each layer, `Float[batch, position, 3, head, d_head]`, and what they mix."""


@dataclass(frozen=True)
class PreNormWeights:
    """Every weight of a decoder; `width` is n_heads · d_head."""

    token_embedding: Tensor
    """`Float[vocabulary, d_model]`, the unembedding too."""
    position_embedding: Tensor
    """`Float[max_positions, d_model]`."""
    norm_1: Tensor
    """`Float[layer, 2, d_model]`: gain and bias of the LayerNorm that attention reads."""
    qkv: Tensor
    """`Float[layer, 3, width, d_model]`: queries, keys, values."""
    qkv_bias: Tensor
    """`Float[layer, 3, width]`."""
    out: Tensor
    """`Float[layer, d_model, width]`."""
    out_bias: Tensor
    """`Float[layer, d_model]`."""
    norm_2: Tensor
    """`Float[layer, 2, d_model]`: gain and bias of the LayerNorm that the MLP reads."""
    mlp_in: Tensor
    """`Float[layer, neuron, d_model]`."""
    mlp_in_bias: Tensor
    """`Float[layer, neuron]`."""
    mlp_out: Tensor
    """`Float[layer, d_model, neuron]`."""
    mlp_out_bias: Tensor
    """`Float[layer, d_model]`."""
    final_norm: Tensor
    """`Float[2, d_model]`: gain and bias."""

    def to(self, device: str) -> PreNormWeights:
        """The same in float32 on a device; raises InvalidForward for a device this machine does not have."""
        try:
            moved = {
                part.name: getattr(self, part.name).to(device, torch.float32).contiguous()
                for part in fields(self)
            }
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvalidForward(
                f"device {device!r} cannot be used here ({reason}); use --device cpu"
            ) from error
        return PreNormWeights(**moved)


class PreNormModel:
    """`engine.forward.Model` over `PreNormWeights`. Gradients reach the tensors the weights were made of."""

    def __init__(
        self,
        weights: PreNormWeights,
        n_heads: int,
        layer_norm_eps: float,
        gelu: Literal["none", "tanh"],
        device: str = "cpu",
    ) -> None:
        self._weights = weights = weights.to(device)
        self._gelu = gelu
        self.layer_norm_eps = layer_norm_eps
        self.n_layers, _, width, self.d_model = weights.qkv.shape
        self.n_heads, self.d_head = n_heads, width // n_heads
        self.n_neurons = weights.mlp_in.shape[1]
        self.max_positions, self.vocabulary_size = (
            len(weights.position_embedding),
            len(weights.token_embedding),
        )
        self.stages = residual_stages(self.n_layers)
        self.unembedding = weights.token_embedding
        heads = (self.n_layers, 3, n_heads, self.d_head)
        W_Q, W_K, W_V = weights.qkv.view(*heads, self.d_model).unbind(1)
        b_Q, b_K, b_V = weights.qkv_bias.view(heads).unbind(1)
        W_O = weights.out.view(self.n_layers, self.d_model, n_heads, self.d_head).movedim(-2, -3)
        self.head_weights: Mapping[str, Tensor] = {
            **{"W_Q": W_Q, "W_K": W_K, "W_V": W_V, "b_Q": b_Q, "b_K": b_K, "b_V": b_V},
            **{"W_O": W_O, "b_O": weights.out_bias},
        }

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        capture: Collection[str] = (),
        interventions: Interventions = NO_INTERVENTIONS,
        places: Tensor | None = None,
    ) -> ForwardPass:
        """See `engine.forward.Model`. Captured queries, keys and values are views of what the attention kernel read."""
        device = self.unembedding.device
        tokens = tokens.to(device)
        places = None if places is None else places.to(device)
        self._check_tokens(tokens, mask, places)
        self._check_interventions(tokens, capture, interventions)
        patches = interventions.residual_patches
        # What a patch hides and nobody asked for is not computed.
        hidden = 0 if capture else max((self.stages.index(stage) for stage in patches), default=0)
        # No position reads another after the last attention.
        last_attention = len(self.stages) - 3
        kept: dict[str, Tensor] = {}
        attention: _Attention | None = ([], []) if "attention" in capture else None
        x = torch.empty(0)
        for position, stage in enumerate(self.stages):
            if position >= hidden:
                if stage not in patches or capture:
                    chosen = places if position == last_attention else None
                    x = self._stage(position, x, tokens, interventions, attention, chosen)
                if stage in patches:
                    x = patches[stage].to(device)
                    x = _at(x, places) if position >= last_attention else x
                if "stages" in capture:
                    kept[stage] = x if position >= last_attention else _at(x, places)
        qkv, mixed = attention or ([], [])
        # [batch, position, 3, head, d_head], a layer each.
        queries, keys, values = ([held.select(2, part).transpose(1, 2) for held in qkv] for part in range(3))
        return ForwardPass(x, self.unembedding, kept, queries, keys, values, mixed)

    def _stage(
        self,
        position: int,
        x: Tensor,
        tokens: Tensor,
        interventions: Interventions,
        attention: _Attention | None,
        places: Tensor | None,
    ) -> Tensor:
        """The residual stream after one more stage: embedding, an attention or an MLP, or the final LayerNorm."""
        if position == 0:
            return self.embed(tokens)
        if position == len(self.stages) - 1:
            return self.final_norm(x)
        layer, is_mlp = divmod(position - 1, 2)
        # The write is fresh, so the sum takes no memory of its own.
        if is_mlp:
            return self._mlp(layer, x, interventions).add_(x)
        return self._attention(layer, x, interventions, attention, places).add_(_at(x, places))

    def _attention(
        self,
        layer: int,
        x: Tensor,
        interventions: Interventions,
        attention: _Attention | None,
        places: Tensor | None,
    ) -> Tensor:
        qkv, heads = self._heads(layer, x)
        if interventions.head_mask is not None:
            heads = heads * interventions.head_mask[layer].to(x)[:, None, None]
        if attention is not None:
            attention[0].append(qkv)
            attention[1].append(heads)
        return self.attention_write(layer, _at(heads.transpose(1, 2), places))

    def _heads(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values, `Float[batch, position, 3, head, d_head]`, and what attention mixes of them.

        That is `Float[batch, head, position, d_head]`.
        """
        qkv = self._project(layer, x)
        # Padding stands on the right, where no causal query sees it: the kernel needs no other mask.
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return qkv, functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def _project(self, layer: int, x: Tensor) -> Tensor:
        """Queries, keys and values, `Float[…, 3, head, d_head]`, of `Float[…, d_model]`."""
        weights = self._weights
        return functional.linear(
            self.attention_norm(layer, x), weights.qkv[layer].flatten(0, 1), weights.qkv_bias[layer].flatten()
        ).view(*x.shape[:-1], 3, self.n_heads, self.d_head)

    def embed(self, tokens: Tensor) -> Tensor:
        """See `engine.forward.Model`, as for the methods that follow."""
        tokens = tokens.to(self.unembedding.device)
        positions = self._weights.position_embedding[: tokens.shape[1]]
        return functional.embedding(tokens, self._weights.token_embedding) + positions

    def attend(self, layer: int, x: Tensor) -> Attended:
        """Queries, keys, values, and what attention mixes of them."""
        qkv, mixed = self._heads(layer, x)
        query, key, value = qkv.unbind(2)
        return Attended(query, key, value, mixed.transpose(1, 2))

    def project(self, layer: int, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; positions are in the stream already, and turn nothing."""
        query, key, value = self._project(layer, x).unbind(-3)
        return query, key, value

    def attention_write(self, layer: int, mixed: Tensor) -> Tensor:
        """W_O and its bias."""
        return functional.linear(mixed.flatten(-2), self._weights.out[layer], self._weights.out_bias[layer])

    def neurons(self, layer: int, x: Tensor) -> Tensor:
        """The LayerNorm, W_in, the nonlinearity."""
        weights = self._weights
        read = self._norm(x, weights.norm_2[layer])
        into = functional.linear(read, weights.mlp_in[layer], weights.mlp_in_bias[layer])
        return functional.gelu(into, approximate=self._gelu)

    def mlp_write(self, layer: int, neurons: Tensor) -> Tensor:
        """W_out and its bias."""
        return functional.linear(neurons, self._weights.mlp_out[layer], self._weights.mlp_out_bias[layer])

    def _mlp(self, layer: int, x: Tensor, interventions: Interventions) -> Tensor:
        neurons = self.neurons(layer, x)
        if interventions.neuron_mask is not None:
            neurons = neurons * interventions.neuron_mask[layer].to(x)
        write = self.mlp_write(layer, neurons)
        return write if interventions.mlp_mask is None else write * interventions.mlp_mask[layer].to(x)

    def attention_norm(self, layer: int, x: Tensor) -> Tensor:
        """The LayerNorm through which the heads of a layer read `Float[…, d_model]`."""
        return self._norm(x, self._weights.norm_1[layer])

    def final_norm(self, x: Tensor) -> Tensor:
        """The LayerNorm before the unembedding, on `Float[…, d_model]`."""
        return self._norm(x, self._weights.final_norm)

    def final_norm_parameters(self) -> tuple[Tensor, Tensor]:
        """Gain and bias of that LayerNorm: Float[d_model] each."""
        return self._weights.final_norm[0], self._weights.final_norm[1]

    def _norm(self, x: Tensor, gain_and_bias: Tensor) -> Tensor:
        gain, bias = gain_and_bias
        return functional.layer_norm(x, (self.d_model,), gain, bias, self.layer_norm_eps)

    def _check_tokens(self, tokens: Tensor, mask: Tensor | None, places: Tensor | None) -> None:
        if tokens.ndim != 2 or not tokens.numel():
            raise InvalidForward(
                f"tokens have shape {tuple(tokens.shape)}; a forward pass takes [batch, position]"
            )
        if tokens.shape[1] > self.max_positions:
            raise InvalidForward(
                f"a stream of {tokens.shape[1]} tokens exceeds the model's {self.max_positions} positions"
            )
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= self.vocabulary_size:
            raise InvalidForward(
                f"token {low if low < 0 else high} is not in the model's vocabulary, 0 to {self.vocabulary_size - 1}"
            )
        if mask is not None and mask.shape != tokens.shape:
            raise InvalidForward(f"the mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}")
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise InvalidForward("the mask hides a token before one it shows: pad on the right")
        if places is not None and places.numel():
            low, high = (int(bound) for bound in places.aminmax())
            if low < 0 or high >= tokens.numel():
                raise InvalidForward(
                    f"place {low if low < 0 else high} is not among the {tokens.numel()} of these tokens"
                )

    def _check_interventions(
        self, tokens: Tensor, capture: Collection[str], interventions: Interventions
    ) -> None:
        for wanted in capture:
            if wanted not in CAPTURES:
                raise InvalidForward(f"nothing named {wanted!r} to capture; there are {', '.join(CAPTURES)}")
        shapes = {
            "head_mask": (interventions.head_mask, (self.n_layers, self.n_heads)),
            "mlp_mask": (interventions.mlp_mask, (self.n_layers,)),
            "neuron_mask": (interventions.neuron_mask, tuple(self._weights.mlp_in.shape[:2])),
        }
        for name, (mask, shape) in shapes.items():
            if mask is not None and mask.shape != shape:
                raise InvalidForward(f"{name} has shape {tuple(mask.shape)}; this model takes {shape}")
        residual = (*tokens.shape, self.d_model)
        for stage, patch in interventions.residual_patches.items():
            if stage not in self.stages:
                raise InvalidForward(f"no residual stage {stage!r}; stages: {', '.join(self.stages)}")
            if patch.shape != residual:
                raise InvalidForward(
                    f"the patch of stage {stage} has shape {tuple(patch.shape)}; these tokens take {residual}"
                )


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    """`Float[batch, position, d_model]` at some places, `Float[place, d_model]`; as it is for None."""
    return x if places is None else x.flatten(0, 1).index_select(0, places)

"""What a model family offers to whoever measures a forward pass: one Protocol, whatever the architecture.

Axes: `batch`, `position`, `layer`, `head`, `d_model`, `d_head`, `vocabulary`. A grouped-query model repeats its
key and value heads, so that every head has its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from .. import LakebedError


class InvalidForward(LakebedError, ValueError):
    """Tokens, a mask or an intervention that the model cannot take; the message names what it can."""


class WeightMismatch(LakebedError, ValueError):
    """Weights that are not those of the configured model; the message names the first that differs."""


@dataclass(frozen=True)
class Interventions:
    """What to change inside one forward pass. A mask multiplies, so 1 keeps and 0 removes."""

    head_mask: Tensor | None = None
    """`Float[layer, head]`, on a head's output before the output projection."""
    mlp_mask: Tensor | None = None
    """`Float[layer]`, on the output of a layer's MLP."""
    neuron_mask: Tensor | None = None
    """`Float[layer, neuron]`, on the activations after the nonlinearity."""
    residual_patches: Mapping[str, Tensor] = field(default_factory=dict)
    """Stage name to the `Float[batch, position, d_model]` that takes the stage's place."""


NO_INTERVENTIONS = Interventions()


@dataclass(frozen=True)
class ForwardPass:
    """What came out, and what was asked for on the way; what was not asked for is empty.

    Where the caller named places, `final` and the stages are `Float[place, d_model]`: those places alone, in that order.
    """

    final: Tensor
    """Stage final_norm, `Float[batch, position, d_model]`."""
    unembedding: Tensor
    """`Float[vocabulary, d_model]`."""
    stages: dict[str, Tensor]
    """Stage name to `Float[batch, position, d_model]`, after any patch."""
    queries: list[Tensor]
    """Per layer `Float[batch, head, position, d_head]`, biases and any rotation in, not yet scaled."""
    keys: list[Tensor]
    """As `queries`: q·k/√d_head is the score before the causal mask and the softmax."""
    values: list[Tensor]
    """As `queries`, bias in."""
    mixed: list[Tensor]
    """As `queries`: the values that attention mixed, after any head mask. W_O makes it what a head writes."""

    @cached_property
    def logits(self) -> Tensor:
        """The model's own, `Float[…, vocabulary]` of `final`, computed when first read: over a large vocabulary they
        outweigh everything else, and most callers unembed a few positions of `final` only."""
        return functional.linear(self.final, self.unembedding)


@dataclass(frozen=True)
class Attended:
    """One layer's heads, `Float[batch, position, head, d_head]` each, biases in."""

    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    """The values that attention mixed; `Model.attention_write` makes of it what the layer adds to the stream."""


class Model(Protocol):
    """A model with the weights of one step, in eval mode. Everything is float32 and deterministic."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_neurons: int
    """Of each MLP."""
    max_positions: int
    vocabulary_size: int
    layer_norm_eps: float
    stages: tuple[str, ...]
    """embedding, layer_0_post_attn, layer_0_post_mlp, …, final_norm."""
    head_weights: Mapping[str, Tensor]
    """W_Q, W_K, W_V: Float[layer, head, d_head, d_model]; b_Q, b_K, b_V: Float[layer, head, d_head]; W_O: Float[layer, head,
    d_model, d_head]; b_O: Float[layer, d_model]; as y = W x + b."""
    unembedding: Tensor
    """`Float[vocabulary, d_model]`: logits = unembedding · final_norm(x), without bias."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        capture: Collection[str] = (),
        interventions: Interventions = NO_INTERVENTIONS,
        places: Tensor | None = None,
    ) -> ForwardPass:
        """One pass over `Int[batch, position]` right-padded tokens; `mask` is `Bool[batch, position]`, None without padding.

        `capture` holds "stages" and "attention" (queries, keys, values and what they mix); without it nothing before the
        last patched stage is computed. `places` is `Int[place]`, row · length + position: the residual stream is wanted
        there only, and no other place is computed once the last layer's attention has read it. What stands at padded
        positions is arbitrary, and finite. Gradients flow if the caller enables them. Raises InvalidForward for a stream
        that is too long, a token or a place out of range, padding elsewhere than on the right, and an intervention of an
        unknown stage or a wrong shape.
        """
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Stage embedding, `Float[batch, position, d_model]`, of `Int[batch, position]`."""
        ...

    def attend(self, layer: int, x: Tensor) -> Attended:
        """The heads of a layer on the whole stage they read, `Float[batch, position, d_model]`."""
        ...

    def project(self, layer: int, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer at some places of the stage it reads, `Float[…, place, d_model]`.

        `Float[…, place, head, d_head]` each, biases in, and any rotation by `position`, `Int[…, place]`.
        """
        ...

    def attention_write(self, layer: int, mixed: Tensor) -> Tensor:
        """What a layer's attention adds to the stream: W_O and its bias on `Float[…, head, d_head]`; `Float[…, d_model]`."""
        ...

    def neurons(self, layer: int, x: Tensor) -> Tensor:
        """The MLP's activations after the nonlinearity, `Float[…, neuron]`, of the stage it reads, `Float[…, d_model]`."""
        ...

    def mlp_write(self, layer: int, neurons: Tensor) -> Tensor:
        """What the MLP adds to the stream, bias in, `Float[…, d_model]`, of `Float[…, neuron]`."""
        ...

    def attention_norm(self, layer: int, x: Tensor) -> Tensor:
        """The LayerNorm through which the heads of a layer read `Float[…, d_model]`."""
        ...

    def final_norm(self, x: Tensor) -> Tensor:
        """The LayerNorm before the unembedding, on `Float[…, d_model]`."""
        ...

    def final_norm_parameters(self) -> tuple[Tensor, Tensor]:
        """Gain and bias of that LayerNorm: Float[d_model] each."""
        ...


def residual_stages(n_layers: int) -> tuple[str, ...]:
    """Names of the residual stages, in forward order."""
    layers = [f"layer_{layer}_post_{part}" for layer in range(n_layers) for part in ("attn", "mlp")]
    return ("embedding", *layers, "final_norm")


def input_stage(layer: int) -> str:
    """The stage that the attention of a layer reads."""
    return "embedding" if layer == 0 else f"layer_{layer - 1}_post_mlp"

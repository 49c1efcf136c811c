"""The symbolic-KV decoder for training: pre-LayerNorm, causal, with the unembedding tied to the token embedding.

What is measured inside a forward pass, or changed in it, is `pre_norm.PreNormModel`'s, which has the same arithmetic.
Axes: `batch`, `position`, `layer`, `head`, `d_model`, `d_head`, `neuron`, `vocabulary`.
Source: symbolic-KV definitions, B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import ModelConfig
from .forward import residual_stages


@dataclass(frozen=True)
class DecoderOutput:
    """Logits of a forward pass, and the attention if it was asked for."""

    logits: Tensor
    """`Float[batch, position, vocabulary]`."""
    attention: Tensor | None
    """Probabilities `Float[layer, batch, head, query, key]`, or None unless asked for."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention with biases; head `h` owns rows `h*d_head` to `(h+1)*d_head` of q, k and v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, x: Tensor, allowed: Tensor | None, return_attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Output `Float[batch, position, d_model]`, and the probabilities if asked for.

        `allowed` is `Bool[batch, 1, query, key]`, or None for plain causal attention. Returned probabilities take
        an explicit softmax, all else the fused kernel; they agree up to rounding.
        """
        query, key, value = (self._split(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        probabilities = None
        if return_attention:
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            visible = causal_mask(x.shape[1], x.device) if allowed is None else allowed
            probabilities = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
            heads = functional.dropout(probabilities, dropout) @ value
        else:
            heads = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, dropout_p=dropout, is_causal=allowed is None
            )
        return self.out_proj(heads.transpose(1, 2).flatten(2)), probabilities

    def _split(self, projected: Tensor) -> Tensor:
        batch, length, width = projected.shape
        return projected.view(batch, length, self.n_heads, width // self.n_heads).transpose(1, 2)


class FeedForward(nn.Module):
    """`W_out GELU(W_in x + b_in) + b_out`, with the exact (erf) GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.d_model, config.d_ff)
        self.fc_out = nn.Linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Output `Float[batch, position, d_model]`."""
        written: Tensor = self.dropout(self.fc_out(functional.gelu(self.fc_in(x))))
        return written


class DecoderBlock(nn.Module):
    """One layer: attention, then MLP, each reading a LayerNorm of the residual stream and adding to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.ff = FeedForward(config)


class SymbolicKVDecoder(nn.Module):
    """The decoder of the symbolic-KV runs.

    Initialization is the framework's, in construction order (token embedding, position embedding, each
    layer's q, k, v, out, fc_in, fc_out, and an output matrix that tying discards), so that one seed gives
    one model. `embedding_std` only scales what was drawn.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.token_embedding = nn.Embedding(vocabulary_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, vocabulary_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        if config.embedding_std != 1.0:
            with torch.no_grad():
                self.token_embedding.weight.mul_(config.embedding_std)
                self.position_embedding.weight.mul_(config.embedding_std)

    def forward(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `Float[batch, position, vocabulary]` of `Int[batch, position]` tokens.

        `attention_mask` (`Bool[batch, position]`) hides the keys where it is false; None hides none. Raises
        `ValueError` for a stream longer than `max_seq_len`.
        """
        return self.run(token_ids, attention_mask).logits

    def run(
        self, token_ids: Tensor, attention_mask: Tensor | None = None, *, return_attention: bool = False
    ) -> DecoderOutput:
        """As `forward`, keeping the attention if asked."""
        length = token_ids.shape[-1]
        if length > self.config.max_seq_len:
            raise ValueError(f"a stream of {length} tokens exceeds max_seq_len {self.config.max_seq_len}")
        attention: list[Tensor] = []
        allowed = _allowed_keys(length, attention_mask)
        x = self.token_embedding(token_ids) + self.position_embedding.weight[:length]
        x = self.embedding_dropout(x)
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            write, probabilities = block.attn(block.ln_1(x), allowed, return_attention)
            if return_attention:
                attention.append(probabilities)
            x = x + write
            x = x + block.ff(block.ln_2(x))
        logits = self.lm_head(self.final_norm(x))
        return DecoderOutput(logits, torch.stack(attention) if attention else None)

    def lens(self, stage: str, x: Tensor) -> Tensor:
        """Logits read off a stage: final LayerNorm (already applied at `final_norm`), then unembedding."""
        stages = residual_stages(self.config.n_layers)
        if stage not in stages:
            raise ValueError(f"no residual stage {stage!r}; stages: {', '.join(stages)}")
        logits: Tensor = self.lm_head(x if stage == "final_norm" else self.final_norm(x))
        return logits


def causal_mask(length: int, device: torch.device | str) -> Tensor:
    """`Bool[query, key]`, true where the key is not after the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _allowed_keys(length: int, attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    return causal_mask(length, attention_mask.device) & attention_mask.bool()[:, None, None, :]

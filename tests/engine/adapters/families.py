"""One small trained model of each family, with what its own library says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lakebed.engine.adapters import Adapter, load_adapter
from lakebed.engine.config import load_config
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.forward import Model
from lakebed.engine.training import TrainingLoop
from safetensors.torch import load_file
from torch import Tensor, nn

FAMILIES = ("symbolic_kv", "gpt2")


@dataclass
class Own:
    """What the library itself computes; stages only where it has them."""

    logits: Tensor
    stages: dict[str, Tensor]
    attention: Tensor  # [layer, batch, head, query, key]


@dataclass
class Family:
    adapter: Adapter
    weights: dict[str, Tensor]
    library: nn.Module
    own: Callable[[Tensor, Tensor | None], Own]
    gelu: Callable[[Tensor], Tensor]
    tokens: Tensor  # [batch, position], right-padded
    mask: Tensor
    n_layers: int
    n_heads: int

    def model(self, **changed: Tensor) -> Model:
        return self.adapter.load_model({**self.weights, **changed})

    def parameter(self, module: str, kind: str, is_bias: bool = False) -> str:
        """The one parameter that the adapter describes so."""
        found = []
        for name in self.weights:
            about = self.adapter.describe(name)
            if (about.module, about.kind, about.is_bias) == (module, kind, is_bias):
                found.append(name)
        (name,) = found
        return name


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.special.erf(x / 2**0.5))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def symbolic_kv() -> Family:
    sizes = {
        f"benchmark.{split}.num_samples": 16
        for split in (
            "train",
            "validation_iid",
            "test_iid",
            "heldout_pairs",
            "structural_ood",
            "counterfactual",
        )
    }
    shape = {
        "model.d_model": 24,
        "model.n_layers": 3,
        "model.n_heads": 3,
        "model.d_ff": 40,
        "model.embedding_std": 0.5,
    }
    config = load_config(
        "tiny",
        batch_size=8,
        **sizes,
        **shape,
        **{"optimization.learning_rate": 0.01, "optimization.warmup_steps": 0},
    )
    loop = TrainingLoop(config)
    for _ in range(30):
        loop.train_step()
    library = loop.model.eval()
    batch = loop.encoded("structural_ood").batch(torch.arange(5))

    def own(tokens: Tensor, mask: Tensor | None) -> Own:
        output = library.run(tokens, mask, return_attention=True)
        assert output.attention is not None
        return Own(library(tokens, mask), _hooked(library, tokens, mask), output.attention)

    return Family(
        load_adapter("symbolic_kv", config.canonical_json()),
        {name: parameter.detach().clone() for name, parameter in library.named_parameters()},
        library,
        own,
        erf_gelu,
        batch.token_ids,
        batch.attention_mask,
        n_layers=3,
        n_heads=3,
    )


def _hooked(model: SymbolicKVDecoder, tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Stages of the training decoder, read off what its LayerNorms take in and give out."""
    seen: dict[str, Tensor] = {}
    stages = [f"layer_{layer}_post_{part}" for layer in range(len(model.blocks)) for part in ("attn", "mlp")]
    norms = [norm for block in model.blocks for norm in (block.ln_1, block.ln_2)] + [model.final_norm]
    hooks = [
        norm.register_forward_hook(lambda _, read, __, stage=stage: seen.update({stage: read[0]}))
        for stage, norm in zip(["embedding", *stages], norms, strict=True)
    ]
    hooks.append(model.final_norm.register_forward_hook(lambda _, __, made: seen.update(final_norm=made)))
    model(tokens, mask)
    for hook in hooks:
        hook.remove()
    return seen


def small_gpt2(**overrides):
    """A random GPT-2 whose every parameter, biases and gains included, is away from its first value."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 3}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(5)
    model = GPT2LMHeadModel(
        GPT2Config(**{**sizes, **tokens, "attn_implementation": "eager", **overrides})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def gpt2(folder: Path) -> Family:
    from transformers import GPT2LMHeadModel

    model = small_gpt2(layer_norm_epsilon=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = torch.randint(1, 61, (64, 12), generator=torch.Generator().manual_seed(2))
    for rows in first.repeat(8, 1).split(16):
        tokens = torch.cat([rows, rows], dim=1)  # to be copied, so that heads have something to attend to
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    library = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()

    def own(tokens: Tensor, mask: Tensor | None) -> Own:
        with_attention = {"output_hidden_states": True, "output_attentions": True}
        output = library(tokens, attention_mask=None if mask is None else mask.long(), **with_attention)
        named = [*("embedding", "layer_0_post_mlp", "layer_1_post_mlp"), "final_norm"]
        stages = dict(zip(named, output.hidden_states, strict=True))
        return Own(output.logits, stages, torch.stack(output.attentions))

    mask = torch.ones(5, 24, dtype=torch.bool)
    for row in range(5):
        mask[row, 24 - 3 * row :] = False
    return Family(
        load_adapter("gpt2", (folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
        library,
        own,
        tanh_gelu,
        torch.cat([first[:5], first[:5]], dim=1),
        mask,
        n_layers=3,
        n_heads=3,
    )

"""What is GPT-2's own: spellings, stored masks, configs that would change the arithmetic, and no need of transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from lakebed.engine.adapters import UnsupportedModel, load_adapter

from tests.engine.adapters.families import small_gpt2


@pytest.fixture(scope="module")
def model():
    return small_gpt2()


def adapter_of(model, **changed):
    return load_adapter("gpt2", json.dumps({**model.config.to_dict(), **changed}))


def test_both_spellings_and_stored_masks_are_one_model(model):
    adapter = adapter_of(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    old = {**bare, "h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.2.attn.masked_bias": torch.tensor(-1e4)}
    tokens = torch.arange(1, 13).view(2, 6)
    expected = adapter.load_model(weights).forward(tokens).logits
    assert torch.equal(adapter.load_model(bare).forward(tokens).logits, expected)
    assert torch.equal(adapter.load_model(old).forward(tokens).logits, expected)
    assert list(adapter.parameter_shapes(old)) == list(bare)
    assert list(adapter.parameter_shapes(weights)) == list(weights)
    assert torch.equal(adapter.head_weights(old)["W_K"], adapter.head_weights(weights)["W_K"])
    assert adapter.describe("transformer.h.1.attn.c_proj.bias") == adapter.describe("h.1.attn.c_proj.bias")
    for name in ("h.1.attn.bias", "lm_head.weight", "transformer.transformer.h.1.ln_1.weight.x"):
        with pytest.raises(KeyError):
            adapter.describe(name)


@pytest.mark.parametrize(
    ("parameter", "module", "kind", "lens"),
    [
        ("transformer.wte.weight", "token_embedding", "embedding", "embed.W_E"),
        ("wpe.weight", "position_embedding", "embedding", "pos_embed.W_pos"),
        ("h.1.ln_2.weight", "L1.ln_2", "layer_norm", "blocks.1.ln2.w"),
        ("h.1.ln_1.bias", "L1.ln_1", "layer_norm", "blocks.1.ln1.b"),
        ("h.2.attn.c_attn.weight", "L2.attention", "qkv_proj", None),
        ("h.2.attn.c_proj.weight", "L2.attention", "out_proj", "blocks.2.attn.W_O"),
        ("h.2.attn.c_proj.bias", "L2.attention", "out_proj", "blocks.2.attn.b_O"),
        ("transformer.h.0.mlp.c_fc.weight", "L0.mlp", "fc_in", "blocks.0.mlp.W_in"),
        ("h.0.mlp.c_proj.bias", "L0.mlp", "fc_out", "blocks.0.mlp.b_out"),
        ("ln_f.bias", "final_norm", "layer_norm", "ln_final.b"),
    ],
)
def test_names_are_those_of_the_field(model, parameter, module, kind, lens):
    about = adapter_of(model).describe(parameter)
    assert (about.module, about.kind, about.transformer_lens_name) == (module, kind, lens)
    assert about.is_bias == parameter.endswith("bias")


@pytest.mark.parametrize(
    "changed", [{"activation_function": "gelu"}, {"n_inner": 7}, {"n_head": 1}, {"layer_norm_epsilon": 0.1}]
)
def test_settings_that_are_supported_give_the_librarys_logits(changed):
    model = small_gpt2(**changed)
    tokens = torch.arange(1, 25).view(2, 12)
    found = adapter_of(model).load_model(model.state_dict()).forward(tokens).logits
    assert (found - model(tokens).logits).abs().max() < 5e-6
    assert (found - small_gpt2()(tokens).logits).abs().max() > 5e-5  # the setting matters


def test_the_defaults_are_those_of_transformers():
    from transformers import GPT2Config

    bare = load_adapter("gpt2", '{"model_type": "gpt2"}').config
    own = GPT2Config()
    assert all(getattr(own, name) == getattr(bare, name) for name in bare.__dataclass_fields__)
    assert bare.d_mlp == 3072


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "cannot run scale_attn_by_inverse_layer_idx=True"),
        ({"reorder_and_upcast_attn": True}, "cannot run reorder_and_upcast_attn=True"),
        ({"scale_attn_weights": False}, "cannot run scale_attn_weights=False: only scale_attn_weights=True"),
        ({"add_cross_attention": True}, "cannot run add_cross_attention=True"),
        ({"tie_word_embeddings": False}, "cannot run tie_word_embeddings=False"),
        (
            {"activation_function": "relu"},
            "activation_function='relu'; it has gelu_new, gelu_pytorch_tanh, gelu",
        ),
        ({"model_type": "llama"}, "no gpt2 config: its model_type is 'llama'"),
        ({"n_head": 5}, "n_embd 24 does not divide into n_head 5 heads"),
        ({"n_layer": "3"}, "n_layer of a gpt2 config is a positive number, not '3'"),
        ({"n_inner": 0}, "n_inner of a gpt2 config is a positive number, not 0"),
    ],
)
def test_a_config_that_would_change_the_arithmetic_is_refused_by_name(model, changed, message):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        adapter_of(model, **changed)
    assert "\n" not in str(caught.value)


def test_what_is_no_config_is_refused():
    with pytest.raises(UnsupportedModel, match=r"no config\.json of a model"):
        load_adapter("gpt2", "{")
    with pytest.raises(UnsupportedModel, match="its model_type is None"):
        load_adapter("gpt2", "[]")


def test_a_model_runs_where_transformers_is_not_installed(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    script = """
import sys; sys.modules["transformers"] = None
import torch
from pathlib import Path
from lakebed.engine.adapters import load_adapter
adapter = load_adapter("gpt2", Path("config.json").read_text())
print(adapter.load_model(torch.load("weights.pt")).forward(torch.tensor([[1, 2]])).logits.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "torch.Size([1, 2, 61])", done.stderr

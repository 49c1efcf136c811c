"""The decoder against an independent float64 computation, and its parameters by name."""

import math
from math import erf

import numpy as np
import pytest
import torch
from lakebed.engine.adapters import load_adapter
from lakebed.engine.config import load_config
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.training import TrainingLoop
from torch import nn

SMALL_SIZES = {
    split: {"num_samples": 16}
    for split in ("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual")
}
SMALL_MODEL = {"d_model": 24, "n_layers": 2, "n_heads": 3, "d_ff": 40, "embedding_std": 0.5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These matrices are tiny: on a busy machine a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained():
    """A small model whose every parameter has moved, LayerNorm gains and biases included."""
    config = load_config(
        "formation",
        batch_size=8,
        benchmark=SMALL_SIZES,
        model=SMALL_MODEL,
        optimization={"learning_rate": 0.02, "warmup_steps": 0},
    )
    loop = TrainingLoop(config)
    for _ in range(6):
        loop.train_step()
    loop.model.eval()
    return loop


@pytest.fixture
def batch(trained):
    # Streams of 68 to 83 tokens, so that rows are padded.
    batch = trained.encoded("structural_ood").batch(torch.arange(5))
    assert not batch.attention_mask.all()
    return batch


def reference_forward(state, tokens, n_layers, n_heads):
    """Logits and stages of one stream, position by position and head by head, in float64."""
    weights = {name: value.double().numpy() for name, value in state.items()}
    width = weights["token_embedding.weight"].shape[1]
    d_head = width // n_heads

    def layer_norm(x, name):
        centred = x - sum(x) / len(x)
        spread = math.sqrt(float(centred @ centred) / len(x) + 1e-5)
        return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return np.array([row @ x for row in weights[f"{name}.weight"]]) + weights[f"{name}.bias"]

    embedding = weights["token_embedding.weight"]
    stream = [
        embedding[token] + weights["position_embedding.weight"][place] for place, token in enumerate(tokens)
    ]
    stages = {"embedding": list(stream)}
    attention = np.zeros((n_layers, n_heads, len(tokens), len(tokens)))
    for layer in range(n_layers):
        block = f"blocks.{layer}"
        read = [layer_norm(x, f"{block}.ln_1") for x in stream]
        queries, keys, values = (
            [linear(x, f"{block}.attn.{part}_proj").reshape(n_heads, d_head) for x in read] for part in "qkv"
        )
        for place in range(len(tokens)):
            heads = []
            for head in range(n_heads):
                scores = [
                    float(queries[place][head] @ keys[past][head]) / d_head**0.5 for past in range(place + 1)
                ]
                exponentials = [math.exp(score - max(scores)) for score in scores]
                probabilities = [part / sum(exponentials) for part in exponentials]
                attention[layer, head, place, : place + 1] = probabilities
                heads.append(sum(p * values[past][head] for past, p in enumerate(probabilities)))
            stream[place] = stream[place] + linear(np.concatenate(heads), f"{block}.attn.out_proj")
        stages[f"layer_{layer}_post_attn"] = list(stream)
        for place in range(len(tokens)):
            hidden = linear(layer_norm(stream[place], f"{block}.ln_2"), f"{block}.ff.fc_in")
            hidden = np.array([0.5 * a * (1 + erf(a / 2**0.5)) for a in hidden])
            stream[place] = stream[place] + linear(hidden, f"{block}.ff.fc_out")
        stages[f"layer_{layer}_post_mlp"] = list(stream)
    stages["final_norm"] = [layer_norm(x, "final_norm") for x in stream]
    logits = np.array([embedding @ x for x in stages["final_norm"]])
    return logits, {stage: np.array(values) for stage, values in stages.items()}, attention


def test_logits_stages_and_attention_are_those_of_an_independent_float64_computation(trained, batch):
    model = trained.model
    output = model.run(batch.token_ids, batch.attention_mask, return_attention=True)
    measured = load_adapter("symbolic_kv", trained.config.canonical_json()).load_model(model.state_dict())
    captured_stages = measured.forward(batch.token_ids, batch.attention_mask, capture=["stages"]).stages
    for row in (0, 3):
        length = int(batch.attention_mask[row].sum())
        tokens = batch.token_ids[row, :length].tolist()
        logits, stages, attention = reference_forward(model.state_dict(), tokens, 2, 3)
        assert np.abs(output.logits[row, :length].detach().numpy() - logits).max() < 2e-4
        assert list(captured_stages) == list(stages)
        for stage, values in stages.items():
            assert np.abs(captured_stages[stage][row, :length].detach().numpy() - values).max() < 1e-4, stage
        captured = output.attention[:, row, :, :length, :length].detach().numpy()
        assert np.abs(captured - attention).max() < 1e-5


def test_explicit_softmax_equals_the_fused_kernel(trained, batch):
    model = trained.model
    fused = model(batch.token_ids, batch.attention_mask)
    explicit = model.run(batch.token_ids, batch.attention_mask, return_attention=True)
    kept = batch.attention_mask
    torch.testing.assert_close(explicit.logits[kept], fused[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(explicit.attention.sum(dim=-1), torch.ones(explicit.attention.shape[:-1]))
    assert explicit.attention.triu(1).abs().max() == 0


def test_padding_and_the_future_are_invisible(trained, batch):
    model = trained.model
    logits = model(batch.token_ids, batch.attention_mask)
    lengths = batch.attention_mask.sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        alone = model(batch.token_ids[row : row + 1, :length])
        torch.testing.assert_close(logits[row, :length], alone[0], rtol=1e-4, atol=1e-4)
    changed = batch.token_ids.clone()
    changed[:, 40:] = 11
    assert torch.equal(model(changed)[:, :40], model(changed.clone())[:, :40])
    torch.testing.assert_close(model(changed)[:, :40], model(batch.token_ids)[:, :40], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(changed)[:, 41], model(batch.token_ids)[:, 41], atol=1e-2)


def test_a_hidden_key_takes_no_attention(trained, batch):
    hidden = batch.attention_mask.clone()
    hidden[:, 5] = False
    attention = trained.model.run(batch.token_ids, hidden, return_attention=True).attention
    assert attention[..., 5].abs().max() == 0
    fused, plain = (
        trained.model(batch.token_ids, hidden),
        trained.model(batch.token_ids, batch.attention_mask),
    )
    assert torch.equal(fused[:, :5], plain[:, :5])
    assert not torch.allclose(fused[:, 6], plain[:, 6], atol=1e-3)


def test_base_model_has_626048_parameters_in_52_tensors_named_as_published():
    config = load_config("formation")
    model = SymbolicKVDecoder(config.model, config.benchmark.vocabulary_size)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {"token_embedding.weight": (146, 128), "position_embedding.weight": (96, 128)}
    for layer in range(3):
        block = f"blocks.{layer}"
        for norm in ("ln_1", "ln_2"):
            expected |= {f"{block}.{norm}.weight": (128,), f"{block}.{norm}.bias": (128,)}
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"{block}.attn.{projection}"
            expected |= {f"{name}.weight": (128, 128), f"{name}.bias": (128,)}
        expected |= {f"{block}.ff.fc_in.weight": (512, 128), f"{block}.ff.fc_in.bias": (512,)}
        expected |= {f"{block}.ff.fc_out.weight": (128, 512), f"{block}.ff.fc_out.bias": (128,)}
    expected |= {"final_norm.weight": (128,), "final_norm.bias": (128,)}
    assert shapes == expected
    assert len(shapes) == 52
    assert sum(math.prod(shape) for shape in shapes.values()) == 626_048
    state = model.state_dict()
    assert set(state) == {*shapes, "lm_head.weight"}
    assert state["lm_head.weight"].data_ptr() == state["token_embedding.weight"].data_ptr()


def test_weights_are_drawn_in_the_published_order_and_scaled_only_by_embedding_std():
    config = load_config("formation", model=SMALL_MODEL | {"embedding_std": 1.0}).model
    torch.manual_seed(3)
    model = SymbolicKVDecoder(config, 30)
    after = torch.rand(4)
    torch.manual_seed(3)
    token = torch.randn(30, 24)
    position = torch.randn(96, 24)
    assert torch.equal(model.token_embedding.weight, token)
    assert torch.equal(model.position_embedding.weight, position)
    for block in model.blocks:
        for linear in (
            *(getattr(block.attn, f"{part}_proj") for part in ("q", "k", "v", "out")),
            block.ff.fc_in,
        ):
            expected = nn.Linear(linear.in_features, linear.out_features)
            assert torch.equal(linear.weight, expected.weight)
            assert torch.equal(linear.bias, expected.bias)
        assert torch.equal(block.ff.fc_out.weight, nn.Linear(40, 24).weight)
    nn.Linear(24, 30, bias=False)
    assert torch.equal(after, torch.rand(4))
    torch.manual_seed(3)
    scaled = SymbolicKVDecoder(config.model_copy(update={"embedding_std": 0.25}), 30)
    assert torch.equal(scaled.token_embedding.weight, token * 0.25)
    assert torch.equal(scaled.position_embedding.weight, position * 0.25)
    assert torch.equal(scaled.blocks[1].ff.fc_in.weight, model.blocks[1].ff.fc_in.weight)


def test_the_lens_at_the_end_is_the_models_own_readout(trained, batch):
    model = trained.model
    seen = {}
    hook = model.final_norm.register_forward_hook(lambda _, read, made: seen.update(read=read[0], made=made))
    logits = model(batch.token_ids)
    hook.remove()
    assert torch.equal(model.lens("layer_1_post_mlp", seen["read"]), logits)
    assert torch.equal(model.lens("final_norm", seen["made"]), logits)
    assert not torch.allclose(
        model.lens("embedding", model.token_embedding(batch.token_ids)), logits, atol=0.1
    )


def test_what_does_not_fit_is_refused(trained):
    model = trained.model
    with pytest.raises(ValueError, match="a stream of 97 tokens exceeds max_seq_len 96"):
        model(torch.ones(1, 97, dtype=torch.long))
    with pytest.raises(ValueError, match="no residual stage 'logits'"):
        model.lens("logits", torch.zeros(1, 3, 24))


def test_dropout_acts_in_training_only_and_at_its_three_places():
    config = load_config("formation", model=SMALL_MODEL | {"dropout": 0.5}).model
    torch.manual_seed(0)
    model = SymbolicKVDecoder(config, 30)
    tokens = torch.randint(1, 30, (2, 20))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    seen = {}
    for name in ("embedding_dropout", "blocks.0.ff", "blocks.0.ln_1"):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, made, name=name: seen.update({name: made})
        )
    model(tokens)
    assert (seen["embedding_dropout"] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert (seen["blocks.0.ff"] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    twice = [model.blocks[0].attn(seen["blocks.0.ln_1"], None)[0] for _ in range(2)]
    assert not torch.allclose(*twice)

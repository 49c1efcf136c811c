"""What every model family must pass: its parts sum to the model, and the model is its own library's."""

from __future__ import annotations

import math

import pytest
import torch
from lakebed.engine.adapters import ParameterSlice
from lakebed.engine.forward import Interventions, InvalidForward, WeightMismatch, input_stage, residual_stages
from torch import Tensor
from torch.nn import functional

CAPTURE = ("stages", "attention")


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def captured(family):
    return family.model().forward(family.tokens, family.mask, capture=CAPTURE)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest entry."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def attention_of(model, queries: Tensor, keys: Tensor) -> Tensor:
    scores = (queries @ keys.mT).double() / math.sqrt(model.d_head)
    length = scores.shape[-1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def test_logits_stages_and_attention_are_the_librarys_own(family, captured):
    own = family.own(family.tokens, family.mask)
    shown = family.mask
    assert not shown.all()
    close(captured.logits[shown], own.logits[shown])
    assert own.stages.keys() <= captured.stages.keys()
    assert {"embedding", "layer_0_post_mlp", "final_norm"} <= own.stages.keys()
    for stage, values in own.stages.items():
        close(captured.stages[stage][shown], values[shown])
    for layer, (queries, keys) in enumerate(zip(captured.queries, captured.keys, strict=True)):
        found = attention_of(family.model(), queries, keys).transpose(1, 2)[shown]
        expected = own.attention[layer].transpose(1, 2)[shown]
        assert (found - expected).abs().max() < 1e-6
    assert own.attention.std() > 0.01


def test_the_parts_of_the_forward_pass_sum_to_the_last_residual_stage(family, captured):
    """Embedding, every head's write from its probabilities, values and W_O, biases and MLPs, each in float64."""
    model, mlp = family.model(), family.adapter.head_weights(family.weights)
    weights = {name: weight.double() for name, weight in family.weights.items()}

    def of(module: str, kind: str, is_bias: bool = False) -> Tensor:
        return weights[family.parameter(module, kind, is_bias)]

    length = family.tokens.shape[1]
    total = of("token_embedding", "embedding")[family.tokens] + of("position_embedding", "embedding")[:length]
    for layer in range(family.n_layers):
        probabilities = attention_of(model, captured.queries[layer], captured.keys[layer])
        values = captured.values[layer].double()
        writes = torch.einsum(
            "bhqk,bhke,hde->bhqd", probabilities, values, model.head_weights["W_O"][layer].double()
        )
        total = total + writes.sum(1) + model.head_weights["b_O"][layer]
        close(captured.stages[f"layer_{layer}_post_attn"][family.mask], total[family.mask])
        gain, bias = of(f"L{layer}.ln_2", "layer_norm"), of(f"L{layer}.ln_2", "layer_norm", True)
        read = layer_norm(total, gain, bias, model.layer_norm_eps)
        neurons = read @ mlp["W_in"][layer].double().mT + of(f"L{layer}.mlp", "fc_in", True)
        total = total + family.gelu(neurons) @ mlp["W_out"][layer].double().mT
        total = total + of(f"L{layer}.mlp", "fc_out", True)
        close(captured.stages[f"layer_{layer}_post_mlp"][family.mask], total[family.mask])
    gain, bias = model.final_norm_parameters()
    logits = layer_norm(total, gain, bias, model.layer_norm_eps) @ model.unembedding.double().mT
    close(captured.logits[family.mask], logits[family.mask])


def test_queries_keys_and_values_are_the_heads_reading_of_their_input(family, captured):
    model = family.model()
    raw = family.adapter.head_weights(family.weights)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        assert torch.equal(model.head_weights[name], raw[name])
    for layer in range(family.n_layers):
        read = model.attention_norm(layer, captured.stages[input_stage(layer)])
        for letter, found in zip("QKV", (captured.queries, captured.keys, captured.values), strict=True):
            weight, bias = model.head_weights[f"W_{letter}"][layer], model.head_weights[f"b_{letter}"][layer]
            close(found[layer], torch.einsum("btd,hed->bhte", read, weight) + bias[:, None])
        at = torch.tensor([3, 1])
        some = model.project(
            layer, captured.stages[input_stage(layer)][:, at], at.expand(len(family.tokens), 2)
        )
        for alone, found in zip(some, (captured.queries, captured.keys, captured.values), strict=True):
            close(alone.transpose(1, 2), found[layer][:, :, at])
        probabilities = attention_of(model, captured.queries[layer], captured.keys[layer])
        close(captured.mixed[layer], probabilities @ captured.values[layer].double())
    close(model.final_norm(captured.stages[f"layer_{family.n_layers - 1}_post_mlp"]), captured.final)


def test_what_is_captured_changes_nothing_and_logits_of_places_are_the_logits(family, captured):
    model = family.model()
    plain = model.forward(family.tokens, family.mask)
    assert torch.equal(plain.logits, captured.logits)
    assert not plain.stages
    assert not plain.queries
    assert list(captured.stages) == list(model.stages) == list(family.adapter.stages())
    assert model.stages == residual_stages(family.n_layers)
    rows, places = torch.tensor([4, 0, 0]), torch.tensor([1, 5, 2])
    unembedded = captured.final[rows, places] @ captured.unembedding.T
    close(unembedded, captured.logits[rows, places], 1e-6)
    shape = (5, family.n_heads, family.tokens.shape[1], model.d_head)
    assert [tuple(part.shape) for part in captured.values] == [shape] * family.n_layers
    assert captured.queries[0].untyped_storage().data_ptr() == captured.values[0].untyped_storage().data_ptr()
    assert (model.n_layers, model.n_heads) == (family.n_layers, family.n_heads)
    assert model.unembedding.shape == (model.vocabulary_size, model.d_model)


def test_at_some_places_the_pass_gives_what_it_gives_at_all_of_them(family, captured, monkeypatch):
    model = family.model()
    length = family.tokens.shape[1]
    rows, positions = torch.tensor([0, 0, 2, 3, 4]), torch.tensor([2, 17, 5, 0, 11])
    places = rows * length + positions
    widths = []
    real = functional.gelu
    monkeypatch.setattr(
        functional, "gelu", lambda x, **k: widths.append(x.numel() // x.shape[-1]) or real(x, **k)
    )
    found = model.forward(family.tokens, family.mask, capture=CAPTURE, places=places)
    assert widths == [family.tokens.numel()] * (family.n_layers - 1) + [len(places)]
    assert list(found.stages) == list(model.stages)
    for stage, values in captured.stages.items():
        close(found.stages[stage], values[rows, positions], 1e-6)
    assert found.final.shape == (5, model.d_model)
    close(found.final, captured.final[rows, positions], 1e-6)
    close(found.logits, captured.logits[rows, positions], 1e-6)
    for part in ("queries", "keys", "values", "mixed"):
        for layer, values in enumerate(getattr(captured, part)):
            assert torch.equal(getattr(found, part)[layer], values)
    plain = model.forward(family.tokens, places=places)
    assert torch.equal(plain.final, found.final)
    assert not plain.stages
    none = model.forward(family.tokens, capture=CAPTURE, places=places[:0])
    assert {tuple(values.shape) for values in none.stages.values()} == {(0, model.d_model)}
    assert torch.equal(none.values[-1], captured.values[-1])


@pytest.mark.parametrize("stage", residual_stages(3))
def test_a_patch_holds_at_some_places_too(family, captured, stage):
    model = family.model()
    other = model.forward(family.tokens.flip(0), capture=CAPTURE).stages[stage]
    patch = Interventions(residual_patches={stage: other})
    places = torch.tensor([3, 30, 31])
    whole = model.forward(family.tokens, interventions=patch, capture=CAPTURE)
    found = model.forward(family.tokens, interventions=patch, capture=CAPTURE, places=places)
    for name, values in whole.stages.items():
        close(found.stages[name], values.flatten(0, 1)[places], 1e-6)
    close(model.forward(family.tokens, interventions=patch, places=places).final, found.final, 1e-6)


def test_padding_and_the_future_are_invisible(family):
    model = family.model()
    logits = model.forward(family.tokens, family.mask).logits
    for row, length in enumerate(family.mask.sum(1).tolist()):
        alone = model.forward(family.tokens[row : row + 1, :length]).logits[0]
        close(logits[row, :length], alone)
    other = torch.where(family.mask, family.tokens, 7)
    assert torch.equal(model.forward(other, family.mask).logits[family.mask], logits[family.mask])
    assert logits.isfinite().all()
    changed = family.tokens.clone()
    changed[:, 12:] = 3
    assert torch.equal(model.forward(changed).logits[:, :12], model.forward(family.tokens).logits[:, :12])


@pytest.mark.parametrize("stage", residual_stages(3))
def test_a_patch_takes_the_stages_place_and_everything_after_follows(family, captured, stage):
    model = family.model()
    clean = Interventions(residual_patches={stage: captured.stages[stage]})
    for capture in ((), CAPTURE):
        assert torch.equal(
            model.forward(family.tokens, interventions=clean, capture=capture).logits, captured.logits
        )
    other = model.forward(family.tokens.flip(0), capture=CAPTURE)
    patch = Interventions(residual_patches={stage: other.stages[stage]})
    patched = model.forward(family.tokens, interventions=patch, capture=CAPTURE)
    assert torch.equal(patched.logits, other.logits)
    assert torch.equal(model.forward(family.tokens, interventions=patch).logits, other.logits)
    place = model.stages.index(stage)
    for at, name in enumerate(model.stages):
        source = captured if at < place else other
        assert torch.equal(patched.stages[name], source.stages[name]), name


def test_two_patches_hold_both_and_nothing_hidden_is_computed(family, captured, monkeypatch):
    model = family.model()
    late = captured.stages["layer_1_post_mlp"]
    both = Interventions(residual_patches={"embedding": late * 2, "layer_1_post_mlp": late})
    calls = []
    real = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    assert torch.equal(model.forward(family.tokens, interventions=both).logits, captured.logits)
    assert len(calls) == 1
    kept = model.forward(family.tokens, interventions=both, capture=["stages"]).stages
    assert torch.equal(kept["embedding"], late * 2)
    assert not torch.equal(kept["layer_1_post_attn"], captured.stages["layer_1_post_attn"])
    assert torch.equal(kept["final_norm"], captured.stages["final_norm"])


def zeroed(family, *slices: ParameterSlice, factor: float = 0.0) -> dict[str, Tensor]:
    """The weights with these slices multiplied."""
    changed = {name: weight.clone() for name, weight in family.weights.items()}
    for part in slices:
        rows = changed[part.parameter][part.row_start : part.row_stop]
        (rows if part.column_start is None else rows[:, part.column_start : part.column_stop]).mul_(factor)
    return changed


def slices_of(family, kind: str, label: str) -> list[ParameterSlice]:
    shapes = {name: tuple(weight.shape) for name, weight in family.weights.items()}
    found = [part for part in family.adapter.slices(shapes) if (part.slice_kind, part.slice) == (kind, label)]
    assert found, label
    return found


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_masks_do_what_changed_weights_do(family, factor):
    """A head is its rows of the output projection, an MLP its output layer with the bias, a neuron what it writes."""
    d_mlp = family.adapter.head_weights(family.weights)["W_in"].shape[1]
    shape = {"head_mask": (3, 3), "mlp_mask": (3,), "neuron_mask": (3, d_mlp)}
    neuron = slices_of(family, "neuron", "L0N7")
    neuron_writes = [part for part in neuron if family.adapter.describe(part.parameter).kind == "fc_out"]
    cases = [
        ("head_mask", (1, 2), slices_of(family, "head_projection", "L1H2.out_proj")),
        ("head_mask", (0, 0), slices_of(family, "head_projection", "L0H0.out_proj")),
        ("mlp_mask", (2,), slices_of(family, "projection", "L2.fc_out")),
        ("neuron_mask", (0, 7), neuron_writes),
    ]
    clean = family.model().forward(family.tokens).logits
    for name, place, slices in cases:
        mask = torch.ones(shape[name])
        mask[place] = factor
        masked = family.model().forward(family.tokens, interventions=Interventions(**{name: mask})).logits
        changed = family.adapter.load_model(zeroed(family, *slices, factor=factor)).forward(family.tokens)
        close(masked, changed.logits)
        assert (masked - clean).abs().max() > 1e-3 * clean.abs().max(), name


def test_each_slice_of_a_head_is_that_heads(family, captured):
    for layer in range(family.n_layers):
        for head in range(family.n_heads):
            others = [other for other in range(family.n_heads) if other != head]
            for letter, name in zip("qkv", ("queries", "keys", "values"), strict=True):
                slices = slices_of(family, "head_projection", f"L{layer}H{head}.{letter}_proj")
                changed = family.adapter.load_model(zeroed(family, *slices))
                found = changed.forward(family.tokens, capture=CAPTURE)
                for part in ("queries", "keys", "values"):
                    now, before = getattr(found, part)[layer], getattr(captured, part)[layer]
                    close(now[:, others], before[:, others], 1e-6)
                    if part == name:
                        assert not now[:, head].any()
                    else:
                        close(now[:, head], before[:, head], 1e-6)
            whole = zeroed(family, *slices_of(family, "head", f"L{layer}H{head}.qkvo"))
            gone = family.adapter.load_model(whole).forward(family.tokens, capture=CAPTURE)
            mask = torch.ones(3, 3)
            mask[layer, head] = 0
            masked = family.model().forward(family.tokens, interventions=Interventions(head_mask=mask))
            close(gone.logits, masked.logits)
            assert not any(part[layer][:, head].any() for part in (gone.queries, gone.keys, gone.values))


def test_every_parameter_is_described_and_every_element_in_one_module_and_projection(family):
    named = {name: tuple(parameter.shape) for name, parameter in family.library.named_parameters()}
    assert list(family.adapter.parameter_shapes(named).items()) == list(named.items())
    shapes = {name: tuple(weight.shape) for name, weight in family.weights.items()}
    assert shapes == named
    about = {name: family.adapter.describe(name) for name in shapes}
    modules = {found.module for found in about.values()}
    inside = {f"L{layer}.{part}" for layer in range(3) for part in ("ln_1", "attention", "ln_2", "mlp")}
    assert modules == inside | {"token_embedding", "position_embedding", "final_norm"}
    for found in about.values():
        assert found.layer == (int(found.module[1]) if found.module in inside else None)
    lens = [found.transformer_lens_name for found in about.values() if found.kind != "qkv_proj"]
    assert None not in lens
    assert len(set(lens)) == len(lens)
    for kind in ("module", "projection", "head", "head_projection", "neuron"):
        counts = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for part in family.adapter.slices(shapes):
            if part.slice_kind == kind:
                rows = counts[part.parameter][part.row_start : part.row_stop]
                rows = rows if part.column_start is None else rows[:, part.column_start : part.column_stop]
                assert rows.numel()
                rows += 1
        for name, count in counts.items():
            found = about[name]
            attention, mlp = (
                found.kind in ("q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj"),
                "fc_" in found.kind,
            )
            of_a_part = not (found.is_bias and found.kind in ("out_proj", "fc_out"))
            expected = {
                "module": True,
                "projection": attention or mlp,
                "head": attention and of_a_part,
                "head_projection": attention and of_a_part,
                "neuron": mlp and of_a_part,
            }[kind]
            assert (count == float(expected)).all(), (kind, name)
    keys = [
        (s.slice_kind, s.slice, s.parameter, s.row_start, s.column_start)
        for s in family.adapter.slices(shapes)
    ]
    assert len(set(keys)) == len(keys)
    with pytest.raises(KeyError):
        family.adapter.describe("nothing.of.ours")


def test_gradients_of_a_models_output_reach_the_weights_it_was_made_of(family):
    events = (torch.tensor([0, 1]), torch.tensor([5, 9]))
    with torch.enable_grad():
        weights = {name: weight.clone().requires_grad_() for name, weight in family.weights.items()}
        passed = family.adapter.load_model(weights).forward(family.tokens, family.mask, capture=CAPTURE)
        passed.logits[events].log_softmax(-1)[:, 3].sum().backward()
        family.library.zero_grad()
        family.own(family.tokens, family.mask).logits[events].log_softmax(-1)[:, 3].sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in family.library.parameters())
    for name, parameter in family.library.named_parameters():
        assert (weights[name].grad - parameter.grad).abs().max() < 1e-5 * largest, name


def test_what_does_not_fit_is_refused_in_a_line_that_names_what_does(family):
    model = family.model()
    batch, length = family.tokens.shape

    def refused(message: str, tokens=family.tokens, mask=None, capture=(), places=None, **changes):
        changed = Interventions(**changes)
        with pytest.raises(InvalidForward, match=message) as caught:
            model.forward(tokens, mask, capture=capture, interventions=changed, places=places)
        assert "\n" not in str(caught.value)

    refused(
        "no residual stage 'layer_3_post_mlp'; stages: embedding, layer_0_post_attn, .*final_norm",
        residual_patches={"layer_3_post_mlp": torch.zeros(batch, length, 24)},
    )
    refused(
        r"the patch of stage embedding has shape \(1, 24\); these tokens take \(5, \d+, 24\)",
        residual_patches={"embedding": torch.zeros(1, 24)},
    )
    refused(r"head_mask has shape \(3,\); this model takes \(3, 3\)", head_mask=torch.ones(3))
    refused(r"mlp_mask has shape \(2,\); this model takes \(3,\)", mlp_mask=torch.ones(2))
    refused(r"neuron_mask has shape \(3, 1\)", neuron_mask=torch.ones(3, 1))
    refused("nothing named 'logits' to capture; there are stages, attention", capture=["logits"])
    size = model.max_positions
    too_long = torch.ones(1, size + 1, dtype=torch.long)
    refused(f"a stream of {size + 1} tokens exceeds the model's {size} positions", too_long)
    last = model.vocabulary_size - 1
    refused(f"token {last + 1} is not in the model's vocabulary, 0 to {last}", torch.tensor([[0, last + 1]]))
    refused("token -1 is not", torch.tensor([[0, -1]]))
    refused(r"tokens have shape \(3,\)", torch.tensor([1, 2, 3]))
    refused(r"tokens have shape \(1, 0\)", torch.ones(1, 0, dtype=torch.long))
    refused("pad on the right", mask=~family.mask)
    refused(r"the mask has shape \(5, 2\)", mask=family.mask[:, :2])
    count = family.tokens.numel()
    refused(f"place {count} is not among the {count} of these tokens", places=torch.tensor([count, 0]))
    refused("place -2 is not among", places=torch.tensor([-2]))


def test_weights_of_another_model_are_refused_by_the_first_that_differs(family):
    names = list(family.weights)

    def refused(weights, message):
        with pytest.raises(WeightMismatch, match=message):
            family.adapter.load_model(weights)

    second = names[1].removeprefix("transformer.")
    rest = {name: weight for name, weight in family.weights.items() if name not in (names[1], names[4])}
    ordered = [name.removeprefix("transformer.") for name in family.adapter.parameter_shapes(names)]
    first = min(ordered.index(second), ordered.index(names[4].removeprefix("transformer.")))
    refused(rest, f"^{ordered[first]} is missing, the config's model has")
    wider = {**family.weights, names[1]: torch.zeros(2, 3)}
    refused(wider, rf"{second} has shape \(2, 3\), the config's model has \(")
    refused(
        {**family.weights, "new.weight": torch.zeros(1)}, "'new.weight', which the config's model does not"
    )
    with pytest.raises(
        InvalidForward, match=r"device 'cuda:97' cannot be used here \(.*\); use --device cpu"
    ):
        family.adapter.load_model(family.weights, "cuda:97")


def test_other_dtypes_are_widened_and_a_tied_name_is_welcome(family):
    (alias,) = family.adapter.tied
    held = family.parameter("token_embedding", "embedding")
    assert held in family.adapter.tied[alias]
    halves = {name: weight.bfloat16() for name, weight in family.weights.items()}
    widened = {name: weight.float() for name, weight in halves.items()}
    found = family.adapter.load_model({**halves, alias: halves[held]}).forward(family.tokens).logits
    assert torch.equal(found, family.adapter.load_model(widened).forward(family.tokens).logits)
    assert found.dtype == torch.float32

"""Sums over the parts of a model, against the same sums written slice by slice in float64, for every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.adapters import ParameterSlice, load_adapter
from lakebed.engine.config import load_config
from lakebed.engine.slices import SliceSums

GPT2 = '{"model_type": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 8, "vocab_size": 20, "activation_function": "gelu_new"}'
ADAPTERS = {
    "symbolic_kv": lambda: load_adapter("symbolic_kv", load_config("tiny").canonical_json()),
    "gpt2": lambda: load_adapter("gpt2", GPT2),
}


def parts_of(adapter):
    shapes = adapter.parameter_shapes()
    return shapes, adapter.slices(shapes)


def random_fields(shapes, count, seed):
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=source) for name, shape in shapes.items()}


def cells(part, tensor):
    """The entries of a slice, `Float[field, …]`."""
    rows = tensor[:, part.row_start : part.row_stop]
    return rows if part.column_start is None else rows[..., part.column_start : part.column_stop]


def by_hand(slices, kind, label, left, right):
    """`Float64[gradient, field]` over every slice of that label."""
    total = 0
    for part in slices:
        if (part.slice_kind, part.slice) == (kind, label):
            a, b = cells(part, left[part.parameter]).double(), cells(part, right[part.parameter]).double()
            total = total + (a[:, None] * b[None]).flatten(2).sum(-1)
    return total


@pytest.mark.parametrize("family", ADAPTERS)
def test_every_part_is_the_sum_over_its_slices(family):
    shapes, slices = parts_of(ADAPTERS[family]())
    sums = SliceSums(shapes, slices)
    gradients, fields = random_fields(shapes, 2, 1), random_fields(shapes, 3, 2)
    products, squares = sums.products(gradients, fields), sums.squares(fields)
    assert {part.slice_kind for part in sums.parts} == {"parameter", "head_projection", "neuron"}
    for at, part in enumerate(sums.parts):
        if part.slice_kind == "parameter":
            a, b = gradients[part.slice].double().flatten(1), fields[part.slice].double().flatten(1)
            wanted, squared = a @ b.T, (b * b).sum(1)
            assert part.numel == a.shape[1]
        else:
            wanted = by_hand(slices, part.slice_kind, part.slice, gradients, fields)
            squared = by_hand(slices, part.slice_kind, part.slice, fields, fields).diagonal()
        torch.testing.assert_close(products[..., at], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(squares[:, at], squared, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), family=st.sampled_from(sorted(ADAPTERS)))
def test_parts_add_up_to_their_wholes(seed, family):
    """Modules to the model, heads and the output bias to the attention block, neurons and the output bias to the MLP."""
    shapes, slices = parts_of(ADAPTERS[family]())
    sums = SliceSums(shapes, slices)
    found = sums.products(random_fields(shapes, 1, seed), random_fields(shapes, 1, seed + 1))[0, 0]
    value = {(part.slice_kind, part.slice): float(found[at]) for at, part in enumerate(sums.parts)}
    module = {part.parameter: part.slice for part in slices if part.slice_kind == "module"}
    assert module.keys() == shapes.keys()
    for layer in (0, 1):
        attention = [name for name, of in module.items() if of == f"L{layer}.attention"]
        mlp = [name for name, of in module.items() if of == f"L{layer}.mlp"]
        heads = sum(
            of
            for (kind, name), of in value.items()
            if kind == "head_projection" and name.startswith(f"L{layer}H")
        )
        neurons = sum(
            of for (kind, name), of in value.items() if kind == "neuron" and name.startswith(f"L{layer}N")
        )
        # What no head and no neuron has is the bias of each output projection.
        left_over = {
            of: [
                name
                for name in names
                if not any(p.parameter == name and p.slice_kind == kind for p in slices)
            ]
            for of, names, kind in (("attention", attention, "head_projection"), ("mlp", mlp, "neuron"))
        }
        assert [len(names) for names in left_over.values()] == [1, 1]
        for whole, parts, names in (
            (attention, heads, left_over["attention"]),
            (mlp, neurons, left_over["mlp"]),
        ):
            total = sum(value["parameter", name] for name in whole)
            assert total == pytest.approx(parts + value["parameter", names[0]], rel=1e-9, abs=1e-9)


def test_a_parameter_without_a_gradient_counts_as_zero():
    shapes, slices = parts_of(ADAPTERS["symbolic_kv"]())
    sums = SliceSums(shapes, slices)
    gradients, fields = random_fields(shapes, 1, 3), random_fields(shapes, 2, 4)
    missing = "blocks.0.attn.q_proj.weight"
    without = sums.products({name: of for name, of in gradients.items() if name != missing}, fields)
    zeroed = sums.products({**gradients, missing: torch.zeros_like(gradients[missing])}, fields)
    assert torch.equal(without, zeroed)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 3, 0, 2), (2, 4, 0, 2)], "share an entry"),
        ([(0, 2, 0, 1), (2, 4, 1, 2)], "along both axes"),
    ],
)
def test_cuts_that_no_sum_can_follow_are_refused(rows, message):
    slices = [ParameterSlice("neuron", f"L0N{at}", "w", 0, None, at, *row) for at, row in enumerate(rows)]
    with pytest.raises(ValueError, match=message):
        SliceSums({"w": (4, 2)}, slices)

"""The four conditions against heads computed one by one with other attention or other values, on invented passes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.capture import CaptureError
from lakebed.engine.forward import ForwardPass
from lakebed.engine.readout import Choices
from lakebed.engine.scalars import PairPass, Records, ScalarError
from lakebed.engine.scalars.roles import SeparationRoles
from lakebed.engine.write_conditions import HeadsAtQuery, condition_writes, heads_at_query

VOCABULARY, EPSILON = 7, 1e-5
ROLES = SeparationRoles(support_key_role="support", distractor_key_role="distractors")


def invented(seed, pairs, positions, layers, heads, width):
    """A model and a pass of random float64 numbers; every pair has a query, a support and a distractor up to it."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d_model, records = heads * width, pairs + 1
    row = torch.randint(records, (pairs,), generator=draw)
    last = normal(records, positions, d_model)
    gain, shift = normal(d_model), normal(d_model)
    final = torch.nn.functional.layer_norm(last, (d_model,), gain, shift, EPSILON)
    unembedding = normal(VOCABULARY, d_model)
    model = SimpleNamespace(
        n_layers=layers,
        n_heads=heads,
        vocabulary_size=VOCABULARY,
        layer_norm_eps=EPSILON,
        stages=("embedding", "last", "final_norm"),
        unembedding=unembedding,
        head_weights={"W_O": normal(layers, heads, d_model, width)},
        final_norm_parameters=lambda: (gain, shift),
    )
    queries, keys, values = (
        [normal(records, heads, positions, width) for _ in range(layers)] for _ in range(3)
    )
    passed = ForwardPass(final, unembedding, {"last": last}, queries, keys, values, [])
    query = torch.randint(1, positions, (pairs,), generator=draw)
    masks = torch.rand(2, pairs, positions, generator=draw) < 0.4
    masks[0, :, 0], masks[1, torch.arange(pairs), query] = True, True
    answer = torch.randint(VOCABULARY - 2, (pairs,), generator=draw)
    wrong = torch.zeros(pairs, VOCABULARY - 1, dtype=torch.float64)
    wrong[torch.arange(pairs), answer] = -torch.inf
    tokens = torch.zeros(records, positions, dtype=torch.long)
    at = torch.nn.functional.one_hot(query, positions).bool()
    made = Records(
        tokens[row],
        tokens,
        row,
        torch.full((pairs,), positions),
        query,
        Choices(torch.arange(VOCABULARY - 1), answer, wrong),
        {"prediction": at, "support": masks[0], "distractors": masks[1]},
    )
    return model, made, PairPass(passed, row)


sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "pairs": st.integers(2, 5),
        "positions": st.integers(2, 6),
        "layers": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "width": st.integers(1, 4),
    }
)


def supports_of(records, pair):
    at = int(records.prediction[pair])
    return [p for p in range(at + 1) if records.roles["support"][pair, p]]


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_a_condition_is_a_head_with_other_attention_or_other_values(size):
    model, records, passed = invented(**size)
    partner = np.roll(np.arange(size["pairs"]), 1)
    heads = heads_at_query(model, records, passed, ROLES)
    writes, answers = condition_writes(model, heads, records.choices, torch.from_numpy(partner))
    for pair, layer, head in np.ndindex(size["pairs"], size["layers"], size["heads"]):
        row, at = int(records.row[pair]), int(records.prediction[pair])
        q, k, v = (
            of[layer][row, head].numpy() for of in (passed.distinct.queries, passed.distinct.keys, passed.distinct.values)
        )  # fmt: skip
        scores = k[: at + 1] @ q[at] / np.sqrt(size["width"])
        real = np.exp(scores - scores.max())
        real /= real.sum()
        supports = supports_of(records, pair)
        distractors = [p for p in range(at + 1) if records.roles["distractors"][pair, p]]
        alone = np.isin(np.arange(at + 1), supports) / len(supports)
        other = int(partner[pair])
        theirs = passed.distinct.values[layer][int(records.row[other]), head].numpy()
        shuffled = v[: at + 1].copy()
        shuffled[supports] = theirs[supports_of(records, other)].mean(0)
        wanted = {
            "support_score": scores[supports].mean(),
            "distractor_score": scores[distractors].mean(),
            "support_attention": real[supports].mean(),
            "distractor_attention": real[distractors].mean(),
            "support_mass": real[supports].sum(),
            "distractor_mass": real[distractors].sum(),
        }
        for name, value in wanted.items():
            assert getattr(heads, name)[pair, layer, head] == pytest.approx(value, abs=1e-12), name
        w_o, unembedding = model.head_weights["W_O"][layer, head].numpy(), model.unembedding.numpy()
        answer = int(records.choices.answer_token[pair])
        margins = {}
        for place, (pattern, values) in enumerate(
            [(real, v[: at + 1]), (alone, v[: at + 1]), (real, shuffled), (alone, shuffled)]
        ):
            write = w_o @ (pattern @ values)
            logits = unembedding @ write
            against = max((t for t in range(VOCABULARY - 1) if t != answer), key=lambda t: logits[t])
            margins[place] = logits[answer] - logits[against]
            index = (pair, layer, head, place)
            assert writes.head_value_margin_dla[index] == pytest.approx(margins[place], abs=1e-10)
            assert writes.head_answer_logit_dla[index] == pytest.approx(logits[answer], abs=1e-10)
            assert int(writes.head_best_wrong_token[index]) == against
            step = 1e-6
            last = heads.last[pair].numpy()
            own = int(answers.readout.best_wrong_token[pair])

            def margin_at(x, answer=answer, own=own):
                gain, shift = (of.numpy() for of in model.final_norm_parameters())
                centred = x - x.mean()
                final = centred / np.sqrt((centred**2).mean() + EPSILON) * gain + shift
                return final @ (model.unembedding[answer] - model.unembedding[own]).numpy()

            slope = (margin_at(last + step * write) - margin_at(last - step * write)) / (2 * step)
            assert writes.head_margin_dla[index] == pytest.approx(slope, rel=1e-5, abs=1e-5)
        for place, of_map in enumerate((1, 1, 3, 3)):
            assert writes.ov_map_value_margin[pair, layer, head, place] == pytest.approx(
                margins[of_map], abs=1e-10
            )


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_what_hangs_on_the_supports_values_is_linear(size):
    """o − (o − c_S + A_S ṽ) = c_S − A_S ṽ: for one support key the mass times what shuffling does to the OV map. And a pair
    shuffled into itself, with one support key, is as it was."""
    model, records, passed = invented(**size)
    only = torch.zeros_like(records.roles["support"])
    only[:, 0] = True
    records.roles["support"] = only
    heads = heads_at_query(model, records, passed, ROLES)
    partner = torch.arange(size["pairs"]).roll(1)
    writes, _ = condition_writes(model, heads, records.choices, partner)
    for read in (writes.head_answer_logit_dla, writes.head_margin_dla):
        real, alone, shuffled, both = read.unbind(-1)
        torch.testing.assert_close(real - shuffled, heads.support_mass * (alone - both), atol=1e-9, rtol=1e-9)
    itself, _ = condition_writes(model, heads, records.choices, torch.arange(size["pairs"]))
    for read in (itself.head_value_margin_dla, itself.head_answer_logit_dla, itself.head_margin_dla):
        real, alone, shuffled, both = read.unbind(-1)
        torch.testing.assert_close(real, shuffled, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(alone, both)


def test_batches_join_in_order():
    model, records, passed = invented(3, 4, 5, 2, 2, 3)
    heads = heads_at_query(model, records, passed, ROLES)
    halves = [heads.apply(lambda column, part=part: column[part]) for part in (slice(0, 1), slice(1, 4))]
    assert torch.equal(HeadsAtQuery.join(halves).attended, heads.attended)


def test_a_margin_that_is_not_the_models_own_is_refused():
    model, records, passed = invented(3, 4, 5, 2, 2, 3)
    heads = heads_at_query(model, records, passed, ROLES)
    gain, shift = model.final_norm_parameters()
    model.final_norm_parameters = lambda: (gain * 1.5, shift)
    with pytest.raises(CaptureError, match="the value margin read off the last residual stage is"):
        condition_writes(model, heads, records.choices, torch.arange(4))


def test_a_role_without_a_place_is_refused():
    model, records, passed = invented(3, 4, 5, 2, 2, 3)
    records.roles["support"][1] = False
    with pytest.raises(ScalarError, match="'support' has no position up to the query in 1 of 4 pairs"):
        heads_at_query(model, records, passed, ROLES)

"""Dataset score_changes on a trained lake: every number against a float64 decoder, and the identities of the nine parts."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lakebed.engine.scalars import ScalarError
from lakebed.engine.score_changes import PARTS
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.datasets import ATTRIBUTIONS, Need, attribution_parameters, score_change_parameters
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.names import spec_id

from tests.attribution_lake import HEADS, NUM_STEPS, RUN
from tests.queries.separation_reference import pairs_of, score_change_rows, weights_at

ROLES = ("prediction", "support_write", "key_distractors")
NAMED = dict(zip(("score_query_role", "support_key_role", "distractor_key_role"), ROLES, strict=True))
TYPES = ("support_value", "recency")
STEPS = (0, 1, 4, NUM_STEPS)
HEADS_TRIED = ("L1H0", "L0H1")


def parameters(head="L1H0", side="clean", **changed):
    asked = {"pair_type": TYPES, "max_pairs_per_type": 5, **changed}
    return score_change_parameters(head, NAMED, side, **asked)


@pytest.fixture(scope="module")
def world(attribution_lake_path, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("scores") / "scores.lake"
    shutil.copytree(attribution_lake_path, path)
    with Lake.open(path) as lake:
        needs = [
            Need("score_changes", parameters(head, side))
            for head in HEADS_TRIED
            for side in ("clean", "corrupted")
        ]
        made = extract(lake, RUN, needs, ",".join(map(str, STEPS)))
        yield SimpleNamespace(
            path=path,
            lake=lake,
            made=made,
            needs=needs,
            rows=lake.sql("FROM score_changes WHERE run = ?", [RUN]).pl().to_dicts(),
            pairs={pair.pair_id: pair for pair in pairs_of(lake, RUN, TYPES, 5)},
            weights={step: weights_at(lake, RUN, step) for step in STEPS},
        )


@torch.no_grad()
@pytest.mark.parametrize("side", ["clean", "corrupted"])
@pytest.mark.parametrize("head", HEADS_TRIED)
@pytest.mark.parametrize(("source", "target"), [(0, 1), (4, NUM_STEPS)])
def test_every_number_is_that_of_the_definition(world, head, side, source, target):
    rows = [
        row
        for row in world.rows
        if (row["scalar_head"], row["record_side"], row["source_step"]) == (head, side, source)
    ]
    assert {row["target_step"] for row in rows} == {target}
    assert {row["spec"] for row in rows} == {spec_id(parameters(head, side))}
    by_pair = {}
    for row in rows:
        by_pair.setdefault(row["pair_id"], {})[row["key_role"], row["key_position"]] = row
    assert by_pair.keys() == world.pairs.keys()
    for pair_id, found in by_pair.items():
        pair = world.pairs[pair_id]
        wanted = score_change_rows(
            world.weights[source],
            world.weights[target],
            HEADS,
            (int(head[1]), int(head[3])),
            pair.sides[side],
            ROLES,
        )
        assert found.keys() == wanted.keys()
        for key, numbers in wanted.items():
            row = found[key]
            assert (row["split"], row["pair_type"]) == (pair.split, pair.pair_type)
            assert {name: row[name] for name in numbers} == pytest.approx(numbers, abs=5e-6)


def test_the_parts_add_up_to_the_sides_and_the_sides_to_the_change(world):
    columns = {name: np.array([row[name] for row in world.rows]) for name in world.rows[0] if name != "run"}
    change = columns["target_score"] - columns["source_score"]
    parts = sum(columns[name] for name in PARTS)
    np.testing.assert_allclose(parts - change, columns["score_reconstruction_error"], atol=1e-13)
    exact = sum(
        columns[name]
        for name in ("q_vector_delta_source_key", "source_query_k_vector_delta", "qk_vector_cross")
    )
    np.testing.assert_allclose(exact, change, atol=1e-13)
    for of, error in (("q_delta", "query"), ("k_delta", "key"), ("score", "score")):
        size = np.abs(columns[f"{of}_reconstruction_error"])
        assert 0 < size.max() < 2e-5, error
    query = sum(columns[name] for name in PARTS[:4])
    # Off by what rounding did to the query, times the key.
    assert np.abs(query - columns["q_vector_delta_source_key"]).max() < 2e-5
    # Where everything moved far, a first order is not enough: what is left is not rounding.
    far = columns["source_step"] == 4
    left = (
        columns["target_attention"]
        - columns["source_attention"]
        - columns["softmax_first_order_attention_delta"]
    )
    assert np.abs(left[far]).max() > 1e-3


def test_keys_stand_up_to_the_query_in_order(world):
    assert all(row["key_position"] <= row["query_position"] for row in world.rows)
    lists = {}
    for row in world.rows:
        key = (row["spec"], row["source_step"], row["pair_id"], row["key_role"])
        lists.setdefault(key, []).append((row["role_position_index"], row["key_position"]))
    for of in lists.values():
        assert [index for index, _ in sorted(of)] == list(range(len(of)))
        positions = [position for _, position in sorted(of)]
        assert positions == sorted(set(positions))
    supports = [of for key, of in lists.items() if key[3] == "support_write"]
    assert {len(of) for of in supports} == {3}


def test_a_second_extraction_makes_nothing_and_a_longer_one_only_what_is_missing(world):
    assert world.made.made["score_changes"] == 4 * [1] + 4 * [4] + 4 * [NUM_STEPS]
    again = extract(world.lake, RUN, world.needs, ",".join(map(str, STEPS)))
    assert again.made["score_changes"] == []
    assert again.standing["score_changes"] == 12


def test_passes_shared_with_attributions_give_the_same(world, attribution_lake_path, tmp_path):
    """One forward pass per step and record side serves both datasets, whichever lacks something."""
    path = tmp_path / "both.lake"
    shutil.copytree(attribution_lake_path, path)
    scalar = {"head": "L1H0", **NAMED, "component": "score", "record_side": "clean"}
    asked = {"pair_type": TYPES, "max_pairs_per_type": 5}
    attributed = Need(ATTRIBUTIONS, attribution_parameters("attention_score_separation", scalar, **asked))
    with Lake.open(path) as lake:
        extract(lake, RUN, [attributed, Need("score_changes", parameters())], "0,1,4")
        rows = lake.sql("FROM score_changes").pl().to_dicts()
        values = lake.sql(
            "SELECT pair_id, target_value - source_value AS delta FROM scalar_changes WHERE quantity = 'value' "
            "AND source_step = 1"
        ).fetchall()
    spec = spec_id(parameters())
    wanted = [row for row in world.rows if row["spec"] == spec and row["source_step"] < 4]
    assert rows == wanted
    # What is attributed is what the keys of one pair make together.
    assert len(values) == len(world.pairs)
    for pair_id, delta in values:
        of = [row for row in rows if row["pair_id"] == pair_id and row["source_step"] == 1]
        means = [
            np.mean([row["target_score"] - row["source_score"] for row in of if row["key_role"] == role])
            for role in ROLES[1:]
        ]
        assert delta == pytest.approx(means[0] - means[1], abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"head": "L4H0"}, ScalarError, "no head L4H0; this run has layers 0–1, heads 0–1"),
        ({"pair_type": ()}, UnknownName, "name a type, of query_key, support_value, recency, distractor"),
        ({"pair_type": ("odd",)}, UnknownName, "no pair type 'odd'"),
        (
            {"split": ("test_iid",)},
            MissingData,
            "no causal patch pairs of type recency, support_value in split test_iid",
        ),
        ({"probe": "none"}, MissingData, "none"),
    ],
)
def test_what_is_not_there_is_refused(world, changed, error, message):
    with pytest.raises(error, match=message):
        extract(world.lake, RUN, [Need("score_changes", parameters(**changed))], "0,1")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"support_key_role": "nowhere"}, "no role 'nowhere'; these pairs have"),
        ({"support_key_role": "key_distractors"}, "support and distractor role are both 'key_distractors'"),
        ({"score_query_role": "support_write"}, "a query is exactly one"),
    ],
)
def test_roles_that_make_no_separation_are_refused(world, roles, message):
    wrong = {**parameters(), **roles}
    with pytest.raises(ScalarError, match=message):
        extract(world.lake, RUN, [Need("score_changes", wrong)], "0,1")

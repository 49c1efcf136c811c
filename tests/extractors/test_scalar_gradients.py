"""Whole gradients of scalars as tensors and as SQL, and products of gradients: against each other; once; refusals."""

import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from lakebed.cli.main import cli
from lakebed.engine.scalars import ScalarError
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.data_groups import DataGroupError
from lakebed.lake.datasets import (
    ATTRIBUTIONS,
    GRADIENT_PRODUCTS,
    SCALAR_GRADIENTS,
    Need,
    attribution_parameters,
    gradient_product_parameters,
    scalar_gradient_parameters,
)
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.names import spec_id
from lakebed.lake.verify import verify

from tests.route_lake import RUN

ROUTE = {
    "stage": "layer_1_post_attn",
    "subspace": "head_ov_output",
    "rank": 2,
    "head": "L1H1",
    "position_role": "prediction",
}
PAIRS = {"pair_type": ("query_key",), "max_pairs_per_type": 5}
GRADIENT = scalar_gradient_parameters("route_score", ROUTE, **PAIRS)
LOSS = scalar_gradient_parameters("lm_loss", {"loss_side": "both"}, **PAIRS)


def products(**changed):
    given = {
        "scalar_pair_type": "query_key",
        "data_group_field": ("pair_type",),
        "loss_side": "both",
        **PAIRS,
    }
    return Need(
        GRADIENT_PRODUCTS, gradient_product_parameters([("route_score", ROUTE)], **{**given, **changed})
    )


@pytest.fixture
def lake(route_lake_path, tmp_path):
    path = tmp_path / "copy.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as opened:
        yield opened


def rows(lake, sql, *values):
    return lake.sql(sql, list(values) or None).fetchall()


def test_a_gradient_is_made_once_and_is_a_table(lake):
    needs = [Need(SCALAR_GRADIENTS, GRADIENT), Need(SCALAR_GRADIENTS, LOSS)]
    assert extract(lake, RUN, needs, "38,40").made == {SCALAR_GRADIENTS: [38, 38, 40, 40]}
    assert extract(lake, RUN, needs, "38,40").made == {SCALAR_GRADIENTS: []}
    assert verify(lake).ok
    spec = spec_id(GRADIENT)
    found = rows(
        lake,
        "SELECT parameter, row, values FROM scalar_gradients WHERE run = ? AND spec = ? AND step = 40 ORDER BY ALL",
        RUN,
        spec,
    )
    tensor = lake.tensor(SCALAR_GRADIENTS, f"{spec}/blocks.1.attn.v_proj.weight", RUN).read(40)
    held = [values for name, _, values in found if name == "blocks.1.attn.v_proj.weight"]
    np.testing.assert_array_equal(np.array(held, np.float32), tensor)
    # A patched prediction after the last attention: what that attention reads still moves the clean state.
    assert np.abs(tensor).max() > 0
    names = {name for name, *_ in found}
    assert names == {name for (name,) in rows(lake, "SELECT parameter FROM parameters WHERE run = ?", RUN)}


def test_what_a_scalar_does_not_reach_is_zero(lake):
    """The bias of the final LayerNorm moves both margins alike."""
    extract(lake, RUN, [Need(SCALAR_GRADIENTS, GRADIENT)], "40")
    assert not lake.tensor(SCALAR_GRADIENTS, f"{spec_id(GRADIENT)}/final_norm.bias", RUN).read(40).any()


def test_values_and_gradients_are_those_of_the_attributions(lake):
    of_interval = attribution_parameters("route_score", ROUTE, **PAIRS)
    extract(lake, RUN, [Need(SCALAR_GRADIENTS, GRADIENT), Need(ATTRIBUTIONS, of_interval)], "38,40")
    mine = rows(lake, "SELECT pair_id, quantity, value, weight FROM scalars WHERE step = 38 ORDER BY ALL")
    theirs = rows(lake, "SELECT pair_id, quantity, source_value, weight FROM scalar_changes ORDER BY ALL")
    assert mine == theirs
    squares = dict(
        rows(
            lake,
            "SELECT slice, gradient_squared FROM attribution_slices WHERE slice_kind = 'parameter' AND split = '__all__'",
        )
    )
    for name, squared in rows(
        lake,
        "SELECT parameter, sum(squared_norm(values)) FROM scalar_gradients WHERE step = 38 GROUP BY ALL",
    ):
        assert squared == pytest.approx(squares[name], rel=1e-5, abs=1e-12)


def test_products_are_those_of_the_whole_gradients(lake):
    """Of a loss with itself, with a route and with the update."""
    extract(lake, RUN, [Need(SCALAR_GRADIENTS, GRADIENT), Need(SCALAR_GRADIENTS, LOSS), products()], "38,40")
    loss, route = spec_id(LOSS), spec_id(GRADIENT)
    wanted = {
        "loss": rows(lake, "SELECT parameter, sum(squared_norm(values)) FROM scalar_gradients WHERE spec = ? AND step = 38 "
                     "GROUP BY ALL", loss),
        spec_id(attribution_parameters("route_score", ROUTE, **PAIRS)): rows(
            lake,
            "SELECT a.parameter, sum(list_dot_product(a.values::DOUBLE[], b.values::DOUBLE[])) FROM scalar_gradients AS a "
            "JOIN scalar_gradients AS b USING (run, step, parameter, row) WHERE a.spec = ? AND b.spec = ? AND step = 38 "
            "GROUP BY ALL", loss, route),
        "update": rows(
            lake,
            "SELECT g.parameter, sum(list_dot_product(g.values::DOUBLE[], b.values::DOUBLE[]) "
            "- list_dot_product(g.values::DOUBLE[], a.values::DOUBLE[])) FROM scalar_gradients AS g "
            "JOIN weights AS a USING (run, step, parameter, row) JOIN weights AS b ON b.run = g.run AND b.step = 40 "
            "AND b.parameter = g.parameter AND b.row = g.row WHERE g.spec = ? AND g.step = 38 GROUP BY ALL", loss),
    }  # fmt: skip
    for factor, expected in wanted.items():
        held = dict(
            rows(
                lake,
                "SELECT parameter, product FROM gradient_products WHERE factor = ? AND data_group = '__all__'",
                factor,
            )
        )
        assert held.keys() == dict(expected).keys()
        for name, product in expected:
            assert held[name] == pytest.approx(product, rel=1e-4, abs=1e-8), (factor, name)
    # One type, so its group is all of them.
    ((differing,),) = rows(
        lake,
        "SELECT count(*) FROM gradient_products AS a JOIN gradient_products AS b USING (factor, parameter) WHERE "
        "a.data_group = '__all__' AND b.data_group = 'pair_type=query_key' AND a.product <> b.product",
    )
    assert differing == 0


def test_groups_are_pooled_by_tokens(lake):
    wanted = products(pair_type=("query_key", "support_value"), loss_side="clean")
    extract(lake, RUN, [wanted], "38,40")
    found = {
        group: rest
        for group, *rest in rows(
            lake, "SELECT data_group, loss, num_tokens, num_records, num_pairs FROM data_group_losses"
        )
    }
    parts = [found["pair_type=query_key"], found["pair_type=support_value"]]
    whole = found["__all__"]
    assert whole[1:] == [sum(of) for of in list(zip(*parts, strict=True))[1:]]
    assert whole[0] == pytest.approx(sum(of[0] * of[1] for of in parts) / whole[1])
    update = dict(
        rows(
            lake,
            "SELECT data_group, sum(product) FROM gradient_products WHERE factor = 'update' GROUP BY ALL",
        )
    )
    pooled = sum(update[name] * found[name][1] for name in ("pair_type=query_key", "pair_type=support_value"))
    assert update["__all__"] * whole[1] == pytest.approx(pooled, rel=1e-5)


def test_gradients_that_are_at_hand_are_not_taken_again(lake, route_lake_path, tmp_path):
    """With the scalar's attributions in one go, or afterwards: the same products."""
    wanted = products(pair_type=("query_key", "support_value"))
    of_interval = attribution_parameters(
        "route_score", ROUTE, **{**PAIRS, "pair_type": ("query_key", "support_value")}
    )
    extract(lake, RUN, [wanted], "38,40")
    query = "SELECT data_group, factor, parameter, product FROM gradient_products ORDER BY ALL"
    apart = rows(lake, query)
    path = tmp_path / "together.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as together:
        extract(together, RUN, [Need(ATTRIBUTIONS, of_interval), wanted], "38,40")
        found = rows(together, query)
    assert [row[:3] for row in found] == [row[:3] for row in apart]
    np.testing.assert_allclose([row[3] for row in found], [row[3] for row in apart], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("need", "error", "message"),
    [
        (
            products(scalar_pair_type="recency"),
            ScalarError,
            "no pair is of type recency, which the scalars are of",
        ),
        (products(data_group_field=("nothing",)), DataGroupError, "no 'nothing' in pair"),
        (products(loss_side="neither"), ScalarError, "scalar lm_loss: loss_side"),
        (products(probe="other"), MissingData, "Probe-set not found"),
        (products(pair_type=()), UnknownName, "name a type, of query_key"),
        (
            Need(SCALAR_GRADIENTS, {**GRADIENT, "scalar": "nothing"}),
            ScalarError,
            "no scalar 'nothing'; there are",
        ),
    ],
)
def test_what_is_not_there_is_one_line(lake, need, error, message):
    with pytest.raises(error, match=message) as caught:
        extract(lake, RUN, [need], "38,40")
    assert "\n" not in str(caught.value)


def test_a_gradient_is_made_from_the_command_line(lake):
    words = [
        "extract",
        "scalar_gradients",
        "--lake",
        str(lake.storage.path("")),
        "--run",
        RUN,
        "--steps",
        "40",
    ]
    words += ["--pair-type", "query_key", "--max-pairs-per-type", "5"]
    made = CliRunner().invoke(cli, [*words, "--scalar", "lm_loss,loss_side=both"], catch_exceptions=False)
    assert '"scalar_gradients": 1' in made.output
    assert rows(lake, "SELECT DISTINCT spec FROM scalar_gradients") == [(spec_id(LOSS),)]
    refused = CliRunner().invoke(cli, [*words, "--scalar", "lm_loss", "--integrate", "2"])
    assert "--integrate is an option of attributions" in refused.output
    assert "name it with --scalar" in CliRunner().invoke(cli, words).output

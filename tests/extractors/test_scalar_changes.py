"""Dataset scalar_changes: the same numbers as attributions have, by forward passes alone, whatever else is made with it."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from lakebed.extractors.dataset import build_extractor
from lakebed.extractors.plan import extract
from lakebed.extractors.states import StateReader
from lakebed.lake import Lake
from lakebed.lake.datasets import (
    ATTRIBUTIONS,
    SCALAR_CHANGES,
    SCALAR_GRADIENTS,
    Need,
    attribution_parameters,
    scalar_change_parameters,
    scalar_gradient_parameters,
)
from lakebed.lake.names import spec_id
from lakebed.lake.subspaces import ROUTE_SCORE, route_parameters
from lakebed.lake.verify import verify

from tests.route_lake import RUN

STEPS = (34, 36, 37, 40)
ROUTES = {
    "head": route_parameters("layer_0_post_mlp", "head_qk_query", "query_key", 3, "L1H2"),
    "identity": route_parameters("embedding", "embedding_value_identity", "support_value", 2, None),
    "full": route_parameters("layer_0_post_attn", "full_residual", "query_key", None, None),
}
PAIRS = {"pair_type": ("query_key", "support_value"), "max_pairs_per_type": 4}
KEY = "split, pair_type, source_step, target_step, pair_id, quantity"


def needs():
    return [
        Need(SCALAR_CHANGES, scalar_change_parameters(ROUTE_SCORE, of, **PAIRS)) for of in ROUTES.values()
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def lake(route_lake_path, tmp_path):
    path = tmp_path / "changes.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as opened:
        yield opened


def values(lake, parameters):
    return lake.sql(
        f"SELECT {KEY}, source_value, target_value, weight FROM scalar_changes WHERE spec = ? ORDER BY ALL",
        [spec_id(parameters)],
    ).fetchall()


def test_it_has_the_numbers_of_attributions_and_nothing_of_gradients(lake):
    made = extract(lake, RUN, needs(), ",".join(map(str, STEPS)))
    assert made.made == {SCALAR_CHANGES: [step for step in STEPS[1:] for _ in ROUTES]}
    assert extract(lake, RUN, needs(), ",".join(map(str, STEPS))).made == {SCALAR_CHANGES: []}
    assert lake.sql("SELECT count(*) FROM attribution_slices").fetchall() == [(0,)]
    others = [Need(ATTRIBUTIONS, attribution_parameters(ROUTE_SCORE, of, **PAIRS)) for of in ROUTES.values()]
    extract(lake, RUN, others, ",".join(map(str, STEPS)))
    for mine, theirs in zip(needs(), others, strict=True):
        found, wanted = values(lake, mine.parameters), values(lake, theirs.parameters)
        assert [row[:6] for row in found] == [row[:6] for row in wanted]
        assert len(found) == 3 * 8 * 4
        for row, other in zip(found, wanted, strict=True):
            assert row[6:] == pytest.approx(other[6:], rel=1e-4, abs=2e-6)
        bases = [
            lake.sql(
                "SELECT source_step, target_step, singular_values FROM scalar_bases WHERE spec = ? ORDER BY ALL",
                [spec_id(of.parameters)],
            ).fetchall()
            for of in (mine, theirs)
        ]
        assert bases[0] == bases[1]
    assert verify(lake).ok


def test_an_inner_step_has_a_value_for_either_basis(lake):
    """The same weights, the bases of two sources: equal only where there is no basis."""
    extract(lake, RUN, needs(), ",".join(map(str, STEPS)))
    for label, need in zip(ROUTES, needs(), strict=True):
        rows = values(lake, need.parameters)
        for (_, middle), (_, _) in pairwise(pairwise(STEPS)):
            ends = {row[0:2] + row[4:6]: row[7] for row in rows if row[3] == middle}
            starts = {row[0:2] + row[4:6]: row[6] for row in rows if row[2] == middle}
            assert ends.keys() == starts.keys()
            assert (ends == starts) == (label == "full")


def test_interval_by_interval_is_the_same_to_the_last_bit(lake, tmp_path, route_lake_path):
    extract(lake, RUN, needs(), ",".join(map(str, STEPS)))
    path = tmp_path / "apart.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as apart:
        for ends in pairwise(STEPS):
            extract(apart, RUN, needs(), ",".join(map(str, ends)))
        for need in needs():
            assert values(apart, need.parameters) == values(lake, need.parameters)


def test_no_gradient_is_taken_and_no_moment_read(lake, monkeypatch):
    """What costs beside the forward passes."""
    asked = []
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient was taken for a value alone")
    )
    iterate = StateReader.iterate

    def seen(self, steps, moments=True):
        asked.append(moments)
        return iterate(self, steps, moments)

    monkeypatch.setattr(StateReader, "iterate", seen)
    extract(lake, RUN, needs()[:1], "34:36")
    assert asked
    assert not any(asked)


def test_its_spec_is_that_of_no_other_dataset():
    made = scalar_change_parameters(ROUTE_SCORE, ROUTES["head"], **PAIRS)
    specs = {
        spec_id(of(ROUTE_SCORE, ROUTES["head"], **PAIRS))
        for of in (scalar_change_parameters, attribution_parameters, scalar_gradient_parameters)
    }
    assert len(specs) == 3
    for name, parameters in (
        (SCALAR_CHANGES, made),
        (ATTRIBUTIONS, attribution_parameters(ROUTE_SCORE, ROUTES["head"], **PAIRS)),
        (SCALAR_GRADIENTS, scalar_gradient_parameters(ROUTE_SCORE, ROUTES["head"], **PAIRS)),
    ):
        assert spec_id(dict(build_extractor(name, parameters).parameters())) == spec_id(parameters)

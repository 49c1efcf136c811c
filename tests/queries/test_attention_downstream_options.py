"""Both reports on downstream scalars: their defaults, and what they refuse."""

import shutil

import pytest
import torch
from lakebed.engine.scalars import ScalarError
from lakebed.engine.scalars.downstream import SCALARS as ENGINE_SCALARS
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.pair_selection import TooFewPairs
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from tests.downstream_lake import RUN

from .downstream_reference import SCALARS

OPTIONS = {
    "head": "L1H2",
    "score_query_role": "prediction",
    "support_key_role": "support_value",
    "distractor_key_role": "value_distractors",
    "pair_type": ("support_value", "distractor"),
    "record_side": ("clean",),
    "scalar": ("qk_ov_product",),
    "max_pairs_per_type": 8,
}


def updates(**options):
    return load_report("attention-downstream-update-attribution").parse({**OPTIONS, **options})


def adam_state(**options):
    given = {**OPTIONS, "objective_pair_type": "support_value", **options}
    return load_report("attention-downstream-adam-state-attribution").parse(given)


@pytest.fixture(scope="module")
def lake(downstream_lake_path, tmp_path_factory):
    """Updates between recorded steps, and two over two of them each."""
    path = tmp_path_factory.mktemp("options") / "d.lake"
    shutil.copytree(downstream_lake_path, path)
    torch.set_num_threads(1)
    with Lake.open(path) as opened:
        for steps in ("36:38", "36,38", "34,36"):
            extract(opened, RUN, updates().needs(), steps)
        yield opened


def test_the_names_are_those_of_the_engine():
    assert set(SCALARS) == set(ENGINE_SCALARS)


def test_the_defaults_are_those_of_the_contract():
    made = updates(scalar=None, record_side=None)
    assert made.scalar == SCALARS[:9]
    assert made.record_side == ("clean", "corrupted")
    assert (made.top_k_groups, made.integrate, len(made.decompose)) == (24, 0, 5)
    made = adam_state(scalar=None, record_side=None)
    assert made.scalar == (
        "attended_support_ov_value_margin", "head_value_margin_dla", "head_margin_dla_fixed_readout"
    )  # fmt: skip
    assert made.record_side == ("clean",)
    assert made.objective() == ("__all__", "support_value")
    assert made.groups[0] == "global:all_named_parameters"
    assert made.groups[5] == "attention_head:L1H2.qkvo"
    assert updates(scalar=("answer_margin", "answer_margin")).scalar == ("answer_margin",)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"scalar": ("qk_ov",)}, InvalidOption, "--scalar should be 'attention_separation', .* or 'qk_ov_product', not 'qk_ov'"),
    ({"distractor_key_role": "support_value"}, InvalidOption, "are both support_value"),
    ({"head": "L2H0"}, UnknownName, "no head L2H0; run 'r' has layers 0–1, heads 0–3"),
    ({"support_key_role": "support"}, UnknownName, "no role 'support'; the events of probe 'probe' have"),
    ({"min_pairs_per_type": 60, "max_pairs_per_type": 64}, TooFewPairs, "support_value [0-9]+, distractor [0-9]+, and at least 60"),
    ({"steps": "36"}, MissingData, "an update lies between two steps"),
    ({"steps": "34,37"}, MissingData, "lakebed extract --for attention-downstream-update-attribution .*--steps 34,37"),
    ({"decompose": ("heads",)}, InvalidOption, "--decompose"),
    ({"top_k_groups": 0}, InvalidOption, "--top-k-groups should be greater than or equal to 1"),
])  # fmt: skip
def test_updates_refuse(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run_report(lake, updates(**{"steps": "36:38", **options}), tmp_path / "out", chart_formats=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"scalar": ("ov",)}, InvalidOption, "--scalar should be 'attention_separation', .* or 'qk_ov_product', not 'ov'"),
    ({"distractor_key_role": "support_value"}, InvalidOption, "are both support_value"),
    ({"head": "L0H9"}, UnknownName, "no head L0H9; run 'r' has layers 0–1, heads 0–3"),
    ({"parameter_group": ("module:L2.mlp",)}, InvalidOption,
     "no group 'module:L2.mlp'; run 'r' has global:all_named_parameters, module:L0.attention, .*attention_head:L1H3.qkvo"),
    ({"parameter_group": ("parameter:final_norm.weight",)}, InvalidOption, "no group 'parameter:final_norm.weight'; run"),
    ({"parameter_group": ("module:L0.mlp", "module:L0.mlp")}, InvalidOption,
     "group 'module:L0.mlp' is given twice; run 'r' has global"),
    ({"min_pairs_per_type": 60, "max_pairs_per_type": 64}, TooFewPairs, "and at least 60 are asked for"),
    ({"steps": "36,38"}, ReportFailed, "from step 36 to 38 of run 'r' was not recorded as one step"),
    ({"objective_pair_type": "recency"}, ReportFailed, "no pair is of split __all__ and type recency; there are __all__"),
    ({"objective_route_split": "train"}, ReportFailed, "no pair is of split train and type support_value; there are"),
    ({"objective_pair_type": "write"}, InvalidOption, "--objective-pair-type should be '__all__', 'query_key'"),
    ({"objective_pair_type": None}, InvalidOption, "--objective-pair-type is required"),
    ({"loss_scope": "answer"}, InvalidOption, "an answer-only gradient has no AdamW terms"),
    ({"record_side": ("clean", "corrupted")}, InvalidOption, "--record-side is one of clean and corrupted here"),
])  # fmt: skip
def test_adam_state_refuse(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run_report(lake, adam_state(**{"steps": "36:38", **options}), tmp_path / "out", chart_formats=[])
    assert not (tmp_path / "out").exists()


def test_keys_of_a_role_must_lie_before_the_query(lake):
    needs = updates(score_query_role="support_key").needs()
    with pytest.raises(ScalarError, match="'support_value' has no position up to the query"):
        extract(lake, RUN, needs, "36,37")

"""The ledger of several heads: each head's numbers are those of the report on it alone, which are checked elsewhere against
float64; the order, the fastest stretch and the shares are worked out again here."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import LakebedError, MissingData
from lakebed.queries.bilinear_qk_rank_adam_state_attribution import BilinearQKRankAdamStateAttribution
from lakebed.queries.qk_separation_ledger import QKSeparationLedger
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from tests.attribution_lake import RUN

STEPS = "2:12"
ROLES = {"support_key_role": "support_value", "distractor_key_role": "value_distractors"}
HEADS = ("L0H0", "L0H1", "L1H0", "L1H1")
OPTIONS = {"run": RUN, "steps": STEPS, "head": HEADS, "rank": 2, "pair_type": ("support_value",), **ROLES}


def one_head(head: str) -> BilinearQKRankAdamStateAttribution:
    stage = "embedding" if head[1] == "0" else "layer_0_post_mlp"
    options = {"head": head, "rank": (2,), "context_stage": stage, "score_query_role": "prediction", **ROLES}
    return BilinearQKRankAdamStateAttribution.parse(
        {"run": RUN, "steps": STEPS, "route_pair_source_type": ("support_value",), **options}
    )


@pytest.fixture(scope="module")
def lake(attribution_lake_path, tmp_path_factory):
    copy = tmp_path_factory.mktemp("ledger") / "l.lake"
    shutil.copytree(attribution_lake_path, copy)
    with Lake.open(copy) as opened:
        extract(opened, RUN, QKSeparationLedger.parse(OPTIONS).needs(), STEPS)
        yield opened


@pytest.fixture(scope="module")
def made(lake, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "ledger"
    printed = run_report(lake, QKSeparationLedger.parse(OPTIONS), out, chart_formats=("svg",))
    rows = {name: pl.read_parquet(printed[f"{name}_parquet"]) for name in ("head", "step", "group")}
    return printed, rows, json.loads((out / "qk_separation_ledger_report.json").read_text())


def test_each_head_has_the_numbers_of_its_own_report(lake, made, tmp_path):
    _, rows, _ = made
    shared = {
        "actual_rank_match_delta": "actual_delta",
        "actual_update_predicted_rank_match_delta": "predicted_delta",
        "raw_sgd_rank_delta": "raw_sgd",
        "adam_current_gradient_rank_delta": "adam_current_gradient",
        "adam_historical_momentum_rank_delta": "adam_historical_momentum",
        "weight_decay_rank_delta": "weight_decay",
        "source_rank_match_score": "source_value",
    }
    for head in HEADS:
        printed = run_report(lake, one_head(head), tmp_path / head, chart_formats=())
        alone = pl.read_parquet(printed["metric_parquet"]).sort("source_step")
        mine = rows["step"].filter(pl.col("head_label") == head).sort("source_step")
        for theirs, own in shared.items():
            assert mine[own].to_list() == pytest.approx(alone[theirs].to_list(), rel=1e-12), (head, own)


def test_heads_stand_in_order_of_growth_with_shares_that_add_up(made):
    _, rows, report = made
    heads = rows["head"].sort("position")
    assert sorted(heads["head_label"]) == sorted(HEADS)
    assert heads["sum_actual_delta"].to_list() == sorted(heads["sum_actual_delta"], reverse=True)
    for of in heads.iter_rows(named=True):
        steps = rows["step"].filter(pl.col("head_label") == of["head_label"])
        assert of["sum_actual_delta"] == pytest.approx(steps["actual_delta"].sum(), rel=1e-9)
        left = of["sum_reconstructed_adamw_residual"] / of["sum_predicted_delta"]
        shares = of["momentum_share"] + of["current_gradient_share"] + of["weight_decay_share"]
        assert shares + left == pytest.approx(1, rel=1e-9)
        assert of["raw_sgd_share"] == pytest.approx(steps["raw_sgd"].sum() / steps["predicted_delta"].sum())
    assert heads["head_label"][0] in report["findings"][0]


def test_the_fastest_stretch_is_a_quarter_of_the_window(made):
    _, rows, _ = made
    for of in rows["head"].iter_rows(named=True):
        steps = rows["step"].filter(pl.col("head_label") == of["head_label"]).sort("source_step")
        changes, sources = steps["actual_delta"].to_list(), steps["source_step"].to_list()
        width = len(changes) // 4
        sums = [sum(changes[at : at + width]) for at in range(len(changes) - width + 1)]
        best = max(range(len(sums)), key=sums.__getitem__)
        assert of["fastest_growth"] == pytest.approx(sums[best], rel=1e-9)
        assert (of["fastest_from"], of["fastest_to"]) == (sources[best], sources[best] + width)


def test_parts_add_up_within_a_kind(made):
    _, rows, _ = made
    total = rows["group"].filter(pl.col("group_kind") == "global_all")
    modules = rows["group"].filter(pl.col("group_kind") == "module_block")
    summed = modules.group_by("head_label", "component").agg(pl.col("sum_delta").sum())
    joined = total.join(summed, on=["head_label", "component"])
    assert joined.height == len(HEADS) * 7
    assert joined["sum_delta"].to_list() == pytest.approx(
        joined["sum_delta_right"].to_list(), rel=1e-9, abs=1e-15
    )
    heads = rows["group"].filter(pl.col("group_kind") == "attention_head")
    projections = rows["group"].filter(pl.col("group_kind") == "attention_head_projection")
    assert projections.height == 4 * heads.height
    of_projections = projections.with_columns(group_id=pl.col("group_id").str.extract(r"(L\d+H\d+)"))
    of_projections = of_projections.group_by("head_label", "component", "group_id").agg(
        pl.col("sum_delta").sum()
    )
    of_heads = heads.with_columns(group_id=pl.col("group_id").str.extract(r"(L\d+H\d+)"))
    both = of_heads.join(of_projections, on=["head_label", "component", "group_id"])
    assert both["sum_delta"].to_list() == pytest.approx(
        both["sum_delta_right"].to_list(), rel=1e-9, abs=1e-15
    )


def test_the_page_leads_with_the_head_and_every_chart_is_there(made):
    printed, _, report = made
    assert set(printed["plots"]) == {"growth", "ledger", "terms", "parts"}
    assert report["findings"][0].startswith("**L")
    assert "not a counterfactual" in report["findings"][-1]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"head": ("L9H0",)}, LakebedError, "no head L9H0; run 'r' has layers 0–1, heads 0–1"),
        ({"head": ("2",)}, InvalidOption, "'2' is no head: write it as L2H1"),
        ({"rank": 9}, InvalidOption, "--rank 9 exceeds the width of a head, 8"),
        ({"support_key_role": "nobody"}, LakebedError, "no role 'nobody'; the events of probe 'probe' have"),
        ({"support_key_role": "value_distractors"}, InvalidOption, "are both value_distractors"),
        ({"pair_type": ()}, InvalidOption, "--route-pair-source-type is required"),
        ({"rank": 3}, MissingData, "needs attributions for run 'r' (probe probe, pair_type support_value"),
        ({"steps": "4"}, MissingData, "an update lies between two steps, and --steps 4 leaves 4"),
        (
            {"min_pairs_per_type": 60},
            ReportFailed,
            "Failed to construct the requested minimum causal patch pairs",
        ),
    ],
)
def test_what_is_wrong_is_one_line(lake, tmp_path, changed, error, message):
    with pytest.raises(error) as caught:
        run_report(lake, QKSeparationLedger.parse({**OPTIONS, **changed}), tmp_path / "out", chart_formats=())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_longer_interval_has_no_terms(lake, tmp_path):
    report = QKSeparationLedger.parse({**OPTIONS, "steps": "2,12"})
    extract(lake, RUN, report.needs(), "2,12")
    with pytest.raises(ReportFailed, match="from step 2 to 12 of run 'r' was not recorded as one step"):
        run_report(lake, report, tmp_path / "out", chart_formats=())

"""answer-scalar-residual-diagnosis against logits of plain float64 passes, on a trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.extractors.states import StateReader
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData
from lakebed.queries.answer_scalar_residual_diagnosis import AnswerScalarResidualDiagnosis
from lakebed.queries.pair_selection import TooFewPairs
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from tests import trained_probe_lake as trained
from tests.plain_decoder import PlainDecoder

STEPS = "50:150:50"
SIDES = ("clean", "corrupted")


def asked(**options):
    return AnswerScalarResidualDiagnosis.parse(
        {
            "run": trained.RUN,
            "steps": STEPS,
            "pair_type": ("support_value", "query_key"),
            "max_pairs_per_type": 4,
            "margin_side": SIDES,
            **options,
        }
    )


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("scalars") / "copy.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as opened:
        extract(opened, trained.RUN, asked().needs(), STEPS)
        yield opened


@pytest.fixture(scope="module")
def printed(lake, tmp_path_factory):
    return run_report(lake, asked(), tmp_path_factory.mktemp("out") / "r", chart_formats=["svg"])


@pytest.fixture(scope="module")
def rows(printed):
    return [json.loads(line) for line in Path(printed["interval_pair_rows"]).read_text().splitlines()]


@pytest.fixture(scope="module")
def logits(lake):
    """(step, side, pair id) to float64 logits at the prediction, the answer and the competitors."""
    found = {}
    for side in SIDES:
        probe = "probe" if side == "clean" else "probe.corrupted"
        events = lake.sql(
            f"select p.pair_id, x.tokens, e.prediction_position, e.answer_token, e.competitors from pairs p join events e "
            f"on e.run = p.run and e.probe = '{probe}' and e.event = p.{side}_event join probe_examples x on x.run = e.run "
            "and x.probe = e.probe and x.example = e.example where p.probe = 'probe' and p.pair_id is not null and p.pair_type in "
            "('support_value', 'query_key') qualify row_number() over (partition by p.pair_type order by p.clean_event) <= 4"
        ).fetchall()
        for step in (50, 100, 150):
            decoder = PlainDecoder(StateReader(lake, trained.RUN).read(step).weights, 4)
            for pair, tokens, position, answer, competitors in events:
                found[step, side, pair] = decoder.run(tokens).logits[position], answer, competitors
    return found


def test_every_scalar_at_both_ends_is_read_off_plain_logits(rows, logits):
    assert len(rows) == 2 * 8 * 2
    switched = 0
    for row in rows:
        ends = {}
        for end in ("source", "target"):
            ends[end] = logits[row[f"{end}_step"], row["margin_side"], row["pair_id"]]
        source, answer, competitors = ends["source"]
        target = ends["target"][0]
        w = {end: max(competitors, key=lambda token: of[0][token]) for end, of in ends.items()}
        assert row["answer_target_id"] == answer
        assert row["source_best_wrong_token_id"] == w["source"]
        assert row["competitor_switched"] == (w["source"] != w["target"])
        switched += row["competitor_switched"]
        wanted = {
            "moving_answer_margin": (
                source[answer] - source[w["source"]],
                target[answer] - target[w["target"]],
            ),
            "fixed_source_competitor_margin": [of[answer] - of[w["source"]] for of in (source, target)],
            "fixed_target_competitor_margin": [of[answer] - of[w["target"]] for of in (source, target)],
            "correct_value_logit": (source[answer], target[answer]),
            "source_best_wrong_logit": (source[w["source"]], target[w["source"]]),
            "target_best_wrong_logit": (source[w["target"]], target[w["target"]]),
            "negative_answer_loss": [
                of[answer] - of.max() - np.log(np.exp(of - of.max()).sum()) for of in (source, target)
            ],
        }
        assert row["scalars"].keys() == wanted.keys()
        for name, values in wanted.items():
            held = row["scalars"][name]
            assert [held["source"], held["target"]] == pytest.approx(list(values), abs=5e-5)
            assert held["delta"] == pytest.approx(held["target"] - held["source"], abs=1e-12)
        top = sorted(competitors, key=lambda token: -target[token])[:5]
        assert row["target_top_wrong_token_ids"] == top
        assert row["target_top_wrong_logits"] == pytest.approx([target[token] for token in top], abs=5e-5)
        assert row["target_answer_prediction_id"] == target.argmax()
    assert 0 < switched < len(rows)


def test_the_parts_add_up_to_the_moving_margin_and_a_switch_never_helps(printed, rows):
    table = [json.loads(line) for line in Path(printed["switch_rows"]).read_text().splitlines()]
    assert len(table) == 2 * 2
    for row in table:
        mine = [
            of
            for of in rows
            if (of["source_step"], of["margin_side"]) == (row["source_step"], row["margin_side"])
        ]
        moved = np.mean([of["scalars"]["moving_answer_margin"]["delta"] for of in mine])
        assert row["moving_delta_mean"] == pytest.approx(moved)
        parts = ("correct_logit_delta_mean", "suppressed_competitor_delta_mean", "switch_delta_mean")
        assert sum(row[part] for part in parts) == pytest.approx(moved)
        assert row["switch_delta_mean"] <= 0
        assert row["competitor_switch_fraction"] == np.mean([of["competitor_switched"] for of in mine])


def test_summary_rows_are_means_over_buckets(printed, rows):
    table = [json.loads(line) for line in Path(printed["interval_summary_rows"]).read_text().splitlines()]
    for row in table:
        bucket = {"all": (True, False), "competitor_switch": (True,), "same_competitor": (False,)}[
            row["switch_bucket"]
        ]
        mine = [
            of["scalars"][row["scalar_name"]]["delta"]
            for of in rows
            if (of["source_step"], of["margin_side"]) == (row["source_step"], row["margin_side"])
            and of["competitor_switched"] in bucket
        ]
        assert row["num_pairs"] == len(mine)
        assert row["delta_mean"] == pytest.approx(np.mean(mine))
        assert row["delta_std"] == pytest.approx(np.std(mine), abs=1e-9)
        assert row["delta_positive_fraction"] == np.mean(np.array(mine) > 0)


def test_findings_and_charts(printed):
    text = Path(printed["markdown"]).read_text()
    assert "From step 50 to 150 the mean margin of 8 clean records changed by" in text
    assert set(printed["plots"]) == {"margin_parts", "scalar_trajectory"}


def test_scalars_and_sides_can_be_chosen(lake):
    with Results(lake, asked(scalar=("correct_value_logit",), margin_side=("corrupted",))) as results:
        found = results.rows("SELECT DISTINCT margin_side, scalar_name FROM interval_summary_rows")
        assert found == [{"margin_side": "corrupted", "scalar_name": "correct_value_logit"}]
        assert list(results.rows("FROM interval_pair_rows")[0]["scalars"]) == ["correct_value_logit"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scalar": ("loss",)}, InvalidOption, "--scalar should be 'moving_answer_margin', "),
        ({"top_k_wrong": 0}, InvalidOption, "--top-k-wrong should be greater than 0"),
        ({"steps": "150"}, ReportFailed, "a change lies between two steps, and --steps 150 leaves"),
        ({"min_pairs_per_type": 900, "max_pairs_per_type": 900}, TooFewPairs, "minimum causal patch pairs"),
        (
            {"pair_type": ("recency",)},
            MissingData,
            "needs interventions for run 'r' at step.*lakebed extract --for answer-scalar-residual-diagnosis",
        ),
    ],
)
def test_what_cannot_be_answered_is_one_line(lake, options, error, message):
    with pytest.raises(error, match=message), Results(lake, asked(**options)) as results:
        results.report.check(results)

"""Every row against torch float64 with autograd; the fits by normal equations; and what is refused."""

from statistics import fmean

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.datasets import INTERVENTIONS, READOUTS, Need
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.interventions import ZERO_EACH, intervention_parameters
from lakebed.lake.names import spec_id
from lakebed.queries.arrays.least_squares import Underdetermined, fit_closure
from lakebed.queries.component_options import UnknownComponent
from lakebed.queries.pair_selection import TooFewPairs
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report
from lakebed.queries.scalar_closure import EmptyBucket
from lakebed.queries.scalar_pairs import ScalarMismatch

from tests.trained_probe_lake import RUN, STEPS

from .closure_reference import least_squares
from .output_reference import (
    CLOSE,
    COMPONENTS,
    MOST,
    SCALARS,
    SIDES,
    TYPES,
    World,
    extracted,
    report,
    rewritten,
    written,
)

NAME = "output-route-closure"
BUCKETS = ("all", "same_competitor", "competitor_switch")
CLEAN = intervention_parameters((), pair_type=TYPES, max_pairs_per_type=MOST, components=True)
EACH = intervention_parameters(ZERO_EACH, pair_type=TYPES, max_pairs_per_type=MOST, components=True)


def asked(**options):
    return report(NAME, **options)


@pytest.fixture(scope="module")
def lake_path(probe_lake_path, tmp_path_factory):
    return extracted(probe_lake_path, tmp_path_factory.mktemp("closure"), asked())


@pytest.fixture(scope="module")
def lake(lake_path):
    with Lake.open(lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    return World(lake)


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, asked(), tmp_path_factory.mktemp("report") / "out")


def test_closure_rows_are_the_definition(found, world):
    rows = {
        (
            row["scalar_name"],
            row["switch_bucket"],
            row["source_step"],
            row["pair_id"],
            row["margin_side"],
        ): row
        for row in found[0]["closure_rows"]
    }
    assert len(rows) == len(found[0]["closure_rows"])
    switches = [switched for *_, switched in world.changes("")]
    fitted = {"all", "competitor_switch"} if sum(switches) > len(switches) / 2 else {"all", "same_competitor"}
    assert {bucket for _, bucket, *_ in rows} == fitted, "the smaller one has too few rows"
    expected = 0
    for name in SCALARS:
        for source, target, pair_id, side, switched in world.changes(name):
            ends = [world.measure(name, source, target, pair_id, side, kind) for kind in ("source", "target")]
            for bucket in fitted & {"all", "competitor_switch" if switched else "same_competitor"}:
                row, expected = rows[name, bucket, source, pair_id, side], expected + 1
                pair = world.pairs[pair_id]
                wanted = {
                    "target_step": target,
                    "step_gap": target - source,
                    "interval_pair_id": f"{pair_id}::{side}",
                    "split": pair.split,
                    "pair_type": pair.pair_type,
                    "competitor_switched": switched,
                }
                assert {key: row[key] for key in wanted} == wanted
                assert row["source_scalar"] == pytest.approx(ends[0][0], **CLOSE)
                assert row["target_scalar"] == pytest.approx(ends[1][0], **CLOSE)
                assert row["actual_scalar_delta"] == row["target_scalar"] - row["source_scalar"]
                deltas = {part: ends[1][1][part] - ends[0][1][part] for part in COMPONENTS}
                assert row["component_deltas"] == pytest.approx(deltas, **CLOSE)
                assert list(row["component_deltas"]) == sorted(COMPONENTS)
                residual = row["actual_scalar_delta"] - row["predicted_scalar_delta"]
                assert row["closure_residual"] == pytest.approx(residual, abs=1e-12)
    assert expected == len(rows)


def test_endpoint_rows_hold_each_end_once(found, world):
    rows = found[0]["endpoint_component_rows"]
    assert len(rows) == len(SCALARS) * (len(STEPS) - 1) * MOST * len(TYPES) * len(SIDES) * 2
    for row in rows:
        source, target, kind = row["source_step"], row["target_step"], row["endpoint_kind"]
        value, parts = world.measure(
            row["scalar_name"], source, target, row["pair_id"], row["margin_side"], kind
        )
        assert row["step"] == (source if kind == "source" else target)
        assert row["checkpoint"] == f"step_{row['step']:06d}"
        assert row["scalar_value_recomputed"] == pytest.approx(value, **CLOSE)
        assert row["component_values"] == pytest.approx({part: parts[part] for part in COMPONENTS}, **CLOSE)


@pytest.mark.parametrize("intercept", [False, True])
def test_the_fits_are_least_squares_of_the_rows(lake, tmp_path, intercept):
    kept = ("embedding", "L1H0", "L1MLP")
    rows, content, _ = written(
        lake, asked(component=kept, fit_intercept=intercept, margin_side=("clean",)), tmp_path / "out"
    )
    fits = {}
    for row in rows["closure_rows"]:
        assert set(row["component_deltas"]) == set(kept)
        fits.setdefault((row["scalar_name"], row["switch_bucket"]), []).append(row)
    assert set(fits) == {(name, bucket) for name in SCALARS for bucket in BUCKETS}, "all are large enough"
    coefficients = {
        (row["scalar_name"], row["switch_bucket"], row["component"]): row for row in rows["coefficient_rows"]
    }
    assert len(coefficients) == len(fits) * len(kept)
    summaries = {
        (row["scalar_name"], row["switch_bucket"]): row for row in content["summary"]["scalar_summary_rows"]
    }
    for key, of in fits.items():
        actual = [row["actual_scalar_delta"] for row in of]
        solved, predicted, r_squared = least_squares(
            [row["component_deltas"] for row in of], actual, intercept
        )
        for row, value in zip(of, predicted, strict=True):
            assert row["predicted_scalar_delta"] == pytest.approx(value, rel=1e-6, abs=1e-9)
        summary = summaries[key]
        assert summary["num_observations"] == len(of)
        assert summary["r_squared"] == pytest.approx(r_squared, abs=1e-9)
        assert summary["fit_r_squared"] == pytest.approx(r_squared, abs=1e-9)
        assert summary["mean_actual_delta"] == pytest.approx(fmean(actual), abs=1e-12)
        assert summary["mean_predicted_delta"] == pytest.approx(predicted.mean(), abs=1e-9)
        assert summary["mean_residual"] == pytest.approx(np.mean(actual - predicted), abs=1e-9)
        size = np.abs(actual - predicted).mean()
        assert summary["mean_abs_residual"] == pytest.approx(size, rel=1e-9)
        for part in kept:
            row = coefficients[*key, part]
            mean = fmean(each["component_deltas"][part] for each in of)
            assert row["coefficient"] == pytest.approx(solved[part], rel=1e-6)
            assert row["mean_component_delta"] == pytest.approx(mean, abs=1e-12)
            assert row["mean_contribution"] == pytest.approx(solved[part] * mean, rel=1e-6, abs=1e-12)
            assert row["r_squared"] == pytest.approx(r_squared, abs=1e-9)
            assert row["mean_abs_residual"] == pytest.approx(size, rel=1e-9)
            of_fit = {
                "fit_intercept": intercept,
                "num_observations": len(of),
                "num_parameters": 3 + intercept,
                "matrix_rank": 3 + intercept,
                "rank_deficient": False,
                "run": RUN,
                "probe": "probe",
                "lake_id": lake.id,
            }
            assert {name: row[name] for name in of_fit} == of_fit
    assert len(content["summary"]["top_component_contributions"]) == len(coefficients)
    assert content["summary"]["fits"]["correct_value_logit::all"]["fit_intercept"] is intercept


def test_the_fit_of_the_definitions_check():
    """Definitions 4 §K.1."""
    fit = fit_closure({"a": [1, 0, 2, 1], "b": [0, 1, 1, -1]}, [3, -2, 4, 5])
    assert fit.coefficients == pytest.approx([3, -2])
    assert fit.r_squared == pytest.approx(1)
    with pytest.raises(Underdetermined):
        fit_closure({"a": [1], "b": [0]}, [3])


def test_parts_sum_to_nothing_in_every_run_and_for_every_token(lake):
    """Definitions 4 §K.3, exactly: ⟨h, ∂l/∂h⟩ is the logit without the LayerNorm's bias, times ε / (variance + ε)."""
    extract(lake, RUN, [Need(INTERVENTIONS, EACH)], "0,150")
    rows = lake.sql(
        "SELECT step, event, intervention, sum(answer_dla::DOUBLE) AS answer, sum(log_prob_dla::DOUBLE) AS loss, "
        "max(abs(answer_dla)) AS largest, list(competitor_dla) AS competitors, count(*) AS parts "
        "FROM intervention_components WHERE spec = ? GROUP BY ALL",
        [spec_id(EACH)],
    ).fetchall()
    assert {row[2] for row in rows} == {"clean", *COMPONENTS[1:]}
    assert len(rows) > 100
    for _, _, _, answer, loss, largest, competitors, parts in rows:
        assert parts == len(COMPONENTS) + 2
        assert abs(answer) < 1e-4 * (1 + largest)
        assert abs(loss) < 1e-4 * (1 + largest)
        held = np.array(competitors, float)
        assert np.abs(held.sum(0)).max() < 1e-4 * (1 + np.abs(held).max())
        assert np.abs(held).max() > 1e-3


def test_the_markdown_leads_with_the_finding_and_warns(found):
    _, content, markdown = found
    lead = next(
        row
        for row in content["summary"]["scalar_summary_rows"]
        if row["scalar_name"] == SCALARS[0] and row["switch_bucket"] == "all"
    )
    first = content["findings"][0]
    assert "**Changes of the DLAs of 11 components " in first
    assert "R² = " in first
    assert f"{lead['num_observations']:,} changes of a pair over an interval" in first
    assert "It is a fit, not a cause." in first
    assert markdown.index(first) < markdown.index("## ")
    assert "sum to about 0 in every run, not to the scalar" in markdown
    assert content["switch_buckets"] == list(BUCKETS)
    assert content["pair_construction"]["constructed_counts"] == dict.fromkeys(TYPES, MOST)


def test_pair_rows_are_the_pairs(found, world):
    assert [row["pair_id"] for row in found[0]["pair_rows"]] == list(world.pairs)


def test_charts_are_drawn(lake, tmp_path):
    printed = run_report(lake, asked(), tmp_path / "out", chart_formats=["svg"])
    assert set(printed["plots"]) == {"actual_vs_predicted", "r_squared", "component_contributions"}


def test_another_untouched_run_is_a_mismatch(lake_path, tmp_path):
    def shifted(name, row):
        if name == "intervention_runs" and row["step"] == 100:
            row["answer_logit"] += 0.01

    with Lake.open(rewritten(lake_path, tmp_path, CLEAN, shifted)) as changed:
        options = {"margin_side": ("clean",), "component": ("L1MLP",)}
        with pytest.raises(
            ScalarMismatch, match=r"Scalar recomputation mismatch: .* at step 100 .*is 0\.0001"
        ):
            run_report(changed, asked(**options), tmp_path / "out", chart_formats=[])
        assert not (tmp_path / "out").exists()
        run_report(changed, asked(**options, scalar_value_tolerance=0.02), tmp_path / "out", chart_formats=[])


def test_an_empty_bucket_fails_only_if_it_was_asked_for(lake_path, tmp_path):
    """Every record has one best wrong token for all steps: nobody overtakes."""
    with Lake.open(lake_path) as lake:
        wrong = dict(lake.sql("SELECT event, competitors[1] FROM events WHERE probe = 'probe'").fetchall())

    def same(name, row):
        if name == "intervention_runs":
            row["best_wrong_token"] = wrong[row["event"]]

    options = {"margin_side": ("clean",), "component": ("L1H0", "L1MLP"), "scalar": ("correct_value_logit",)}
    with Lake.open(rewritten(lake_path, tmp_path, CLEAN, same)) as changed:
        _, content, markdown = written(changed, asked(**options), tmp_path / "out")
        assert "Bucket competitor_switch is left out: no rows." in content["warnings"]
        assert "Bucket competitor_switch is left out: no rows." in markdown
        with pytest.raises(
            EmptyBucket, match="bucket competitor_switch has no rows: no pair changes its best"
        ):
            run_report(
                changed,
                asked(**options, switch_bucket=("competitor_switch",)),
                tmp_path / "no",
                chart_formats=[],
            )
    assert not (tmp_path / "no").exists()


def test_a_bucket_that_is_too_small_is_left_out_unless_asked_for(lake, world, tmp_path):
    rows = [switched for *_, switched in world.changes("", ("clean",))]
    buckets = {"competitor_switch": sum(rows), "same_competitor": len(rows) - sum(rows)}
    bucket, count = min(buckets.items(), key=lambda of: of[1])
    assert 0 < count < len(COMPONENTS)
    options = {"margin_side": ("clean",), "scalar": ("correct_value_logit",)}
    closures, content, _ = written(lake, asked(**options), tmp_path / "out")
    said = f"Bucket {bucket} is left out: {count} changes are too few for 11 parameters."
    assert said in content["warnings"]
    assert bucket not in {row["switch_bucket"] for row in closures["closure_rows"]}
    with pytest.raises(
        Underdetermined,
        match=rf"correct_value_logit in bucket {bucket} is underdetermined: {count} observations for 11",
    ):
        run_report(lake, asked(**options, switch_bucket=(bucket,)), tmp_path / "no", chart_formats=[])


def test_too_few_rows_in_all_are_underdetermined(lake, tmp_path):
    options = {
        "steps": "0,50",
        "pair_type": ("query_key",),
        "max_pairs_per_type": 1,
        "margin_side": ("clean",),
    }
    extract(lake, RUN, asked(**options).needs(), "0,50")
    with pytest.raises(
        Underdetermined, match="in bucket all is underdetermined: 1 observations for 11 parameters"
    ):
        run_report(lake, asked(**options), tmp_path / "out", chart_formats=[])


def test_what_it_needs():
    clean, corrupted, *readouts = asked().needs()
    assert clean.parameters["interventions"] == []
    assert clean.parameters["components"] is True
    assert (clean.parameters["record_side"], corrupted.parameters["record_side"]) == SIDES
    assert [(need.dataset, need.parameters["probe"]) for need in readouts] == [
        (READOUTS, "probe"),
        (READOUTS, "probe.corrupted"),
    ]
    assert asked(component=("L1MLP",)).needs() == asked().needs()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_type": None}, "--pair-type is required"),
        ({"pair_type": ("other",)}, "--pair-type should be 'query_key'"),
        ({"scalar": ("loss",)}, "--scalar should be 'moving_answer_margin'"),
        ({"margin_side": ("both",)}, "--margin-side should be 'clean' or 'corrupted'"),
        ({"switch_bucket": ("none",)}, "--switch-bucket should be 'all'"),
        ({"scalar_value_tolerance": -1}, "--scalar-value-tolerance should be greater than or equal to 0"),
        ({"top_k_components": 0}, "--top-k-components should be greater than 0"),
        ({"max_pairs_per_type": 0}, "--max-pairs-per-type should be greater than or equal to 1"),
        ({"min_pairs_per_type": 5}, "--min-pairs-per-type 5 exceeds --max-pairs-per-type 4"),
        ({"endpoint_role": ("source",)}, "no option --endpoint-role; it has --run"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        asked(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "50"}, ReportFailed, "a change lies between two steps"),
        ({"steps": "0,75"}, MissingData, "needs .* Run: lakebed extract --for output-route-closure"),
        ({"component": ("L0H9",)}, UnknownComponent, "no component L0H9; run 'r' has embedding, and in each of layers 0–1 heads 0–3 and an MLP"),
        ({"component": ("L2MLP",)}, UnknownComponent, "no component L2MLP"),
        ({"split": ("train",)}, UnknownName, "probe 'probe' has no split 'train'"),
        ({"probe": "other"}, MissingData, "Probe-set not found: run 'r' has no probe 'other'"),
        ({"max_pairs_per_type": 9999, "min_pairs_per_type": 9999}, TooFewPairs, "requested minimum causal patch pairs"),
    ],
)  # fmt: skip
def test_what_the_lake_lacks_is_named(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run_report(lake, asked(**options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", ["L0N3", "mlp", "L0", "L0.attention_bias"])
def test_labels_of_no_component_are_refused(label):
    with pytest.raises(UnknownComponent, match="write a head as L0H1, an MLP as L0MLP"):
        asked(component=(label,))

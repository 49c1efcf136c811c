"""Every row against float64 runs with a clean state put back; the step at the source, exactly; what is refused, and why."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.scalars import ScalarError
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.component_options import NotAblatable, UnknownComponent
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.rescue import IncompleteRuns
from lakebed.queries.results import Results
from lakebed.queries.run import run_report
from lakebed.queries.scalar_pairs import ScalarMismatch

from tests.stepwise_rescue import World, order, statistics

from . import rescue_lake
from .conftest import assert_same
from .float64_decoder import load_weights
from .rescue_lake import make_lake
from .route_reference import load_pairs, positions

RUN, STEPS = "r", (50, 100, 150)
SCALARS = ("correct_value_logit", "fixed_target_competitor_margin", "negative_answer_loss")
SOURCES = ("L0MLP", "L0H2", "L1H3")
STAGES = (
    "embedding",
    "layer_0_post_attn",
    "layer_0_post_mlp",
    "layer_1_post_attn",
    "layer_1_post_mlp",
    "final_norm",
)
ROLES = ("support_value", "prediction", "all_query_relation")
OPTIONS = {
    "run": RUN,
    "steps": ",".join(map(str, STEPS)),
    "scalar": SCALARS,
    "margin_side": ("corrupted", "clean"),
    "source_component": SOURCES,
    "patch_stage": STAGES,
    "pair_type": ("support_value", "query_key"),
    "max_pairs_per_type": 2,
}
AT_ROLES = {
    "source_component": SOURCES[:2],
    "patch_stage": STAGES[1:5],
    "position_role": ROLES,
    "margin_side": ("clean",),
}
CLOSE = {"rel": 2e-3, "near": 3e-5}
ROW_SETS = ("rescue_rows", "summary_rows", "pair_rows")


def report(**options):
    given = {**OPTIONS, **options}
    return load_report("residual-state-rescue").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def written(lake, asked, out, charts=()):
    printed = run_report(lake, asked, out, chart_formats=charts, overwrite=True)
    rows = {
        name: [json.loads(line) for line in Path(printed[name]).read_text().splitlines()] for name in ROW_SETS
    }
    return (
        rows,
        json.loads(Path(printed["report"]).read_text()),
        Path(printed["markdown"]).read_text(),
        printed,
    )


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("states") / "states.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as opened:
        for options in ({}, AT_ROLES):
            extract(opened, RUN, report(**options).needs(), OPTIONS["steps"])
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    pairs = load_pairs(lake, RUN, "probe", OPTIONS["pair_type"], OPTIONS["max_pairs_per_type"])
    return World(lake, RUN, STEPS, 4, pairs, load_weights)


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, report(), tmp_path_factory.mktemp("out") / "out", charts=("svg",))


@pytest.fixture(scope="module")
def at_roles(lake, tmp_path_factory):
    return written(lake, report(**AT_ROLES), tmp_path_factory.mktemp("out") / "out", charts=("svg",))


def restorations(sources, stages, roles):
    for source in sources:
        for role in roles:
            for stage in stages:

                def make(decoder, tokens, event, source=source, stage=stage, role=role):
                    places = None if role is None else positions(event, role)
                    return decoder.restored_state(tokens, source, stage, places)

                yield source, (stage, role), make


def check_rows(rows, wanted):
    assert len(rows) == len(wanted)
    for row, (key, clean, ablated, patched) in zip(rows, wanted, strict=True):
        stage, role = key.label
        assert_same(
            row,
            {
                "source_step": key.source_step,
                "target_step": key.target_step,
                "endpoint_kind": key.kind,
                "step": key.step,
                "checkpoint": f"step_{key.step:06d}",
                "pair_id": key.pair.pair_id,
                "margin_side": key.side,
                "scalar_name": key.scalar,
                "source_component": key.source,
                "patch_stage": stage,
                "position_role": role,
                "clean_scalar": float(clean),
                "source_ablated_scalar": float(ablated),
                "patched_scalar": float(patched),
                "total_drop": float(clean - ablated),
                "rescue": float(patched - ablated),
                "unrecovered": float(clean - patched),
                "absolute_unrecovered": float(abs(clean - patched)),
            },
            **CLOSE,
        )
        assert row["rescue"] == row["patched_scalar"] - row["source_ablated_scalar"]
        assert row["absolute_unrecovered"] == abs(row["clean_scalar"] - row["patched_scalar"])
        assert row["improved_by_patch"] == (row["absolute_unrecovered"] < abs(row["total_drop"]))


def test_rescue_rows_are_runs_with_a_clean_stream(found, world):
    wanted = world.rows(OPTIONS["margin_side"], SCALARS, list(restorations(SOURCES, STAGES, (None,))))
    check_rows(found[0]["rescue_rows"], list(wanted))


def test_rescue_rows_are_runs_with_a_clean_stream_at_some_positions(at_roles, world):
    patches = list(restorations(AT_ROLES["source_component"], AT_ROLES["patch_stage"], ROLES))
    check_rows(at_roles[0]["rescue_rows"], list(world.rows(("clean",), SCALARS, patches)))
    # Neither all nor nothing: that is what it is for.
    middle = [
        row["mean_rescue_fraction_from_means"]
        for row in at_roles[0]["summary_rows"]
        if row["has_something_to_rescue"] and 0.05 < row["mean_rescue_fraction_from_means"] < 0.95
    ]
    assert middle


def test_rescue_is_a_step_at_the_source(found):
    """Definitions 4 §K.4, to the bit: a row that is clean again is the clean run."""
    for row in found[0]["rescue_rows"]:
        if STAGES.index(row["patch_stage"]) > order(row["source_component"]):
            assert row["patched_scalar"] == row["clean_scalar"]
        else:
            assert row["rescue"] == pytest.approx(0, abs=2e-6)
    for row in found[0]["summary_rows"]:
        if row["has_something_to_rescue"]:
            after = STAGES.index(row["patch_stage"]) > order(row["source_component"])
            assert row["mean_rescue_fraction_from_means"] == pytest.approx(float(after), abs=1e-4)


def test_the_plumbing_is_checked_and_said_to_be_no_finding(found, at_roles):
    _, content, markdown, _ = found
    assert content["warnings"] == []
    assert "Whole clean streams leave at most 0 missing at and after the source" in content["findings"][-1]
    assert content["findings"][-1] in markdown
    assert "a test that patching works, not a finding about the model" in markdown
    assert "at one role's positions alone: **" in at_roles[2]
    assert "Whole clean streams" not in at_roles[2]


def test_summary_rows_are_statistics_of_the_rows(at_roles):
    rows, content, _, _ = at_roles
    keys = ("scalar_name", "endpoint_kind", "source_component", "patch_stage", "position_role")
    groups = {}
    for row in rows["rescue_rows"]:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary = rows["summary_rows"]
    assert len(summary) == len(groups)
    for row in summary:
        assert_same(row, statistics(groups[tuple(row[key] for key in keys)]), rel=1e-9, near=1e-9)
    assert content["summary_rows"] == summary


def test_the_files_and_keys_are_the_contract(found):
    rows, content, _, printed = found
    assert {name: Path(printed[name]).name for name in ROW_SETS} == {
        "rescue_rows": "residual_state_rescue_rows.jsonl",
        "summary_rows": "residual_state_rescue_summary_rows.jsonl",
        "pair_rows": "residual_state_rescue_pairs.jsonl",
    }
    assert {"rescue_fraction", "unrecovered"} <= set(printed["plots"])
    assert {row["pair_id"] for row in rows["pair_rows"]} == {row["pair_id"] for row in rows["rescue_rows"]}
    assert content["pair_types"] == list(OPTIONS["pair_type"])
    assert content["margin_sides"] == ["corrupted", "clean"]


def test_charts_and_tables_hold_no_more_rows_than_asked(lake, tmp_path):
    asked = report(plot_top_k_rows=2, markdown_top_k_rows=3)
    with Results(lake, asked) as results:
        assert results.value('SELECT count(DISTINCT "row") FROM unrecovered_cells') == 2
        assert len(results.rows("FROM top_summary")) == 3


def made_up(**options):
    given = {
        "run": rescue_lake.RUN, "pair_type": ("support_value",), "scalar": ("correct_value_logit",),
        "source_component": ("L0MLP",), "patch_stage": ("layer_0_post_attn", "layer_1_post_attn"),
    }  # fmt: skip
    return load_report("residual-state-rescue").parse({**given, **options})


GONE = "without L0MLP"
BEFORE, AFTER = (f"without L0MLP, clean layer_{layer}_post_attn" for layer in (0, 1))


def test_fractions_from_means_and_per_row(tmp_path):
    """Definitions 4 §K.6: drops 2 and 8, rescues 1 and 2; and a stream that does not come back as it must is warned of."""
    logits = {"clean": [10.0, 10.0], GONE: [8.0, 2.0], BEFORE: [8.0, 2.5], AFTER: [9.0, 4.0]}
    with make_lake(tmp_path / "m.lake", made_up(), logits) as lake:
        rows, content, markdown, _ = written(lake, made_up(), tmp_path / "out")
    after = [row for row in rows["summary_rows"] if row["patch_stage"] == "layer_1_post_attn"]
    assert len(after) == 2
    for row in after:
        assert row["mean_rescue_fraction_from_means"] == pytest.approx(0.3)
        assert row["mean_recovery_fraction_per_row"] == pytest.approx(0.375)
    assert content["warnings"] == [
        "A whole clean stream must give back all or nothing, and it does not: up to 6 is missing at or after the source, up "
        "to 0.5 comes back before it."
    ]
    assert content["warnings"][0] in markdown


@settings(max_examples=6, deadline=None)
@given(st.integers(-20, 20).map(lambda n: n / 8), st.sampled_from([0.0, 1e-6, 0.5, 3.0]))
def test_a_drop_up_to_the_threshold_has_no_fraction(tmp_path_factory, drop, threshold):
    logits = {"clean": [4.0], GONE: [4.0 - drop], BEFORE: [4.0], AFTER: [4.0]}
    path = tmp_path_factory.mktemp("drop") / "m.lake"
    asked = made_up(denominator_threshold=threshold)
    with make_lake(path, asked, logits) as lake, Results(lake, asked) as results:
        for row in results.rows("FROM summary_rows"):
            wanted = 1.0 if abs(drop) > threshold else None
            assert row["mean_rescue_fraction_from_means"] == wanted
            assert row["mean_recovery_fraction_per_row"] == wanted
            assert row["num_recovery_fraction_rows"] == (wanted is not None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_component": None}, InvalidOption, "--source-component is required"),
        ({"patch_stage": None}, InvalidOption, "--patch-stage is required"),
        ({"patch_stage": ()}, InvalidOption, "--patch-stage Tuple should have at least 1 item"),
        ({"source_component": ("embedding",)}, NotAblatable, "--source-component: embedding cannot be zeroed"),
        ({"source_component": ("L0",)}, UnknownComponent, "cannot read component 'L0'"),
        ({"pair_type": None}, InvalidOption, "--pair-type is required"),
        ({"denominator_threshold": -0.1}, InvalidOption, "--denominator-threshold should be greater"),
        ({"scalar_value_tolerance": -0.1}, InvalidOption, "--scalar-value-tolerance should be greater"),
        ({"plot_top_k_rows": 0}, InvalidOption, "--plot-top-k-rows should be greater than 0"),
        ({"markdown_top_k_rows": 0}, InvalidOption, "--markdown-top-k-rows should be greater than 0"),
        ({"endpoint_role": ()}, InvalidOption, "--endpoint-role Tuple should have at least 1 item"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        report(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_component": ("L2MLP",)}, UnknownComponent, "no component L2MLP; run 'r' has embedding, and in each of layers 0–1"),
        ({"patch_stage": ("layer_7_post_mlp",)}, UnknownName, "no stage 'layer_7_post_mlp'; run 'r' has embedding, layer_0_post_attn"),
        ({"position_role": ("elsewhere",)}, UnknownName, "no role 'elsewhere'; the events of probe 'probe' have"),
        ({"position_role": ("support_key",)}, MissingData, "needs interventions .* Run: lakebed extract --for residual-state-rescue .*--position-role support_key"),
        ({"steps": "50"}, ReportFailed, "a change lies between two steps"),
    ],
)  # fmt: skip
def test_what_the_lake_lacks_is_named(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run_report(lake, report(**options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_positions_after_the_prediction_are_refused(lake):
    with pytest.raises(
        ScalarError, match="Intervention positions must be in the causal prefix: role 'value_distractors'"
    ):
        extract(lake, RUN, report(position_role=("value_distractors",)).needs(), OPTIONS["steps"])


def test_runs_of_other_weights_than_the_readouts_are_refused(tmp_path):
    logits = {"clean": [10.0], GONE: [8.0], BEFORE: [8.0], AFTER: [10.0]}
    with (
        make_lake(tmp_path / "m.lake", made_up(), logits, readout_shift=0.5) as lake,
        pytest.raises(ScalarMismatch, match="Scalar recomputation mismatch: correct_value_logit"),
    ):
        run_report(lake, made_up(), tmp_path / "out", chart_formats=[])


def test_no_rows_are_refused(tmp_path):
    with (
        make_lake(tmp_path / "m.lake", made_up(), {"clean": [10.0]}) as lake,
        pytest.raises(IncompleteRuns, match="there are 0 rows of 4"),
    ):
        run_report(lake, made_up(), tmp_path / "out", chart_formats=[])

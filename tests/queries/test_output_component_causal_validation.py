"""Every row against torch float64 with a component's output times 0; the statistics by hand; and what is refused."""

import json
import math
from pathlib import Path
from statistics import correlation, fmean

import polars as pl
import pytest
from lakebed.lake import Lake
from lakebed.lake.datasets import INTERVENTIONS, READOUTS
from lakebed.lake.errors import MissingData
from lakebed.lake.interventions import intervention_parameters
from lakebed.queries.coefficient_rows import CoefficientRows, OtherOrigin
from lakebed.queries.component_options import NotAblatable, UnknownComponent
from lakebed.queries.output_component_causal_validation import NoComponents
from lakebed.queries.report import InvalidOption
from lakebed.queries.run import run_report
from lakebed.queries.scalar_pairs import ScalarMismatch

from tests.trained_probe_lake import STEPS

from .output_reference import (
    CAUSAL,
    CLOSE,
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

NAME = "output-component-causal-validation"
# Not in the order of the forward pass.
COMPONENTS = ("L1MLP", "L0H2", "L1H3")
QUANTITIES = (
    "baseline_scalar",
    "ablated_scalar",
    "causal_effect",
    "dla_contribution",
    "causal_minus_dla",
)


def asked(**options):
    return report(NAME, **{"component": COMPONENTS, **options})


@pytest.fixture(scope="module")
def lake_path(probe_lake_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    return extracted(probe_lake_path, folder, asked(), report("output-route-closure", margin_side=("clean",)))


@pytest.fixture(scope="module")
def lake(lake_path):
    with Lake.open(lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    return World(lake)


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, asked(scalar=SCALARS), tmp_path_factory.mktemp("report") / "out")


def test_validation_rows_are_the_definition(found, world):
    rows = found[0]["validation_rows"]
    expected = [
        (name, source, target, pair_id, side, kind, component)
        for name in SCALARS
        for source, target, pair_id, side, _ in world.changes(name)
        for kind in ("source", "target")
        for component in COMPONENTS
    ]
    keys = (
        "scalar_name",
        "source_step",
        "target_step",
        "pair_id",
        "margin_side",
        "endpoint_kind",
        "component",
    )
    held = {tuple(row[key] for key in keys): row for row in rows}
    assert held.keys() == set(expected)
    assert len(rows) == len(expected)
    for name, source, target, pair_id, side, kind, component in expected:
        row = held[name, source, target, pair_id, side, kind, component]
        baseline, parts = world.measure(name, source, target, pair_id, side, kind)
        ablated, _ = world.measure(name, source, target, pair_id, side, kind, component)
        effect, dla = baseline - ablated, parts[component]
        values = dict(zip(QUANTITIES, (baseline, ablated, effect, dla, effect - dla), strict=True))
        assert {of: row[of] for of in QUANTITIES} == pytest.approx(values, **CLOSE)
        assert row["step"] == (source if kind == "source" else target)
        assert row["checkpoint"] == f"step_{row['step']:06d}"
        assert row["answer_target_id"] == getattr(world.pairs[pair_id], side).answer
        assert row["source_best_wrong_token_id"] == world.wrong(source, pair_id, side)
        assert row["target_best_wrong_token_id"] == world.wrong(target, pair_id, side)
        assert row["causal_effect"] == pytest.approx(
            row["baseline_scalar"] - row["ablated_scalar"], abs=1e-12
        )
        signs = [math.copysign(row[of] != 0, row[of]) for of in ("causal_effect", "dla_contribution")]
        assert row["sign_match"] is (signs[0] == signs[1])


def test_summaries_are_means_and_plain_r_squared(found):
    """R² as definitions 4 §0.6, nothing fitted."""
    groups = {}
    for row in found[0]["validation_rows"]:
        groups.setdefault((row["scalar_name"], row["endpoint_kind"], row["component"]), []).append(row)
    assert len(found[0]["summary_rows"]) == len(groups) == len(SCALARS) * 2 * len(COMPONENTS)
    for row in found[0]["summary_rows"]:
        of = groups[row["scalar_name"], row["endpoint_kind"], row["component"]]
        y, x = ([each[name] for each in of] for name in ("causal_effect", "dla_contribution"))
        mean = fmean(y)
        wanted = {
            "num_observations": len(of),
            **{f"mean_{name}": fmean(each[name] for each in of) for name in QUANTITIES},
            **{f"mean_abs_{name}": fmean(abs(each[name]) for each in of) for name in QUANTITIES[2:]},
            "sign_match_fraction": fmean(each["sign_match"] for each in of),
            "causal_vs_dla_r_squared": 1
            - math.fsum((a - b) ** 2 for a, b in zip(y, x, strict=True))
            / math.fsum((a - mean) ** 2 for a in y),
            "causal_vs_dla_correlation": correlation(y, x),
        }
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_one_end_alone(lake, found, tmp_path):
    rows, _, markdown = written(lake, asked(endpoint_role=("source",)), tmp_path / "out")
    assert {row["endpoint_kind"] for row in rows["validation_rows"]} == {"source"}
    both = {json.dumps(row, sort_keys=True) for row in found[0]["validation_rows"]}
    assert {json.dumps(row, sort_keys=True) for row in rows["validation_rows"]} <= both
    assert "(source ends)" in markdown
    assert {row["scalar_name"] for row in rows["summary_rows"]} == set(CAUSAL)


def test_the_markdown_leads_with_whether_both_agree(found):
    rows, content, markdown = found
    of = [
        row
        for row in rows["validation_rows"]
        if row["scalar_name"] == SCALARS[0] and row["endpoint_kind"] == "target"
    ]
    r_squared = content["agreement"][0]["r_squared"]
    mean = fmean(row["causal_effect"] for row in of)
    assert r_squared == pytest.approx(
        1
        - sum(row["causal_minus_dla"] ** 2 for row in of)
        / sum((row["causal_effect"] - mean) ** 2 for row in of)
    )
    first = content["findings"][0]
    assert first.startswith("**DLA ")
    assert f"R² {r_squared:.3g} without a fit" in first
    assert f"{len(of):,} numbers of 3 components (target ends)" in first
    assert markdown.index(first) < markdown.index("## ")
    assert "sum to about 0 in every run" in markdown
    assert content["components"] == list(COMPONENTS)


def test_charts_are_drawn(lake, tmp_path):
    printed = run_report(lake, asked(), tmp_path / "out", chart_formats=["svg"])
    assert set(printed["plots"]) == {"causal_vs_dla", "top_effects"}
    assert Path(printed["pair_rows"]).name == "output_component_causal_validation_pairs.jsonl"


def test_it_shares_the_untouched_runs_attributions_with_the_closure():
    needs = asked(margin_side=("clean",)).needs()
    assert [need.dataset for need in needs] == [INTERVENTIONS, READOUTS, INTERVENTIONS]
    runs, _, components = needs
    assert [of["name"] for of in runs.parameters["interventions"]] == sorted(COMPONENTS)
    assert runs.parameters["components"] is False
    assert components in report("output-route-closure", margin_side=("clean",)).needs()


@pytest.fixture(scope="module")
def coefficients(lake, tmp_path_factory):
    """Files of coefficients of a closure without the embedding, which has none to zero."""
    out = tmp_path_factory.mktemp("coefficients")
    options = {"component": ("L0H0", "L0H2", "L1H3", "L1MLP"), "margin_side": ("clean",)}
    return run_report(lake, report("output-route-closure", **options), out / "out", chart_formats=[])


@pytest.mark.parametrize("form", ["coefficient_rows", "coefficient_parquet"])
def test_components_come_from_coefficient_rows(lake, coefficients, tmp_path, form):
    path = coefficients[form]
    rows = pl.read_ndjson(coefficients["coefficient_rows"]).to_dicts()
    kept = [row for row in rows if row["scalar_name"] in CAUSAL and row["switch_bucket"] == "all"]
    ranked = sorted(kept, key=lambda row: -abs(row["mean_contribution"]))
    first = list(dict.fromkeys(row["component"] for row in ranked))[:2]
    of = asked(component=None, coefficient_rows=path, top_k_components=2)
    assert list(of.components()) == first
    assert [each["edits"] for each in of.interventions()] == [[{"zero": label}] for label in first]
    assert "--coefficient-rows" in of.arguments()
    assert asked(component=("L0H1",), coefficient_rows="nowhere.jsonl").components() == ("L0H1",)
    one = asked(
        component=None,
        coefficient_rows=path,
        scalar=("negative_answer_loss",),
        coefficient_switch_bucket=("competitor_switch",),
    )
    kept = [
        row
        for row in rows
        if row["scalar_name"] == "negative_answer_loss" and row["switch_bucket"] == "competitor_switch"
    ]
    assert list(one.components()) == [
        row["component"] for row in sorted(kept, key=lambda row: -abs(row["mean_contribution"]))
    ]
    with pytest.raises(
        MissingData, match=r"needs interventions .* Run: lakebed extract --for .*--coefficient-rows"
    ):
        run_report(lake, of, tmp_path / "out", chart_formats=[])


def line(**values):
    row = {"scalar_name": CAUSAL[0], "switch_bucket": "all", "component": "L0H0", "mean_contribution": 1.0}
    return json.dumps({key: value for key, value in {**row, **values}.items() if value is not None}) + "\n"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, CoefficientRows, "no file .*: --coefficient-rows takes output_route_closure_coefficients.jsonl"),
        ("", CoefficientRows, "no coefficient row of .* is left for --scalar .* it has no rows"),
        (line(switch_bucket="same_competitor"), CoefficientRows, "is left for .* it has negative_answer_loss in same_competitor"),
        (line() + "\n", CoefficientRows, "cannot read coefficient rows"),
        (line(component=None), CoefficientRows, "row 1 has no component: this is no coefficient row"),
        ("[1]\n", CoefficientRows, "row 1 has no scalar_name, switch_bucket"),
        (line(mean_contribution="x"), CoefficientRows, "row 1 has mean_contribution 'x'"),
        (line(component="embedding") + line(component="L0H1"), NotAblatable, "has among its first 8: embedding cannot be zeroed.*--component L0H1"),
        (line(component="head"), UnknownComponent, "cannot read component 'head'"),
    ],
)  # fmt: skip
def test_files_that_rank_nothing_are_refused(tmp_path, text, error, message):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        asked(component=None, coefficient_rows=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("origin", [{"run": "other"}, {"probe": "other"}, {"lake_id": "other"}])
def test_coefficients_of_another_run_are_refused(lake, tmp_path, origin):
    path = tmp_path / "rows.jsonl"
    path.write_text(line(**origin))
    with pytest.raises(
        OtherOrigin, match=r"the coefficients of .* are of (run|probe|lake id) other, and this is"
    ):
        run_report(
            lake, asked(component=None, coefficient_rows=str(path)), tmp_path / "out", chart_formats=[]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"component": None}, NoComponents, "name the components to zero, --component L1H1, or a file that ranks them"),
        ({"component": ("L0H0", "embedding")}, NotAblatable, "--component: embedding cannot be zeroed"),
        ({"component": ("L0N1",)}, UnknownComponent, "cannot read component 'L0N1'"),
        ({"endpoint_role": ("both",)}, InvalidOption, "--endpoint-role should be 'source' or 'target'"),
        ({"coefficient_switch_bucket": ("x",)}, InvalidOption, "--coefficient-switch-bucket should be 'all'"),
        ({"top_k_components": 0}, InvalidOption, "--top-k-components should be greater than 0"),
        ({"markdown_top_k_rows": 0}, InvalidOption, "--markdown-top-k-rows should be greater than 0"),
        ({"pair_type": None}, InvalidOption, "--pair-type is required"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        asked(**options)
    assert "\n" not in str(caught.value)


def test_what_the_lake_lacks_is_named(lake, tmp_path):
    with pytest.raises(
        UnknownComponent, match="no component L7H0; run 'r' has embedding, and in each of layers 0–1"
    ):
        run_report(lake, asked(component=("L7H0",)), tmp_path / "out", chart_formats=[])
    with pytest.raises(MissingData, match=r"needs interventions .*lakebed extract --for"):
        run_report(lake, asked(component=("L0H0",)), tmp_path / "out", chart_formats=[])
    assert not (tmp_path / "out").exists()


def test_another_untouched_run_is_a_mismatch(lake_path, tmp_path):
    def shifted(name, row):
        if name == "intervention_runs" and row["step"] == STEPS[-1] and row["intervention"] == "clean":
            row["answer_log_prob"] -= 0.5

    parameters = intervention_parameters(
        asked().interventions(), pair_type=TYPES, max_pairs_per_type=MOST, record_side=SIDES[1]
    )
    with (
        Lake.open(rewritten(lake_path, tmp_path, parameters, shifted)) as changed,
        pytest.raises(
            ScalarMismatch,
            match=r"recomputation mismatch: negative_answer_loss of the corrupted record .* at step 150",
        ),
    ):
        run_report(changed, asked(), tmp_path / "out", chart_formats=[])

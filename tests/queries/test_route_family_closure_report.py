"""Families fitted to the same observations, from the lake and from a file, against normal equations; and what is refused."""

import json
import shutil
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import pytest
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.arrays.least_squares import Underdetermined
from lakebed.queries.closure_rows import (
    ForeignClosureRows,
    IncompleteClosureRow,
    NoClosureRows,
    UnknownRouteLabel,
    UnreadableClosureRows,
)
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.route_closure import accounted
from lakebed.queries.run import run_report

from tests.route_lake import RUN

from .closure_reference import OPTIONS, ROUTES, extracted, least_squares, margin_report

FAMILIES = {"qk": ("query",), "ov": ("value", "all"), "joint": ("query", "all", "value")}
SPECS = tuple(
    f"label={label}," + ",".join(f"route={of}" for of in routes) for label, routes in FAMILIES.items()
)
ROW_SETS = ("closure_rows", "coefficient_rows", "family_summary_rows", "interval_rows")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def report(**options):
    given = {**OPTIONS, "family": SPECS, **options}
    return load_report("route-family-closure-report").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def of_file(path, **options):
    """The report on a file: nothing of the lake's selection is given."""
    return report(**{**dict.fromkeys(OPTIONS), "run": RUN, "route_closure_rows": str(path), **options})


def written(lake, out, asked):
    printed = run_report(lake, asked, out, chart_formats=[], overwrite=True)
    return (
        {name: lines(printed[name]) for name in ROW_SETS},
        json.loads(Path(printed["report"]).read_text()),
        printed,
    )


@pytest.fixture(scope="module")
def lake_path(route_lake_path, tmp_path_factory):
    return extracted(route_lake_path, tmp_path_factory.mktemp("closures"))


@pytest.fixture(scope="module")
def lake(lake_path):
    with Lake.open(lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def margins(lake, tmp_path_factory):
    """What route-to-margin-closure printed."""
    return run_report(lake, margin_report(), tmp_path_factory.mktemp("margins") / "out", chart_formats=[])


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("families") / "out", report())


@pytest.mark.parametrize("intercept", [False, True])
def test_every_family_is_its_own_fit(lake, tmp_path, margins, intercept):
    rows, content, _ = written(lake, tmp_path / "out", report(fit_intercept=intercept))
    observed = lines(margins["closure_rows"])
    actual = [row["actual_margin_delta"] for row in observed]
    at = 0
    for label, routes in FAMILIES.items():
        deltas = [{of: row["route_score_deltas"][of] for of in routes} for row in observed]
        coefficients, predicted, r_squared = least_squares(deltas, actual, intercept)
        held = [row for row in rows["closure_rows"] if row["family_label"] == label]
        assert rows["closure_rows"][at : at + len(held)] == held
        at += len(held)
        ignored = {
            "route_score_deltas",
            "predicted_margin_delta",
            "closure_residual",
            "lake_id",
            "run",
            "probe",
        }
        for row, of, delta, value in zip(held, observed, deltas, predicted, strict=True):
            assert row["family_route_labels"] == sorted(routes)
            assert row["route_score_deltas"] == delta
            assert row["predicted_margin_delta"] == pytest.approx(value, rel=1e-8, abs=1e-10)
            assert row["closure_residual"] == row["actual_margin_delta"] - row["predicted_margin_delta"]
            assert {name: row[name] for name in of if name not in ignored} == {
                name: value for name, value in of.items() if name not in ignored
            }
        mine = [row for row in rows["coefficient_rows"] if row["family_label"] == label]
        assert [row["route_label"] for row in mine] == sorted(routes)
        for row in mine:
            mean = fmean(delta[row["route_label"]] for delta in deltas)
            assert row["coefficient"] == pytest.approx(coefficients[row["route_label"]], rel=1e-7)
            assert row["mean_route_score_delta"] == pytest.approx(mean)
            assert row["mean_contribution"] == pytest.approx(row["coefficient"] * mean)
        (summary,) = (row for row in rows["family_summary_rows"] if row["family_label"] == label)
        assert summary["route_labels"] == sorted(routes)
        assert (summary["num_routes"], summary["num_observations"]) == (len(routes), len(observed))
        assert summary["r_squared"] == pytest.approx(r_squared, rel=1e-9)
        assert summary["fit"]["intercept"] == pytest.approx(coefficients.get(None, 0.0), rel=1e-7)
        assert summary["mean_actual_margin_delta"] == pytest.approx(fmean(actual))
        assert summary["mean_predicted_margin_delta"] == pytest.approx(np.mean(predicted))
        assert summary["mean_residual"] == pytest.approx(
            fmean(row["closure_residual"] for row in held), abs=1e-12
        )
        size = fmean(abs(row["closure_residual"]) for row in held)
        assert summary["mean_abs_residual"] == pytest.approx(size)
        for of in (row for row in rows["interval_rows"] if row["family_label"] == label):
            inside = [row for row in held if row["source_step"] == of["source_step"]]
            y = np.array([row["actual_margin_delta"] for row in inside])
            sse = sum(row["closure_residual"] ** 2 for row in inside)
            assert of["num_observations"] == len(inside)
            assert of["actual_mean"] == pytest.approx(y.mean(), abs=1e-12)
            assert of["predicted_mean"] == pytest.approx(
                fmean(row["predicted_margin_delta"] for row in inside)
            )
            assert of["residual_mean"] == pytest.approx(
                fmean(row["closure_residual"] for row in inside), abs=1e-12
            )
            assert of["abs_residual_mean"] == pytest.approx(
                fmean(abs(row["closure_residual"]) for row in inside)
            )
            assert of["r_squared"] == pytest.approx(1 - sse / ((y - y.mean()) ** 2).sum())
    assert [row["family_label"] for row in content["ranked_by_r_squared"]] == [
        row["family_label"] for row in sorted(rows["family_summary_rows"], key=lambda row: -row["r_squared"])
    ]
    assert [row["family_label"] for row in content["ranked_by_mean_abs_residual"]] == [
        row["family_label"]
        for row in sorted(rows["family_summary_rows"], key=lambda row: row["mean_abs_residual"])
    ]
    assert content["families"] == {label: list(routes) for label, routes in FAMILIES.items()}
    assert content["available_route_labels"] == sorted(ROUTES)


def test_one_family_of_all_routes_is_the_margin_closure(found, margins):
    """Definitions 4 §K.7, to the last bit."""
    mine = [row for row in found[0]["closure_rows"] if row["family_label"] == "joint"]
    for row, of in zip(mine, lines(margins["closure_rows"]), strict=True):
        assert {name: value for name, value in row.items() if not name.startswith("family")} == {
            name: value for name, value in of.items() if name not in ("lake_id", "run", "probe")
        }
    (summary,) = (row for row in found[0]["family_summary_rows"] if row["family_label"] == "joint")
    assert summary["fit"] == json.loads(Path(margins["report"]).read_text())["summary"]["fit"]


@pytest.mark.parametrize("kind", ["closure_rows", "closure_parquet"])
def test_a_file_gives_what_the_lake_gives(lake, tmp_path, found, margins, kind):
    rows, content, printed = written(lake, tmp_path / "out", of_file(margins[kind]))
    assert rows == found[0]
    assert content["ranked_by_r_squared"] == found[1]["ranked_by_r_squared"]
    assert content["findings"] == found[1]["findings"]
    assert content["route_closure_rows_path"] == margins[kind]
    assert pq.read_table(printed["closure_parquet"]).num_rows == len(rows["closure_rows"])


def test_filters_leave_rows_out(lake, tmp_path, margins):
    path = margins["closure_rows"]
    (split,) = {row["split"] for row in lines(path)}
    asked = of_file(
        path, pair_type=("support_value",), target_scalar="answer_margin", record_side="clean", split=(split,)
    )
    rows, _, _ = written(lake, tmp_path / "out", asked)
    kept = [row for row in lines(path) if row["pair_type"] == "support_value"]
    assert len(rows["closure_rows"]) == len(FAMILIES) * len(kept)
    assert {row["pair_id"] for row in rows["closure_rows"]} == {row["pair_id"] for row in kept}
    # The same as asking the lake for these pairs alone.
    direct, _, _ = written(lake, tmp_path / "direct", report(route_pair_type="support_value"))
    assert rows == direct
    for nothing in (
        {"record_side": "corrupted"},
        {"target_scalar": "clean_vs_corrupted_contrast"},
        {"pair_type": ("recency",)},
    ):
        with pytest.raises(
            NoClosureRows, match=f"has {len(lines(path))} rows, and the filters leave none of them"
        ):
            run_report(lake, of_file(path, **nothing), tmp_path / "nothing", chart_formats=[])


def test_findings_compare_nested_families(found):
    findings = found[1]["findings"]
    best = found[1]["ranked_by_r_squared"][0]
    assert best["family_label"] == "joint"
    assert findings[0].startswith(accounted("`joint`, 3 routes,", 1, best["r_squared"], "the margin"))
    assert "It is a fit, not a cause." in findings[0]
    assert {(row["family_label"], row["within"]) for row in found[1]["additions"]} == {
        ("joint", "qk"),
        ("joint", "ov"),
    }
    assert all(row["r_squared_gain"] >= -1e-12 for row in found[1]["additions"])


def test_a_mixture_of_margins_is_warned_of(lake, tmp_path, margins):
    other = run_report(lake, margin_report(margin_side="corrupted"), tmp_path / "other", chart_formats=[])
    both = tmp_path / "both.jsonl"
    both.write_text(Path(margins["closure_rows"]).read_text() + Path(other["closure_rows"]).read_text())
    _, content, _ = written(lake, tmp_path / "out", of_file(both))
    assert content["warnings"][0].startswith(
        "The rows mix answer_margin of the clean record and answer_margin of the corrupted record"
    )
    rows, content, _ = written(lake, tmp_path / "clean", of_file(both, record_side="clean"))
    assert not [line for line in content["warnings"] if "mix" in line]
    assert len(rows["closure_rows"]) == len(FAMILIES) * len(lines(margins["closure_rows"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": None}, "--family is required"),
        ({"family": ("route=query",)}, "it has 0 labels; it takes one label="),
        ({"family": ("label=a,label=b,route=query",)}, "it has 2 labels"),
        ({"family": ("label=a",)}, "it has no route="),
        ({"family": ("label=a,route=",)}, "route has no value"),
        ({"family": ("label=a,colour=red",)}, "'colour=red' is no label=… and no route="),
        ({"family": ("label=a,route=query,route=query",)}, "route 'query' stands twice"),
        ({"family": ("label=a,route=query", "label=a,route=all")}, "label 'a' stands for two families"),
        ({"route": None}, "--route-closure-rows or --route is required, and not both"),
        ({"route_closure_rows": "rows.jsonl"}, "--route-closure-rows or --route is required, and not both"),
        ({"pair_type": None}, "--pair-type is required with --route"),
        ({"route_pair_type": "recency"}, "--route-pair-type recency is none of --pair-type"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        report(**options)
    assert "\n" not in str(caught.value)


def test_a_file_has_its_own_steps_and_pairs():
    with pytest.raises(
        InvalidOption, match="--steps, --max-pairs-per-type: rows of --route-closure-rows have their own"
    ):
        of_file("rows.jsonl", steps="1,2", max_pairs_per_type=3)


def changed(row, **changes):
    return json.dumps({name: value for name, value in {**row, **changes}.items() if value is not ...})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda row: "", NoClosureRows, "is empty"),
        (lambda row: f"{changed(row)}\n\n{changed(row)}\n", UnreadableClosureRows, "line 2: blank"),
        (lambda row: "[1]", UnreadableClosureRows, "line 1: no JSON object"),
        (lambda row: "{", UnreadableClosureRows, "line 1: no JSON"),
        (lambda row: changed(row, actual_margin_delta=...), IncompleteClosureRow, "row 1: no 'actual_margin_delta'; the row has"),
        (lambda row: changed(row, route_score_deltas=...), IncompleteClosureRow, "row 1: no 'route_score_deltas'"),
        (lambda row: changed(row, route_score_deltas={}), IncompleteClosureRow, "'route_score_deltas' is no object of numbers"),
        (lambda row: changed(row, route_score_deltas={"all": "x"}), IncompleteClosureRow, "'all' is no finite number: 'x'"),
        (lambda row: changed(row, actual_margin_delta=float("nan")), IncompleteClosureRow, "'actual_margin_delta' is no finite"),
        (lambda row: changed(row, run=...), IncompleteClosureRow, "no 'run'; write the rows with lakebed query route-to-margin-closure"),
        (lambda row: changed(row, run="other"), ForeignClosureRows, "row 1: it is of run 'other', this is 'r': a fit takes rows of one run"),
        (lambda row: changed(row, probe="other"), ForeignClosureRows, "it is of probe 'other', this is 'probe'"),
        (lambda row: changed(row, lake_id="other"), ForeignClosureRows, "it is of lake 'other', this is"),
    ],
)  # fmt: skip
def test_files_that_are_no_closure_rows_of_this_run_are_refused(
    lake, tmp_path, margins, change, error, message
):
    path = tmp_path / "rows.jsonl"
    path.write_text(change(lines(margins["closure_rows"])[0]))
    with pytest.raises(error, match=message) as caught:
        run_report(lake, of_file(path), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet", "text.parquet"])
def test_files_that_cannot_be_read_are_refused(lake, tmp_path, name):
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(UnreadableClosureRows, match=f"{name} cannot be read") as caught:
        run_report(lake, of_file(tmp_path / name), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"family": ("label=a,route=other",)}, UnknownRouteLabel, "family 'a' has a route 'other'; there are all, query, value"),
        ({"probe": "other"}, MissingData, "Probe-set not found"),
        ({"split": ("train",)}, UnknownName, "has no split 'train'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(lake, tmp_path, margins, options, error, message):
    for asked in (report(**options), of_file(margins["closure_rows"], **options)):
        with pytest.raises(error, match=message) as caught:
            run_report(lake, asked, tmp_path / "out", chart_formats=[])
        assert "\n" not in str(caught.value)


def test_rows_that_lack_a_route_and_too_few_rows_are_refused(lake, tmp_path, margins):
    path = tmp_path / "rows.jsonl"
    rows = lines(margins["closure_rows"])[:2]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        Underdetermined, match="family 'joint' is underdetermined: 2 observations for 3 parameters"
    ):
        run_report(lake, of_file(path), tmp_path / "out", chart_formats=[])
    del rows[1]["route_score_deltas"]["all"]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(Exception, match="observation 1 has 0 values of 'all'; in 1 of 2 observations"):
        run_report(lake, of_file(path), tmp_path / "out", chart_formats=[])


def test_rows_of_another_lake_are_refused(lake_path, tmp_path, margins):
    """A run of the same name, trained elsewhere."""
    other = tmp_path / "other.lake"
    shutil.copytree(lake_path, other)
    about = json.loads((other / "lakebed.json").read_text())
    about["id" if "id" in about else "lake_id"] = "0" * 32
    (other / "lakebed.json").write_text(json.dumps(about))
    with Lake.open(other) as opened, pytest.raises(ForeignClosureRows, match="it is of lake "):
        run_report(opened, of_file(margins["closure_rows"]), tmp_path / "out", chart_formats=[])

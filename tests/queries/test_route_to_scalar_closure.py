"""Scalars of the answer and their fits against float64 and normal equations; closures of a file, and what is refused."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.datasets import INTERVENTIONS, SCALAR_CHANGES
from lakebed.lake.errors import MissingData
from lakebed.queries.arrays.least_squares import Underdetermined
from lakebed.queries.closure_rows import (
    ForeignClosureRows,
    IncompleteClosureRow,
    NoClosureRows,
    UnknownRouteLabel,
)
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.route_to_scalar_closure import DisagreeingDuplicates, NoClosureOfPair
from lakebed.queries.run import run_report
from lakebed.queries.scalar_closure import EmptyBucket

from tests.route_lake import RUN

from .closure_reference import (
    OPTIONS,
    ROUTES,
    SPECS,
    STEPS,
    World,
    extracted,
    least_squares,
    margin_report,
)
from .float64_decoder import best_wrong

SCALARS = (
    "moving_answer_margin",
    "fixed_source_competitor_margin",
    "fixed_target_competitor_margin",
    "correct_value_logit",
    "source_best_wrong_logit",
    "target_best_wrong_logit",
    "negative_answer_loss",
)
BUCKETS = ("all", "same_competitor", "competitor_switch")
GIVEN = {name: value for name, value in OPTIONS.items() if name != "route_pair_type"}
ROW_SETS = ("closure_rows", "coefficient_rows")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def report(**options):
    given = {**GIVEN, **options}
    return load_report("route-to-scalar-closure").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def of_file(path, **options):
    return report(route=None, route_closure_rows=str(path), **options)


def written(lake, out, asked):
    printed = run_report(lake, asked, out, chart_formats=[], overwrite=True)
    rows = {name: lines(printed[name]) for name in ROW_SETS}
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


@pytest.fixture(scope="module")
def lake(route_lake_path, tmp_path_factory):
    path = extracted(route_lake_path, tmp_path_factory.mktemp("closures"))
    with Lake.open(path) as opened:
        extract(opened, RUN, report(margin_side=("clean", "corrupted")).needs(), OPTIONS["steps"])
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    return World(lake)


@pytest.fixture(scope="module")
def margins(lake, tmp_path_factory):
    return run_report(lake, margin_report(), tmp_path_factory.mktemp("margins") / "out", chart_formats=[])


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("scalars") / "out", report())


def scalars(world, pair, side, source, target):
    """(at the source, at the target) by scalar, and whether the best wrong token changed: definitions 4 §0.10."""
    event = getattr(pair, side)
    ends = [world.decoders[step].forward(event.tokens).logits[event.prediction] for step in (source, target)]
    wrong = [best_wrong(logits, event.answer, event.competitors) for logits in ends]
    y, (s, t) = event.answer, wrong
    at = {
        "moving_answer_margin": [logits[y] - logits[w] for logits, w in zip(ends, wrong, strict=True)],
        "fixed_source_competitor_margin": [logits[y] - logits[s] for logits in ends],
        "fixed_target_competitor_margin": [logits[y] - logits[t] for logits in ends],
        "correct_value_logit": [logits[y] for logits in ends],
        "source_best_wrong_logit": [logits[s] for logits in ends],
        "target_best_wrong_logit": [logits[t] for logits in ends],
        "negative_answer_loss": [
            logits[y] - logits.max() - np.log(np.exp(logits - logits.max()).sum()) for logits in ends
        ],
    }
    return at, s != t


def in_bucket(bucket, switched):
    return bucket == "all" or switched == (bucket == "competitor_switch")


def test_closure_rows_are_the_definition(found, world):
    rows = {
        (row["scalar_name"], row["switch_bucket"], row["source_step"], row["pair_id"]): row
        for row in found[0]["closure_rows"]
    }
    assert len(rows) == len(found[0]["closure_rows"])
    assert {key[0] for key in rows} == set(SCALARS)
    wanted = 0
    for source, target in pairwise(STEPS):
        for pair in world.pairs:
            values, switched = scalars(world, pair, "clean", source, target)
            for scalar, (before, after) in values.items():
                for bucket in BUCKETS:
                    row = rows.get((scalar, bucket, source, pair.pair_id))
                    assert (row is not None) == in_bucket(bucket, switched)
                    if row is None:
                        continue
                    wanted += 1
                    assert row["source_scalar"] == pytest.approx(before, rel=1e-4, abs=1e-5)
                    assert row["target_scalar"] == pytest.approx(after, rel=1e-4, abs=1e-5)
                    assert row["actual_scalar_delta"] == row["target_scalar"] - row["source_scalar"]
                    assert (
                        row["closure_residual"] == row["actual_scalar_delta"] - row["predicted_scalar_delta"]
                    )
                    assert row["competitor_switched"] == switched
                    named = (
                        row["target_step"],
                        row["step_gap"],
                        row["split"],
                        row["pair_type"],
                        row["margin_side"],
                    )
                    assert named == (target, target - source, pair.split, pair.pair_type, "clean")
                    assert row["interval_pair_id"] == f"{pair.pair_id}::clean"
    assert wanted == len(rows)


@pytest.mark.parametrize(
    "options",
    [{}, {"fit_intercept": True}, {"margin_side": ("corrupted", "clean")}, {"route_label": ("query",)}],
    ids=["default", "intercept", "both records", "one route"],
)
def test_every_fit_is_its_own(lake, tmp_path, margins, options):
    rows, content, _ = written(lake, tmp_path / "out", report(**options))
    routes = options.get("route_label", tuple(ROUTES))
    deltas = {
        (row["source_step"], row["pair_id"]): {label: row["route_score_deltas"][label] for label in routes}
        for row in lines(margins["closure_rows"])
    }
    sides = options.get("margin_side", ("clean",))
    fits = {
        (row["scalar_name"], row["switch_bucket"]): row
        for row in content["summary"]["scalar_bucket_summaries"]
    }
    assert content["summary"]["num_fits"] == len(fits) == len(SCALARS) * len(BUCKETS)
    assert content["summary"]["num_observations"] == len(rows["closure_rows"])
    for (scalar, bucket), of in fits.items():
        held = [
            row
            for row in rows["closure_rows"]
            if (row["scalar_name"], row["switch_bucket"]) == (scalar, bucket)
        ]
        assert {row["margin_side"] for row in held} == set(sides)
        for row in held:
            assert row["route_score_deltas"] == deltas[row["source_step"], row["pair_id"]]
        actual = [row["actual_scalar_delta"] for row in held]
        coefficients, predicted, r_squared = least_squares(
            [row["route_score_deltas"] for row in held], actual, options.get("fit_intercept", False)
        )
        assert [row["predicted_scalar_delta"] for row in held] == pytest.approx(
            list(predicted), rel=1e-7, abs=1e-9
        )
        assert of["r_squared"] == pytest.approx(r_squared, rel=1e-7, abs=1e-9)
        assert of["fit"]["r_squared"] == of["r_squared"]
        assert of["num_observations"] == len(held)
        assert of["competitor_switch_fraction"] == pytest.approx(
            fmean(row["competitor_switched"] for row in held)
        )
        means = {
            "mean_actual_scalar_delta": fmean(actual),
            "mean_predicted_scalar_delta": fmean(predicted),
            "mean_residual": fmean(row["closure_residual"] for row in held),
            "mean_abs_residual": fmean(abs(row["closure_residual"]) for row in held),
        }
        assert {name: of[name] for name in means} == pytest.approx(means, rel=1e-9, abs=1e-10)
        for row in rows["coefficient_rows"]:
            if (row["scalar_name"], row["switch_bucket"]) == (scalar, bucket):
                mean = fmean(each["route_score_deltas"][row["route_label"]] for each in held)
                assert row["coefficient"] == pytest.approx(
                    coefficients[row["route_label"]], rel=1e-6, abs=1e-9
                )
                assert row["mean_route_score_delta"] == pytest.approx(mean, abs=1e-12)
                assert row["mean_contribution"] == pytest.approx(row["coefficient"] * mean, abs=1e-12)
    assert len(rows["coefficient_rows"]) == len(fits) * len(routes)
    ranked = [row["r_squared"] for row in content["summary"]["scalar_bucket_summaries"]]
    assert ranked == sorted(ranked, reverse=True)
    sizes = [row["mean_abs_residual"] for row in content["summary"]["ranked_by_mean_abs_residual"]]
    assert sizes == sorted(sizes)


def test_the_moving_margin_over_all_pairs_is_the_margin_closure(found, margins):
    summary = json.loads(Path(margins["report"]).read_text())["summary"]
    (mine,) = (
        row
        for row in found[1]["summary"]["scalar_bucket_summaries"]
        if (row["scalar_name"], row["switch_bucket"]) == ("moving_answer_margin", "all")
    )
    assert mine["fit"]["coefficients"] == pytest.approx(summary["fit"]["coefficients"], rel=1e-3)
    assert mine["r_squared"] == pytest.approx(summary["r_squared"], abs=1e-4)


def test_margins_are_differences_of_their_logits(found):
    """Least squares is linear in the response, and pairs that keep their competitor have one margin."""
    by = {
        (row["scalar_name"], row["switch_bucket"], row["route_label"]): row["coefficient"]
        for row in found[0]["coefficient_rows"]
    }
    for bucket in BUCKETS:
        for label in ROUTES:
            answer = by["correct_value_logit", bucket, label]
            for end in ("source", "target"):
                margin = answer - by[f"{end}_best_wrong_logit", bucket, label]
                assert by[f"fixed_{end}_competitor_margin", bucket, label] == pytest.approx(
                    margin, rel=1e-6, abs=1e-8
                )
            if bucket == "same_competitor":
                moving = by["moving_answer_margin", bucket, label]
                assert by["fixed_source_competitor_margin", bucket, label] == pytest.approx(moving)


@pytest.mark.parametrize("kind", ["closure_rows", "closure_parquet"])
def test_a_file_gives_what_the_lake_gives(lake, tmp_path, found, margins, kind):
    rows, content, _ = written(lake, tmp_path / "out", of_file(margins[kind]))
    assert rows == found[0]
    assert content["findings"] == found[1]["findings"]


def test_the_record_of_closure_rows_does_not_matter(lake, tmp_path, found, margins):
    """Rows of either record, and of both, which say the same of the routes."""
    other = run_report(lake, margin_report(margin_side="corrupted"), tmp_path / "other", chart_formats=[])
    both = tmp_path / "both.jsonl"
    both.write_text(Path(margins["closure_rows"]).read_text() + Path(other["closure_rows"]).read_text())
    for path in (other["closure_rows"], both):
        assert written(lake, tmp_path / "out", of_file(path))[0] == found[0]


def test_duplicates_that_disagree_are_refused(lake, tmp_path, margins):
    rows = lines(margins["closure_rows"])
    path = tmp_path / "rows.jsonl"
    again = json.loads(json.dumps(rows[0]))
    again["route_score_deltas"]["query"] += 1e-5
    path.write_text("\n".join(map(json.dumps, [*rows, again])))
    with pytest.raises(
        DisagreeingDuplicates,
        match=r"from step 34 to 36 disagree: 'query' changed by .*--duplicate-tolerance is 1e-06",
    ):
        run_report(lake, of_file(path), tmp_path / "out", chart_formats=[])
    written(lake, tmp_path / "near", of_file(path, duplicate_tolerance=1e-4))
    del again["route_score_deltas"]["query"]
    path.write_text("\n".join(map(json.dumps, [*rows, again])))
    with pytest.raises(
        DisagreeingDuplicates, match="from step 34 to 36 have other routes: all, query, value and all, value"
    ):
        run_report(lake, of_file(path), tmp_path / "out", chart_formats=[])


def test_it_names_what_it_needs():
    needs = report(margin_side=("clean", "corrupted")).needs()
    assert sorted(need.dataset for need in needs) == [INTERVENTIONS] * 2 + [SCALAR_CHANGES] * len(ROUTES)
    assert [need.dataset for need in of_file("rows.jsonl").needs()] == [INTERVENTIONS]
    # The rows that route-to-margin-closure reads.
    margin = [need.parameters for need in margin_report().needs() if need.dataset == SCALAR_CHANGES]
    assert [need.parameters for need in needs if need.dataset == SCALAR_CHANGES] == margin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scalar": ("loss",)}, "--scalar should be 'moving_answer_margin', "),
        ({"switch_bucket": ("none",)}, "--switch-bucket should be 'all', 'same_competitor' or 'competitor_switch'"),
        ({"margin_side": ("both",)}, "--margin-side should be 'clean' or 'corrupted'"),
        ({"pair_type": None}, "--pair-type is required"),
        ({"route": None}, "--route-closure-rows or --route is required, and not both"),
        ({"route_closure_rows": "rows.jsonl"}, "--route-closure-rows or --route is required, and not both"),
        ({"duplicate_tolerance": -1}, "--duplicate-tolerance should be greater than or equal to 0"),
        ({"route": ("label=a",)}, "key 'stage' is missing"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        report(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda rows: [], {}, NoClosureRows, "is empty"),
        (lambda rows: rows[1:], {}, NoClosureOfPair, "1 pairs over an interval have no closure row, the first is .* from step 34 to 36"),
        (lambda rows: [{**rows[0], "route_score_deltas": None}, *rows[1:]], {}, IncompleteClosureRow, "no 'route_score_deltas'"),
        (lambda rows: [{**row, "run": "other"} for row in rows], {}, ForeignClosureRows, "it is of run 'other', this is 'r'"),
        (lambda rows: rows, {"route_label": ("other",)}, UnknownRouteLabel, "--route-label has a route 'other'; there are all, query, value"),
        (lambda rows: rows, {"steps": "34,37"}, NoClosureOfPair, "from step 34 to 37: name the --steps"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(lake, tmp_path, margins, change, options, error, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, change(lines(margins["closure_rows"])))))
    with pytest.raises(error, match=message) as caught:
        run_report(lake, of_file(path, **options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_buckets_that_are_too_small(lake, tmp_path, world):
    """Left out where nobody asked for them, refused where somebody did."""
    steps = "36,37"
    few = {"steps": steps, "max_pairs_per_type": 1, "route": SPECS[:2]}
    extract(lake, RUN, report(**few).needs(), steps)
    switched = [
        scalars(world, pair, "clean", 36, 37)[1]
        for kind in few_types()
        for pair in [next(of for of in world.pairs if of.pair_type == kind)]
    ]
    counts = {"same_competitor": switched.count(False), "competitor_switch": switched.count(True)}
    rows, content, _ = written(lake, tmp_path / "out", report(**few))
    held = {row["switch_bucket"] for row in rows["closure_rows"]}
    assert held == {"all", *(bucket for bucket, count in counts.items() if count >= 2)}
    left = [line for line in content["warnings"] if "is left out" in line]
    assert len(left) == 3 - len(held)
    for bucket, count in counts.items():
        if count < 2:
            error, message = (
                (EmptyBucket, f"bucket {bucket} has no rows")
                if count == 0
                else (
                    Underdetermined,
                    f"in bucket {bucket} is underdetermined: 1 observations for 2 parameters",
                )
            )
            with pytest.raises(error, match=message):
                run_report(lake, report(**few, switch_bucket=(bucket,)), tmp_path / "x", chart_formats=[])


def few_types():
    return OPTIONS["pair_type"]


def test_what_was_not_extracted_is_named(lake, tmp_path):
    with pytest.raises(
        MissingData, match=r"needs scalar_changes .* Run: lakebed extract --for route-to-scalar-closure"
    ):
        run_report(lake, report(steps="34,37"), tmp_path / "out", chart_formats=[])

"""Every row against float64: route scores, margins, the fit over all of them by normal equations; and what is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from lakebed import LakebedError
from lakebed.extractors.plan import extract
from lakebed.lake import Lake, Unit
from lakebed.lake.datasets import READOUTS, SCALAR_CHANGES
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.names import spec_id
from lakebed.queries.arrays.least_squares import Underdetermined
from lakebed.queries.pair_selection import TooFewPairs
from lakebed.queries.report import InvalidOption
from lakebed.queries.route_closure import PairsChanged, accounted, doubtful
from lakebed.queries.run import run_report

from tests.route_lake import RUN

from .closure_reference import (
    MOST,
    ROUTES,
    SPECS,
    STEPS,
    TYPES,
    World,
    extracted,
    least_squares,
    margin_report,
)
from .conftest import assert_same

# float32 passes in the lake, float64 here.
CLOSE = {"rel": 2e-3, "near": 1e-5}
ROW_SETS = ("closure_rows", "margin_rows", "route_rows", "coefficient_rows", "pair_rows")


@pytest.fixture(scope="module")
def lake_path(route_lake_path, tmp_path_factory):
    return extracted(route_lake_path, tmp_path_factory.mktemp("closures"))


@pytest.fixture(scope="module")
def lake(lake_path):
    with Lake.open(lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    return World(lake)


def written(lake, out, **options):
    printed = run_report(lake, margin_report(**options), out, chart_formats=[], overwrite=True)
    rows = {
        name: [json.loads(line) for line in Path(printed[name]).read_text().splitlines()] for name in ROW_SETS
    }
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("report") / "out")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fit_intercept": True},
        {"margin_side": "corrupted", "target_scalar": "clean_vs_corrupted_contrast", "fit_intercept": True},
        {"route_pair_type": "support_value"},
    ],
    ids=["answer margin", "intercept", "contrast of the corrupted record", "one type"],
)
def test_closure_rows_and_coefficients_are_the_definition(lake, world, tmp_path, options):
    rows, content, _ = written(lake, tmp_path / "out", **options)
    scalar, side = options.get("target_scalar", "answer_margin"), options.get("margin_side", "clean")
    kinds = TYPES if options.get("route_pair_type", "__all__") == "__all__" else (options["route_pair_type"],)
    wanted = world.observations(scalar, side, kinds)
    assert len(rows["closure_rows"]) == len(wanted) == (len(STEPS) - 1) * MOST * len(kinds)
    for row, (source, target, pair, before, after, deltas) in zip(rows["closure_rows"], wanted, strict=True):
        assert_same(
            row,
            {
                "source_step": source,
                "target_step": target,
                "step_gap": target - source,
                "source_checkpoint": f"step_{source:06d}",
                "target_checkpoint": f"step_{target:06d}",
                "pair_id": pair.pair_id,
                "split": pair.split,
                "pair_type": pair.pair_type,
                "record_side": side,
                "target_scalar": scalar,
                "source_margin": before,
                "target_margin": after,
                "actual_margin_delta": after - before,
                "run": RUN,
                "probe": "probe",
                "lake_id": lake.id,
            },
            **CLOSE,
        )
        assert list(row["route_score_deltas"]) == sorted(ROUTES)
        assert row["route_score_deltas"] == pytest.approx(deltas, rel=2e-3, abs=1e-5)
    # The fit of the rows as they are written: to the last digit, by other arithmetic.
    intercept = options.get("fit_intercept", False)
    coefficients, predicted, r_squared = least_squares(
        [row["route_score_deltas"] for row in rows["closure_rows"]],
        [row["actual_margin_delta"] for row in rows["closure_rows"]],
        intercept,
    )
    for row, value in zip(rows["closure_rows"], predicted, strict=True):
        assert row["predicted_margin_delta"] == pytest.approx(value, rel=1e-9, abs=1e-9)
        assert row["closure_residual"] == row["actual_margin_delta"] - row["predicted_margin_delta"]
    assert [row["route_label"] for row in rows["coefficient_rows"]] == sorted(ROUTES)
    for row in rows["coefficient_rows"]:
        label, of = row["route_label"], ROUTES[row["route_label"]]
        mean = fmean(each["route_score_deltas"][label] for each in rows["closure_rows"])
        assert row["coefficient"] == pytest.approx(coefficients[label], rel=1e-7)
        assert row["mean_route_score_delta"] == pytest.approx(mean)
        assert row["mean_contribution"] == pytest.approx(coefficients[label] * mean, rel=1e-7)
        named = {"stage": of["stage"], "subspace_name": of["subspace"], "position_role": of["position_role"]}
        assert_same(row, {**named, **{name: of.get(name) for name in ("rank", "head_layer", "head")}})
    summary = content["summary"]
    assert summary["r_squared"] == pytest.approx(r_squared, rel=1e-9)
    assert summary["fit"]["intercept"] == pytest.approx(coefficients.get(None, 0.0), rel=1e-7)
    # And close to the fit of what float64 measures.
    _, _, exact = least_squares([of[5] for of in wanted], [of[4] - of[3] for of in wanted], intercept)
    assert summary["r_squared"] == pytest.approx(exact, abs=2e-3)


def test_margin_rows_are_what_the_model_answers(found, world):
    rows = iter(found[0]["margin_rows"])
    for step in STEPS:
        for pair in world.pairs:
            row = next(rows)
            assert_same(
                row,
                {
                    "step": step,
                    "checkpoint": f"step_{step:06d}",
                    "pair_id": pair.pair_id,
                    "split": pair.split,
                    "pair_type": pair.pair_type,
                    "record_side": "clean",
                    "target_scalar": "answer_margin",
                    "source_sample_id": pair.source_sample_id,
                    "source_query_index": pair.source_query_index,
                    "clean_transfer_token": pair.clean_transfer_token,
                    "corrupted_transfer_token": pair.corrupted_transfer_token,
                    **world.margin(step, pair, "clean"),
                },
                **CLOSE,
            )
            assert row["value"] == row["answer_margin"]
    assert next(rows, None) is None


def test_route_rows_tell_the_two_bases_of_an_inner_step_apart(found, world):
    rows = iter(found[0]["route_rows"])
    for source, target in pairwise(STEPS):
        for kind, step in (("source", source), ("target", target)):
            for label in ROUTES:
                for pair in world.pairs:
                    row = next(rows)
                    score, margins = world.score(label, step, source, pair)
                    assert_same(
                        row,
                        {
                            "step": step,
                            "checkpoint": f"step_{step:06d}",
                            "route_label": label,
                            "source_step": source,
                            "target_step": target,
                            "endpoint_kind": kind,
                            "basis_step": source,
                            "pair_id": pair.pair_id,
                            "pair_type": pair.pair_type,
                            "split": pair.split,
                            "route_score": score,
                            **{f"transfer_margin_{run}": value for run, value in margins.items()},
                        },
                        **CLOSE,
                    )
    assert next(rows, None) is None


def test_the_summary_says_what_the_rows_do(found):
    rows, content, markdown = found
    summary, held = content["summary"], rows["closure_rows"]
    assert summary["num_observations"] == len(held)
    assert summary["num_intervals"] == len(STEPS) - 1
    assert summary["route_labels"] == summary["fit"]["route_labels"] == sorted(ROUTES)
    means = {
        "actual_margin_delta_mean": "actual_margin_delta",
        "predicted_margin_delta_mean": "predicted_margin_delta",
        "closure_residual_mean": "closure_residual",
    }
    for name, column in means.items():
        assert summary[name] == pytest.approx(fmean(row[column] for row in held), abs=1e-12)
    size = fmean(abs(row["closure_residual"]) for row in held)
    assert summary["closure_abs_residual_mean"] == pytest.approx(size)
    for of, ends in zip(summary["interval_rows"], pairwise(STEPS), strict=True):
        inside = [row for row in held if (row["source_step"], row["target_step"]) == ends]
        assert (of["source_step"], of["target_step"]) == ends
        assert of["num_observations"] == len(inside)
        for name, column in means.items():
            assert of[name] == pytest.approx(fmean(row[column] for row in inside), abs=1e-12)
        y = np.array([row["actual_margin_delta"] for row in inside])
        sse = sum(row["closure_residual"] ** 2 for row in inside)
        assert of["r_squared"] == pytest.approx(1 - sse / ((y - y.mean()) ** 2).sum())
    contributions = [row["mean_contribution"] for row in summary["route_contributions"]]
    assert sorted(map(abs, contributions), reverse=True) == list(map(abs, contributions))
    assert sum(contributions) == pytest.approx(summary["predicted_margin_delta_mean"])
    assert content["basis_mode"] == "source_checkpoint_per_interval"
    assert set(content["subspaces"]) == {"query", "value"}
    assert content["subspaces"]["query"]["head_label"] == "L1H2"
    assert content["pair_construction"]["constructed_counts"] == dict.fromkeys(TYPES, MOST)
    assert accounted("3 routes", 3, summary["r_squared"], "the clean record's answer margin") in markdown
    assert "It is a fit, not a cause." in markdown
    assert "A closure is a fit, not a cause" in markdown


def test_pair_rows_are_all_that_were_built(lake, world, tmp_path):
    rows, _, _ = written(lake, tmp_path / "out", route_pair_type="support_value")
    assert [row["pair_id"] for row in rows["pair_rows"]] == [pair.pair_id for pair in world.pairs]
    entered = {pair.pair_id for pair in world.pairs if pair.pair_type == "support_value"}
    for name in ("closure_rows", "margin_rows", "route_rows"):
        assert {row["pair_id"] for row in rows[name]} == entered


def test_routes_that_move_together_are_said_to(lake, tmp_path):
    """Patching the whole query key of the embedding does nothing for support_value pairs: a column of zeros."""
    nothing = "label=none,stage=embedding,subspace=full_residual,position_role=query_key"
    options = {"route": (SPECS[2], nothing), "route_pair_type": "support_value"}
    extract(lake, RUN, margin_report(**options).needs(), margin_report().steps)
    rows, content, markdown = written(lake, tmp_path / "out", **options)
    assert content["summary"]["fit"]["rank_deficient"]
    assert {row["route_label"]: row["coefficient"] for row in rows["coefficient_rows"]}["none"] == 0
    assert (
        "The fit: the design has rank 1 for 2 parameters, so other coefficients fit as well"
        in content["warnings"][0]
    )
    assert content["warnings"][0] in markdown
    fit = {"name": "The fit", "rank_deficient": False, "condition_number": 31.5}
    assert doubtful([fit])[0].startswith(
        "The fit: routes move together (condition number 31.5 of unit columns, above 30)"
    )
    assert doubtful([{**fit, "condition_number": 29.0}]) == []


def test_what_is_not_accounted_for_is_said_so():
    assert accounted("One route", 1, 0.25, "it") == "**One route accounts for R² = 0.25 of how it changed**"
    assert accounted("2 routes", 2, 0.25, "it") == "**2 routes account for R² = 0.25 of how it changed**"
    assert accounted("2 routes", 2, -0.5, "it").startswith(
        "**2 routes do not account for how it changed** (R² = -0.5"
    )
    assert "nothing to account for" in accounted("2 routes", 2, None, "it")


def test_it_needs_forward_passes_only():
    needs = margin_report(margin_side="corrupted").needs()
    assert [need.dataset for need in needs] == [SCALAR_CHANGES] * len(ROUTES) + [READOUTS]
    assert needs[-1].parameters == {"probe": "probe.corrupted"}


SPEC = "label=a,stage=embedding,subspace=full_residual,position_role=query_key"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": None}, "--route is required"),
        ({"route": ("",)}, "--route a route is empty"),
        ({"route": (f"{SPEC},colour=red",)}, "no key 'colour'; there are label, stage"),
        ({"route": (f"{SPEC},stage=embedding",)}, "key 'stage' stands twice"),
        ({"route": (SPEC.replace("label=a", "label="),)}, "key 'label' has no value"),
        ({"route": (SPEC.replace("label=a,", ""),)}, "key 'label' is missing"),
        ({"route": (SPEC, SPEC.replace("embedding", "final_norm"))}, "label 'a' stands for two routes"),
        ({"route": (SPEC, SPEC.replace("label=a", "label=b"))}, "routes 'a' and 'b' are the same"),
        ({"route": (f"{SPEC},rank=2",)}, "full_residual is the whole residual vector: it takes no rank"),
        ({"route": (SPEC.replace("full_residual", "head_qk_key"),)}, "head_qk_key is of a head: it needs head_layer and head"),
        ({"route": (SPEC.replace("full_residual", "other"),)}, "no subspace 'other'; there are"),
        ({"route": (SPEC.replace("full_residual", "embedding_key_identity"),)}, "needs a rank of at least 1"),
        ({"route_pair_type": None}, "--route-pair-type is required"),
        ({"route_pair_type": "recency"}, "--route-pair-type recency is none of --pair-type, query_key, support_value"),
        ({"pair_type": None}, "--pair-type is required"),
        ({"target_scalar": "loss"}, "--target-scalar should be 'answer_margin' or 'clean_vs_corrupted_contrast'"),
        ({"margin_side": "both"}, "--margin-side should be 'clean' or 'corrupted'"),
        ({"min_pairs_per_type": 5}, "--min-pairs-per-type 5 exceeds --max-pairs-per-type 4"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        margin_report(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "40"}, MissingData, "an update lies between two steps"),
        ({"steps": "34,37"}, MissingData, "needs scalar_changes .* Run: lakebed extract --for route-to-margin-closure .*--route label=query"),
        ({"route": (SPEC.replace("embedding", "layer_9_post_mlp"),)}, UnknownName, "no stage 'layer_9_post_mlp'; run 'r' has embedding"),
        ({"route": (SPEC.replace("query_key", "other"),)}, UnknownName, "no role 'other'; the events of probe 'probe' have"),
        ({"route": ("label=a,stage=embedding,subspace=head_ov_output,rank=9,head=L0H0,position_role=query_key",)}, InvalidOption, "rank 9 exceeds the width of a head, 8"),
        ({"route": ("label=a,stage=embedding,subspace=head_ov_output,rank=1,head=L5H0,position_role=query_key",)}, UnknownName, "no head L5H0; run 'r' has layers 0–1, heads 0–3"),
        ({"probe": "other"}, MissingData, "Probe-set not found: run 'r' has no probe 'other'"),
        ({"split": ("train",)}, UnknownName, "probe 'probe' has no split 'train'"),
        ({"max_pairs_per_type": 99, "min_pairs_per_type": 99}, TooFewPairs, "requested minimum causal patch pairs"),
    ],
)  # fmt: skip
def test_what_the_lake_lacks_is_named(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run_report(lake, margin_report(**options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_role": "key_distractors"}, "Intervention positions must be in the causal prefix"),
        (
            {"subspace": "embedding_key_identity,rank=99"},
            "rank 99 exceeds that of subspace embedding_key_identity",
        ),
    ],
)
def test_what_only_the_records_and_weights_can_tell_is_refused_when_they_are_read(lake, change, message):
    given = {
        "label": "a",
        "stage": "embedding",
        "subspace": "full_residual",
        "position_role": "query_key",
        **change,
    }
    asked = margin_report(route=(",".join(f"{key}={value}" for key, value in given.items()),))
    with pytest.raises(LakebedError, match=message) as caught:
        extract(lake, RUN, asked.needs(), "34,36")
    assert "\n" not in str(caught.value)


def test_more_parameters_than_observations_are_refused(lake, tmp_path):
    options = {"max_pairs_per_type": 1, "route_pair_type": "support_value", "steps": "34,36"}
    extract(lake, RUN, margin_report(**options).needs(), options["steps"])
    with pytest.raises(
        Underdetermined, match="is underdetermined: 1 observations for 3 parameters; take fewer features"
    ):
        run_report(lake, margin_report(**options), tmp_path / "out", chart_formats=[])
    assert not (tmp_path / "out").exists()


def test_pairs_that_change_in_an_interval_are_refused(lake_path, tmp_path):
    """A lake whose rows of one route were written by somebody else."""
    copy = tmp_path / "changed.lake"
    shutil.copytree(lake_path, copy)
    parameters = margin_report().changes()[0]
    with Lake.open(copy) as changed:
        changed.refresh()
        (receipt,) = [
            of
            for of in changed.receipts.all(RUN, SCALAR_CHANGES)
            if spec_id(parameters) in of.unit and tuple(of.steps) == (36, 37)
        ]
        held = [
            {name: value for name, value in row.items() if name != "run"}
            for row in changed.table("scalar_changes", RUN).collect().to_dicts()
            if row["spec"] == spec_id(parameters) and row["source_step"] == 36
        ]
        changed.storage.remove(receipt.key)
    first = held[0]["pair_id"]
    rows = [{**row, "pair_id": "another"} if row["pair_id"] == first else row for row in held]
    made = Unit(SCALAR_CHANGES, RUN, receipt.unit, (36, 37), parameters, {"made": "up"})
    with Lake.open(copy) as changed, changed.unit(made) as writer:
        writer.rows("scalar_changes", rows)
    with (
        Lake.open(copy) as changed,
        pytest.raises(PairsChanged, match="pair ids change between intervals or routes: 3 intervals"),
    ):
        run_report(changed, margin_report(), tmp_path / "out", chart_formats=[])

"""Every column against float64: losses and routes, derivatives of each along the other's gradient; groups; refusals."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake, Unit
from lakebed.lake.data_groups import DataGroupError
from lakebed.lake.datasets import GRADIENT_PRODUCTS, SCALAR_GRADIENTS, Need, scalar_gradient_parameters
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.names import spec_id
from lakebed.queries.pair_selection import TooFewPairs
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from tests.route_lake import HEADS, RUN, TRAIN_PROBE

from .conftest import assert_same
from .float64_decoder import Decoder, load_weights
from .route_reference import gradient_along, lm_loss, load_pairs, route, span

STEPS = (36, 38, 40)
ROUTES = {
    "query": {
        "stage": "layer_0_post_mlp",
        "subspace": "head_qk_query",
        "rank": 3,
        "head_layer": 1,
        "head": 2,
        "position_role": "query_key",
    },
    "all": {"stage": "layer_0_post_attn", "subspace": "full_residual", "position_role": "query_key"},
}
TYPES = {"eval": ("query_key", "distractor"), "train": ("query_key",)}
OPTIONS = {
    "run": RUN,
    "steps": ",".join(map(str, STEPS)),
    "train_probe": TRAIN_PROBE,
    "route": tuple(
        ",".join(f"{key}={value}" for key, value in {"label": label, **of}.items())
        for label, of in ROUTES.items()
    ),
    "route_pair_type": "query_key",
    "pair_type": TYPES["eval"],
    "train_pair_type": TYPES["train"],
    "data_group_field": ("pair_type", "mutation.changed_role"),
    "max_pairs_per_type": 4,
}
CLOSE = {"rel": 2e-3, "near": 5e-6}


def report(**options):
    given = {**OPTIONS, **options}
    return load_report("route-competition-report").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def written(lake, out, **options):
    printed = run_report(lake, report(**options), out, chart_formats=[], overwrite=True)
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("route_rows", "data_rows", "pair_rows")
    }
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


@pytest.fixture(scope="module")
def lake(route_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("competing") / "competing.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as opened:
        extract(opened, RUN, report().needs(), OPTIONS["steps"])
        yield opened


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def weights(lake):
    return {step: load_weights(lake, RUN, step) for step in STEPS}


@pytest.fixture(scope="module")
def pairs(lake):
    return {
        domain: load_pairs(lake, RUN, probe, TYPES[domain], 4)
        for domain, probe in (("eval", "probe"), ("train", TRAIN_PROBE))
    }


def groups(pairs):
    """Group id to its values and pairs, in report order."""
    made = {"__all__": ({}, pairs)}
    for kind in sorted({pair.pair_type for pair in pairs}):
        of = [pair for pair in pairs if pair.pair_type == kind]
        for role in sorted({json.loads(pair.mutation)["changed_role"] for pair in of}):
            inside = [pair for pair in of if json.loads(pair.mutation)["changed_role"] == role]
            values = {"pair_type": kind, "mutation.changed_role": role}
            made["|".join(f"{key}={value}" for key, value in values.items())] = (values, inside)
    return made


def score_of(of, columns, pairs):
    scored = [pair for pair in pairs if pair.pair_type == "query_key"]
    return lambda decoder: fmean(
        route(decoder, columns, of["stage"], of["position_role"], pair)[0] for pair in scored
    )


SIDES = {"eval": ("clean", "corrupted"), "train": ("clean",)}


def test_data_rows_are_the_definition(found, weights, pairs):
    rows = iter(found[0]["data_rows"])
    for source, target in pairwise(STEPS):
        before, after = Decoder(weights[source], HEADS), Decoder(weights[target], HEADS)
        update = {name: weights[target][name] - of for name, of in weights[source].items()}
        for domain in ("eval", "train"):
            for label, of in ROUTES.items():
                head = (1, 2) if "head" in of else None
                columns = span(before, of["subspace"], of.get("rank"), head)
                score = score_of(of, columns, pairs[domain])
                ends = score(before), score(after)
                predicted = gradient_along(score, weights[source], update, 1e-4)
                for group, (values, held) in groups(pairs[domain]).items():
                    row = next(rows)
                    events = [getattr(pair, side) for side in SIDES[domain] for pair in held]
                    total, tokens = lm_loss(before, events)
                    rate = row["learning_rate"]
                    assert_same(
                        row,
                        {
                            "source_step": source,
                            "target_step": target,
                            "step_gap": 2,
                            "source_checkpoint": f"step_{source:06d}",
                            "target_checkpoint": f"step_{target:06d}",
                            "route_split": "__all__",
                            "route_pair_type": "query_key",
                            "route_label": label,
                            "domain": domain,
                            "stage": of["stage"],
                            "subspace_name": of["subspace"],
                            "subspace_type": "head_singular_vectors" if head else "full_residual",
                            "head_label": head and "L1H2",
                            "head_layer": head and 1,
                            "head": head and 2,
                            "rank": of.get("rank"),
                            "position_role": "query_key",
                            "data_group_id": group,
                            "data_group_values": values,
                            "loss_side": "both" if domain == "eval" else "clean",
                            "loss": total / tokens,
                            "loss_num_records": len(events),
                            "loss_num_tokens": tokens,
                            "source_route_score": ends[0],
                            "target_route_score": ends[1],
                            "actual_update_predicted_route_delta": predicted,
                        },
                        **CLOSE,
                    )
                    assert row["actual_route_delta"] == pytest.approx(ends[1] - ends[0], rel=1e-3, abs=2e-5)
                    dot = row["loss_dot_route_gradient"]
                    norms = row["loss_gradient_l2_norm"], row["route_gradient_l2_norm"]
                    moved = row["loss_dot_actual_update"]
                    step_norm = math.sqrt(sum((field**2).sum() for field in update.values()))
                    assert_same(
                        row,
                        {
                            "parameter_delta_l2_norm": step_norm,
                            "negative_loss_dot_route_gradient": -dot,
                            "loss_negative_route_gradient_cosine": -dot / norms[0] / norms[1],
                            "loss_route_gradient_cosine": dot / norms[0] / norms[1],
                            "local_sgd_route_delta_linearized": -rate * dot,
                            "negative_loss_dot_actual_update": -moved,
                            "loss_delta_under_actual_update_linearized": moved,
                            "loss_reduction_under_actual_update_linearized": -moved,
                            "loss_negative_actual_update_cosine": -moved / norms[0] / step_norm,
                            "loss_actual_update_cosine": moved / norms[0] / step_norm,
                        },
                        rel=1e-5,
                    )
    assert next(rows, None) is None


def test_products_are_slopes_of_one_along_the_gradient_of_the_other(lake, found, weights, pairs):
    """∇ℓ·Δ and ∇ℓ·∇ℓ from finite differences of the loss; ∇ℓ·∇R too, along the route's gradient as stored by itself."""
    source, target = STEPS[:2]
    update = {name: weights[target][name] - of for name, of in weights[source].items()}
    for domain, probe in (("eval", "probe"), ("train", TRAIN_PROBE)):
        scored = scalar_gradient_parameters(
            "route_score",
            report().routes[0].parameters(),
            pair_type=("query_key",),
            probe=probe,
            max_pairs_per_type=4,
        )
        extract(lake, RUN, [Need(SCALAR_GRADIENTS, scored)], str(source))
        gradient = {
            name: lake.tensor("scalar_gradients", f"{spec_id(scored)}/{name}", RUN)
            .read(source)
            .astype(np.float64)
            for name in weights[source]
        }
        for group, (_, held) in groups(pairs[domain]).items():
            events = [getattr(pair, side) for side in SIDES[domain] for pair in held]

            def loss(decoder, events=events):
                total, count = lm_loss(decoder, events)
                return total / count

            row = next(
                row
                for row in found[0]["data_rows"]
                if (row["source_step"], row["domain"], row["route_label"], row["data_group_id"])
                == (source, domain, "query", group)
            )
            assert row["loss_dot_actual_update"] == pytest.approx(
                gradient_along(loss, weights[source], update, 1e-4), rel=1e-3
            )
            assert row["loss_dot_route_gradient"] == pytest.approx(
                gradient_along(loss, weights[source], gradient, 1e-3), rel=2e-3, abs=1e-5
            )


def test_route_rows_are_the_cells_of_the_route(found):
    rows = found[0]["route_rows"]
    assert [(row["source_step"], row["domain"], row["route_label"]) for row in rows] == [
        (step, domain, label) for step in STEPS[:-1] for domain in ("eval", "train") for label in ROUTES
    ]
    assert {(row["split"], row["pair_type"]) for row in rows} == {("__all__", "query_key")}
    data = {
        (row["source_step"], row["domain"], row["route_label"]): row
        for row in found[0]["data_rows"]
        if row["data_group_id"] == "__all__"
    }
    for row in rows:
        of = data[row["source_step"], row["domain"], row["route_label"]]
        assert row["num_pairs"] == 4
        assert row["actual_delta"] == of["actual_route_delta"]
        assert row["predicted_delta"] == of["actual_update_predicted_route_delta"]
        assert row["residual"] == pytest.approx(row["actual_delta"] - row["predicted_delta"])
        assert row["source_transfer_margin_patched_mean"] == pytest.approx(
            row["source_transfer_margin_corrupted_mean"] + row["source_route_score"]
        )


def test_routes_are_ranked_by_the_last_interval(found):
    rows, content, markdown = found
    last = {
        (row["domain"], row["route_label"]): row
        for row in rows["data_rows"]
        if row["source_step"] == STEPS[-2] and row["data_group_id"] == "__all__"
    }
    for of in content["combined_rows"]:
        label = of["route_label"]
        for domain in ("eval", "train"):
            row = last[domain, label]
            assert_same(
                {
                    key.removeprefix(f"{domain}_"): value
                    for key, value in of.items()
                    if key.startswith(domain)
                },
                {
                    "source_route_score": row["source_route_score"],
                    "target_route_score": row["target_route_score"],
                    "actual_delta": row["actual_route_delta"],
                    "predicted_delta": row["actual_update_predicted_route_delta"],
                    "relative_error": row["actual_update_route_relative_error"],
                    "sign_match": row["actual_update_route_sign_match"],
                    "route_support": row["negative_loss_dot_route_gradient"],
                    "actual_update_loss_reduction": row["loss_reduction_under_actual_update_linearized"],
                },
            )
        assert of["train_local_sgd_route_delta"] == last["train", label]["local_sgd_route_delta_linearized"]
    for name in ("train_route_support", "eval_actual_delta", "train_actual_delta"):
        values = [row[name] for row in content[f"ranked_by_{name}"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == len(ROUTES)
    assert content["combined_rows"] == content["ranked_by_train_route_support"]
    assert set(content["subspaces"]) == {"query:eval", "query:train"}
    best = content["combined_rows"][0]["route_label"]
    assert f"descent on training records supports `{best}` most" in markdown or "opposes" in markdown


def test_pair_rows_are_those_of_both_domains(found, pairs):
    assert [(row["domain"], row["pair_id"]) for row in found[0]["pair_rows"]] == [
        (domain, pair.pair_id) for domain in ("eval", "train") for pair in pairs[domain]
    ]


def test_a_group_of_another_interval_may_not_mean_something_else(lake, tmp_path):
    copy = tmp_path / "changed.lake"
    shutil.copytree(lake.storage.path(""), copy)
    parameters = report().products()[1]
    with Lake.open(copy) as changed:
        changed.refresh()
        (receipt,) = [
            of
            for of in changed.receipts.all(RUN, GRADIENT_PRODUCTS)
            if spec_id(parameters) in of.unit and tuple(of.steps) == (38, 40)
        ]
        held = {
            table: [
                {name: value for name, value in row.items() if name != "run"}
                for row in changed.table(table, RUN).collect().to_dicts()
                if row["spec"] == spec_id(parameters) and row["source_step"] == 38
            ]
            for table in ("data_group_losses", "gradient_products")
        }
        changed.storage.remove(receipt.key)
    for row in held["data_group_losses"]:
        row["data_group_values"] = json.dumps({"pair_type": "other"})
    made = Unit(GRADIENT_PRODUCTS, RUN, receipt.unit, (38, 40), parameters, {"made": "up"})
    with Lake.open(copy) as changed, changed.unit(made) as writer:
        for table, rows in held.items():
            writer.rows(table, rows)
    with (
        Lake.open(copy) as changed,
        pytest.raises(
            ReportFailed, match="Data group values changed across intervals: __all__ of domain train is"
        ),
    ):
        run_report(changed, report(), tmp_path / "out", chart_formats=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_probe": None},
            "--train-probe is required: a probe of training records. Make one: lakebed probe build",
        ),
        (
            {"route_pair_type": "distractor"},
            "--route-pair-type distractor is none of --train-pair-type, query_key",
        ),
        (
            {"route_pair_type": "recency"},
            "--route-pair-type recency is none of --pair-type, query_key, distractor",
        ),
        ({"train_pair_type": None}, "--train-pair-type is required"),
        ({"data_group_field": None}, "--data-group-field is required"),
        ({"route": None}, "--route is required"),
        ({"eval_loss_side": "neither"}, "--eval-loss-side should be 'clean', 'corrupted' or 'both'"),
        (
            {"split": ("validation_iid",), "eval_split": ("heldout_pairs",)},
            "--eval-split and --split disagree",
        ),
        ({"min_error_denominator": 0}, "--min-error-denominator should be greater than 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        report(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_probe": "other"}, MissingData, "no probe 'other' of training records. Run: lakebed probe build .* --split train"),
        ({"train_split": ("validation_iid",)}, UnknownName, "probe 'train-probe' has no split 'validation_iid'; it has train"),
        ({"eval_split": ("train",)}, UnknownName, "probe 'probe' has no split 'train'; it has validation_iid"),
        ({"max_pairs_per_type": 99, "min_pairs_per_type": 99}, TooFewPairs, "requested minimum causal patch pairs"),
        ({"data_group_field": ("colour",)}, DataGroupError, "--data-group-field colour: no 'colour' in pair .*; it has pair_id, "),
        ({"data_group_field": ("mutation",)}, DataGroupError, "an object in pair .*; name one of its values, mutation.changed_role"),
        ({"data_group_field": ("mutation.depth",)}, DataGroupError, "no 'depth' in pair .*; it has "),
        ({"data_group_field": ("pair_type.x",)}, DataGroupError, "no 'x' in pair .*; it has no fields"),
        ({"data_group_field": ("split",)}, MissingData, "needs gradient_products .* Run: lakebed extract --for route-competition"),
        ({"steps": "40"}, MissingData, "an update lies between two steps"),
    ],
)  # fmt: skip
def test_what_the_lake_lacks_is_named(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run_report(lake, report(**options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()

"""Every column against float64 scalars, finite differences and gradients cut slice by slice, and what is refused."""

import json
import shutil
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from lakebed.engine.adapters import load_adapter
from lakebed.engine.scalars import build_scalar
from lakebed.engine.scalars.measure import Task, measure
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report

from tests import downstream_lake
from tests.downstream_records import batch_of

from .conftest import assert_same
from .downstream_reference import (
    SCALARS,
    Reference,
    cosine,
    identifiers,
    parameter_groups,
    restricted,
    scalar_row,
)

STEPS = (34, 36, 37)
HEAD, ROLES = (1, 2), ("prediction", "support_value", "value_distractors")
TYPES = ("support_value", "distractor")
SIDES = ("clean", "corrupted")
OPTIONS = {
    "steps": ",".join(map(str, STEPS)),
    "head": "L1H2",
    "score_query_role": ROLES[0],
    "support_key_role": ROLES[1],
    "distractor_key_role": ROLES[2],
    "pair_type": TYPES,
    "max_pairs_per_type": 8,
    "scalar": SCALARS,
    "integrate": 2,
    "top_k_groups": 5,
}
CLOSE = {"rel": 1e-4, "near": 2e-5}  # float32 forward passes
SETS = ("scalar_rows", "metric_rows", "decomposition_rows", "group_rows", "pair_rows")


def report(**options):
    return load_report("attention-downstream-update-attribution").parse({**OPTIONS, **options})


@pytest.fixture(scope="module")
def lake(downstream_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("updates") / "d.lake"
    shutil.copytree(downstream_lake_path, path)
    torch.set_num_threads(1)
    with Lake.open(path) as opened:
        extract(opened, downstream_lake.RUN, report().needs(), OPTIONS["steps"])
        yield opened


@pytest.fixture(scope="module")
def reference(lake):
    return Reference(lake, HEAD, ROLES, TYPES, OPTIONS["max_pairs_per_type"])


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    printed = run_report(lake, report(), out, chart_formats=[], rows_format=["parquet"])
    rows = {key: pl.read_parquet(printed[f"{key.removesuffix('_rows')}_parquet"]).to_dicts() for key in SETS}
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


@pytest.fixture(scope="module")
def expected(reference):
    """Scalar rows in report order."""
    return [
        scalar_row(reference, source, target, side, pair, name)
        for source, target in pairwise(STEPS)
        for side in SIDES
        for name in SCALARS
        for pair in sorted(reference.pairs, key=lambda pair: pair["pair_id"])
    ]


def test_the_pairs_are_of_several_splits_and_types(reference):
    assert len({pair["split"] for pair in reference.pairs}) == 2
    assert {pair["pair_type"] for pair in reference.pairs} == set(TYPES)


def test_scalar_rows_are_the_definition(found, expected):
    rows = found[0]["scalar_rows"]
    assert len(rows) == len(expected) == 2 * 2 * 11 * 16
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        assert_same(row, wanted, **CLOSE)


def cells_of(expected):
    """Scalar rows by interval, side, scalar, split and pair type."""
    made = defaultdict(list)
    for row in expected:
        for split in {"__all__", row["split"]}:
            for pair_type in {"__all__", row["pair_type"]}:
                key = (row["source_step"], row["target_step"], row["record_side"], row["scalar_name"])
                made[*key, split, pair_type].append(row)
    return made


def test_metric_rows_are_means_over_cells(found, expected):
    rows = found[0]["metric_rows"]
    cells = cells_of(expected)
    assert len(rows) == len(cells) == 2 * 2 * 11 * 9
    order = [
        (row["source_step"], SIDES.index(row["record_side"]), SCALARS.index(row["scalar_name"]), row["split"],
         row["pair_type"]) for row in rows
    ]  # fmt: skip
    assert order == sorted(order)
    for row in rows:
        source, target = row["source_step"], row["target_step"]
        held = cells[source, target, row["record_side"], row["scalar_name"], row["split"], row["pair_type"]]
        before, after, delta = (
            np.array([of[key] for of in held]) for key in ("source_value", "target_value", "actual_delta")
        )
        predicted = row["predicted_delta"]
        residual = row["actual_delta"] - predicted
        wrong = [(of["source_best_wrong_token_id"], of["target_best_wrong_token_id"]) for of in held]
        wanted = {
            **identifiers(source, target, HEAD, ROLES, row["record_side"]),
            "learning_rate": 0.01,
            "num_pairs": len(held),
            "num_entries": len(held),
            "num_unique_pairs": len(held),
            "source_value": float(before.mean()),
            "source_objective_value": float(before.mean()),
            "source_objective_value_abs_mean": float(abs(before).mean()),
            "source_objective_value_std": float(before.std()),
            "source_value_std": float(before.std()),
            "target_value": float(after.mean()),
            "target_value_std": float(after.std()),
            "actual_delta": float(delta.mean()),
            "actual_delta_abs_mean": float(abs(delta).mean()),
            "actual_delta_std": float(delta.std()),
            "source_accuracy": float(np.mean([of["source_answer_correct"] for of in held])),
            "target_accuracy": float(np.mean([of["target_answer_correct"] for of in held])),
            "competitor_switch_fraction": float(np.mean([one != other for one, other in wrong]))
            if wrong[0][0] is not None
            else None,
            "support_scores_per_pair_mean": 1.0,
            "distractor_scores_per_pair_mean": float(
                np.mean([of["num_distractor_positions"] for of in held])
            ),
            "residual": residual,
            "absolute_error": abs(residual),
            "relative_error": abs(residual) / max(abs(row["actual_delta"]), 1e-9),
            "relative_error_denominator": max(abs(row["actual_delta"]), 1e-9),
            "predicted_relative_error": abs(residual) / max(abs(predicted), 1e-9),
            "predicted_relative_error_denominator": max(abs(predicted), 1e-9),
            "sign_match": bool(np.sign(row["actual_delta"]) == np.sign(predicted)),
            "integrated_relative_error": abs(row["actual_delta"] - row["integrated_delta"])
            / max(abs(row["actual_delta"]), 1e-9),
        }
        assert_same(row, wanted, **CLOSE)
        checked_elsewhere = {
            "split", "pair_type", "scalar_name", "predicted_delta", "integrated_delta", "parameter_delta_l2_norm",
            "predicted_delta_counting_aliases", "scalar_gradient_l2_norm", "update_scalar_gradient_cosine",
            "num_parameters", "zero_scalar_gradient_parameter_count", "zero_scalar_gradient_parameter_names",
        }  # fmt: skip
        assert row.keys() == wanted.keys() | checked_elsewhere


@pytest.mark.parametrize(("side", "split", "pair_type"), [
    ("clean", "__all__", "__all__"), ("corrupted", "__all__", "distractor"), ("clean", "validation_iid", "support_value"),
])  # fmt: skip
def test_first_order_is_the_slope_along_the_update_and_the_integral_its_mean(
    found, reference, side, split, pair_type
):
    nodes, shares = np.polynomial.legendre.leggauss(2)
    pairs = reference.cell(split, pair_type)
    for source, target in pairwise(STEPS):
        update = reference.update(source, target)
        first = reference.slope(source, update, side, pairs)
        along = [reference.slope(source, update, side, pairs, target, (node + 1) / 2) for node in nodes]
        for row in found[0]["metric_rows"]:
            if (row["source_step"], row["record_side"], row["split"], row["pair_type"]) != (
                source, side, split, pair_type,
            ):  # fmt: skip
                continue
            name = row["scalar_name"]
            near = 1e-5 * row["scalar_gradient_l2_norm"] * row["parameter_delta_l2_norm"]
            assert row["predicted_delta"] == pytest.approx(first[name], rel=1e-3, abs=near), name
            integrated = sum(share / 2 * of[name] for share, of in zip(shares, along, strict=True))
            # A competitor may switch between float32 and float64 where two are equal to rounding: not here.
            assert row["integrated_delta"] == pytest.approx(integrated, rel=1e-3, abs=near), name


def gradients_of(reference, source, side, pairs, names=SCALARS):
    """Gradients of every scalar's mean over the pairs, by scalar and parameter, from the engine alone."""
    adapter = load_adapter("symbolic_kv", downstream_lake.config().canonical_json())
    leaves = {
        name: torch.from_numpy(of).float().requires_grad_() for name, of in reference.weights(source).items()
    }
    given = {
        "head": "L1H2",
        **dict(zip(("score_query_role", "support_key_role", "distractor_key_role"), ROLES, strict=True)),
    }
    tasks = {name: Task(build_scalar(name, given), cells=1) for name in names}
    batch = batch_of([reference.event(pair, side) for pair in pairs])
    measure(adapter.load_model(leaves), leaves, [batch], list(tasks.values()))
    return {
        key: {
            name: task.gradients[name][0].double().numpy() / len(pairs)
            if name in task.gradients
            else np.zeros(of.shape)
            for name, of in reference.weights(source).items()
        }
        for key, task in tasks.items()
    }


def test_decomposition_rows_cut_gradient_and_update_slice_by_slice(found, reference):
    source, target = STEPS[:2]
    groups, update = parameter_groups(reference.weights(source)), reference.update(source, target)
    gradients = gradients_of(reference, source, "clean", reference.pairs)
    metrics = {
        row["scalar_name"]: row
        for row in found[0]["metric_rows"]
        if (row["source_step"], row["record_side"], row["split"], row["pair_type"])
        == (source, "clean", "__all__", "__all__")
    }
    seen = defaultdict(dict)
    for row in found[0]["decomposition_rows"]:
        if (row["source_step"], row["record_side"], row["split"], row["pair_type"]) != (
            source, "clean", "__all__", "__all__",
        ):  # fmt: skip
            continue
        metric, group = metrics[row["scalar_name"]], groups[row["group_id"]]
        gradient = restricted(gradients[row["scalar_name"]], group)
        delta = restricted(update, group)
        contribution = float(gradient @ delta)
        # A bias of the keys moves all scores alike: its gradient is rounding.
        noise = 1e-6 * metric["scalar_gradient_l2_norm"]
        assert_same(
            row,
            {
                **identifiers(source, target, HEAD, ROLES, "clean"),
                "predicted_delta_contribution": contribution,
                "contribution_per_parameter": contribution / len(delta),
                "num_selected_parameters": len(delta),
                "parameter_delta_l2_norm": float(np.linalg.norm(delta)),
                **{key: metric[key] for key in ("num_pairs", "source_value", "target_value", "actual_delta")},
                "global_predicted_delta": metric["predicted_delta"],
                "global_residual": metric["residual"],
                "global_relative_error": metric["relative_error"],
            },
            rel=1e-4,
            near=noise * np.linalg.norm(delta),
        )
        size = np.linalg.norm(gradient)
        assert row["scalar_gradient_l2_norm"] == pytest.approx(size, rel=1e-4, abs=noise)
        if size == 0 or size > 1e3 * noise:
            angle = cosine(gradient, delta)
            assert row["update_scalar_gradient_cosine"] == (
                angle and pytest.approx(angle, rel=1e-3, abs=1e-5)
            )
        seen[row["scalar_name"]][row["group_id"]] = row
    assert all(seen[name].keys() == groups.keys() for name in SCALARS)
    for name, metric in metrics.items():
        of = seen[name]
        whole = of["global:all_named_parameters"]
        assert metric["predicted_delta"] == whole["predicted_delta_contribution"]
        assert metric["num_parameters"] == whole["num_selected_parameters"]
        assert metric["update_scalar_gradient_cosine"] == whole["update_scalar_gradient_cosine"]
        zero = [key for key, of_one in gradients[name].items() if not of_one.any()]
        assert set(metric["zero_scalar_gradient_parameter_names"]) == set(zero)
        assert metric["zero_scalar_gradient_parameter_count"] == len(zero)
        embedding = of["parameter:token_embedding.weight"]["predicted_delta_contribution"]
        assert metric["predicted_delta_counting_aliases"] == pytest.approx(
            metric["predicted_delta"] + embedding
        )
        for key in ("predicted_delta_contribution", "integrated_delta_contribution"):
            modules = sum(row[key] for group, row in of.items() if group.startswith("module:"))
            assert modules == pytest.approx(whole[key], abs=1e-9)
            head = [of[f"attention_head_projection:L1H2.{part}_proj"][key] for part in ("q", "k", "v", "out")]
            assert of["attention_head:L1H2.qkvo"][key] == pytest.approx(sum(head), abs=1e-12)
        assert whole["integrated_delta_contribution"] == metric["integrated_delta"]


def test_group_rows_list_their_slices(found, reference):
    groups = parameter_groups(reference.weights(STEPS[0]))
    rows = {row["group_id"]: row for row in found[0]["group_rows"]}
    assert rows.keys() == groups.keys()
    for group, slices in groups.items():
        row = rows[group]
        assert row["selection_count"] == len(slices) == len(row["selections"])
        assert {of["parameter_name"] for of in row["selections"]} == {name for name, _ in slices}
        assert row["num_selected_parameters"] == sum(of["num_parameters"] for of in row["selections"])
    assert_same(
        rows["attention_head_projection:L1H2.out_proj"],
        {"layer": 1, "head": 2, "projection": "out_proj", "neuron": None, "component_type": "attention",
         "partition_name": "attention_head_projections", "group_kind": "attention_head_projection"},
    )  # fmt: skip
    assert rows["mlp_neuron:L0N3"]["neuron"] == 3
    assert "lm_head.weight" in rows["module:token_embedding"]["notes"]


def test_pair_rows_are_the_chosen_pairs(found, reference):
    assert {row["pair_id"] for row in found[0]["pair_rows"]} == {pair["pair_id"] for pair in reference.pairs}
    assert len(found[0]["pair_rows"]) == len(reference.pairs)


def pooled(rows, **of):
    return [
        row
        for row in rows
        if row["split"] == row["pair_type"] == "__all__"
        and row["record_side"] == "clean"
        and all(row[key] == value for key, value in of.items())
    ]


def test_the_regions_are_disjoint_and_add_up(found):
    table = {row["label"]: row for row in found[1]["summary"]["by_scalar"]}
    assert list(table) == list(SCALARS)
    for name, row in table.items():
        of = defaultdict(float)
        for each in pooled(found[0]["decomposition_rows"], scalar_name=name):
            of[each["group_id"]] += each["integrated_delta_contribution"]
        wanted = {
            **{
                region: of[f"attention_head_projection:L1H2.{part}_proj"]
                for region, part in zip(("W_Q", "W_K", "W_V", "W_O"), ("q", "k", "v", "out"), strict=True)
            },
            "other attention": of["module:L0.attention"] + of["module:L1.attention"] - of["attention_head:L1H2.qkvo"],
            "MLPs": of["module:L0.mlp"] + of["module:L1.mlp"],
            "embeddings": of["module:token_embedding"] + of["module:position_embedding"],
            "LayerNorms": of["module:final_norm"] + sum(of[f"module:L{layer}.ln_{n}"] for layer in (0, 1) for n in (1, 2)),
        }  # fmt: skip
        for region, value in wanted.items():
            assert row[region] == pytest.approx(value, rel=1e-9, abs=1e-10), (name, region)
        metrics = pooled(found[0]["metric_rows"], scalar_name=name)
        assert sum(row[region] for region in wanted) == pytest.approx(
            sum(m["integrated_delta"] for m in metrics)
        )
        assert row["first_value"] == metrics[0]["source_value"]
        assert row["last_value"] == metrics[-1]["target_value"]
        assert row["sum_actual_delta"] == pytest.approx(sum(m["actual_delta"] for m in metrics))


def test_the_summary_is_the_contract(found):
    rows, content, _ = found
    summary = content["summary"]
    assert summary["num_intervals"] == 2
    assert summary["intervals"] == ["34->36", "36->37"]
    assert summary["target_steps"] == [36, 37]
    last = [
        row for row in rows["metric_rows"]
        if row["target_step"] == 37 and row["split"] == row["pair_type"] == "__all__"
    ]  # fmt: skip
    assert [(row["record_side"], row["scalar_name"]) for row in summary["final_metric_rows"]] == sorted(
        (row["record_side"], row["scalar_name"]) for row in last
    )
    everything = [row for row in rows["metric_rows"] if row["split"] == row["pair_type"] == "__all__"]
    assert summary["all_all_worst_relative_error"] == max(row["relative_error"] for row in everything)
    assert summary["all_all_mean_absolute_error"] == pytest.approx(
        np.mean([row["absolute_error"] for row in everything])
    )
    assert summary["all_all_sign_match_fraction"] == pytest.approx(
        np.mean([row["sign_match"] for row in everything])
    )
    groups = [
        row["predicted_delta_contribution"]
        for row in pooled(rows["decomposition_rows"], target_step=37)
        if row["group_kind"] not in ("global_all", "parameter_tensor")
    ]
    top = [row["predicted_delta_contribution"] for row in summary["final_top_positive_contributions"]]
    assert top == sorted(groups, reverse=True)[:5]
    top = [row["predicted_delta_contribution"] for row in summary["final_top_negative_contributions"]]
    assert top == sorted(groups)[:5]


def test_the_page_leads_with_what_moved(found):
    _, content, page = found
    table = {row["label"]: row for row in content["summary"]["by_scalar"]}
    grew = sum(row["sum_actual_delta"] > 0 for row in table.values())
    assert f"- **{grew} of 11 scalars of L1H2 grew between steps 34 and 37.**" in page
    first = page.split("\n- `", 2)[1].split("`")[0]
    assert "L1H2's own W_Q, W_K, W_V and W_O account for" in page
    assert first in table

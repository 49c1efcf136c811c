"""Every column against float64 scalars and AdamW written out, slope by slope and slice by slice, and what is refused."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report
from lakebed.queries.traced_report import COMPONENTS

from tests.downstream_lake import RUN

from .conftest import assert_same
from .downstream_reference import Reference, competitors, parameter_groups, restricted
from .downstream_reference import identifiers as reference_identifiers

STEPS = (36, 37, 38, 39)
HEAD, ROLES = (1, 2), ("prediction", "support_value", "value_distractors")
SCALARS = ("head_margin_dla_fixed_readout", "qk_ov_product", "answer_margin")
TYPES = ("support_value", "distractor")
OPTIONS = {
    "steps": "36:39",
    "head": "L1H2",
    "score_query_role": ROLES[0],
    "support_key_role": ROLES[1],
    "distractor_key_role": ROLES[2],
    "route_pair_source_type": TYPES,
    "objective_pair_type": "support_value",
    "max_route_pairs_per_type": 8,
    "scalar": SCALARS,
}
GLOBAL = "global:all_named_parameters"
PROJECTIONS = tuple(f"attention_head_projection:L1H2.{part}_proj" for part in ("q", "k", "v", "out"))
DEFAULT = (GLOBAL, *PROJECTIONS, "attention_head:L1H2.qkvo")
CLOSE = {"rel": 1e-4, "near": 2e-5}  # float32 forward passes
SETS = ("metric_rows", "component_rows", "group_rows", "route_pair_rows")


def report(**options):
    return load_report("attention-downstream-adam-state-attribution").parse({**OPTIONS, **options})


def written(lake, out, **options):
    printed = run_report(
        lake, report(**options), out, chart_formats=[], overwrite=True, rows_format=["jsonl"]
    )
    rows = {key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in SETS}
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


@pytest.fixture(scope="module")
def lake(downstream_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("traced") / "d.lake"
    shutil.copytree(downstream_lake_path, path)
    torch.set_num_threads(1)
    with Lake.open(path) as opened:
        extract(opened, RUN, report().needs(), OPTIONS["steps"])
        yield opened


@pytest.fixture(scope="module")
def reference(lake):
    return Reference(lake, HEAD, ROLES, TYPES, 8)


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("written") / "out")


def identifiers(target, name, log):
    return {
        **reference_identifiers(target - 1, target, HEAD, ROLES, "clean"),
        "learning_rate": log["learning_rate"],
        "objective_pair_type": "support_value",
        "objective_route_split": "__all__",
        "scalar_name": name,
    }


def l2(field):
    return float(np.sqrt(sum((of**2).sum() for of in field.values())))


def test_metric_rows_are_the_definition(lake, found, reference):
    rows = found[0]["metric_rows"]
    pairs = reference.cell("__all__", "support_value")
    assert len(rows) == 3 * len(SCALARS)
    assert len({pair["split"] for pair in pairs}) == 2
    checked = set()
    for row, (target, name) in zip(
        rows, [(target, name) for target in STEPS[1:] for name in SCALARS], strict=True
    ):
        source = target - 1
        log, group, terms = reference.terms(target)
        before, after = (
            np.array([reference.at(step, source, "clean", pair["clean"])[name] for pair in pairs])
            for step in (source, target)
        )
        events = [reference.event(pair, "clean") for pair in pairs]
        logits = [
            [reference.decoder(step).forward(event.tokens).logits[event.prediction] for event in events]
            for step in (source, target)
        ]
        wrong = [
            [competitors(reference.decoder(step), HEAD, event, ROLES).get(name) for event in events]
            for step in (source, target)
        ]
        update = reference.update(source, target)
        predicted, actual = row["actual_update_predicted_scalar_delta"], row["actual_scalar_delta"]
        residual = row["reconstructed_adamw_residual"]
        wanted = {
            **identifiers(target, name, log),
            "num_pairs": 8,
            "num_entries": 8,
            "num_unique_pairs": 8,
            "optimizer_trace_dir": lake.uri,
            "optimizer_trace_batch_step": target,
            "loss_scope": "full_lm",
            "loss": log["loss"],
            "loss_num_records": 12,
            "loss_delta_vs_optimizer_trace": None,
            "actual_batch_sample_count": 12,
            "actual_batch_query_event_count": log["query_event_count"],
            "source_value": float(before.mean()),
            "target_value": float(after.mean()),
            "source_objective_value": float(before.mean()),
            "source_objective_value_abs_mean": float(abs(before).mean()),
            "source_objective_value_std": float(before.std()),
            "actual_scalar_delta": float((after - before).mean()),
            "source_accuracy": float(np.mean([of.argmax() == e.answer for of, e in zip(logits[0], events, strict=True)])),
            "target_accuracy": float(np.mean([of.argmax() == e.answer for of, e in zip(logits[1], events, strict=True)])),
            "competitor_switch_fraction": None
            if wrong[0][0] is None
            else float(np.mean([one != other for one, other in zip(*wrong, strict=True)])),
            "actual_update_scalar_relative_error": abs(actual - predicted) / max(abs(actual), 1e-9),
            "actual_update_scalar_sign_match": bool(np.sign(actual) == np.sign(predicted)),
            "reconstructed_adamw_relative_error": abs(residual) / max(abs(predicted), 1e-9),
            "reconstructed_adamw_sign_match": bool(np.sign(predicted) == np.sign(predicted - residual)),
            "parameter_delta_l2_norm": l2(update),
            "trace_pre_clip_grad_norm": log["pre_clip_grad_norm"],
            "grad_clip_norm": 0.55,
            "clip_coefficient": log["clip_coefficient"],
            "adam_state_step_min": source,
            "adam_state_step_max": source,
            "adam_eps_values": [group["eps"]],
            "adam_beta_values": [[group["beta1"]], [group["beta2"]]],
            "adam_weight_decay_values": [0.05],
            "trace_learning_rate": log["learning_rate"],
            "stored_optimizer_group_lr_values": [log["learning_rate"]],
            "stored_optimizer_group_lr_matches_trace": True,
        }  # fmt: skip
        assert_same(row, wanted, **CLOSE)
        rate = log["learning_rate"]
        assert row["raw_gradient_l2_norm"] == pytest.approx(l2(terms["raw_sgd"]) / rate, rel=1e-5)
        assert row["clipped_gradient_l2_norm"] == pytest.approx(l2(terms["clipped_sgd"]) / rate, rel=1e-5)
        # What float32 rounding of the weights left over.
        rounding = l2({key: update[key] - of for key, of in terms["reconstructed_adamw_update"].items()})
        assert row["reconstructed_adamw_l2_error"] == pytest.approx(rounding, rel=1e-2)
        assert row["reconstructed_adamw_l2_relative_error"] == pytest.approx(rounding / l2(update), rel=1e-2)
        checked |= wanted.keys()
    slopes = {f"{name.removesuffix('_update')}_scalar_delta" for name in COMPONENTS}
    elsewhere = {
        "loss_num_tokens", "actual_update_predicted_scalar_delta", "reconstructed_adamw_residual",
        "actual_update_predicted_scalar_delta_counting_aliases", "raw_gradient_l2_norm", "clipped_gradient_l2_norm",
        "reconstructed_adamw_l2_error", "reconstructed_adamw_l2_relative_error", "scalar_gradient_l2_norm",
        "actual_update_scalar_gradient_cosine", "zero_scalar_gradient_parameter_count",
        "zero_scalar_gradient_parameter_names",
    }  # fmt: skip
    assert rows[0].keys() == checked | slopes | elsewhere


def test_tokens_are_those_of_the_batch(lake, found):
    # Clipping acted in some of these steps.
    assert min(row["clip_coefficient"] for row in found[0]["metric_rows"]) < 1
    for row in found[0]["metric_rows"]:
        ((tokens,),) = lake.sql(
            "SELECT sum(len(e.tokens) - 1) FROM (SELECT split, unnest(sample_ids) AS sample_id FROM training_batches WHERE "
            "run = 'r' AND step = ?) b JOIN examples e ON e.run = 'r' AND e.split = b.split AND e.sample_id = b.sample_id",
            [row["target_step"]],
        ).fetchall()
        assert row["loss_num_tokens"] == tokens


def test_terms_are_slopes_along_the_fields_of_adamw(found, reference):
    """AdamW written out in float64 from stored moments and gradients; each term a direction to go along."""
    pairs = reference.cell("__all__", "support_value")
    for target in STEPS[1:]:
        _, _, terms = reference.terms(target)
        fields = {**terms, "actual": reference.update(target - 1, target)}
        slopes = {key: reference.slope(target - 1, field, "clean", pairs) for key, field in fields.items()}
        for row in found[0]["metric_rows"]:
            if row["target_step"] != target:
                continue
            near = 2e-5 * row["scalar_gradient_l2_norm"]
            for name in COMPONENTS:
                got = row[f"{name.removesuffix('_update')}_scalar_delta"]
                wanted = slopes[name][row["scalar_name"]]
                assert got == pytest.approx(wanted, rel=1e-3, abs=near * l2(fields[name])), name
            predicted = row["actual_update_predicted_scalar_delta"]
            wanted = slopes["actual"][row["scalar_name"]]
            assert predicted == pytest.approx(wanted, rel=1e-3, abs=near * l2(fields["actual"]))
            assert row["clipped_sgd_scalar_delta"] == pytest.approx(
                row["clip_coefficient"] * row["raw_sgd_scalar_delta"], rel=1e-5
            )


def test_component_rows_cut_terms_slice_by_slice(found, reference):
    metrics = {(row["target_step"], row["scalar_name"]): row for row in found[0]["metric_rows"]}
    groups = parameter_groups(reference.weights(36))
    rows = found[0]["component_rows"]
    order = [
        (target, name, component, group)
        for target in STEPS[1:]
        for name in SCALARS
        for component in COMPONENTS
        for group in DEFAULT
    ]
    assert [
        (row["target_step"], row["scalar_name"], row["component"], row["parameter_group_id"]) for row in rows
    ] == order
    pairs = reference.cell("__all__", "support_value")
    slopes = {}
    for target in STEPS[1:]:
        log, _, terms = reference.terms(target)
        for group in DEFAULT:
            for component in COMPONENTS:
                cut = {name: np.zeros_like(of) for name, of in reference.weights(36).items()}
                for name, index in groups[group]:
                    cut[name][index] = terms[component][name][index]
                if target == STEPS[1]:
                    slopes[group, component] = reference.slope(target - 1, cut, "clean", pairs)
        for row in (row for row in rows if row["target_step"] == target):
            group, component, name = row["parameter_group_id"], row["component"], row["scalar_name"]
            metric = metrics[target, name]
            norm = float(np.linalg.norm(restricted(terms[component], groups[group])))
            delta, size = row["component_scalar_delta"], row["scalar_gradient_l2_norm"]
            of_group = row["actual_update_predicted_scalar_delta_for_group"]
            of_all = metric["actual_update_predicted_scalar_delta"]
            wanted = {
                **identifiers(target, name, log),
                "optimizer_trace_dir": metric["optimizer_trace_dir"],
                "component_l2_norm": norm,
                "num_selected_parameters": len(restricted(terms[component], groups[group])),
                "selection_count": len(groups[group]),
                "component_fraction_of_actual_update_prediction_for_group": delta / of_group,
                "component_fraction_of_global_actual_update_prediction": delta / of_all,
                "component_scalar_gradient_cosine": delta / (row["component_l2_norm"] * size),
            }
            assert_same(row, wanted, rel=1e-5)
            if target == STEPS[1]:
                near = 2e-5 * metric["scalar_gradient_l2_norm"] * norm
                assert delta == pytest.approx(slopes[group, component][name], rel=1e-3, abs=near)
            if group == GLOBAL:
                assert row["scalar_gradient_l2_norm"] == metric["scalar_gradient_l2_norm"]
                assert delta == metric[f"{component.removesuffix('_update')}_scalar_delta"]
                assert of_group == of_all
    more = {
        "component", "parameter_group_id", "parameter_group_kind", "component_type", "partition_name", "group_layer",
        "group_head", "group_projection", "notes", "component_scalar_delta", "scalar_gradient_l2_norm",
        "actual_update_predicted_scalar_delta_for_group",
    }  # fmt: skip
    assert rows[0].keys() == wanted.keys() | more


def test_group_rows_say_what_a_group_selects(found):
    rows = {row["group_id"]: row for row in found[0]["group_rows"]}
    assert tuple(rows) == DEFAULT
    assert_same(
        rows[PROJECTIONS[3]],
        {"group_kind": "attention_head_projection", "component_type": "attention", "group_layer": 1, "group_head": 2,
         "partition_name": "attention_head_projections", "group_projection": "out_proj", "neuron": None,
         "selection_count": 1, "num_selected_parameters": 32 * 8, "selections": [
             {"parameter_name": "blocks.1.attn.out_proj.weight", "parameter_shape": [32, 32], "selector": "columns 16:24",
              "num_parameters": 256}]},
    )  # fmt: skip
    assert rows["attention_head:L1H2.qkvo"]["selection_count"] == 7


def test_route_pair_rows_are_the_objectives(found, reference):
    assert [row["pair_id"] for row in found[0]["route_pair_rows"]] == [
        pair["pair_id"] for pair in reference.cell("__all__", "support_value")
    ]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_groups_replace_the_default_and_their_terms_add_up(lake, tmp_path, reference, data):
    other = ("parameter:", "attention_projection:", "mlp_neuron:")
    valid = [group for group in parameter_groups(reference.weights(36)) if not group.startswith(other)]
    chosen = data.draw(st.lists(st.sampled_from(valid), min_size=1, max_size=6, unique=True))
    rows, _, _ = written(lake, tmp_path / "out", parameter_group=tuple(chosen))
    assert [row["group_id"] for row in rows["group_rows"]] == chosen
    parts = defaultdict(dict)
    for row in rows["component_rows"]:
        key = (row["target_step"], row["scalar_name"], row["parameter_group_id"])
        parts[key][row["component"]] = row["component_scalar_delta"]
        parts[key]["predicted"] = row["actual_update_predicted_scalar_delta_for_group"]
    assert {key[2] for key in parts} == set(chosen)
    for of in parts.values():
        current, momentum = of["adam_current_gradient"], of["adam_historical_momentum"]
        assert of["adam_preconditioned"] == pytest.approx(current + momentum, rel=1e-12, abs=1e-18)
        whole = current + momentum + of["weight_decay"]
        assert of["reconstructed_adamw_update"] == pytest.approx(whole, rel=1e-12, abs=1e-18)
        assert of["predicted"] == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_sums_that_must_agree(found):
    of = defaultdict(dict)
    for row in found[0]["component_rows"]:
        of[row["target_step"], row["scalar_name"], row["component"]][row["parameter_group_id"]] = row[
            "component_scalar_delta"
        ]
    for groups in of.values():
        four = sum(groups[name] for name in PROJECTIONS)
        assert groups["attention_head:L1H2.qkvo"] == pytest.approx(four, rel=1e-9, abs=1e-15)
    for row in found[0]["metric_rows"]:
        total = (
            row["adam_current_gradient_scalar_delta"]
            + row["adam_historical_momentum_scalar_delta"]
            + row["weight_decay_scalar_delta"]
            + row["reconstructed_adamw_residual"]
        )
        assert row["actual_update_predicted_scalar_delta"] == pytest.approx(total, rel=1e-12, abs=1e-15)


def test_the_summary_adds_up(found):
    rows, content, page = found
    summary = content["summary"]
    assert content["parameter_groups"] == list(DEFAULT)
    for scalar in summary["by_scalar"]:
        metrics = [row for row in rows["metric_rows"] if row["scalar_name"] == scalar["label"]]
        for mine, theirs in (
            ("sum_actual_delta", "actual_scalar_delta"),
            ("sum_predicted_delta", "actual_update_predicted_scalar_delta"),
            ("sum_reconstructed_adamw_residual", "reconstructed_adamw_residual"),
        ):
            assert scalar[mine] == pytest.approx(sum(row[theirs] for row in metrics), rel=1e-9, abs=1e-15)
        regions = [row for row in summary["by_region"] if row["label"] == scalar["label"]]
        assert len(regions) == 8 * 3
        for term in ("adam_current_gradient", "adam_historical_momentum", "weight_decay"):
            of = {row["region"]: row["contribution"] for row in regions if row["term"] == term}
            assert sum(of.values()) == pytest.approx(sum(row[f"{term}_scalar_delta"] for row in metrics))
            for region, group in zip(("W_Q", "W_K", "W_V", "W_O"), PROJECTIONS, strict=True):
                wanted = sum(
                    row["component_scalar_delta"]
                    for row in rows["component_rows"]
                    if (row["scalar_name"], row["component"], row["parameter_group_id"])
                    == (scalar["label"], term, group)
                )
                assert of[region] == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    groups = summary["by_group"]
    assert len(groups) == len(SCALARS) * len(COMPONENTS) * len(DEFAULT)
    sizes = sorted((abs(row["sum_delta"]) for row in groups), reverse=True)
    assert [abs(row["sum_delta"]) for row in summary["largest_groups"]] == sizes[:24]
    for row in groups[:20]:
        held = [
            of
            for of in rows["component_rows"]
            if (of["scalar_name"], of["component"], of["parameter_group_id"])
            == (row["scalar_name"], row["component"], row["parameter_group_id"])
        ]
        assert row["mean_cosine"] == pytest.approx(
            np.mean([of["component_scalar_gradient_cosine"] or 0 for of in held]), rel=1e-9, abs=1e-15
        )
        assert row["mean_fraction_of_global"] == pytest.approx(
            np.mean([of["component_fraction_of_global_actual_update_prediction"] for of in held])
        )
    for name in SCALARS:
        assert f"- **L1H2's `{name}` " in page


def test_half_of_the_change_stood_from_a_step_on(found):
    rows, _, page = found
    for name in SCALARS:
        deltas = [row["actual_scalar_delta"] for row in rows["metric_rows"] if row["scalar_name"] == name]
        made, total = np.cumsum(deltas), sum(deltas)
        step = next(
            target for at, target in enumerate(STEPS[1:]) if all(made[at:] * np.sign(total) >= abs(total) / 2)
        )
        line = next(line for line in page.splitlines() if line.startswith(f"- **L1H2's `{name}`"))
        assert f"half of the change stood from step {step} on" in line


def test_an_objective_is_a_cell_of_what_was_built(lake, tmp_path, reference):
    split = reference.pairs[-1]["split"]
    rows, _, _ = written(lake, tmp_path / "out", objective_pair_type="__all__", objective_route_split=split)
    pairs = reference.cell(split, "__all__")
    assert len(rows["route_pair_rows"]) == rows["metric_rows"][0]["num_pairs"] == len(pairs) < 16
    values = [reference.at(36, 36, "clean", pair["clean"])[SCALARS[1]] for pair in pairs]
    assert rows["metric_rows"][1]["source_value"] == pytest.approx(np.mean(values), rel=1e-4)

"""bilinear-qk-rank-adam-state-attribution on a recorded training, column by column against autograd and a plain AdamW split."""

import math
import shutil
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from lakebed.lake import Lake
from lakebed.lake.errors import UnknownName
from lakebed.queries.report import InvalidOption, ReportFailed

from tests.attribution_lake import HEAD, HEADS, RUN, STAGE, config

from .attribution_reference import (
    TIED,
    check_errors,
    check_qk_place,
    check_spectrum,
    check_sums,
    groups,
    rank_interval,
    restricted,
    run_report,
    tamper,
)
from .separation_reference import adamw_terms, inner, norm, pairs_of, weights_at

NAME = "bilinear-qk-rank-adam-state-attribution"
ROLES = ("prediction", "support_key", "key_distractors")
STEPS = range(7)
CLIPPED = (1, 2, 3, 4)
COMPONENTS = (
    "raw_sgd", "clipped_sgd", "adam_current_gradient", "adam_historical_momentum", "adam_preconditioned", "weight_decay",
    "reconstructed_adamw_update",
)  # fmt: skip
OPTIONS = {
    "head": HEAD,
    "rank": (3, 8),
    "context_stage": STAGE,
    "score_query_role": ROLES[0],
    "support_key_role": ROLES[1],
    "distractor_key_role": ROLES[2],
    "route_pair_source_type": ("support_value", "distractor"),
    "route_pair_type": "support_value",
    "max_route_pairs_per_type": 6,
}


@pytest.fixture(scope="module")
def world(attribution_lake_path, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("adam") / "adam.lake"
    shutil.copytree(attribution_lake_path, path)
    with Lake.open(path) as lake:
        made = run_report(lake, NAME, "0:6", **OPTIONS)
        weights = {step: weights_at(lake, RUN, step) for step in STEPS}
        yield SimpleNamespace(
            path=path,
            lake=lake,
            made=made,
            pairs=pairs_of(lake, RUN, ["support_value"], 6),
            weights=weights,
            terms={step: adamw_terms(lake, RUN, step, weights[step - 1], config()) for step in STEPS[1:]},
            steps={row["step"]: row for row in lake.table("training_steps", RUN).collect().to_dicts()},
            batches={row["step"]: row for row in lake.table("training_batches", RUN).collect().to_dicts()},
        )


def of_interval(world, source, rank):
    return rank_interval(world.weights, world.pairs, source, rank, (1, 1), ROLES, STAGE)


def row_of(rows, source, rank, **more):
    (found,) = [
        row
        for row in rows
        if (row["source_step"], row["rank"]) == (source, rank)
        and all(row[key] == value for key, value in more.items())
    ]
    return found


@pytest.mark.parametrize("source", STEPS[:-1])
@pytest.mark.parametrize("rank", [3, 8])
def test_metric_rows_are_the_split_of_the_recorded_step(world, source, rank):
    row, wanted = row_of(world.made.metric_rows, source, rank), of_interval(world, source, rank)
    step, settings = source + 1, config().optimization
    terms, raw, coefficient = world.terms[step]
    predicted = inner(wanted.gradient, wanted.update)
    near = {"rel": 2e-3, "abs": 1e-6}
    for name, value in {
        "source_rank_match_score": wanted.source,
        "target_rank_match_score": wanted.target,
        "actual_rank_match_delta": wanted.target - wanted.source,
        "actual_update_predicted_rank_match_delta": predicted,
        "actual_update_predicted_rank_match_delta_counting_aliases": predicted
        + float((wanted.gradient[TIED] * wanted.update[TIED]).sum()),
        "parameter_delta_l2_norm": norm(wanted.update),
        **{
            f"{name.removesuffix('_update')}_rank_delta": inner(terms[name], wanted.gradient)
            for name in COMPONENTS
        },
    }.items():
        assert row[name] == pytest.approx(value, **near), name
    check_errors(
        {
            "actual_delta": row["actual_rank_match_delta"],
            "predicted_delta": row["actual_update_predicted_rank_match_delta"],
            "relative_error": row["actual_update_rank_match_relative_error"],
            "sign_match": row["actual_update_rank_match_sign_match"],
        }
        | derived(row)
    )
    check_optimizer(world, row, step, raw, coefficient, settings)
    check_reconstruction(row, terms, wanted)
    check_place(world, row, source, rank)
    check_spectrum(row, wanted.spectrum, rank)


def derived(row):
    """Columns that the row leaves out, so that one check serves all reports."""
    actual, predicted = row["actual_rank_match_delta"], row["actual_update_predicted_rank_match_delta"]
    denominators = [max(abs(of), 1e-9) for of in (actual, predicted)]
    return {
        "residual": actual - predicted,
        "absolute_error": abs(actual - predicted),
        "relative_error_denominator": denominators[0],
        "predicted_relative_error_denominator": denominators[1],
        "predicted_relative_error": abs(actual - predicted) / denominators[1],
    }


def check_optimizer(world, row, step, raw, coefficient, settings):
    """OPT of the definitions; clipping acts in the first four steps, and the rate differs in every one."""
    assert row["raw_gradient_l2_norm"] == pytest.approx(norm(raw), rel=1e-6)
    assert row["trace_pre_clip_grad_norm"] == pytest.approx(norm(raw), rel=1e-6)
    assert row["grad_clip_norm"] == settings.grad_clip_norm == 2
    assert row["clip_coefficient"] == pytest.approx(coefficient, rel=1e-6)
    assert (row["clip_coefficient"] < 1) == (step in CLIPPED)
    assert row["clipped_gradient_l2_norm"] == pytest.approx(min(norm(raw), 2), rel=1e-6)
    assert row["adam_state_step_min"] == row["adam_state_step_max"] == step - 1
    assert row["adam_eps_values"] == [1e-8]
    assert row["adam_beta_values"] == [[settings.beta1], [settings.beta2]]
    assert row["adam_weight_decay_values"] == [0.05]
    assert row["trace_learning_rate"] == row["learning_rate"] == pytest.approx(0.01 * step / 12)
    stored = row["stored_optimizer_group_lr_values"]
    assert stored == [None if step == 1 else pytest.approx(0.01 * (step - 1) / 12)]
    assert not row["stored_optimizer_group_lr_matches_trace"]


def check_reconstruction(row, terms, wanted):
    error = {name: terms["reconstructed_adamw_update"][name] - of for name, of in wanted.update.items()}
    residual = row["actual_update_predicted_rank_match_delta"] - row["reconstructed_adamw_rank_delta"]
    assert row["reconstructed_adamw_residual"] == pytest.approx(residual, rel=1e-5, abs=1e-12)
    denominator = max(abs(row["actual_update_predicted_rank_match_delta"]), 1e-9)
    assert row["reconstructed_adamw_relative_error"] == pytest.approx(
        abs(row["reconstructed_adamw_residual"]) / denominator
    )
    assert row["reconstructed_adamw_sign_match"]
    assert row["reconstructed_adamw_l2_error"] == pytest.approx(norm(error), rel=0.05)
    assert row["reconstructed_adamw_l2_relative_error"] == pytest.approx(
        row["reconstructed_adamw_l2_error"] / row["parameter_delta_l2_norm"]
    )
    # What is left is the rounding of float32 weights.
    assert row["reconstructed_adamw_l2_relative_error"] < 1e-4
    assert row["clipped_sgd_rank_delta"] == pytest.approx(
        row["clip_coefficient"] * row["raw_sgd_rank_delta"], rel=1e-6
    )


def check_place(world, row, source, rank):
    check_qk_place(row, source, source + 1, rank, "clean", ROLES, STAGE)
    assert [row["route_pair_type"], row["route_split"], row["num_pairs"]] == ["support_value", "__all__", 6]
    logged, batch = world.steps[source + 1], world.batches[source + 1]
    assert row["loss_scope"] == "full_lm"
    assert row["loss"] == logged["loss"]
    assert row["loss_num_records"] == row["actual_batch_sample_count"] == len(batch["sample_ids"]) == 8
    assert row["loss_delta_vs_optimizer_trace"] is None
    assert row["optimizer_trace_batch_step"] == source + 1
    assert row["optimizer_trace_dir"] == world.lake.uri
    assert row["actual_batch_query_event_count"] == logged["query_event_count"]
    lengths = world.lake.sql(
        "SELECT sum(len(tokens) - 1) FROM examples WHERE run = ? AND split = ? AND list_contains(?, sample_id)",
        [RUN, batch["split"], batch["sample_ids"]],
    ).fetchall()
    assert row["loss_num_tokens"] == int(lengths[0][0])


@pytest.mark.parametrize(("source", "rank"), [(0, 3), (3, 8), (5, 3)])
def test_component_rows_have_norm_cosine_and_share(world, source, rank):
    wanted, terms = of_interval(world, source, rank), world.terms[source + 1][0]
    metric = row_of(world.made.metric_rows, source, rank)
    rows = [row for row in world.made.component_rows if (row["source_step"], row["rank"]) == (source, rank)]
    assert [row["component"] for row in rows] == list(COMPONENTS)
    for row in rows:
        assert {key: row[key] for key in metric} == metric
        of = terms[row["component"]]
        product, size = inner(of, wanted.gradient), norm(of)
        assert row["component_rank_delta"] == pytest.approx(product, rel=2e-3, abs=1e-6)
        assert row["component_l2_norm"] == pytest.approx(size, rel=1e-5, abs=1e-12)
        assert row["rank_gradient_l2_norm"] == pytest.approx(norm(wanted.gradient), rel=1e-4)
        if size:
            cosine = product / size / norm(wanted.gradient)
            assert row["component_rank_gradient_cosine"] == pytest.approx(cosine, abs=1e-4)
        else:
            # At step 0 there is no momentum yet.
            assert (source, row["component"]) == (0, "adam_historical_momentum")
            assert row["component_rank_gradient_cosine"] is None
            assert row["component_rank_delta"] == 0
        share = row["component_rank_delta"] / row["actual_update_predicted_rank_match_delta"]
        assert row["component_fraction_of_actual_update_prediction"] == pytest.approx(share)


def test_terms_add_up(world):
    for row in world.made.metric_rows:
        current, momentum = (
            row[f"adam_{of}_rank_delta"] for of in ("current_gradient", "historical_momentum")
        )
        preconditioned = row["adam_preconditioned_rank_delta"]
        assert current + momentum == pytest.approx(preconditioned, rel=1e-9, abs=1e-15)
        whole = preconditioned + row["weight_decay_rank_delta"]
        assert row["reconstructed_adamw_rank_delta"] == pytest.approx(whole, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("term", ["raw_sgd", "adam_historical_momentum", "weight_decay"])
def test_the_lake_has_every_term_by_part_of_the_model(world, term):
    """attribution_slices is finer than the report: a term restricted to any group, and groups that add up."""
    wanted, of = of_interval(world, 2, 3), world.terms[3][0][term]
    rows = world.lake.sql(
        "SELECT slice_kind, slice, a.value FROM attributions AS a JOIN specs USING (run, spec) WHERE run = ? AND term = ? "
        "AND source_step = 2 AND target_step = 3 AND split = '__all__' AND pair_type = 'support_value' "
        "AND parameters->>'$.parameters.rank' = '3'",
        [RUN, term],
    ).fetchall()
    held = {(kind, name): value for kind, name, value in rows}
    parts = groups(world.weights[2], HEADS)
    sums = {}
    for group, selections in parts.items():
        kind, _, name = group.partition(":")
        key = {
            "parameter": ("parameter", name),
            "attention_head_projection": ("head_projection", name),
            "mlp_neuron": ("neuron", name),
        }.get(kind)
        value = inner(restricted(of, selections), restricted(wanted.gradient, selections))
        if key is not None:
            assert held[key] == pytest.approx(value, rel=5e-3, abs=1e-7), group
            value = held[key]
        sums[group] = value
    plain = {key: value for key, value in sums.items() if key.split(":")[0] in ("parameter",)}
    assert math.fsum(plain.values()) == pytest.approx(
        row_of(world.made.metric_rows, 2, 3)[f"{term}_rank_delta"], rel=1e-9, abs=1e-15
    )
    if term == "raw_sgd":
        exact = {
            group: inner(restricted(of, part), restricted(wanted.gradient, part))
            for group, part in parts.items()
        }
        check_sums(exact)


def test_the_summary_adds_up_the_window(world):
    summary = world.made.facts["summary"]
    for of in summary["by_rank"]:
        rows = [row for row in world.made.metric_rows if f"rank {row['rank']}" == of["label"]]
        assert (of["num_intervals"], of["start_step"], of["end_step"]) == (6, 0, 6)
        assert of["sum_actual_delta"] == pytest.approx(sum(row["actual_rank_match_delta"] for row in rows))
        assert of["clipped_intervals"] == 4
        mean = sum(row["clip_coefficient"] for row in rows) / 6
        assert of["mean_clip_coefficient"] == pytest.approx(mean)
    for of in summary["by_component"]:
        rows = [
            row
            for row in world.made.component_rows
            if (f"rank {row['rank']}", row["component"]) == (of["label"], of["component"])
        ]
        total = sum(row["component_rank_delta"] for row in rows)
        actual = sum(row["actual_rank_match_delta"] for row in rows)
        assert of["sum_delta"] == pytest.approx(total, abs=1e-15)
        assert of["share_of_actual"] == pytest.approx(total / actual, abs=1e-12)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rank": (9,)}, InvalidOption, "--rank 9 exceeds the width of a head, 8"),
        ({"context_stage": "layer_7_post_mlp"}, UnknownName, "no stage 'layer_7_post_mlp'"),
        ({"head": "L3H0"}, UnknownName, "no head L3H0"),
        ({"distractor_key_role": "nowhere"}, UnknownName, "no role 'nowhere'"),
        ({"distractor_key_role": "support_key"}, InvalidOption, "are both support_key"),
        ({"loss_scope": "answer"}, InvalidOption, "--loss-scope answer: the optimizer stepped along"),
        ({"loss_scope": "half"}, InvalidOption, "--loss-scope"),
        ({"route_pair_source_type": ()}, InvalidOption, "--route-pair-source-type is required"),
        (
            {"record_side": ("clean", "corrupted")},
            InvalidOption,
            "--record-side is one of clean and corrupted",
        ),
        ({"pair_type": ("recency",)}, InvalidOption, "--route-pair-source-type and --pair-type disagree"),
        ({"grad_norm_match_tolerance": -1}, InvalidOption, "--grad-norm-match-tolerance"),
        (
            {"route_pair_type": "recency"},
            ReportFailed,
            "no pair is of split __all__ and type recency; there are",
        ),
        ({"route_split": "test_iid"}, ReportFailed, "no pair is of split test_iid"),
    ],
)
def test_bad_input_is_refused_in_one_line(world, changed, error, message):
    with pytest.raises(error, match=message) as raised:
        run_report(world.lake, NAME, "0:6", make=False, **{**OPTIONS, **changed})
    assert "\n" not in str(raised.value)


def test_an_interval_that_is_not_one_recorded_step_is_refused(world):
    with pytest.raises(ReportFailed, match="the update from step 4 to 24 of run 'r' was not recorded as one"):
        run_report(world.lake, NAME, "3,4,24", **OPTIONS)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "pre_clip_grad_norm",
            "Recomputed gradient norm mismatch at step 3: the recorded gradient has norm 2.1",
        ),
        ("learning_rate", "Optimizer param-group lr mismatch at step 3"),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(world, tmp_path, column, message):
    path = tmp_path / "tampered.lake"
    shutil.copytree(world.path, path)
    tamper(path, pl.col(column) + 0.25 * (pl.col("step") == 3))
    with Lake.open(path) as lake, pytest.raises(ReportFailed, match=message):
        run_report(lake, NAME, "0:6", make=False, **OPTIONS)

"""bilinear-qk-rank-actual-batch-attribution on a recorded training: the batch's loss is differentiated anew, in float64."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from lakebed.lake import Lake
from lakebed.lake.errors import UnknownName
from lakebed.queries.report import InvalidOption, ReportFailed

from tests.attribution_lake import HEAD, HEADS, RUN, STAGE

from .attribution_reference import (
    TIED,
    check_qk_place,
    check_spectrum,
    rank_interval,
    run_report,
    tamper,
)
from .separation_reference import batch_loss, gradient, inner, norm, pairs_of, weights_at

NAME = "bilinear-qk-rank-actual-batch-attribution"
ROLES = ("prediction", "support_key", "key_distractors")
STEPS = range(7)
OPTIONS = {
    "head": HEAD,
    "rank": (8, 2),
    "context_stage": STAGE,
    "score_query_role": ROLES[0],
    "support_key_role": ROLES[1],
    "distractor_key_role": ROLES[2],
    "route_pair_source_type": ("support_value", "distractor"),
    "route_pair_type": "distractor",
    "max_route_pairs_per_type": 6,
}


@pytest.fixture(scope="module")
def world(attribution_lake_path, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("batches") / "batches.lake"
    shutil.copytree(attribution_lake_path, path)
    with Lake.open(path) as lake:
        made = run_report(lake, NAME, "0:6", **OPTIONS)
        weights = {step: weights_at(lake, RUN, step) for step in STEPS}
        steps = {row["step"]: row for row in lake.table("training_steps", RUN).collect().to_dicts()}
        streams = {step: batch_of(lake, step) for step in STEPS[1:]}
        losses = {step: batch_loss(weights[step - 1], HEADS, tokens) for step, tokens in streams.items()}
        yield SimpleNamespace(
            path=path,
            lake=lake,
            made=made,
            pairs=pairs_of(lake, RUN, ["distractor"], 6),
            weights=weights,
            steps=steps,
            streams=streams,
            losses={step: float(of.detach()) for step, of in losses.items()},
            loss_gradients={step: gradient(of, weights[step - 1]) for step, of in losses.items()},
        )


def batch_of(lake, step):
    """Token ids of the records that the step's batch was logged to hold."""
    ((split, sample_ids),) = lake.sql(
        "SELECT split, sample_ids FROM training_batches WHERE run = ? AND step = ?", [RUN, step]
    ).fetchall()
    ((vocabulary,),) = lake.sql(
        "SELECT vocabulary FROM probes WHERE run = ? AND probe = 'probe'", [RUN]
    ).fetchall()
    token = {text: at for at, text in enumerate(vocabulary)}
    held = dict(
        lake.sql(
            "SELECT sample_id, tokens FROM examples WHERE run = ? AND split = ?", [RUN, split]
        ).fetchall()
    )
    return [[token[text] for text in held[sample_id]] for sample_id in sample_ids]


def row_of(rows, source, rank):
    (found,) = [row for row in rows if (row["source_step"], row["rank"]) == (source, rank)]
    return found


def of_interval(world, source, rank):
    return rank_interval(world.weights, world.pairs, source, rank, (1, 1), ROLES, STAGE)


@pytest.mark.parametrize("source", STEPS[:-1])
@pytest.mark.parametrize("rank", [2, 8])
def test_route_rows_are_those_of_the_definition(world, source, rank):
    row, wanted = row_of(world.made.route_rows, source, rank), of_interval(world, source, rank)
    w = world.weights[source]
    predicted = inner(wanted.gradient, wanted.update)
    for name, value in {
        "source_rank_match_score": wanted.source,
        "target_rank_match_score": wanted.target,
        "actual_rank_match_delta": wanted.target - wanted.source,
        "actual_update_predicted_rank_match_delta": predicted,
        "actual_update_predicted_rank_match_delta_counting_aliases": predicted
        + float((wanted.gradient[TIED] * wanted.update[TIED]).sum()),
        "parameter_delta_l2_norm": norm(wanted.update),
        "rank_gradient_l2_norm": norm(wanted.gradient),
        "actual_update_rank_gradient_cosine": predicted / norm(wanted.gradient) / norm(wanted.update),
        **score_means(world, wanted, source),
    }.items():
        assert row[name] == pytest.approx(value, rel=2e-3, abs=3e-6), name
    actual, first_order = row["actual_rank_match_delta"], row["actual_update_predicted_rank_match_delta"]
    residual = actual - first_order
    assert row["actual_update_rank_match_residual"] == residual
    relative = abs(residual) / max(abs(actual), 1e-9)
    assert row["actual_update_rank_match_relative_error"] == pytest.approx(relative)
    assert row["actual_update_rank_match_sign_match"] == (actual * first_order > 0)
    assert row["num_route_pairs"] == len(world.pairs) == 6
    assert row["num_route_scores"] == sum(len(s) + len(d) for _, s, d in wanted.scores(w))
    assert row["num_parameters"] == sum(of.numel() for of in w.values())
    unreached = {name for name, of in wanted.gradient.items() if not of.any()}
    assert set(row["zero_rank_gradient_parameter_names"]) == unreached
    assert row["zero_rank_gradient_parameter_count"] == len(unreached)
    check_place(row, source, rank)
    check_spectrum(row, wanted.spectrum, rank)


def score_means(world, wanted, source):
    """Means over scores: a pair with more distractors counts more."""
    found = {}
    for end, step in (("source", source), ("target", source + 1)):
        held = list(wanted.scores(world.weights[step]))
        for name, at in (("support", 1), ("distractor", 2)):
            scores = torch.cat([of[0][of[at]] for of in held])
            found[f"{end}_{name}_score_mean"] = float(scores.mean().detach())
    for name in ("support", "distractor"):
        ends = [found[f"{end}_{name}_score_mean"] for end in ("source", "target")]
        found[f"{name}_score_delta_mean"] = ends[1] - ends[0]
    return found


def check_place(row, source, rank):
    check_qk_place(row, source, source + 1, rank, "clean", ROLES, STAGE)
    assert [row["route_split"], row["route_pair_type"]] == ["__all__", "distractor"]
    assert row["objective"] == "rank_bilinear_qk_retrieval_separation"
    assert row["learning_rate"] == pytest.approx(0.01 * (source + 1) / 12)


@pytest.mark.parametrize("source", STEPS[:-1])
@pytest.mark.parametrize("rank", [2, 8])
def test_the_recorded_gradient_is_the_batch_s_loss_gradient(world, source, rank):
    """Everything on the loss, against autograd over the tokens of the logged records."""
    row, step = row_of(world.made.actual_batch_rows, source, rank), source + 1
    wanted, loss_gradient = of_interval(world, source, rank), world.loss_gradients[step]
    support = -inner(loss_gradient, wanted.gradient)
    reduction = -inner(loss_gradient, wanted.update)
    sizes = norm(loss_gradient), norm(wanted.gradient), norm(wanted.update)
    near = {"rel": 2e-3, "abs": 1e-6}
    for name, value in {
        "loss": world.losses[step],
        "loss_gradient_l2_norm": sizes[0],
        "rank_gradient_l2_norm": sizes[1],
        "parameter_delta_l2_norm": sizes[2],
        "loss_dot_rank_gradient": -support,
        "negative_loss_dot_rank_gradient": support,
        "loss_rank_gradient_cosine": -support / sizes[0] / sizes[1],
        "loss_negative_rank_gradient_cosine": support / sizes[0] / sizes[1],
        "sgd_equivalent_rank_match_delta_linearized": 0.01 * step / 12 * support,
        "loss_dot_actual_update": -reduction,
        "negative_loss_dot_actual_update": reduction,
        "loss_reduction_under_actual_update_linearized": reduction,
        "loss_actual_update_cosine": -reduction / sizes[0] / sizes[2],
        "loss_negative_actual_update_cosine": reduction / sizes[0] / sizes[2],
    }.items():
        assert row[name] == pytest.approx(value, **near), name
    assert (row["data_group_id"], row["loss_side"], row["loss_scope"]) == (
        "actual_batch",
        "actual_batch",
        "full_lm",
    )
    assert row["data_group_values"] == {"batch_source": "optimizer_trace"}
    check_trace(world, row, step)
    check_place(row, source, rank)
    route = row_of(world.made.route_rows, source, rank)
    shared = row.keys() & route.keys()
    assert {"actual_rank_match_delta", "actual_update_rank_match_residual"} < shared
    assert {key: row[key] for key in shared} == {key: route[key] for key in shared}


def check_trace(world, row, step):
    """What training logged of the batch (TR of the definitions)."""
    logged, streams = world.steps[step], world.streams[step]
    assert row["loss_num_records"] == row["actual_batch_sample_count"] == len(streams) == 8
    assert row["actual_batch_unique_sample_count"] == len({tuple(of) for of in streams})
    assert row["loss_num_tokens"] == sum(len(of) - 1 for of in streams)
    assert row["loss"] == row["optimizer_trace_loss"] == logged["loss"]
    assert row["loss_delta_vs_optimizer_trace"] is None
    assert row["optimizer_trace_dir"] == world.lake.uri
    assert row["optimizer_trace_batch_step"] == step
    assert row["optimizer_trace_token_accuracy"] == logged["token_accuracy"]
    assert row["actual_batch_query_event_count"] == logged["query_event_count"]
    assert row["optimizer_trace_pre_clip_grad_norm"] == logged["pre_clip_grad_norm"]
    assert row["optimizer_trace_parameter_delta_l2"] == pytest.approx(
        row["parameter_delta_l2_norm"], rel=1e-9
    )


def test_the_sgd_equivalent_is_the_raw_sgd_term_of_the_adam_report(world):
    adam = run_report(world.lake, "bilinear-qk-rank-adam-state-attribution", "0:6", **OPTIONS)
    for row in world.made.actual_batch_rows:
        other = row_of(adam.metric_rows, row["source_step"], row["rank"])
        raw_sgd = other["raw_sgd_rank_delta"]
        assert row["sgd_equivalent_rank_match_delta_linearized"] == pytest.approx(raw_sgd, rel=1e-9)
        for name in ("actual_rank_match_delta", "loss", "loss_num_tokens", "parameter_delta_l2_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-12)


def test_pair_rows_are_the_pairs_of_the_route(world):
    assert [row["pair_id"] for row in world.made.route_pair_rows] == [pair.pair_id for pair in world.pairs]


def test_the_summary_adds_up_the_window(world):
    summary = world.made.facts["summary"]
    # In the order of --rank.
    assert [of["label"] for of in summary["by_rank"]] == ["rank 8", "rank 2"]
    for of, rank in zip(summary["by_data_group"], (8, 2), strict=True):
        rows = [row for row in world.made.actual_batch_rows if row["rank"] == rank]
        assert of["data_group_values"] == {"batch_source": "optimizer_trace"}
        assert of["num_intervals"] == 6
        for name, column in {
            "sum_support": "negative_loss_dot_rank_gradient",
            "sum_sgd_equivalent": "sgd_equivalent_rank_match_delta_linearized",
            "sum_actual_delta": "actual_rank_match_delta",
            "sum_loss_reduction": "loss_reduction_under_actual_update_linearized",
        }.items():
            assert of[name] == pytest.approx(sum(row[column] for row in rows))
        assert of["mean_loss"] == pytest.approx(np.mean([row["loss"] for row in rows]))
        cosines = [row["loss_negative_rank_gradient_cosine"] for row in rows]
        assert of["mean_support_cosine"] == pytest.approx(np.mean(cosines))
        assert of["supporting_intervals"] == sum(cosine > 0 for cosine in cosines)
    assert "L1H1's rank 8 QK separation in" in world.made.findings[0].replace("separation**", "separation")
    ledger = [row for row in world.made.sections["ledger"] if row["panel"] == "rank 8, change"]
    last = [row["value"] for row in ledger if row["step"] == 6 and row["series"] == "actual change"]
    assert last == [pytest.approx(summary["by_rank"][0]["sum_actual_delta"])]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rank": (9,)}, InvalidOption, "--rank 9 exceeds the width of a head, 8"),
        ({"route_pair_type": None}, InvalidOption, "--route-pair-type is required"),
        ({"top_k_data_groups": 0}, InvalidOption, "--top-k-data-groups"),
        ({"loss_scope": "answer"}, InvalidOption, "--loss-scope answer: the optimizer stepped along"),
        ({"support_key_role": "key_distractors"}, InvalidOption, "are both key_distractors"),
        ({"score_query_role": "nowhere"}, UnknownName, "no role 'nowhere'"),
        ({"route_pair_type": "recency"}, ReportFailed, "no pair is of split __all__ and type recency"),
    ],
)
def test_bad_input_is_refused_in_one_line(world, changed, error, message):
    with pytest.raises(error, match=message) as raised:
        run_report(world.lake, NAME, "0:6", make=False, **{**OPTIONS, **changed})
    assert "\n" not in str(raised.value)


def test_steps_that_are_not_neighbours_are_refused(world):
    with pytest.raises(
        ReportFailed, match=r"from step 4 to 6 of run 'r' was not recorded as one step.*lakebed trace"
    ):
        run_report(world.lake, NAME, "4,6", **OPTIONS)


def test_several_learning_rates_in_one_step_are_refused(world, tmp_path):
    """One rate takes the SGD term back to the gradient: with two there is no such number."""
    path = tmp_path / "groups.lake"
    shutil.copytree(world.path, path)
    groups = json.loads(world.steps[1]["optimizer_groups"])
    two = json.dumps([groups[0], {**groups[0], "learning_rate": 0.5}])
    column = pl.when(pl.col("step") == 2).then(pl.lit(two)).otherwise(pl.col("optimizer_groups"))
    tamper(path, column.alias("optimizer_groups"))
    with (
        Lake.open(path) as lake,
        pytest.raises(ReportFailed, match=r"groups of step 2 have learning rates 0\.000833333, 0\.5"),
    ):
        run_report(lake, NAME, "0:6", make=False, **OPTIONS)

"""bilinear-qk-rank-update-attribution on a trained lake, column by column against a float64 decoder and autograd."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.report import InvalidOption

from tests.attribution_lake import HEAD, HEADS, NUM_STEPS, RUN, STAGE

from .attribution_reference import (
    check_decomposition,
    check_metric,
    check_qk_place,
    check_spectrum,
    check_sums,
    run_report,
)
from .separation_reference import (
    cells_of,
    gradient,
    keys_of,
    pairs_of,
    qk_basis,
    rank_scores,
    separation,
    weights_at,
)

NAME = "bilinear-qk-rank-update-attribution"
STEPS = (0, 1, 4, NUM_STEPS)
ROLES = ("prediction", "support_key", "key_distractors")
TYPES = ("support_value", "distractor")
COUNT = 16
OPTIONS = {
    "head": HEAD,
    "rank": (2, 8),
    "context_stage": STAGE,
    "score_query_role": ROLES[0],
    "support_key_role": ROLES[1],
    "distractor_key_role": ROLES[2],
    "pair_type": TYPES,
    "max_pairs_per_type": COUNT,
}


@pytest.fixture(scope="module")
def world(attribution_lake_path, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("qk") / "qk.lake"
    shutil.copytree(attribution_lake_path, path)
    with Lake.open(path) as lake:
        made = run_report(lake, NAME, ",".join(map(str, STEPS)), integrate=8, **OPTIONS)
        yield SimpleNamespace(
            lake=lake,
            made=made,
            pairs=pairs_of(lake, RUN, TYPES, COUNT),
            weights={step: weights_at(lake, RUN, step) for step in STEPS},
        )


def of_pair(w, event, basis):
    """Separation and what goes with it."""
    scores = rank_scores(w, HEADS, (1, 1), event, ROLES, basis, STAGE)
    _, supports, distractors = keys_of(event, ROLES)
    support, best = scores[supports].mean(), scores[distractors].max()
    return SimpleNamespace(
        value=separation(scores, supports, distractors),
        support=float(support.detach()),
        distractor=float(scores[distractors].mean().detach()),
        margin=float((support - best).detach()),
        wins=bool(scores[supports].max() > best),
        counts=(len(supports), len(distractors)),
    )


def expected(world, source, target, rank, side):
    """By pair id: what it was and what it became with the source's basis."""
    basis = qk_basis(world.weights[source], HEADS, (1, 1), rank)
    return {
        pair.pair_id: tuple(
            of_pair(world.weights[step], pair.sides[side], basis) for step in (source, target)
        )
        for pair in world.pairs
    }, basis


def update(world, source, target):
    return {
        name: (world.weights[target][name] - before).detach()
        for name, before in world.weights[source].items()
    }


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 4)])
@pytest.mark.parametrize(("rank", "side"), [(2, "clean"), (8, "corrupted")])
def test_metric_and_decomposition_rows_are_those_of_the_definition(world, source, target, rank, side):
    ends, basis = expected(world, source, target, rank, side)
    rows = {
        (row["split"], row["pair_type"]): row
        for row in world.made.metric_rows
        if (row["source_step"], row["rank"], row["record_side"]) == (source, rank, side)
    }
    cells = cells_of(world.pairs)
    assert rows.keys() == cells.keys()
    w, moved = world.weights[source], update(world, source, target)
    for cell, pairs in cells.items():
        row, of = rows[cell], [ends[pair.pair_id] for pair in pairs]
        g = gradient(sum(before.value for before, _ in of) / len(of), w)
        values = [[float(end[at].value.detach()) for end in of] for at in (0, 1)]
        check_metric(row, *values, g, moved, w)
        for name, attribute in {
            "support_delta_mean": "support",
            "distractor_delta_mean": "distractor",
            "max_margin_delta_mean": "margin",
            "support_beats_all_delta_mean": "wins",
        }.items():
            mean = sum(getattr(after, attribute) - getattr(before, attribute) for before, after in of)
            assert row[name] == pytest.approx(mean / len(of), rel=1e-3, abs=2e-5), name
        counts = [sum(before.counts[at] for before, _ in of) for at in (0, 1)]
        assert [row["num_support_scores"], row["num_distractor_scores"]] == counts
        assert row["num_scores"] == sum(counts)
        check_identity(row, source, target, rank, side, basis[2])
        if cell in (("__all__", "__all__"), ("heldout_pairs", "distractor")):
            groups = [
                other
                for other in world.made.decomposition_rows
                if all(
                    other[key] == row[key]
                    for key in ("source_step", "rank", "record_side", "split", "pair_type")
                )
            ]
            check_decomposition(groups, g, moved, w, HEADS)
            for other in groups:
                assert other["actual_delta"] == row["actual_delta"]
                assert other["global_predicted_delta"] == row["predicted_delta"]
                assert other["global_residual"] == row["residual"]
                assert other["global_relative_error"] == row["relative_error"]
                check_place(other, source, target, rank, side)


def check_place(row, source, target, rank, side):
    """Columns that say which interval, head and scalar a row is about."""
    check_qk_place(row, source, target, rank, side, ROLES, STAGE)
    assert row["objective"] == "rank_bilinear_qk_retrieval_separation"


def check_identity(row, source, target, rank, side, spectrum):
    check_place(row, source, target, rank, side)
    # The schedule warms up over twelve steps to 0.01; there is no rate at step 0.
    assert row["learning_rate"] == (None if source == 0 else pytest.approx(0.01 * source / 12))
    check_spectrum(row, spectrum.tolist(), rank)


@pytest.mark.parametrize(("rank", "side"), [(2, "corrupted"), (8, "clean")])
def test_score_rows_are_the_pairs_of_the_definition(world, rank, side):
    ends, _ = expected(world, 1, 4, rank, side)
    rows = [
        row
        for row in world.made.score_rows
        if (row["source_step"], row["rank"], row["record_side"]) == (1, rank, side)
    ]
    assert sorted(row["pair_id"] for row in rows) == sorted(ends)
    of_pairs = {pair.pair_id: pair for pair in world.pairs}
    for row in rows:
        pair = of_pairs[row["pair_id"]]
        assert (row["split"], row["pair_type"]) == (pair.split, pair.pair_type)
        for end, of in zip(("source", "target"), ends[row["pair_id"]], strict=True):
            near = {"rel": 1e-4, "abs": 1e-5}
            value = float(of.value.detach())
            assert row[f"{end}_rank_match_separation"] == pytest.approx(value, **near)
            assert row[f"{end}_support_score_mean"] == pytest.approx(of.support, **near)
            assert row[f"{end}_distractor_score_mean"] == pytest.approx(of.distractor, **near)
            assert row[f"{end}_rank_match_max_margin"] == pytest.approx(of.margin, **near)
            assert row[f"{end}_support_beats_all_distractors"] == of.wins
        delta = row["target_rank_match_separation"] - row["source_rank_match_separation"]
        assert row["rank_match_separation_delta"] == delta


def test_integrated_contributions_are_the_whole_change_of_the_longest_interval(world):
    for row in world.made.metric_rows:
        assert row["integrated_relative_error"] == pytest.approx(
            abs(row["actual_delta"] - row["integrated_delta"]) / row["relative_error_denominator"]
        )
        if row["source_step"] == 4 and row["split"] == row["pair_type"] == "__all__":
            assert row["integrated_relative_error"] < 1e-3
    for rank in (2, 8):
        check_sums(
            {
                row["group_id"]: row["integrated_delta_contribution"]
                for row in world.made.decomposition_rows
                if (row["source_step"], row["rank"], row["record_side"]) == (4, rank, "clean")
                and row["split"] == row["pair_type"] == "__all__"
            }
        )


def test_group_and_pair_rows_say_what_was_selected(world):
    groups = {row["group_id"]: row for row in world.made.group_rows}
    head = groups["attention_head:L1H0.qkvo"]
    assert (head["group_layer"], head["group_head"], head["component_type"]) == (1, 0, "attention")
    selected = {part["parameter_name"].split("attn.")[1]: part for part in head["selections"]}
    assert selected["q_proj.weight"]["selector"] == "rows 0:8"
    assert selected["out_proj.weight"]["selector"] == "columns 0:8"
    assert selected["out_proj.weight"]["parameter_shape"] == [16, 16]
    assert len(selected) == head["selection_count"] == 7
    assert head["num_selected_parameters"] == 4 * 8 * 16 + 3 * 8
    neuron = groups["mlp_neuron:L0N5"]
    assert (neuron["group_neuron"], neuron["num_selected_parameters"]) == (5, 33)
    assert sorted(row["pair_id"] for row in world.made.pair_rows) == sorted(
        pair.pair_id for pair in world.pairs
    )


def test_the_summary_adds_up_the_intervals_of_the_first_side(world):
    for of in world.made.facts["summary"]["by_rank"]:
        rows = [
            row
            for row in world.made.metric_rows
            if (row["rank"], row["record_side"]) == (of["rank"], "clean")
            and row["split"] == row["pair_type"] == "__all__"
        ]
        assert of["num_intervals"] == len(rows) == 3
        for name in ("actual_delta", "predicted_delta", "integrated_delta"):
            assert of[f"sum_{name}"] == pytest.approx(sum(row[name] for row in rows))
        for name in ("support", "distractor"):
            assert of[f"sum_{name}_delta"] == pytest.approx(sum(row[f"{name}_delta_mean"] for row in rows))
        assert of["sign_matches"] == sum(row["sign_match"] for row in rows)
        assert of["mean_relative_error"] == pytest.approx(sum(row["relative_error"] for row in rows) / 3)
    assert world.made.findings[0].startswith("**L1H1's rank-2 QK separation ")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rank": (9,)}, InvalidOption, "--rank 9 exceeds the width of a head, 8"),
        ({"rank": (0,)}, InvalidOption, "--rank must be at least 1"),
        ({"context_stage": "layer_7_post_mlp"}, UnknownName, "no stage 'layer_7_post_mlp'"),
        ({"head": "L3H0"}, UnknownName, "no head L3H0"),
        ({"support_key_role": "nowhere"}, UnknownName, "no role 'nowhere'"),
        ({"support_key_role": "key_distractors"}, InvalidOption, "are both key_distractors"),
        ({"decompose": ("atoms",)}, InvalidOption, "--decompose"),
        ({"top_k_groups": 0}, InvalidOption, "--top-k-groups"),
        ({"min_error_denominator": 0}, InvalidOption, "--min-error-denominator"),
        ({"pair_type": ()}, InvalidOption, "--pair-type"),
        (
            {"min_pairs_per_type": 200, "max_pairs_per_type": 200},
            Exception,
            "requested minimum causal patch pairs",
        ),
        ({"score_query_role": "support_value"}, MissingData, "needs attributions"),
    ],
)
def test_bad_input_is_refused_in_one_line(world, changed, error, message):
    with pytest.raises(error, match=message) as raised:
        run_report(world.lake, NAME, "0,1", make=False, **{**OPTIONS, **changed})
    assert "\n" not in str(raised.value)


def test_one_step_alone_is_no_interval(world):
    with pytest.raises(MissingData, match="made between two steps"):
        run_report(world.lake, NAME, "4", **OPTIONS)

"""attention-retrieval-separation-update-attribution on a trained lake, column by column against a float64 decoder."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lakebed.lake import Lake
from lakebed.lake.errors import UnknownName
from lakebed.queries.report import InvalidOption, ReportFailed

from tests.attribution_lake import HEADS, NUM_STEPS, RUN

from .attribution_reference import check_decomposition, check_metric, check_sums, run_report
from .separation_reference import (
    cells_of,
    decode,
    gradient,
    head_scores,
    keys_of,
    pairs_of,
    score_change_rows,
    separation,
    weights_at,
)

NAME = "attention-retrieval-separation-update-attribution"
STEPS = (0, 1, 4, NUM_STEPS)
HEAD = (1, 0)
ROLES = ("prediction", "support_value", "value_distractors")
TYPES = ("support_value", "distractor")
COUNT = 15
COMPONENTS = ("k_side", "score", "q_side")
OPTIONS = {
    "head": "L1H0",
    "score_query_role": ROLES[0],
    "support_key_role": ROLES[1],
    "distractor_key_role": ROLES[2],
    "score_component": COMPONENTS,
    "pair_type": TYPES,
    "max_pairs_per_type": COUNT,
}


@pytest.fixture(scope="module")
def world(attribution_lake_path, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("separations") / "separations.lake"
    shutil.copytree(attribution_lake_path, path)
    with Lake.open(path) as lake:
        yield SimpleNamespace(
            lake=lake,
            made=run_report(lake, NAME, ",".join(map(str, STEPS)), integrate=8, **OPTIONS),
            pairs=pairs_of(lake, RUN, TYPES, COUNT),
            weights={step: weights_at(lake, RUN, step) for step in STEPS},
        )


def of_pair(w, event, component, source):
    """The component's separation and its means, and the attention of the whole head, less that to the distractors."""
    source = {name: of.detach() for name, of in source.items()}
    frozen = {"q_side": {"keys_from": source}, "k_side": {"query_from": source}}.get(component, {})
    scores = head_scores(w, HEADS, HEAD, event, ROLES, **frozen)
    query, supports, distractors = keys_of(event, ROLES)
    attention = decode(w, HEADS, event.tokens).attention[HEAD][query].detach()
    return SimpleNamespace(
        value=separation(scores, supports, distractors),
        support=float(scores[supports].mean().detach()),
        distractor=float(scores[distractors].mean().detach()),
        attention=float(separation(attention, supports, distractors)),
        counts=(len(supports), len(distractors)),
    )


def rows_of(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 4)])
@pytest.mark.parametrize(
    ("component", "side"), [("score", "clean"), ("q_side", "corrupted"), ("k_side", "clean")]
)
def test_metric_and_decomposition_rows_are_those_of_the_definition(world, component, side, source, target):
    w, after = world.weights[source], world.weights[target]
    moved = {name: (after[name] - before).detach() for name, before in w.items()}
    held = {
        pair.pair_id: [of_pair(at, pair.sides[side], component, w) for at in (w, after)]
        for pair in world.pairs
    }
    mine = {"source_step": source, "score_component": component, "record_side": side}
    rows = {(row["split"], row["pair_type"]): row for row in rows_of(world.made.metric_rows, **mine)}
    cells = cells_of(world.pairs)
    assert rows.keys() == cells.keys()
    for cell, pairs in cells.items():
        row, of = rows[cell], [held[pair.pair_id] for pair in pairs]
        g = gradient(sum(before.value for before, _ in of) / len(of), w)
        values = [[float(end[at].value.detach()) for end in of] for at in (0, 1)]
        check_metric(row, *values, g, moved, w)
        assert row["source_objective_value"] == row["source_value"]
        sizes = np.abs(values[0]).mean(), np.std(values[0])
        near = {"rel": 1e-4, "abs": 1e-5}
        assert row["source_objective_value_abs_mean"] == pytest.approx(sizes[0], **near)
        assert row["source_objective_value_std"] == pytest.approx(sizes[1], **near)
        for name in ("support", "distractor"):
            mean = np.mean([getattr(end, name) - getattr(begin, name) for begin, end in of])
            assert row[f"{name}_delta_mean"] == pytest.approx(mean, **near)
        attention = [np.mean([ends[at].attention for ends in of]) for at in (0, 1)]
        assert row["source_attention_mean"] == pytest.approx(attention[0], abs=1e-6)
        assert row["target_attention_mean"] == pytest.approx(attention[1], abs=1e-6)
        change = row["target_attention_mean"] - row["source_attention_mean"]
        assert row["actual_attention_delta_mean"] == change
        counts = [sum(before.counts[at] for before, _ in of) for at in (0, 1)]
        assert [row["num_support_scores"], row["num_distractor_scores"]] == counts
        assert row["num_scores"] == sum(counts)
        assert row["num_unique_pairs"] == row["num_pairs"] == len(pairs)
        assert row["support_scores_per_pair_mean"] == counts[0] / len(pairs)
        assert row["distractor_scores_per_pair_mean"] == pytest.approx(counts[1] / len(pairs))
        check_place(row, source, target, component, side)
        if cell in (("__all__", "__all__"), ("validation_iid", "support_value")):
            groups = rows_of(world.made.decomposition_rows, **mine, split=cell[0], pair_type=cell[1])
            check_decomposition(groups, g, moved, w, HEADS)
            for group in groups:
                check_place(group, source, target, component, side)
                assert group["actual_delta"] == row["actual_delta"]
                assert group["global_predicted_delta"] == row["predicted_delta"]
                assert group["global_residual"] == row["residual"]
                assert group["global_relative_error"] == row["relative_error"]


def check_place(row, source, target, component, side):
    assert [row[key] for key in ("source_step", "target_step", "step_gap")] == [
        source,
        target,
        target - source,
    ]
    assert row["source_checkpoint"] == f"step_{source:06d}"
    assert row["target_checkpoint"] == f"step_{target:06d}"
    assert row["learning_rate"] == (None if source == 0 else pytest.approx(0.01 * source / 12))
    assert [row[key] for key in ("head_layer", "head", "head_label")] == [1, 0, "L1H0"]
    assert tuple(row[f"{of}_role"] for of in ("score_query", "support_key", "distractor_key")) == ROLES
    assert row["score_key_role"] == "support_value-minus-mean-value_distractors"
    assert [row["score_component"], row["record_side"]] == [component, side]
    assert row["objective"] == "retrieval_separation"


@torch.no_grad()
@pytest.mark.parametrize(("source", "side"), [(1, "corrupted"), (4, "clean")])
def test_the_sides_are_those_of_the_definition_whatever_component_is_asked(world, source, side):
    target = STEPS[STEPS.index(source) + 1]
    before, after = world.weights[source], world.weights[target]
    found = {}
    for pair in world.pairs:
        event = pair.sides[side]
        query, supports, distractors = keys_of(event, ROLES)
        ends = [decode(w, HEADS, event.tokens) for w in (before, after)]
        q0, q1 = (end.queries[HEAD][query] / 8**0.5 for end in ends)
        k0, k1 = (end.keys[HEAD] for end in ends)
        found[pair.pair_id] = {
            name: float(separation(scores, supports, distractors))
            for name, scores in {
                "total_score": k1 @ q1 - k0 @ q0,
                "q_side": k0 @ (q1 - q0),
                "k_side": (k1 - k0) @ q0,
                "qk_cross": (k1 - k0) @ (q1 - q0),
            }.items()
        }
    for cell, pairs in cells_of(world.pairs).items():
        rows = rows_of(
            world.made.metric_rows, source_step=source, record_side=side, split=cell[0], pair_type=cell[1]
        )
        assert [row["score_component"] for row in rows] == list(COMPONENTS)
        for row in rows:
            for name in ("total_score", "q_side", "k_side", "qk_cross"):
                mean = np.mean([found[pair.pair_id][name] for pair in pairs])
                assert row[f"actual_{name}_delta_mean"] == pytest.approx(mean, abs=1e-5), name
            sides = [row[f"actual_{name}_delta_mean"] for name in ("q_side", "k_side", "qk_cross")]
            assert sum(sides) == pytest.approx(row["actual_total_score_delta_mean"], abs=1e-12)
            own = {"score": "total_score"}.get(row["score_component"], row["score_component"])
            assert row["actual_delta"] == pytest.approx(row[f"actual_{own}_delta_mean"], abs=1e-5)
            assert row["target_value"] - row["source_value"] == pytest.approx(row["actual_delta"], abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("source", "side"), [(0, "clean"), (4, "corrupted")])
def test_score_rows_are_those_of_the_definition(world, source, side):
    target = STEPS[STEPS.index(source) + 1]
    rows = rows_of(world.made.score_rows, source_step=source, record_side=side)
    by_pair = {}
    for row in rows:
        by_pair.setdefault(row["pair_id"], {})[row["score_key_role"], row["key_position"]] = row
    for pair in world.pairs:
        wanted = score_change_rows(
            world.weights[source], world.weights[target], HEADS, HEAD, pair.sides[side], ROLES
        )
        found = by_pair[pair.pair_id]
        assert found.keys() == wanted.keys()
        for key, numbers in wanted.items():
            row = found[key]
            assert {name: row[name] for name in numbers} == pytest.approx(numbers, abs=5e-6)
            check_score_row(row, pair, source, target)


def check_score_row(row, pair, source, target):
    """Where it stands, and what follows from its numbers."""
    assert [row[key] for key in ("source_step", "target_step", "step_gap")] == [
        source,
        target,
        target - source,
    ]
    assert row["source_checkpoint"] == f"step_{source:06d}"
    assert row["target_checkpoint"] == f"step_{target:06d}"
    assert [row[key] for key in ("head_layer", "head", "head_label")] == [1, 0, "L1H0"]
    assert row["score_query_role"] == "prediction"
    for key in ("split", "pair_type", "source_sample_id", "source_query_index"):
        assert row[key] == getattr(pair, key)
    change = row["target_score"] - row["source_score"]
    query, keys = ([f"q_{of}_source_key" for of in KINDS], [f"source_query_k_{of}" for of in KINDS])
    for name, value in {
        "actual_score_delta": change,
        "actual_attention_delta": row["target_attention"] - row["source_attention"],
        "softmax_residual": row["actual_attention_delta"] - row["softmax_first_order_attention_delta"],
        "reconstructed_score_delta": sum(row[of] for of in (*query, *keys, "qk_vector_cross")),
        "score_reconstruction_error": row["reconstructed_score_delta"] - change,
        "linear_score_delta": sum(row[of] for of in (*query[:3], *keys[:3])),
        "internal_weight_input_cross_delta": row[query[3]] + row[keys[3]],
    }.items():
        assert row[name] == pytest.approx(value, abs=1e-12), name
    for of in ("q_delta", "k_delta"):
        assert 0 <= row[f"{of}_reconstruction_error"] < 2e-5


KINDS = ("input", "weight", "bias", "weight_input_cross")


def test_integrated_contributions_are_the_whole_change_of_the_longest_interval(world):
    for component in COMPONENTS:
        mine = {
            "source_step": 4,
            "record_side": "clean",
            "score_component": component,
            "split": "__all__",
            "pair_type": "__all__",
        }
        (row,) = rows_of(world.made.metric_rows, **mine)
        assert row["integrated_relative_error"] < 1e-3
        check_sums(
            {
                of["group_id"]: of["integrated_delta_contribution"]
                for of in rows_of(world.made.decomposition_rows, **mine)
            }
        )


def test_the_summary_says_what_the_rows_say(world):
    summary, made = world.made.facts["summary"], world.made
    whole = {"record_side": "clean", "split": "__all__", "pair_type": "__all__"}
    rows = rows_of(made.metric_rows, **whole)
    assert summary["num_intervals"] == 3
    assert summary["intervals"] == ["0->1", "1->4", f"4->{NUM_STEPS}"]
    assert summary["target_steps"] == [1, 4, NUM_STEPS]
    assert summary["final_target_step"] == NUM_STEPS
    assert summary["final_all"] == [row for row in rows if row["target_step"] == NUM_STEPS]
    assert len(summary["final_metric_by_split_and_pair_type"]) == 9 * 3
    of_score = rows_of(rows, score_component="score")
    for name in ("q_side", "k_side"):
        total = sum(row[f"actual_{name}_delta_mean"] for row in of_score)
        assert summary["sides"][f"sum_{name}"] == pytest.approx(total, abs=1e-12)
    total = sum(row["actual_total_score_delta_mean"] for row in of_score)
    assert summary["sides"]["sum_actual"] == pytest.approx(total, abs=1e-12)
    assert sum(part["sum_delta"] for part in summary["parts"]) == pytest.approx(total, abs=1e-5)
    assert len(summary["parts"]) == 9
    assert [of["label"] for of in summary["by_component"]] == ["key side", "score", "query side"]
    sides = made.sections["sides"]
    assert {row["step"] for row in sides} == set(STEPS)
    ends = {
        row["series"]: row["value"] for row in sides if row["step"] == NUM_STEPS and row["panel"] == "change"
    }
    assert ends["score separation"] == pytest.approx(total, abs=1e-12)
    verb = "grew" if total > 0 else "fell"
    assert made.findings[0].startswith(
        f"**L1H0's score of `support_value` above `value_distractors` {verb} by "
    )
    larger = "query" if abs(summary["sides"]["sum_q_side"]) > abs(summary["sides"]["sum_k_side"]) else "key"
    assert made.findings[1].startswith(f"**The {larger} side moved it more**")
    assert len(made.group_rows) == len(
        rows_of(made.decomposition_rows, source_step=0, score_component="score", **whole)
    )
    assert sorted(row["pair_id"] for row in made.pair_rows) == sorted(pair.pair_id for pair in world.pairs)


def test_parts_that_do_not_add_up_are_refused(world):
    with pytest.raises(
        ReportFailed, match=r"the parts miss what was measured by up to .* --reconstruction-tolerance 1e-09"
    ):
        run_report(
            world.lake, NAME, ",".join(map(str, STEPS)), integrate=8, reconstruction_tolerance=1e-9, **OPTIONS
        )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"head": "L3H0"}, UnknownName, "no head L3H0"),
        ({"support_key_role": "nowhere"}, UnknownName, "no role 'nowhere'"),
        ({"support_key_role": "value_distractors"}, InvalidOption, "are both value_distractors"),
        ({"score_component": ("v_side",)}, InvalidOption, "--score-component"),
        ({"score_component": ()}, InvalidOption, "--score-component"),
        ({"record_side": ("both",)}, InvalidOption, "--record-side"),
        ({"decompose": ("atoms",)}, InvalidOption, "--decompose"),
        ({"reconstruction_tolerance": 0}, InvalidOption, "--reconstruction-tolerance"),
        ({"top_k_groups": 0}, InvalidOption, "--top-k-groups"),
        ({"min_error_denominator": -1}, InvalidOption, "--min-error-denominator"),
        ({"score_query_role": None}, InvalidOption, "--score-query-role is required"),
    ],
)
def test_bad_input_is_refused_in_one_line(world, changed, error, message):
    with pytest.raises(error, match=message) as raised:
        run_report(world.lake, NAME, "0,1", make=False, **{**OPTIONS, **changed})
    assert "\n" not in str(raised.value)

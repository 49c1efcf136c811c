"""What the report says of invented reruns, whose numbers can be done in the head."""

import json
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake import Unit
from lakebed.lake.names import spec_id
from lakebed.lake.value_codes import eval_kinds
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report

from .value_code_lake import make_value_code_lake

OPTIONS = {
    "source_stage": "layer_0_post_mlp",
    "target_stage": "layer_1_post_mlp",
    "source_position_role": "support_value",
    "target_position_role": "prediction",
    "group_by": "answer_value",
    "basis_rank": [2],
    "control": ["shuffled_answer_value", "random_subspace"],
}
CONTEXT = {"context_stage": "layer_0_post_mlp", "context_position_role": "prediction", "context_rank": 2}


def report(**options):
    return load_report("value-code-transfer-rescue").parse({**OPTIONS, **options})


@pytest.fixture
def made(tmp_path):
    invented = make_value_code_lake(tmp_path / "made.lake", records=12)
    yield invented
    invented.lake.close()


def invent(made, asked, answers, flat=None):
    """Reruns in which the answer's logit is `answers[kind]` (a number, or one per step), its first competitor's 1, the
    others' 0; `flat` names events in which nothing changes."""
    judged = _judged(made)
    for need in asked.needs():
        rows = []
        for number, step in enumerate(made.steps):
            for event in made.events:
                kinds = answers if event["event"] in judged else ["clean"]
                for kind in kinds:
                    value = answers[kind]
                    value = value[number] if isinstance(value, list) else value
                    if event["event"] in (flat or ()):
                        value = 2.0
                    logits = [1.0] + [0.0] * (len(event["competitors"]) - 1)
                    source = (
                        judged[(judged.index(event["event"]) + 1) % len(judged)] if kind != "clean" else None
                    )
                    rows.append(
                        {
                            "probe": "probe", "spec": spec_id(need.parameters), "step": step, "event": event["event"],
                            "eval_kind": kind, "answer_logit": value, "competitor_logits": logits,
                            "answer_log_prob": value - np.log(np.exp([value, *logits]).sum()), "best_token": 0,
                            "source_event": source if "shuffled" in kind else None,
                        }
                    )  # fmt: skip
        unit = Unit(
            need.dataset, made.run, spec_id(need.parameters), tuple(made.steps), parameters=need.parameters
        )
        with made.lake.unit(unit) as writer:
            writer.rows("value_code_runs", rows)
            writer.rows("value_code_bases", [])


def _judged(made):
    found = made.lake.sql(
        "SELECT event FROM events WHERE split_number(sample_id, query_index) >= 0.75 ORDER BY event"
    ).fetchall()
    return [event for (event,) in found]


def written(made, out, asked):
    printed = run_report(made.lake, asked, out, chart_formats=["svg"])
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("rescue_rows", "summary_rows")
    }
    return printed, rows, Path(printed["markdown"]).read_text()


def kinds(asked, **answers):
    """Logits by kind: the clean run's 5, 1 without the code, and what is given or nothing back."""
    found = {"clean": 5.0, "target_subspace_removed": 1.0, "oracle_actual_projected": 5.0}
    for kind in eval_kinds(asked.control, asked.has_context):
        found.setdefault(kind, 1.0)
    return {**found, **answers}


def test_a_transfer_that_suffices_is_said_to(made, tmp_path):
    asked = report()
    invent(made, asked, kinds(asked, true_transfer=[1.0, 4.0, 4.6], random_subspace=[1.0, 2.0, 2.0]))
    printed, rows, text = written(made, tmp_path / "out", asked)
    assert "rank-2 code of layer_1_post_mlp / prediction **is causal**: taking it away lowers" in text
    assert "by **4** (4 → 0, lower in 100 % of" in text
    # At equal logits the token that comes first is named: some answers come after the competitor.
    assert "gives back **90 %** of that (margin 3.6), clearly more than every control" in text
    assert "the best, random_subspace, gives 25 %" in text
    assert "gives back at least half, and clearly more than the others, from step **20** to the last" in text
    assert list(printed["plots"]) == ["rescue_fraction", "margins"]
    of = [
        row for row in rows["summary_rows"]
        if (row["checkpoint_step"], row["eval_kind"], row["scalar_name"]) == (30, "true_transfer", "value_margin")
    ]  # fmt: skip
    assert of[0]["mean_total_drop"] == pytest.approx(4)
    assert of[0]["mean_rescue"] == pytest.approx(3.6)
    assert of[0]["mean_unrecovered"] == pytest.approx(0.4)
    assert of[0]["mean_rescue_fraction_from_means"] == pytest.approx(0.9)
    assert of[0]["improved_fraction"] == 1
    # Every drop is the same: no variance that could be explained.
    assert of[0]["rescue_vs_drop_r_squared"] is None


def test_what_a_control_gives_too_is_no_sufficiency(made, tmp_path):
    asked = report()
    invent(made, asked, kinds(asked, true_transfer=5.0, shuffled_answer_value=4.9))
    *_, text = written(made, tmp_path / "out", asked)
    assert "gives back **100 %** of that (margin 4), **not** clearly more than every control" in text
    assert "does not give back half, and clearly more than the others, at the last step" in text


def test_without_controls_nothing_is_claimed(made, tmp_path):
    asked = report(control=[])
    invent(made, asked, kinds(asked, true_transfer=5.0))
    *_, text = written(made, tmp_path / "out", asked)
    assert "No --control was asked for" in text
    assert "The shuffle" not in text


def test_a_context_must_beat_source_and_context_alone(made, tmp_path):
    asked = report(**CONTEXT)
    answers = {"true_transfer": 3.0, "context_only": 3.4, "source_plus_context": 4.6}
    invent(made, asked, kinds(asked, **answers, source_plus_context_random_subspace_not_refit=9.0))
    printed, _, text = written(made, tmp_path / "out", asked)
    assert "source_plus_context from layer_0_post_mlp / support_value gives back **90 %**" in text
    assert "clearly more than every control, or either alone: the best, context_only, gives 60 %" in text
    assert "not_refit" not in Path(printed["plots"]["rescue_fraction"]).read_text()


def test_ranks_are_set_beside_each_other(made, tmp_path):
    asked = report(basis_rank=[2, 3])
    invent(made, asked, kinds(asked, true_transfer=4.0))
    *_, text = written(made, tmp_path / "out", asked)
    assert "At step 30 the rank-3 code" in text
    assert "true_transfer at the other ranks, last step: rank 2 75 % (best control 0 %)" in text


def test_where_removal_helps_there_is_nothing_to_rescue(made, tmp_path):
    asked = report()
    invent(made, asked, kinds(asked, clean=0.5, oracle_actual_projected=0.5))
    printed, _, text = written(made, tmp_path / "out", asked)
    assert "is **not** shown to be causal: taking it away raises the margin" in text
    assert "nothing to rescue" in text
    assert list(printed["plots"]) == ["margins"]


def test_steps_without_a_drop_are_named(made, tmp_path):
    asked = report()
    same = [1.1, 5.0, 5.0]
    invent(made, asked, kinds(asked, clean=same, oracle_actual_projected=same))
    *_, text = written(made, tmp_path / "out", asked)
    assert "At step 10 taking the code away lowers the margin by less than 5 %" in text


def test_a_row_without_a_drop_has_no_fraction(made, tmp_path):
    asked = report()
    flat = _judged(made)[:2]
    invent(made, asked, kinds(asked, true_transfer=3.0), flat)
    _, rows, _ = written(made, tmp_path / "out", asked)
    names = {(event["sample_id"], event["query_index"]) for event in made.events if event["event"] in flat}
    for row in rows["rescue_rows"]:
        unmoved = (row["sample_id"], row["query_index"]) in names
        assert (row["total_drop"] == 0) == unmoved or row["scalar_name"] == "value_accuracy"
        if unmoved:
            assert row["rescue_fraction"] is None
            assert row["improved_by_patch"] is False
    for row in rows["summary_rows"]:
        if row["scalar_name"] == "value_margin" and row["eval_kind"] == "true_transfer":
            assert row["num_rescue_fraction_rows"] == row["num_rows"] - 2
            # Rows that lose nothing rescue nothing: both fractions are of the others.
            assert row["mean_rescue_fraction_from_means"] == pytest.approx(0.5)
            assert row["mean_rescue_fraction_per_row"] == pytest.approx(0.5)
            assert row["rescue_vs_drop_r_squared"] is not None


def test_its_sql_to_go_on_with_runs(made):
    asked = report()
    invent(made, asked, kinds(asked))
    for _, query in asked.next_queries:
        made.lake.sql(query.replace("$run", f"'{made.run}'")).fetchall()


def test_ties_name_the_token_that_comes_first(made, tmp_path):
    asked = report()
    invent(made, asked, kinds(asked))
    _, rows, _ = written(made, tmp_path / "out", asked)
    first = {
        (event["sample_id"], event["query_index"]): event["answer_token"] < event["competitors"][0]
        for event in made.events
    }
    assert set(first.values()) == {True, False}
    for row in rows["rescue_rows"]:
        if row["scalar_name"] == "value_accuracy":
            assert row["clean_scalar"] == 1
            assert row["target_subspace_removed_scalar"] == first[row["sample_id"], row["query_index"]]

import json
import math
from pathlib import Path

import pytest
from lakebed.lake import Lake, Unit
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.run import run_report

from .conftest import assert_same, make_trace_lake


def report(**options):
    return load_report("optimizer-update-trace").parse(options)


def written(made, tmp_path, **options):
    printed = run_report(made.lake, report(**options), tmp_path / "out", chart_formats=[])
    keys = ("step_rows", "batch_rows", "parameter_update_rows")
    return printed, *(
        [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in keys
    )


def root_sum(rows, column):
    total = 0.0
    for row in sorted(rows, key=lambda row: row["parameter"]):
        total += row[column] * row[column]
    return math.sqrt(total)


def test_step_rows_are_the_definition(trace, tmp_path):
    _, steps, *_ = written(trace, tmp_path)
    assert [row["step"] for row in steps] == trace.steps
    for row, stored in zip(steps, trace.step_rows, strict=True):
        updates = [each for each in trace.update_rows if each["step"] == row["step"]]
        assert (row["source_step"], row["target_step"]) == (row["step"] - 1, row["step"])
        copied = (
            "loss",
            "token_accuracy",
            "learning_rate",
            "pre_clip_grad_norm",
            "grad_clip_norm",
            "batch_size",
        )
        assert {key: row[key] for key in copied} == {key: stored[key] for key in copied}
        assert_same(
            row,
            {
                "parameter_delta_l2": root_sum(updates, "delta_l2"),
                "parameter_delta_max_abs": max(each["delta_max_abs"] for each in updates),
                "parameter_l2_before": root_sum(updates, "weight_l2_before"),
                "clipped_gradient_l2": root_sum(updates, "clipped_gradient_l2"),
                "update_dot_negative_clipped_gradient": sum(
                    each["update_dot_negative_clipped_gradient"] for each in updates
                ),
                "optimizer_state_entries": len(updates),
                "optimizer_state_step_max": row["step"],
                "adam_exp_avg_l2": root_sum(updates, "exp_avg_l2"),
                "adam_exp_avg_sq_l2": root_sum(updates, "exp_avg_sq_l2"),
                "adam_exp_avg_count": sum(each["numel"] for each in updates),
                "adam_exp_avg_sq_count": sum(each["numel"] for each in updates),
                "clipped": stored["clip_coefficient"] < 1,
                "momentum_l2": root_sum(updates, "momentum_l2"),
            },
            rel=1e-13,
            near=0,
        )


def test_the_terms_add_up_to_the_update(trace, tmp_path):
    _, steps, *_ = written(trace, tmp_path)
    for row in steps:
        terms = [
            row[f"{name}_dot_update"] for name in ("current_gradient", "momentum", "weight_decay", "residual")
        ]
        assert sum(terms) == pytest.approx(row["parameter_delta_l2"] ** 2, rel=1e-12)


def test_batches_carry_their_queries_in_order(trace, tmp_path):
    _, _, batches, _ = written(trace, tmp_path)
    for row, stored in zip(batches, trace.batch_rows, strict=True):
        numbers = [int(sample.split("_")[1]) for sample in stored["sample_ids"]]
        repeated = [n for n in numbers for _ in range(1 + n % 2)]
        assert row == {
            "step": stored["step"],
            "batch_size": 2,
            "query_event_count": len(repeated),
            "splits": ["train"],
            "sample_ids": stored["sample_ids"],
            "query_keys": [f"K{n:02d}" for n in repeated],
            "answer_values": [f"V{n:03d}" for n in repeated],
        }


def test_a_batch_with_an_unknown_example_has_no_queries(tmp_path):
    def change(steps, batches, updates):
        batches[0]["sample_ids"] = ["train_000001", "other"]

    made = make_trace_lake(tmp_path / "l", [1, 2], change=change)
    _, _, batches, _ = written(made, tmp_path)
    assert [batches[0][key] for key in ("query_event_count", "query_keys", "answer_values")] == [None] * 3
    assert batches[1]["query_keys"]
    made.lake.close()


@pytest.mark.parametrize("top", [0, 2, 24])
def test_largest_updates_of_each_step(trace, tmp_path, top):
    _, _, _, rows = written(trace, tmp_path, top_k_parameters=top)
    wanted = []
    for step in trace.steps:
        updates = [each for each in trace.update_rows if each["step"] == step]
        wanted += sorted(updates, key=lambda each: -each["delta_l2"])[:top]
    assert len(rows) == len(wanted)
    for row, stored in zip(rows, wanted, strict=True):
        assert row["parameter_l2_before"] == stored["weight_l2_before"]
        assert_same(
            row, {key: stored[key] for key in ("step", "parameter", "numel", "delta_l2", "delta_max_abs")}
        )


def test_printed_keys_and_replay_status(trace, tmp_path):
    printed, *_ = written(trace, tmp_path)
    assert printed["checkpoint_dir"] == f"{trace.lake.uri}/tensors/traced/weights"
    assert {
        "report",
        "markdown",
        "step_rows",
        "batch_rows",
        "parameter_update_rows",
        "checkpoint_dir",
    } <= printed.keys()
    content = json.loads(Path(printed["report"]).read_text())
    assert content["historical_replay_status"] == "instrumented_from_initialization_exact_for_this_trace"
    assert content["historical_replay_blocker"] is None
    assert content["summary"]["steps"] == 8


def test_a_continuation_that_is_no_replay_says_why(tmp_path):
    made = make_trace_lake(tmp_path / "l", [11, 12])
    run = {
        "source": "trace",
        "parent_run": "old",
        "parent_step": 10,
        "historical_replay": "the batch order restarts",
    }
    with made.lake.unit(Unit("run", "again", "run")) as writer:
        writer.rows("runs", [run])
    with made.lake.unit(Unit("trace", "again", "trace", (11,))) as writer:
        writer.rows("training_steps", [row for row in made.step_rows if row["step"] == 11])
        writer.rows("parameter_updates", [row for row in made.update_rows if row["step"] == 11])
    printed, _, batches, _ = written(made, tmp_path, run="again")
    content = json.loads(Path(printed["report"]).read_text())
    assert content["historical_replay_status"] == "instrumented_continuation_not_historical_replay"
    assert content["historical_replay_blocker"] == "the batch order restarts"
    assert content["warnings"] == ["This trace is not a historical replay: the batch order restarts."]
    assert batches == []
    made.lake.close()


def test_markdown_says_when_the_loss_fell_and_that_terms_are_arithmetic(trace, tmp_path):
    printed, *_ = written(trace, tmp_path)
    text = Path(printed["markdown"]).read_text()
    assert "Over 8 recorded steps, 0 to 8, the loss went from" in text
    assert "**fell fastest between steps 0 and 2**" in text
    assert "arithmetic, not a counterfactual" in text
    assert "Clipping acted in" in text


def test_a_foreign_loop_without_loss_and_moments(tmp_path):
    lake = Lake.create(tmp_path / "l")
    with lake.unit(Unit("trace", "bare", "trace", (1, 2))) as writer:
        writer.rows("training_steps", [{"step": step, "pre_clip_grad_norm": 1.0} for step in (1, 2)])
        writer.rows(
            "parameter_updates",
            [
                {"step": step, "parameter": "w", "numel": 4, "has_gradient": True, "delta_l2": 0.5}
                for step in (1, 2)
            ],
        )
    printed = run_report(lake, report(), tmp_path / "o", chart_formats=["svg"])
    content = json.loads(Path(printed["report"]).read_text())
    assert content["historical_replay_status"] is None
    assert content["findings"][0] == "2 recorded steps, 0 to 2; no loss was logged."
    row = json.loads(Path(printed["step_rows"]).read_text().splitlines()[0])
    assert row["optimizer_state_entries"] == row["adam_exp_avg_count"] == 0
    assert row["adam_exp_avg_l2"] is None
    lake.close()


def test_negative_top_k():
    with pytest.raises(
        InvalidOption, match="--top-k-parameters should be greater than or equal to 0, not -1"
    ):
        report(top_k_parameters=-1)

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
from lakebed.extractors.plan import extract
from lakebed.extractors.value_code_examples import BeyondThePrediction, SeveralPositions
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.run import run_report

from . import rescue_reference as reference
from . import value_code_reference
from .conftest import assert_same
from .test_value_code_transfer_map_report import _with_distractors

CONTROLS = ["shuffled_answer_value", "wrong_support_value", "key_identity", "random_subspace"]
RANKS = [2, 3]
STEPS = (50, 150)
CONTEXT = {"context_stage": "layer_0_post_attn", "context_position_role": "query_key", "context_rank": 4}
OPTIONS = {
    "run": "r",
    "source_stage": "layer_0_post_mlp",
    "target_stage": "layer_1_post_mlp",
    "source_position_role": "support_value",
    "target_position_role": "prediction",
    "group_by": "answer_value",
    "basis_rank": RANKS,
    "control": CONTROLS,
    "random_seed": 5,
    "steps": "50,150",
    **CONTEXT,
}
ENDS = ("source_stage", "target_stage", "source_position_role", "target_position_role", "group_by")
KEYS = ("rescue_rows", "summary_rows", "subspace_rows", "pair_rows")
# After the last attention; before it, where a record's edits meet; where two queries edit the same position.
TARGETS = [
    ("layer_1_post_mlp", "prediction"),
    ("layer_0_post_mlp", "prediction"),
    ("layer_0_post_attn", "support_value"),
]
SCALARS = [
    "correct_value_logit", "value_margin", "fixed_clean_competitor_margin", "fixed_removed_competitor_margin",
    "negative_answer_loss", "value_accuracy",
]  # fmt: skip


def report(**options):
    return load_report("value-code-transfer-rescue").parse({**OPTIONS, **options})


def written(lake, out, charts=(), **options):
    asked = report(**options)
    extract(lake, "r", asked.needs(), asked.steps)
    printed = run_report(lake, asked, out, chart_formats=list(charts))
    rows = {key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in KEYS}
    return printed, rows


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("rescue") / "r.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def splits(lake):
    """Splits in which every query comes after a write that is not its support."""
    return _with_distractors(lake)


@pytest.fixture(scope="module")
def whole(lake, splits, tmp_path_factory):
    """(printed, rows) of the report with everything."""
    return written(lake, tmp_path_factory.mktemp("whole") / "out", ["svg"], split=splits)


@pytest.mark.parametrize(("stage", "role"), TARGETS)
def test_every_outcome_is_that_of_a_float64_decoder_with_hooks(lake, splits, tmp_path, stage, role):
    ends = {"target_stage": stage, "target_position_role": role}
    _, rows = written(lake, tmp_path / "out", split=splits, basis_rank=[3], steps="150", **ends)
    wanted, kinds, judged = reference.rescued(lake, "r", 150, {**OPTIONS, **ends}, 3, splits)
    assert len(rows["rescue_rows"]) == len(kinds) * len(judged) * len(SCALARS)
    largest = 0.0
    for row in rows["rescue_rows"]:
        key = (row["sample_id"], row["query_index"], row["eval_kind"])
        clean, removed, patched = wanted[key][row["scalar_name"]]
        found = [row["clean_scalar"], row["target_subspace_removed_scalar"], row["patched_scalar"]]
        assert found == pytest.approx([clean, removed, patched], abs=2e-4), key
        largest = max(largest, abs(clean - removed))
        assert row["total_drop"] == pytest.approx(found[0] - found[1], abs=1e-12)
        assert row["rescue"] == pytest.approx(found[2] - found[1], abs=1e-12)
        assert row["unrecovered"] == pytest.approx(found[0] - found[2], abs=1e-12)
        fraction = row["rescue"] / row["total_drop"] if abs(row["total_drop"]) > 1e-12 else None
        assert row["rescue_fraction"] == pytest.approx(fraction)
        assert row["improved_by_patch"] == (abs(row["unrecovered"]) < abs(row["total_drop"]))
        if row["eval_kind"] == "oracle_actual_projected" and abs(row["total_drop"]) > 1e-2:
            assert row["rescue_fraction"] == pytest.approx(1, abs=1e-3)
    # Something was at stake, and in the last case queries of a record are edited at the same position.
    assert largest > 0.01
    events = value_code_reference.facts(lake, "r", splits).events
    shared = Counter((events[i]["example"], events[i]["roles"][role][0][0]) for i in judged)
    assert (max(shared.values()) > 1) == (role == "support_value")


def test_rows_have_these_columns_and_come_in_this_order(lake, splits, whole):
    of = value_code_reference.facts(lake, "r", splits)
    _, rows = whole
    kinds = report().parameters()["eval_kinds"]
    judged = [e for e in of.events if reference.fit_number(e["sample_id"], e["query_index"]) >= 0.75]
    found = iter(rows["rescue_rows"])
    for step in STEPS:
        for rank in RANKS:
            for kind in kinds:
                for at, event in enumerate(judged):
                    for scalar in SCALARS:
                        row = next(found)
                        following = judged[(at + 1) % len(judged)]
                        same = following["answer_token"] == event["answer_token"]
                        wanted = {
                            "checkpoint": f"{lake.uri}#r/{step}",
                            "checkpoint_name": f"step_{step:06d}",
                            "checkpoint_step": step,
                            "basis_rank": rank,
                            "eval_kind": kind,
                            "sample_id": event["sample_id"],
                            "split": event["split"],
                            "query_index": event["query_index"],
                            **{name: OPTIONS[name] for name in ENDS},
                            "answer_value_token_id": event["answer_token"],
                            "answer_value_token": of.text[event["answer_token"]],
                            "scalar_name": scalar,
                            "source_has_same_answer": same if "shuffled" in kind else None,
                        }
                        assert_same(row, wanted)
                        assert row.keys() - wanted.keys() == {
                            "clean_scalar", "target_subspace_removed_scalar", "patched_scalar", "total_drop", "rescue",
                            "unrecovered", "rescue_fraction", "improved_by_patch",
                        }  # fmt: skip
    assert next(found, None) is None


def test_summaries_are_means_over_the_rows(whole):
    _, rows = whole
    groups = {}
    for row in rows["rescue_rows"]:
        key = (row["checkpoint_step"], row["basis_rank"], row["eval_kind"], row["scalar_name"])
        groups.setdefault(key, []).append(row)
    assert len(rows["summary_rows"]) == len(groups)
    for row, (key, members) in zip(rows["summary_rows"], groups.items(), strict=True):

        def mean(name, members=members):
            held = [float(of[name]) for of in members if of[name] is not None]
            return sum(held) / len(held) if held else None

        drop, rescue = mean("total_drop"), mean("rescue")
        names = (
            "clean_scalar",
            "target_subspace_removed_scalar",
            "patched_scalar",
            "total_drop",
            "rescue",
            "unrecovered",
        )
        wanted = {
            **dict(
                zip(("checkpoint_step", "basis_rank", "eval_kind", "scalar_name"), key, strict=True)
            ),
            "num_rows": len(members),
            **{f"mean_{name}": mean(name) for name in names},
            "mean_rescue_fraction_from_means": rescue / drop if abs(drop) > 1e-12 else None,
            "mean_rescue_fraction_per_row": mean("rescue_fraction"),
            "num_rescue_fraction_rows": sum(of["rescue_fraction"] is not None for of in members),
            "improved_fraction": mean("improved_by_patch"),
            "rescue_vs_drop_r_squared": value_code_reference.r_squared(
                [of["total_drop"] for of in members], [of["rescue"] for of in members]
            ),
            "dropped_fraction": sum(of["total_drop"] > 0 for of in members) / len(members),
            "source_has_same_answer_fraction": mean("source_has_same_answer"),
        }  # fmt: skip
        assert_same(row, wanted, rel=1e-6, near=1e-7)
        assert row.keys() == wanted.keys()


def test_codes_bases_and_examples_are_those_of_the_transfer_map_report(lake, splits, whole, tmp_path):
    """Two computations that share no code, one in a report's NumPy and one in torch: controls but for the random one."""
    _, rows = whole
    options = {name: value for name, value in OPTIONS.items() if not name.startswith("context")}
    asked = load_report("value-code-transfer-map-report").parse({**options, "split": splits})
    printed = run_report(lake, asked, tmp_path / "map", chart_formats=[])
    mapped = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("transfer_rows", "subspace_rows", "pair_rows")
    }
    errors = lake.sql(
        "SELECT t.step, len(t.coordinates) AS rank, t.eval_kind, e.sample_id, e.query_index, "
        "list_sum(list_transform(list_zip(t.coordinates, o.coordinates), lambda p: (p[1] - p[2]) ** 2)) AS error, "
        "sqrt(squared_norm(t.coordinates)) AS length "
        "FROM value_code_runs AS t JOIN value_code_runs AS o USING (run, probe, spec, step, event) "
        "JOIN events AS e USING (run, probe, event) JOIN specs AS s USING (run, spec) "
        "WHERE o.eval_kind = 'oracle_actual_projected' AND s.parameters->>'$.target_stage' = 'layer_1_post_mlp' "
        f"AND json_array_length(s.parameters->'$.split') = {len(splits)} AND s.parameters->>'$.context' IS NOT NULL"
    ).fetchall()
    found = {of[:5]: of[5:] for of in errors}
    compared = 0
    for row in mapped["transfer_rows"]:
        key = tuple(
            row[name] for name in ("checkpoint_step", "basis_rank", "eval_kind", "sample_id", "query_index")
        )
        if row["eval_kind"] != "random_subspace":
            error, length = found[key]
            assert error == pytest.approx(row["coord_squared_error"], rel=2e-3, abs=1e-4), key
            assert length == pytest.approx(row["predicted_coord_norm"], rel=1e-3, abs=1e-4), key
            compared += 1
    assert compared > 100
    subspaces = [row for row in rows["subspace_rows"] if row["basis_role"] != "prediction_context_identity"]
    for row, of in zip(subspaces, mapped["subspace_rows"], strict=True):
        for name, value in of.items():
            near = value is not None and name.endswith("singular_values")
            assert row[name] == (pytest.approx(value, rel=1e-4, abs=1e-5) if near else value), name
    for row, of in zip(rows["pair_rows"], mapped["pair_rows"], strict=True):
        assert_same(
            row, {name: value for name, value in of.items() if "context" not in name}, rel=1e-4, near=1e-5
        )
        assert row.keys() == of.keys()


def test_the_context_has_a_basis_of_its_own(lake, splits, whole):
    _, rows = whole
    context = [row for row in rows["subspace_rows"] if row["basis_role"] == "prediction_context_identity"]
    assert [(row["checkpoint_step"], row["basis_rank"]) for row in context] == [(step, 4) for step in STEPS]
    for row in context:
        assert row["context_stage"] == "layer_0_post_attn"
        assert row["context_position_role"] == row["context_role"] == "query_key"
        assert row["group_by"] == "answer_value"
        assert row["pca_rank"] == len(row["identity_singular_values"]) == 4
    others = [row for row in rows["subspace_rows"] if row not in context]
    assert {row["context_stage"] for row in others} == {None}
    of = value_code_reference.facts(lake, "r", splits)
    for row, event in zip(rows["pair_rows"], of.events * 2, strict=True):
        assert row["context_stage"] == "layer_0_post_attn"
        assert row["context_positions"] == [event["roles"]["query_key"][0][0]]


def test_a_stage_after_the_unembedding_reads_it_can_be_edited_too(lake, tmp_path):
    _, rows = written(
        lake, tmp_path / "out", target_stage="final_norm", control=[], basis_rank=[3], steps="150",
        context_stage=None, context_position_role=None, context_rank=None, split=["validation_iid"],
    )  # fmt: skip
    by_kind = {}
    for row in rows["rescue_rows"]:
        by_kind.setdefault(row["eval_kind"], []).append(row)
    assert list(by_kind) == ["oracle_actual_projected", "true_transfer"]
    for row in by_kind["oracle_actual_projected"]:
        assert row["unrecovered"] == pytest.approx(0, abs=1e-5)


def test_what_is_edited_behind_the_last_attention_no_prediction_sees(lake, tmp_path):
    _, rows = written(
        lake, tmp_path / "out", target_position_role="support_value", control=[], basis_rank=[2], steps="150",
        split=["validation_iid"],
    )  # fmt: skip
    assert all(abs(row["total_drop"]) < 1e-5 for row in rows["rescue_rows"])
    text = (tmp_path / "out" / "value_code_transfer_rescue_report.md").read_text()
    assert "is **not** shown to be causal" in text
    assert "nothing to rescue" in text


def test_files_findings_and_charts(whole):
    printed, rows = whole
    assert [key for key in printed if not key.endswith("parquet")] == ["report", "markdown", *KEYS, "plots"]
    assert [Path(printed[key]).name for key in ("report", "markdown", *KEYS)] == [
        "value_code_transfer_rescue_report.json",
        "value_code_transfer_rescue_report.md",
        "value_code_transfer_rescue_rows.jsonl",
        "value_code_transfer_rescue_summary_rows.jsonl",
        "value_code_transfer_rescue_subspaces.jsonl",
        "value_code_transfer_rescue_pairs.jsonl",
    ]
    text = Path(printed["markdown"]).read_text()
    last = [
        row for row in rows["summary_rows"]
        if row["checkpoint_step"] == 150 and row["basis_rank"] == 3
        and row["scalar_name"] == "fixed_clean_competitor_margin" and row["eval_kind"] == "oracle_actual_projected"
    ]  # fmt: skip
    drop = last[0]["mean_total_drop"]
    moved = "lowers" if drop > 0 else "raises"
    assert (
        f"{moved} the margin over the clean run's competitor by **{abs(drop):.4g}**" in text.splitlines()[4]
    )
    same = [
        row for row in rows["rescue_rows"]
        if row["source_has_same_answer"] and row["eval_kind"] == "shuffled_answer_value"
    ]  # fmt: skip
    assert f"The shuffle gives {len(same) // len(SCALARS) // len(RANKS) // len(STEPS)} of" in text


def test_only_what_is_finite_is_written(whole):
    _, rows = whole
    for key in KEYS:
        for row in rows[key]:
            assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


def test_a_rank_is_made_once_and_ranks_share_the_untouched_run(lake, tmp_path, monkeypatch):
    from lakebed.extractors import value_code_rescues

    passes = []
    run_clean = value_code_rescues.run_clean
    monkeypatch.setattr(value_code_rescues, "run_clean", lambda *given: passes.append(1) or run_clean(*given))
    options = {"split": ["counterfactual"], "control": [], "steps": "50,150"}
    assert extract(lake, "r", report(**options).needs(), "50,150").made["value_code_rescues"] == [
        50,
        50,
        150,
        150,
    ]
    assert len(passes) == 2
    more = report(**{**options, "basis_rank": [2, 3, 4]})
    assert extract(lake, "r", more.needs(), "50,150").made["value_code_rescues"] == [50, 150]
    assert len(passes) == 4


def test_batches_do_not_matter(lake, tmp_path, monkeypatch):
    from lakebed.engine import value_code_rescue
    from lakebed.extractors import value_code_examples

    ends = {
        "target_stage": "layer_0_post_mlp",
        "split": ["validation_iid"],
        "steps": "150",
        "control": CONTROLS[:1],
    }
    _, rows = written(lake, tmp_path / "a", ridge_lambda=0.5, **ends)
    monkeypatch.setattr(value_code_rescue, "_TOKENS", 40)
    monkeypatch.setattr(value_code_rescue, "_LOGITS", 300)
    monkeypatch.setattr(value_code_examples, "_TOKENS", 100)
    # The same numbers under another name of the same split.
    _, again = written(lake, tmp_path / "b", ridge_lambda=0.5 + 1e-12, **ends)
    for row, other in zip(rows["rescue_rows"], again["rescue_rows"], strict=True):
        assert row["patched_scalar"] == pytest.approx(other["patched_scalar"], abs=1e-4)


def test_what_is_missing_is_named_with_the_command_that_makes_it(lake, tmp_path):
    asked = report(basis_rank=[5], split=["counterfactual"])
    with pytest.raises(MissingData) as caught:
        run_report(lake, asked, tmp_path / "out")
    message = str(caught.value)
    assert "value-code-transfer-rescue needs value_code_rescues for run 'r'" in message
    assert "lakebed extract --for value-code-transfer-rescue" in message
    assert "--basis-rank 5" in message
    assert "--context-rank 4" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"basis_rank": [0]}, {"basis_rank": []}, {"fit_fraction": 0}, {"fit_fraction": 1}, {"ridge_lambda": -1},
        {"control": ["chance"]}, {"group_by": None}, {"source_stage": None}, {"max_records": 0}, {"random_seed": -1},
        {"context_rank": 0}, {"context_rank": None}, {"context_stage": None}, {"context_position_role": None},
    ],
)  # fmt: skip
def test_options_that_cannot_be(options):
    given = {name: value for name, value in {**OPTIONS, **options}.items() if value is not None}
    with pytest.raises(InvalidOption):
        load_report("value-code-transfer-rescue").parse(given)


def test_a_partial_context_names_what_goes_together():
    with pytest.raises(
        InvalidOption, match="--context-stage, --context-position-role and --context-rank go together"
    ):
        report(context_rank=None)


@pytest.mark.parametrize("name", [*ENDS, "context_stage", "context_position_role"])
def test_unknown_names_list_those_there_are(lake, tmp_path, name):
    with pytest.raises(UnknownName, match=r"'nothing'.* ha(s|ve) "):
        run_report(lake, report(**{name: "nothing"}), tmp_path / "out")
    # So does an extraction, whose report was not asked.
    with pytest.raises(UnknownName, match=r"'nothing'.* ha(s|ve) "):
        extract(lake, "r", report(**{name: "nothing"}).needs(), "150")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_position_role": "all_query_relation"},
            SeveralPositions,
            r"target role 'all_query_relation' has several positions in \d+ of \d+ events, such as event 0 of record",
        ),
        (
            {"source_position_role": "value_distractors"},
            BeyondThePrediction,
            "Intervention positions must be in the causal prefix: role 'value_distractors' has positions after the prediction",
        ),
    ],
)
def test_events_that_lack_what_is_asked_are_refused(lake, options, error, message):
    with pytest.raises(error, match=message) as caught:
        extract(lake, "r", report(**options).needs(), "150")
    assert "\n" not in str(caught.value)

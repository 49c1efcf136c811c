"""Every row set against a float64 head computed anew under each condition, and what the report says and refuses."""

import csv
import json
import shutil
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from lakebed.engine.write_conditions import condition_writes
from lakebed.extractors import write_conditions
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.write_conditions import CONDITIONS as OWN_CONDITIONS
from lakebed.queries.ov_write_progress_report import AnswerChanged
from lakebed.queries.pair_selection import TooFewPairs
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from tests.trained_probe_lake import RUN, STEPS

from .chain_reference import SIDES, chosen_pairs
from .conftest import assert_same
from .float64_decoder import Decoder, load_events, load_weights
from .write_reference import CONDITIONS, METRICS, OUTPUTS, WRITES, pair_rows, partners

HEADS = ((1, 2), (0, 1))
TYPES, MOST = ("support_value", "distractor"), 4
ROLES = ("prediction", "support_value", "value_distractors")
# Several supports, and a write at a position that is not the prediction.
ELSEWHERE = ("support_value", "support_write", "key_distractors")
NAMES = ("score_query_role", "support_key_role", "distractor_key_role")
OPTIONS = {
    "head": ("L1H2", "L0H1"),
    **dict(zip(NAMES, ROLES, strict=True)),
    "pair_type": TYPES,
    "max_pairs_per_type": MOST,
    "top_k_correlations": 7,
}
SETS = (
    "pair_rows", "checkpoint_rows", "pair_delta_rows", "delta_rows", "correlation_rows", "pair_metadata_rows",
)  # fmt: skip
CLOSE = {"rel": 5e-5, "near": 2e-5}  # float32 forward passes
DELTAS = (*METRICS, "fixed_source_competitor_margin", "fixed_target_competitor_margin")


def report(**options):
    return load_report("ov-write-progress-report").parse({**OPTIONS, **options})


def written(lake, out, **options):
    printed = run_report(
        lake, report(**options), out, chart_formats=[], rows_format=["parquet"], overwrite=True
    )
    rows = {key: pl.read_parquet(printed[f"{key.removesuffix('_rows')}_parquet"]).to_dicts() for key in SETS}
    return printed, rows, json.loads(Path(printed["report"]).read_text())


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("writes") / "w.lake"
    shutil.copytree(probe_lake_path, path)
    torch.set_num_threads(1)
    with Lake.open(path) as opened:
        elsewhere = report(**dict(zip(NAMES, ELSEWHERE, strict=True)))
        extract(opened, RUN, (*report().needs(), *elsewhere.needs()), ",".join(map(str, STEPS)))
        yield opened


@pytest.fixture(scope="module")
def records(lake):
    return {side: load_events(lake, RUN, probe) for side, probe in SIDES.items()}


@pytest.fixture(scope="module")
def decoders(lake):
    return {step: Decoder(load_weights(lake, RUN, step), 4) for step in STEPS}


@pytest.fixture(scope="module")
def expected(lake, records, decoders):
    return list(pair_rows(lake, records, decoders, HEADS, ROLES, TYPES, MOST))


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("report") / "out")


def assert_pair_row(row, wanted, roles):
    wanted = {**wanted, **dict(zip(NAMES, roles, strict=True))}
    logits = wanted.pop("logits")
    assert_same(row, wanted, **CLOSE)
    held = row["value_logits_by_token_id"]
    assert list(held) == sorted(logits)
    assert held == pytest.approx(logits, rel=5e-5, abs=2e-5)
    assert row.keys() == {*wanted, "checkpoint", "value_logits_by_token_id"}


def test_pair_rows_are_the_definition(found, expected):
    rows = found[1]["pair_rows"]
    assert len(rows) == len(expected) == len(STEPS) * 2 * 2 * 4 * 8
    assert OWN_CONDITIONS == CONDITIONS
    for row, wanted in zip(rows, expected, strict=True):
        assert_pair_row(row, wanted, ROLES)


def test_pair_rows_with_several_supports_away_from_the_prediction(lake, records, decoders, tmp_path):
    _, rows, _ = written(
        lake, tmp_path / "out", **dict(zip(NAMES, ELSEWHERE, strict=True)), head=("L1H0",), steps="0,150"
    )
    ends = {step: decoders[step] for step in (0, 150)}
    wanted = list(pair_rows(lake, records, ends, ((1, 0),), ELSEWHERE, TYPES, MOST))
    assert {len(of["support_positions"]) for of in wanted} == {3}
    for row, of in zip(rows["pair_rows"], wanted, strict=True):
        assert_pair_row(row, of, ELSEWHERE)


def test_conditions_change_what_they_should(found):
    """Something is tested only where the conditions differ: attention and answers never do, writes do."""
    of_condition = defaultdict(list)
    for row in found[1]["pair_rows"]:
        of_condition[row["condition"]].append(row)
    real, support, shuffled, both = (of_condition[name] for name in CONDITIONS)
    same = [name for name in METRICS if name not in WRITES]
    for rows in zip(real, support, shuffled, both, strict=True):
        for name in same:
            assert len({row[name] for row in rows}) == 1
        for name in ("ov_map_value_margin", *WRITES[4:]):
            assert rows[0][name] == rows[1][name]
            assert rows[2][name] == rows[3][name]
        for row in rows[1], rows[3]:
            assert row["head_value_margin_dla"] == row["ov_map_value_margin"]
        # One support: what shuffling takes from the write is what it takes from the OV map, as far as it is attended to.
        for name in ("head_answer_logit_dla", "head_margin_dla"):
            taken = rows[0]["attention_support_mass"] * (rows[1][name] - rows[3][name])
            assert rows[0][name] - rows[2][name] == pytest.approx(taken, abs=1e-6)
    # A question asked twice has the same support: shuffled into the other it stays as it is.
    repeated = {
        (side, row["pair_id"])
        for row in found[1]["pair_metadata_rows"]
        for side in SIDES
        if row[f"{side}_answer_value"] == row[f"shuffled_{side}_answer_value"]
    }
    differ = defaultdict(set)
    for rows in zip(real, support, shuffled, both, strict=True):
        of = (rows[0]["record_side"], rows[0]["pair_id"]) in repeated
        differ[of].add(len({row["head_answer_logit_dla"] for row in rows}))
    assert differ[False] == {4}
    assert 4 not in differ[True]


def cells_of(rows, *keys):
    made = defaultdict(list)
    for row in rows:
        for split, pair_type in product(("__all__", row["split"]), ("__all__", row["pair_type"])):
            made[(*(row[key] for key in keys), split, pair_type)].append(row)
    return made


IDENTITY = ("record_side", "head_label", "condition")


def test_checkpoint_rows_are_means_over_cells(found, expected):
    cells = cells_of(expected, "step", *IDENTITY)
    rows = found[1]["checkpoint_rows"]
    assert len(rows) == len(cells)
    for row in rows:
        held = cells[tuple(row[key] for key in ("step", *IDENTITY, "split", "pair_type"))]
        wanted = {
            "num_entries": len(held),
            "num_unique_pairs": len({of["pair_id"] for of in held}),
            "answer_accuracy": float(np.mean([of["answer_correct"] for of in held])),
            **{
                f"{metric}_{name}": float(function([of[metric] for of in held]))
                for metric in METRICS
                for name, function in (("mean", np.mean), ("std", np.std))
            },
        }
        assert_same(row, wanted, **CLOSE)
        ids = {"step", "checkpoint", "split", "pair_type", "head_layer", "head", "head_label", *NAMES}
        assert row.keys() == {*wanted, *ids, "record_side", "condition"}


def expected_deltas(rows):
    """By identity, pair and target step."""
    of_pair = defaultdict(list)
    for row in rows:
        of_pair[tuple(row[key] for key in (*IDENTITY, "pair_id"))].append(row)
    for key, of in of_pair.items():
        for before, after in pairwise(of):
            source, target = before["best_wrong_token_id"], after["best_wrong_token_id"]

            def margin(row, token):
                return row["logits"][row["answer_token_id"]] - row["logits"][token]

            yield (
                (*key, after["step"]),
                {
                    "source_step": before["step"],
                    "step_gap": after["step"] - before["step"],
                    "split": after["split"],
                    "pair_type": after["pair_type"],
                    "source_best_wrong_token_id": source,
                    "target_best_wrong_token_id": target,
                    "competitor_switched": source != target,
                    "source_answer_correct": before["answer_correct"],
                    "target_answer_correct": after["answer_correct"],
                    **{f"delta_{name}": after[name] - before[name] for name in METRICS},
                    "delta_fixed_source_competitor_margin": margin(after, source) - margin(before, source),
                    "delta_fixed_target_competitor_margin": margin(after, target) - margin(before, target),
                },
            )


def test_pair_delta_rows_hold_competitors_fixed(found, expected):
    wanted = dict(expected_deltas(expected))
    rows = found[1]["pair_delta_rows"]
    assert len(rows) == len(wanted) == 3 * 2 * 2 * 4 * 8
    assert 0 < sum(row["competitor_switched"] for row in rows) < len(rows)
    for row in rows:
        of = wanted[tuple(row[key] for key in (*IDENTITY, "pair_id", "target_step"))]
        assert_same(row, of, rel=5e-5, near=4e-5)
        ids = {
            "source_checkpoint",
            "target_checkpoint",
            "source_sample_id",
            "source_query_index",
            "head_layer",
            "head",
        }
        assert row.keys() == {*of, *IDENTITY, "pair_id", "target_step", *ids, *NAMES}


def test_a_moving_margin_is_a_fixed_one_and_the_switch(found, expected):
    logits = {(row["step"], row["record_side"], row["pair_id"]): row["logits"] for row in expected}
    for row in found[1]["pair_delta_rows"]:
        source, target = row["source_best_wrong_token_id"], row["target_best_wrong_token_id"]
        at = {
            end: logits[row[f"{end}_step"], row["record_side"], row["pair_id"]]
            for end in ("source", "target")
        }
        for end in ("source", "target"):
            other = "target" if end == "source" else "source"
            switch = at[other][source] - at[other][target]
            assert row["delta_moving_answer_margin"] == pytest.approx(
                row[f"delta_fixed_{end}_competitor_margin"] + switch, abs=5e-5
            )


def test_delta_rows_are_means_of_pair_deltas(found):
    cells = cells_of(found[1]["pair_delta_rows"], "target_step", *IDENTITY)
    rows = found[1]["delta_rows"]
    assert len(rows) == len(cells)
    for row in rows:
        held = cells[tuple(row[key] for key in ("target_step", *IDENTITY, "split", "pair_type"))]
        wanted = {
            "source_step": held[0]["source_step"],
            "step_gap": held[0]["step_gap"],
            "num_entries": len(held),
            "num_unique_pairs": len(held),
            "competitor_switch_fraction": float(np.mean([of["competitor_switched"] for of in held])),
            **{
                f"delta_{metric}_{name}": float(function([of[f"delta_{metric}"] for of in held]))
                for metric in DELTAS
                for name, function in (("mean", np.mean), ("std", np.std))
            },
        }
        assert_same(row, wanted)
        ids = {"source_checkpoint", "target_checkpoint", "split", "pair_type", "head_layer", "head", *NAMES}
        assert row.keys() == {*wanted, "target_step", *IDENTITY, *ids}


def test_correlation_rows_are_over_intervals(found):
    pooled = defaultdict(list)
    for row in found[1]["delta_rows"]:
        if row["split"] == row["pair_type"] == "__all__":
            pooled[tuple(row[key] for key in IDENTITY)].append(row)
    rows = found[1]["correlation_rows"]
    assert [
        (*(row[key] for key in IDENTITY), row["write_delta_metric"], row["output_delta_metric"])
        for row in rows
    ] == [
        (*of, f"delta_{write}", f"delta_{output}")
        for of in product(SIDES, OPTIONS["head"], CONDITIONS)
        for write, output in product(WRITES, OUTPUTS)
    ]
    for row in rows:
        held = pooled[tuple(row[key] for key in IDENTITY)]
        x, y = ([of[f"{row[f'{kind}_delta_metric']}_mean"] for of in held] for kind in ("write", "output"))
        assert row["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        assert_same(
            row,
            {"status": "computed", "reason": None, "num_points": 3, "split": "__all__", "pair_type": "__all__",
             "head_layer": int(row["head_label"][1]), "head": int(row["head_label"][3])},
        )  # fmt: skip


def test_pair_metadata_rows_name_the_pair_before(lake, found):
    pairs = chosen_pairs(lake, TYPES, MOST)
    before = partners(pairs)
    rows = found[1]["pair_metadata_rows"]
    assert [row["pair_id"] for row in rows] == [pair[4] for pair in pairs]
    for row in rows:
        assert row["shuffled_pair_id"] == before[row["pair_id"]][4] != row["pair_id"]
        other = next(of for of in rows if of["pair_id"] == row["shuffled_pair_id"])
        assert other["pair_type"] == row["pair_type"]
        for side in SIDES:
            assert row[f"shuffled_{side}_answer_value"] == other[f"{side}_answer_value"]
    assert {row["mutation"] for row in rows}


# -- the summary -----------------------------------------------------------------------------------------------------


def test_the_summary_holds_the_final_rows_and_the_strongest_correlations(found):
    summary, rows = found[2]["summary"], found[1]
    assert summary["primary_record_side"] == "clean"
    assert {
        (row["record_side"], row["head_label"], row["condition"]) for row in summary["final_rows"]
    } == set(product(SIDES, OPTIONS["head"], CONDITIONS))
    assert {row["step"] for row in summary["final_rows"]} == {150}
    sizes = sorted((abs(row["correlation"]) for row in rows["correlation_rows"]), reverse=True)
    assert [abs(row["correlation"]) for row in summary["top_correlations"]] == sizes[:7]
    values = [row["correlation"] for row in rows["correlation_rows"]]
    assert summary["strongest_positive"]["correlation"] == max(values)
    assert summary["strongest_negative"]["correlation"] == min(values)


def test_attention_and_ov_map_add_up_to_the_product(found):
    ends = {
        (row["head_label"], row["step"]): row["support_mass_ov_value_margin_mean"]
        for row in found[1]["checkpoint_rows"]
        if (row["record_side"], row["condition"], row["split"], row["pair_type"])
        == ("clean", CONDITIONS[0], "__all__", "__all__")
    }
    for row in found[2]["heads"]:
        change = ends[row["head_label"], 150] - ends[row["head_label"], 0]
        assert row["by_attention"] + row["by_ov_map"] == pytest.approx(change, abs=1e-12)


def test_the_markdown_leads_with_the_head_whose_write_grew(found):
    content, text = found[2], Path(found[0]["markdown"]).read_text()
    pooled = defaultdict(dict)
    for row in found[1]["checkpoint_rows"]:
        if (row["record_side"], row["condition"], row["split"], row["pair_type"]) == (
            "clean", CONDITIONS[0], "__all__", "__all__",
        ):  # fmt: skip
            pooled[row["head_label"]][row["step"]] = row["support_mass_ov_value_margin_mean"]
    change = {label: of[150] - of[0] for label, of in pooled.items()}
    assert [row["head_label"] for row in content["heads"]] == sorted(change, key=change.get, reverse=True)
    best = content["heads"][0]
    assert best["change"] == pytest.approx(change[best["head_label"]])
    grew = f"{best['head_label']}'s write from the support grew"
    if best["change"] <= 0:
        grew = f"No head's write from the support grew; {best['head_label']}'s fell least"
    assert content["findings"][0].startswith(f"**{grew}")
    assert content["findings"][0] in text
    assert "There are two intervals" not in text


def test_with_two_intervals_every_correlation_is_one_and_the_reader_is_told(lake, tmp_path):
    printed, rows, content = written(lake, tmp_path / "out", steps="0,50,150", record_side=("clean",))
    for row in rows["correlation_rows"]:
        assert abs(row["correlation"]) == pytest.approx(1)
    assert any("two intervals" in line for line in content["warnings"])
    assert "**Warning.** There are two intervals" in Path(printed["markdown"]).read_text()


def test_one_interval_has_no_correlation(lake, tmp_path):
    _, rows, content = written(lake, tmp_path / "out", steps="0,150", record_side=("clean",))
    for row in rows["correlation_rows"]:
        assert_same(
            row,
            {"correlation": None, "status": "not_computed", "reason": "requires_at_least_two_intervals", "num_points": 1},
        )  # fmt: skip
    assert content["summary"]["top_correlations"] == []
    assert content["summary"]["strongest_positive"] is None
    assert "requires at least two intervals" in content["findings"][0]


def test_what_does_not_vary_has_no_correlation(probe_lake_path, tmp_path, monkeypatch):
    path = tmp_path / "still.lake"
    shutil.copytree(probe_lake_path, path)

    def still(*arguments):
        writes, answers = condition_writes(*arguments)
        return replace(writes, head_margin_dla=torch.ones_like(writes.head_margin_dla)), answers

    monkeypatch.setattr(write_conditions, "condition_writes", still)
    with Lake.open(path) as opened:
        extract(opened, RUN, report(record_side=("clean",)).needs(), "0,50,100")
        _, rows, _ = written(opened, tmp_path / "out", record_side=("clean",))
    of_status = defaultdict(set)
    for row in rows["correlation_rows"]:
        of_status[row["status"], row["reason"], row["correlation"] is None].add(row["write_delta_metric"])
    assert of_status.pop(("not_computed", "zero_variance", True)) == {"delta_head_margin_dla"}
    assert of_status.keys() == {("computed", None, False)}


def test_printed_keys_are_the_contracts(lake, tmp_path):
    printed = run_report(lake, report(record_side=("clean",)), tmp_path / "out", chart_formats=["svg"])
    assert {key for key in printed if not key.endswith("parquet")} == {"report", "markdown", "plots", *SETS}
    assert list(printed["plots"]) == ["write_trajectory", "conditions", "final_conditions", "correlations"]
    assert Path(printed["report"]).name == "ov_write_progress_report.json"
    first = json.loads(Path(printed["pair_rows"]).read_text().splitlines()[0])
    assert len(first["value_logits_by_token_id"]) > 10


def test_a_map_is_json_text_in_csv(lake, tmp_path):
    asked = report(record_side=("clean",), steps="0,150")
    printed = run_report(lake, asked, tmp_path / "out", chart_formats=[], rows_format=["csv", "jsonl"])
    with Path(printed["pair_csv"]).open(newline="") as file:
        cells = [json.loads(row["value_logits_by_token_id"]) for row in csv.DictReader(file)]
    lines = Path(printed["pair_rows"]).read_text().splitlines()
    assert cells == [json.loads(line)["value_logits_by_token_id"] for line in lines]


def test_the_first_record_side_is_primary(lake, tmp_path):
    _, rows, content = written(lake, tmp_path / "out", record_side=("corrupted", "clean"))
    assert content["summary"]["primary_record_side"] == "corrupted"
    assert rows["pair_rows"][0]["record_side"] == "corrupted"
    assert "corrupted records" in content["findings"][0]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_needs_do_not_depend_on_the_heads():
    assert report().needs() == report(head=("L0H0",)).needs()
    assert [need.parameters["record_side"] for need in report().needs()] == ["clean", "corrupted"]


def test_the_queries_to_go_on_with_find_something(lake):
    for _, sql in report().next_queries:
        assert lake.sql(sql.replace("$run", f"'{RUN}'")).fetchall()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": ("1",)}, "--head 1 is no head: write it as L2H1"),
        ({"head": ("L1H0", "L01H0")}, "--head L01H0 is no head"),
        ({"head": ("L1H0", "L0H1", "L1H0")}, "--head L1H0 stands 2 times"),
        ({"head": ()}, "--head"),
        (
            {"support_key_role": "value_distractors"},
            "--support-key-role and --distractor-key-role are both value_distractors",
        ),
        ({"pair_type": ("order",)}, "--pair-type should be 'query_key'"),
        ({"max_pairs_per_type": 1}, "--max-pairs-per-type should be greater than or equal to 2"),
        ({"min_pairs_per_type": 1}, "--min-pairs-per-type should be greater than or equal to 2"),
        ({"min_pairs_per_type": 9}, "--min-pairs-per-type 9 exceeds --max-pairs-per-type 4"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InvalidOption) as error:
        report(**options)
    assert str(error.value).startswith(f"ov-write-progress-report: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "100"}, ReportFailed, "at least two checkpoints are needed, and --steps leaves 1"),
        ({"head": ("L9H0",)}, UnknownName, "no head L9H0; run 'r' has layers 0–1, heads 0–3"),
        ({"support_key_role": "friend"}, UnknownName, "no role 'friend'; the events of probe 'probe' have"),
        ({"probe": "other"}, MissingData, "Probe-set not found"),
        ({"max_pairs_per_type": 5000, "min_pairs_per_type": 4000}, TooFewPairs, "requested minimum"),
        (
            {"max_pairs_per_type": 64},
            MissingData,
            "keeps the corrupted records of 4 pairs per type and split",
        ),
        (
            {"max_pairs_per_type": 3},
            MissingData,
            "needs write_conditions for run 'r' (probe probe, pair_type distractor and support_value",
        ),
    ],
)
def test_what_the_run_does_not_have(lake, tmp_path, options, error, message):
    with pytest.raises(error) as raised:
        written(lake, tmp_path / "out", **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_answer_that_changed_is_refused(lake):
    with Results(lake, report()) as results:
        results.report.check(results)
        lake.session.execute(
            "UPDATE answers SET measured_answer_token = 0 WHERE step = 100 AND record_side = 'clean'", []
        )
        with pytest.raises(
            AnswerChanged, match=r"the answer of pair .* was token 0 at step 100, and its record asks for"
        ):
            results.report.check(results)

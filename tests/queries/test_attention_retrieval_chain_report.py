"""Every number of the chain against a float64 forward pass over both records of each pair, and what is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from tests.trained_probe_lake import RUN, STEPS

from .chain_reference import METRICS, SIDES, cells, chain, chosen_pairs
from .conftest import assert_same
from .float64_decoder import Decoder, load_events, load_weights

LAYER, NUMBER = 1, 2
OPTIONS = {
    "head": f"L{LAYER}H{NUMBER}",
    "support_key_role": "support_value",
    "distractor_key_role": "value_distractors",
    "pair_type": ("support_value", "distractor"),
    "max_pairs_per_type": 4,
}
# The write at a position that is not the prediction, with keys before it.
ELSEWHERE = {
    "score_query_role": "support_value",
    "support_key_role": "support_key",
    "distractor_key_role": "key_distractors",
}
CLOSE = {"rel": 5e-5, "near": 2e-5}  # float32 forward passes


def report(**options):
    return load_report("attention-retrieval-chain-report").parse({**OPTIONS, **options})


def written(lake, out, **options):
    printed = run_report(lake, report(**options), out, chart_formats=[], overwrite=True)
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("checkpoint_rows", "delta_rows", "pair_metric_rows", "pair_rows")
    }
    return printed, rows, json.loads(Path(printed["report"]).read_text())


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    """The trained run with attention and writes of both record sides, and from the support's value."""
    path = tmp_path_factory.mktemp("chained") / "chained.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as opened:
        needs = (*report().needs(), *report(**ELSEWHERE).needs())
        extract(opened, RUN, needs, ",".join(map(str, STEPS)))
        yield opened


@pytest.fixture(scope="module")
def records(lake):
    """Events of each record side, by number, from the tokens alone."""
    return {side: load_events(lake, RUN, probe) for side, probe in SIDES.items()}


@pytest.fixture(scope="module")
def decoders(lake):
    return {step: Decoder(load_weights(lake, RUN, step), 4) for step in STEPS}


def expected_rows(lake, records, decoders, roles=("prediction", "support_value", "value_distractors")):
    for step in STEPS:
        for side in SIDES:
            for clean, corrupted, pair_type, split, pair_id, source, query in chosen_pairs(
                lake, OPTIONS["pair_type"], 4
            ):
                event = records[side][clean if side == "clean" else corrupted]
                yield {
                    "checkpoint": f"{lake.uri}#{RUN}/{step}",
                    "checkpoint_name": f"step_{step:06d}",
                    "step": step,
                    "head_layer": LAYER,
                    "head": NUMBER,
                    "head_label": OPTIONS["head"],
                    "score_query_role": roles[0],
                    "support_key_role": roles[1],
                    "distractor_key_role": roles[2],
                    "record_side": side,
                    "split": split,
                    "pair_type": pair_type,
                    "pair_id": pair_id,
                    "source_sample_id": source,
                    "source_query_index": query,
                    **chain(decoders[step], LAYER, NUMBER, event, *roles),
                }


@pytest.fixture(scope="module")
def expected(lake, records, decoders):
    return list(expected_rows(lake, records, decoders))


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("report") / "out")


def test_pair_metric_rows_are_the_definition(found, expected):
    rows = found[1]["pair_metric_rows"]
    assert len(rows) == len(expected) == len(STEPS) * 2 * 8
    for row, wanted in zip(rows, expected, strict=True):
        assert_same(row, {key: _plain(value) for key, value in wanted.items()}, **CLOSE)
        assert row.keys() == wanted.keys()


def _plain(value):
    return float(value) if isinstance(value, np.floating) else value


def test_from_another_query_the_write_is_there_and_the_readout_stays(
    lake, records, decoders, expected, tmp_path
):
    _, rows, _ = written(lake, tmp_path / "out", **ELSEWHERE)
    roles = tuple(ELSEWHERE.values())
    wanted = list(expected_rows(lake, records, decoders, roles))
    assert not any(
        row["query_position"] == each["query_position"] for row, each in zip(wanted, expected, strict=True)
    )
    for row, of in zip(rows["pair_metric_rows"], wanted, strict=True):
        assert_same(row, {key: _plain(value) for key, value in of.items()}, **CLOSE)


def test_checkpoint_rows_are_means_over_cells(found, expected):
    made = cells(expected)
    rows = found[1]["checkpoint_rows"]
    assert len(rows) == len(made)
    for row, ((step, side, split, pair_type), of) in zip(rows, made.items(), strict=True):
        wanted = {
            "step": step,
            "record_side": side,
            "split": split,
            "pair_type": pair_type,
            "num_pairs": len(of),
            "answer_accuracy": float(np.mean([each["answer_correct"] for each in of])),
            **{
                f"{metric}_{name}": float(function([each[metric] for each in of]))
                for metric in METRICS
                for name, function in (("mean", np.mean), ("std", np.std))
            },
        }
        assert_same(row, wanted, **CLOSE)
        ids = {"checkpoint", "checkpoint_name", "head_layer", "head", "head_label"}
        roles = {"score_query_role", "support_key_role", "distractor_key_role"}
        assert row.keys() == {*wanted, *ids, *roles}


def test_delta_rows_are_differences_of_neighbours(found):
    by_cell = {}
    for row in found[1]["checkpoint_rows"]:
        by_cell.setdefault((row["record_side"], row["split"], row["pair_type"]), []).append(row)
    deltas = {
        (row["record_side"], row["split"], row["pair_type"], row["source_step"]): row
        for row in found[1]["delta_rows"]
    }
    assert len(deltas) == len(found[1]["delta_rows"]) == sum(len(rows) - 1 for rows in by_cell.values())
    for cell, rows in by_cell.items():
        for before, after in pairwise(rows):
            row = deltas[(*cell, before["step"])]
            assert_same(
                row,
                {
                    "target_step": after["step"],
                    "step_gap": 50,
                    "source_checkpoint": before["checkpoint"],
                    "target_checkpoint": after["checkpoint"],
                    "head_label": OPTIONS["head"],
                    "num_pairs": after["num_pairs"],
                    "delta_answer_accuracy": after["answer_accuracy"] - before["answer_accuracy"],
                    "negative_delta_answer_loss_mean": before["answer_loss_mean"] - after["answer_loss_mean"],
                    **{
                        f"delta_{metric}_mean": after[f"{metric}_mean"] - before[f"{metric}_mean"]
                        for metric in METRICS
                    },
                },
            )
            assert "std" not in " ".join(row)


def test_pair_rows_are_the_pairs(lake, found):
    rows = found[1]["pair_rows"]
    pairs = chosen_pairs(lake, OPTIONS["pair_type"], 4)
    assert [(row["pair_id"], row["pair_type"], row["split"]) for row in rows] == [
        (pair[4], pair[2], pair[3]) for pair in pairs
    ]
    assert {row["mutation"]["changed_role"] for row in rows} == {
        "support_write_value",
        "distractor_write_value",
    }
    for row in rows:
        same = row["clean_answer_value"] == row["corrupted_answer_value"]
        assert same == (row["pair_type"] == "distractor")


# -- the summary -----------------------------------------------------------------------------------------------------


def test_the_deltas_add_up_to_the_total(found):
    summary = found[2]["summary"]
    assert summary["primary_record_side"] == "clean"
    assert (summary["total_primary_delta"]["source_step"], summary["total_primary_delta"]["target_step"]) == (
        0,
        150,
    )
    names = [name for name in summary["total_primary_delta"] if "delta" in name]
    assert len(names) == len(METRICS) + 2
    for name in names:
        total = sum(row[name] for row in summary["primary_delta_rows"])
        assert summary["total_primary_delta"][name] == pytest.approx(total, rel=1e-9, abs=1e-12)
    primary = [
        row
        for row in found[1]["checkpoint_rows"]
        if (row["record_side"], row["split"], row["pair_type"]) == ("clean", "__all__", "__all__")
    ]
    assert summary["final_primary_row"] == primary[-1]
    assert summary["final_primary_row"]["num_pairs"] == 8


def test_correlations_are_over_intervals(found):
    summary = found[2]["summary"]
    links = {
        "qk_to_attention": ("qk_separation", "attention_separation"),
        "attention_to_head_margin_dla": ("attention_separation", "head_margin_dla"),
        "head_margin_dla_to_answer_margin": ("head_margin_dla", "answer_margin"),
        "answer_margin_to_loss_reduction": ("answer_margin", "answer_loss"),
    }
    assert list(summary["correlations"]) == sorted(links)
    for name, (x, y) in links.items():
        changes = np.array(
            [
                [
                    row[f"delta_{x}_mean"],
                    -row["delta_answer_loss_mean"] if y == "answer_loss" else row[f"delta_{y}_mean"],
                ]
                for row in summary["primary_delta_rows"]
            ]
        )
        link = summary["correlations"][name]
        assert link["value"] == pytest.approx(np.corrcoef(*changes.T)[0, 1], abs=1e-9)
        assert (link["status"], link["reason"], link["num_points"]) == ("ok", None, 3)
        assert "→" in link["label"]


def test_the_first_record_side_is_primary(lake, tmp_path):
    _, rows, content = written(lake, tmp_path / "out", record_side=("corrupted", "clean"))
    assert content["summary"]["primary_record_side"] == "corrupted"
    assert rows["pair_metric_rows"][0]["record_side"] == "corrupted"
    final = content["summary"]["final_primary_row"]
    assert (final["record_side"], final["split"], final["pair_type"]) == ("corrupted", "__all__", "__all__")


def test_two_checkpoints_have_deltas_and_no_correlation(lake, tmp_path):
    printed, rows, content = written(lake, tmp_path / "out", steps="0,150", record_side=("clean",))
    assert {row["source_step"] for row in rows["delta_rows"]} == {0}
    for link in content["summary"]["correlations"].values():
        assert (link["value"], link["status"], link["num_points"]) == (None, "undefined", 1)
        assert link["reason"] == "fewer than two intervals"
    assert "No link can be held against the next over the intervals" in Path(printed["markdown"]).read_text()


def test_markdown_names_the_link_that_moved_first(found):
    content, text = found[2], Path(found[0]["markdown"]).read_text()
    primary = [
        row
        for row in found[1]["checkpoint_rows"]
        if (row["record_side"], row["split"], row["pair_type"]) == ("clean", "__all__", "__all__")
    ]
    names = {
        "QK separation": "qk_separation",
        "attention separation": "attention_separation",
        "head margin DLA": "head_margin_dla",
        "answer margin": "answer_margin",
        "answer loss": "answer_loss",
    }
    half_way = {}
    for name, metric in names.items():
        values = [row[f"{metric}_mean"] for row in primary]
        shares = (np.array(values) - values[0]) / (values[-1] - values[0])
        half_way[name] = STEPS[max(at for at in range(len(STEPS)) if shares[at] < 0.5) + 1]
    assert {row["link"]: row["half_way_step"] for row in content["links"]} == half_way
    half_way.pop("answer loss")
    changes = {row["link"]: row["change"] for row in content["links"]}
    first = [
        f"{name} ({changes[name]:+.3g})" for name in half_way if half_way[name] == min(half_way.values())
    ]
    assert content["findings"][0].startswith(
        f"**{' and '.join(', '.join(first).rsplit(', ', 1))} moved first**"
    )
    assert content["findings"][0] in text


def test_printed_keys_are_the_contracts(lake, tmp_path):
    printed = run_report(lake, report(record_side=("clean",)), tmp_path / "out", chart_formats=["svg"])
    keys = {"report", "markdown", "checkpoint_rows", "delta_rows", "pair_metric_rows", "pair_rows", "plots"}
    assert {key for key in printed if not key.endswith("parquet")} == keys
    assert list(printed["plots"]) == ["trajectory", "deltas"]
    assert Path(printed["report"]).name == "attention_retrieval_chain_report.json"


# -- what is refused -------------------------------------------------------------------------------------------------


def test_the_queries_to_go_on_with_find_something(lake):
    for _, sql in report().next_queries:
        assert lake.sql(sql.replace("$run", f"'{RUN}'")).fetchall()


def test_needs_are_those_of_the_sides_asked_for():
    clean = report(record_side=("clean",))
    assert {need.parameters["probe"] for need in clean.needs()} == {"probe"}
    both = report(score_query_role="support_value")
    assert [
        (need.dataset, need.parameters["probe"], need.parameters.get("query_role")) for need in both.needs()
    ] == [
        (dataset, probe, role)
        for probe in SIDES.values()
        for dataset, role in (
            ("attention", "support_value"),
            ("head_writes", "support_value"),
            ("readouts", None),
        )
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"support_key_role": "value_distractors"},
            "--support-key-role and --distractor-key-role are both value_distractors",
        ),
        ({"pair_type": ()}, "--pair-type"),
        ({"pair_type": ("order",)}, "--pair-type should be 'query_key'"),
        ({"record_side": ("both",)}, "--record-side should be 'clean' or 'corrupted'"),
        ({"min_pairs_per_type": 9}, "--min-pairs-per-type 9 exceeds --max-pairs-per-type 4"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InvalidOption) as error:
        report(**options)
    assert str(error.value).startswith(f"attention-retrieval-chain-report: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "100"}, ReportFailed, "at least two checkpoints are needed, and --steps leaves 1"),
        ({"head": "L9H0"}, UnknownName, "no head L9H0; run 'r' has layers 0–1, heads 0–3"),
        ({"support_key_role": "friend"}, UnknownName, "no role 'friend'; the events of probe 'probe' have"),
        ({"split": ("train",)}, UnknownName, "probe 'probe' has no split 'train'"),
        ({"probe": "other"}, MissingData, "Probe-set not found"),
        (
            {"max_pairs_per_type": 64},
            MissingData,
            "keeps the corrupted records of 4 pairs per type and split",
        ),
        (
            {"max_pairs_per_type": 5000, "min_pairs_per_type": 4000},
            ReportFailed,
            "Failed to construct the requested minimum",
        ),
        (
            {"score_query_role": "query_key"},
            MissingData,
            "needs attention for run 'r' (probe probe, query_role query_key). Run: lakebed extract --for",
        ),
        (
            {"support_key_role": "query_key"},
            ReportFailed,
            "head_writes does not say what a head would write from 'query_key' alone; it does for support_key",
        ),
    ],
)
def test_what_the_run_does_not_have(lake, tmp_path, options, error, message):
    with pytest.raises(error) as raised:
        written(lake, tmp_path / "out", **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()

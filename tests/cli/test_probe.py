"""`lakebed probe`: build, import and show, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lakebed.cli.probe import contents
from lakebed.engine.config import load_config
from lakebed.extractors.runs import RunInfo, register_run
from lakebed.lake import Lake

EVENT = {"roles": {"subject": [4, 1], "prediction": 2}, "answer": 20, "competitors": [30, 21]}
RECORD = {"sample_id": "one", "token_ids": [1, 8, 10, 20, 2], "events": [EVENT]}
SMALL = {
    f"benchmark.{split}.num_samples": 30
    for split in ("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual")
}


@pytest.fixture
def lake(tmp_path: Path) -> str:
    """A lake with a registered run of a small task."""
    config = load_config("tiny", **SMALL)
    path = str(tmp_path / "p.lake")
    with Lake.create(path) as opened:
        info = RunInfo(source="test", adapter="symbolic_kv", config=config.canonical_json(), seed=7)
        register_run(opened, "kv", info, [])
    return path


def test_build_prints_one_object_and_the_same_again_makes_nothing(run_cli, lake) -> None:
    command = ("probe", "build", "--lake", lake, "--run", "kv", "--examples-per-split", 4)
    first, again = (run_cli(*command) for _ in range(2))
    made = json.loads(first.out)
    assert (first.status, first.err, first.out.count("\n")) == (0, "", 1)
    assert {name: made[name] for name in ("lake", "run", "probe", "made", "examples")} == {
        "lake": lake,
        "run": "kv",
        "probe": "probe",
        "made": True,
        "examples": 16,
    }
    assert len(made["sha256"]) == 64
    assert json.loads(again.out) == {**made, "made": False}


def test_every_option_of_build_reaches_the_probe(run_cli, lake) -> None:
    options = ("--probe", "mine", "--examples-per-split", 3, "--seed", 5, "--max-pairs-per-type", 2)
    splits = ("--split", "test_iid", "--split", "train")
    assert run_cli("probe", "build", "--lake", lake, "--run", "kv", *options, *splits).status == 0
    with Lake.open(lake) as opened:
        row = opened.table("probes", "kv").collect().to_dicts()[0]
    assert (row["probe"], row["splits"]) == ("mine", ["test_iid", "train"])
    metadata = json.loads(row["metadata"])
    assert (metadata["seed"], metadata["examples_per_split"], metadata["max_pairs_per_type"]) == (5, 3, 2)


def test_another_probe_of_the_same_name_is_refused_in_one_line(run_cli, lake) -> None:
    command = ("probe", "build", "--lake", lake, "--run", "kv", "--examples-per-split", 2)
    assert run_cli(*command).status == 0
    refused = run_cli(*command, "--seed", 1)
    assert (refused.status, refused.out) == (1, "")
    assert refused.err == (
        "lakebed: probe 'probe' of run 'kv' stands in the lake with other content (seed 17, now 1): choose another "
        "name with --probe\n"
    )


def test_import_and_its_errors(run_cli, lake, tmp_path) -> None:
    path = tmp_path / "questions.jsonl"
    command = ("probe", "import", path, "--lake", lake, "--run", "kv", "--probe", "questions")
    missing = run_cli(*command)
    assert (missing.status, missing.out) == (1, "")
    assert missing.err.startswith(f"lakebed: cannot read probe file {path}: No such file")
    path.write_text(json.dumps(RECORD) + "\n\n")
    assert run_cli(*command).err == f"lakebed: {path}, line 2 is blank: every line must be a JSON record\n"
    path.write_text(json.dumps(RECORD) + "\n")
    made = json.loads(run_cli(*command).out)
    assert (made["made"], made["examples"], made["events"], made["corrupted_records"]) == (True, 1, 1, 0)
    assert json.loads(run_cli(*command).out)["made"] is False


def test_show_counts_what_the_probes_hold(run_cli, lake, tmp_path) -> None:
    run_cli(
        "probe", "build", "--lake", lake, "--run", "kv", "--examples-per-split", 6, "--max-pairs-per-type", 3
    )
    (tmp_path / "q.jsonl").write_text(json.dumps(RECORD) + "\n")
    run_cli("probe", "import", tmp_path / "q.jsonl", "--lake", lake, "--run", "kv", "--probe", "questions")
    found = json.loads(run_cli("probe", "show", "--lake", lake, "--run", "kv", "--json").out)
    probes = {probe["probe"]: probe for probe in found["probes"]}
    assert list(probes) == ["probe", "probe.corrupted", "questions"]
    built, questions = probes["probe"], probes["questions"]
    assert {name: counts["examples"] for name, counts in built["splits"].items()} == {
        "validation_iid": 6,
        "heldout_pairs": 6,
        "structural_ood": 6,
        "counterfactual": 6,
    }
    assert sum(counts["events"] for counts in built["splits"].values()) == built["events"]
    assert built["roles"]["support_write"] == {"events": built["events"], "positions": [3, 3]}
    assert questions["roles"] == {
        "prediction": {"events": 1, "positions": [1, 1]},
        "subject": {"events": 1, "positions": [2, 2]},
    }
    assert questions["pairs"] == {}
    assert set(built["pairs"]) == {"query_key", "support_value", "recency", "distractor"}
    for held in built["pairs"].values():
        assert held["pairs"] + sum(held["skipped"].values()) == built["events"]
        assert held["corrupted_records"] == 12
    assert probes["probe.corrupted"]["events"] == 48
    with Lake.open(lake) as opened:
        assert contents(opened, "kv") == found["probes"]


def test_show_as_tables(run_cli, lake, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert (
        "has no probes yet: make one with `lakebed probe build"
        in run_cli("probe", "show", "--lake", lake, "--run", "kv").out
    )
    run_cli("probe", "build", "--lake", lake, "--run", "kv", "--examples-per-split", 20)
    shown = run_cli("probe", "show", "--lake", lake, "--run", "kv").out
    for text in ("probe  symbolic_kv, 80 records", "structural_ood", "value_distractors", "recency"):
        assert text in shown
    assert "support_write_used_by_prior_read" in shown
    assert "probe.corrupted  corrupted," in shown


@pytest.mark.parametrize("command", ["build", "show"])
def test_an_unknown_run_is_named(run_cli, lake, command) -> None:
    answer = run_cli("probe", command, "--lake", lake, "--run", "other")
    assert (answer.status, answer.err) == (1, f"lakebed: no run 'other' in {lake}; it has kv\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--examples-per-split", 0), "0 is not in the range x>=1"),
        (("--max-pairs-per-type", -1), "-1 is not in the range x>=1"),
        (("--seed", "x"), "'x' is not a valid integer"),
    ],
)
def test_counts_that_make_no_sense(run_cli, lake, options, message) -> None:
    answer = run_cli("probe", "build", "--lake", lake, "--run", "kv", *options)
    assert answer.status == 2
    assert message in answer.err


@pytest.mark.parametrize("command", ["build", "import", "show"])
def test_every_help_has_an_example(run_cli, command) -> None:
    assert f"Example: lakebed probe {command}" in run_cli("probe", command, "--help").out

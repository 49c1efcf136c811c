"""`lakebed show`: what is in a lake, and the schema of any lake."""

from __future__ import annotations

import json

import pytest
from lakebed.cli.show import _dataset_lines, size_text
from lakebed.lake import Lake
from lakebed.lake.macros import MACROS
from lakebed.lake.schema import QUANTITIES, TABLES, VIEWS


def test_what_is_in_the_lake(run_cli, lake_path) -> None:
    answer = run_cli("show", "--lake", lake_path)
    assert answer.status == 0
    lines = answer.out.splitlines()
    assert lines[0].startswith(f"{lake_path}  (format 1, id ")
    assert lines[2].startswith("run ref: source train, seed 7, store exact, 9 parameters in 2 tensors, ")
    assert lines[3].split()[-2:] == ["2", "sets"]
    assert lines[4].split()[-3:] == ["steps", "2", "rank=1"]
    assert lines[5].split()[-3:] == ["steps", "2", "rank=2"]
    assert lines[6].split()[0] == "trace"
    assert lines[6].split()[-2:] == ["steps", "1:4"]


def test_sets_of_a_dataset_say_what_they_differ_in() -> None:
    scalar = {"scalar": "answer_margin", "parameters": {"head": "L1H1", "rank": None}}
    entries = [
        {"dataset": "attributions", "parameters": parameters, "steps": "0:4", "bytes": 1500, "rows": 2}
        for parameters in (
            {"split": [], "pair_type": ["a", "b"], "probe": "probe", **scalar},
            {"split": [], "pair_type": ["a"], "probe": "probe", **scalar},
        )
    ]
    whole, first, second = (" ".join(line.split()) for line in _dataset_lines(entries))
    assert whole == ("attributions 3.0 kB 4 rows 2 sets, alike in scalar=answer_margin head=L1H1 probe=probe")
    assert first == "attributions 1.5 kB 2 rows steps 0:4 pair_type=a"
    assert second == "attributions 1.5 kB 2 rows steps 0:4 pair_type=a,b"
    assert [line.split()[-1] for line in _dataset_lines(entries[:1])] == ["pair_type=a,b"]


def test_the_same_as_json(run_cli, lake_path) -> None:
    found = json.loads(run_cli("show", "--lake", lake_path, "--run", "ref", "--json").out)
    (run,) = found["runs"]
    assert found["format"] == 1
    assert (run["run"], run["source"], run["seed"], run["config"]) == ("ref", "train", 7, {"layers": 2})
    assert (run["parameters"], run["parameter_tensors"], run["units"], run["rows"]) == (9, 2, 3, 7)
    trace = run["datasets"][-1]
    assert (trace["dataset"], trace["steps"], trace["step_count"]) == ("trace", "1:4", 4)
    assert trace["bytes"] == run["bytes"] > 0
    assert [entry["parameters"] for entry in run["datasets"][:2]] == [{"rank": 1}, {"rank": 2}] or [
        entry["parameters"] for entry in run["datasets"][:2]
    ] == [{"rank": 2}, {"rank": 1}]


def test_an_empty_lake_and_unknown_runs(run_cli, lake_path, tmp_path) -> None:
    Lake.create(tmp_path / "x.lake").close()
    assert "no runs yet: `lakebed demo`" in run_cli("show", "--lake", tmp_path / "x.lake").out
    answer = run_cli("show", "--lake", lake_path, "--run", "nope")
    assert (answer.status, answer.err) == (1, f"lakebed: no run 'nope' in {lake_path}; it has ref\n")
    answer = run_cli("show", "--lake", tmp_path / "none")
    assert (answer.status, answer.err.count("\n")) == (1, 1)


def test_without_a_lake_it_asks_for_one(run_cli, monkeypatch, lake_path) -> None:
    answer = run_cli("show")
    assert answer.status == 2
    assert "which lake?" in answer.err
    monkeypatch.setenv("LAKEBED_LAKE", lake_path)
    assert run_cli("show").status == 0


def everything() -> set[str]:
    names = {*TABLES, *VIEWS, *(quantity.view for quantity in QUANTITIES.values())}
    names |= {column.name for table in TABLES.values() for column in table.columns}
    return names | {signature.split("(")[0] for signature in MACROS}


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_the_schema_names_everything(run_cli, form: str) -> None:
    answer = run_cli("show", "--schema", "--format", form)
    assert answer.status == 0
    for name in everything():
        assert name in answer.out
    for table in TABLES.values():
        for column in table.columns:
            meaning = (
                column.about.replace("|", "\\|").replace("<", "&lt;") if form == "markdown" else column.about
            )
            assert (
                json.dumps(meaning, ensure_ascii=False)[1:-1] if form == "json" else meaning
            ) in answer.out


def test_one_entry_of_the_schema(run_cli) -> None:
    out = run_cli("show", "--schema", "training_steps").out
    assert out.startswith("training_steps  (run, step)\n")
    assert "parameter_updates" not in out
    assert "Zarr quantity svd" in run_cli("show", "--schema", "singular_vectors").out
    assert "(macro)" in run_cli("show", "--schema", "squared_norm").out
    assert "SELECT DISTINCT" in run_cli("show", "--schema", "specs").out
    found = json.loads(run_cli("show", "--schema", "training_steps", "--json").out)
    assert found["tables"][0]["key"] == ["run", "step"]
    assert found["tables"][0]["columns"][0]["name"] == "run"
    answer = run_cli("show", "--schema", "nope")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "no table, tensor, view or macro 'nope'; there are abs_cosine" in answer.err


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000_000, "2.3 GB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text

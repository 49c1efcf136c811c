"""`lakebed sql`: formats that are exact, errors that are one line, a shell that goes on."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys

import polars as pl
import pytest
from lakebed.cli.row_formats import column_names, plain, shown
from lakebed.cli.sql_shell import Shell, SqlCompleter, history_path, is_whole
from lakebed.lake import Lake
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

AWKWARD = """SELECT 0.1::DOUBLE AS d, 1e300 AS e, 'nan'::DOUBLE AS n, '-inf'::DOUBLE AS i, 0.1::FLOAT AS f, NULL AS z,
    true AS t, 'a|b,"c"' || chr(10) || 'd' AS s,
    '\\x00\\xFF'::BLOB AS b, [1.5::DOUBLE, NULL, 'nan'::DOUBLE] AS l, {'k': [1]} AS r,
    sum(range)::HUGEINT AS h, 1.10::DECIMAL(5, 2) AS c, DATE '2026-01-02' AS y, TIMESTAMP '2026-01-02 03:04:05.5' AS w
    FROM range(4)"""


def ask(run_cli, lake_path, *arguments):
    answer = run_cli("sql", "--lake", lake_path, *arguments)
    assert answer.status == 0, answer.err
    return answer.out


def test_json_is_exact_and_has_no_nan(run_cli, lake_path) -> None:
    (row,) = json.loads(ask(run_cli, lake_path, "--format", "json", AWKWARD), parse_constant=pytest.fail)
    assert row == {
        "d": 0.1, "e": 1e300, "n": None, "i": None, "f": 0.10000000149011612, "z": None, "t": True, "s": 'a|b,"c"\nd',
        "b": "00ff", "l": [1.5, None, None], "r": {"k": [1]}, "h": 6, "c": 1.1, "y": "2026-01-02",
        "w": "2026-01-02T03:04:05.500000",
    }  # fmt: skip
    assert [
        json.loads(line) for line in ask(run_cli, lake_path, "--format", "jsonl", AWKWARD).splitlines()
    ] == [row]


def test_csv_is_exact(run_cli, lake_path) -> None:
    (row,) = csv.DictReader(io.StringIO(ask(run_cli, lake_path, "--format", "csv", AWKWARD)))
    assert (row["d"], row["e"], row["n"], row["i"]) == ("0.1", "1e+300", "nan", "-inf")
    assert (row["z"], row["t"], row["s"], row["b"]) == ("", "true", 'a|b,"c"\nd', "00ff")
    assert (row["l"], row["r"], row["h"], row["c"]) == ("[1.5, null, null]", '{"k": [1]}', "6", "1.10")


def test_every_float_reads_back_as_the_same_number(run_cli, lake_path) -> None:
    query = "SELECT (random() - 0.5) * pow(10, (random() * 600 - 300)) AS x FROM range(500)"
    with Lake.open(lake_path) as lake:
        connection = lake.session.connection
        connection.execute(f"CREATE TABLE truth AS {query}")
        truth = [x for (x,) in connection.execute("FROM truth").fetchall()]
        values = ", ".join(f"({x!r}::DOUBLE)" for x in truth)
    query = f"SELECT x FROM (VALUES {values}) AS t(x)"
    lines = ask(run_cli, lake_path, "--format", "csv", query).splitlines()
    assert [float(line) for line in lines[1:]] == truth
    assert [row["x"] for row in json.loads(ask(run_cli, lake_path, "--format", "json", query))] == truth
    markdown = ask(run_cli, lake_path, "--format", "markdown", query).splitlines()
    assert [float(line.strip("| ")) for line in markdown[2:]] == truth


def test_markdown_escapes_and_aligns(run_cli, lake_path) -> None:
    lines = ask(
        run_cli, lake_path, "--format", "markdown", "SELECT 1 AS one, 'a|b' || chr(10) || 'c' AS two"
    ).splitlines()
    assert lines == ["| one | two |", "| ---: | --- |", "| 1 | a\\|b<br>c |"]


def test_parquet_to_a_file_and_to_a_pipe(run_cli, lake_path, tmp_path) -> None:
    query = "SELECT step, loss, [step, 2] AS l, 'x'::BLOB AS b FROM training_steps ORDER BY step"
    ask(run_cli, lake_path, "--format", "parquet", "--output", tmp_path / "o.parquet", query)
    frame = pl.read_parquet(tmp_path / "o.parquet")
    assert frame["loss"].to_list() == [1 / (3 * step) for step in (1, 2, 3, 4)]
    assert frame["l"].to_list()[1] == [2, 2]
    done = subprocess.run(
        _command("sql", "--lake", lake_path, "--format", "parquet", query),
        capture_output=True,
        check=True,
    )
    assert pl.read_parquet(done.stdout).equals(frame)
    assert [path.name for path in tmp_path.iterdir()] == ["o.parquet"]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from lakebed.cli import main; main()", *arguments]


def test_the_table_is_for_people(run_cli, lake_path) -> None:
    out = ask(
        run_cli,
        lake_path,
        "SELECT step, loss, range(10) AS l, NULL AS z, 'long ' || repeat('x', 300) AS s "
        "FROM training_steps LIMIT 1",
    )
    lines = out.splitlines()
    assert lines[2].startswith("   1   0.333333   [0, 1, 2, 3, … 10]   NULL   long xxx")
    assert lines[2].endswith("…")
    assert lines[-1] == "(1 row)"
    out = ask(run_cli, lake_path, "--max-rows", "2", "SELECT step FROM training_steps ORDER BY step")
    assert out.splitlines()[-1] == "(the first 2 rows; --max-rows shows more, the other formats all)"
    assert [line.strip() for line in out.splitlines()[2:4]] == ["1", "2"]
    assert (
        ask(run_cli, lake_path, "SELECT step FROM training_steps WHERE false").splitlines()[-1] == "(0 rows)"
    )


@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "markdown"])
def test_no_rows_and_many_rows(run_cli, lake_path, form: str) -> None:
    empty = ask(run_cli, lake_path, "--format", form, "SELECT 1 AS x WHERE false")
    assert empty == {"csv": "x\n", "json": "[]\n", "jsonl": "", "markdown": "| x |\n| --- |\n"}[form]
    many = ask(run_cli, lake_path, "--format", form, "SELECT range AS x FROM range(5000)")
    extra = {"csv": 1, "json": 2, "jsonl": 0, "markdown": 2}[form]
    assert len(many.splitlines()) == 5000 + extra
    if form == "json":
        assert [row["x"] for row in json.loads(many)] == list(range(5000))


def test_names_that_meet_twice_are_told_apart(run_cli, lake_path) -> None:
    assert column_names(["a", "b", "a", "a", "a_1"]) == ["a", "b", "a_2", "a_3", "a_1"]
    assert json.loads(ask(run_cli, lake_path, "--format", "json", "SELECT 1 AS x, 2 AS x")) == [
        {"x": 1, "x_1": 2}
    ]


def test_queries_from_a_file_and_from_standard_input(run_cli, lake_path, tmp_path, monkeypatch) -> None:
    file = tmp_path / "q.sql"
    file.write_text("-- a comment\nSELECT max(step) AS m\nFROM training_steps;\n")
    assert ask(run_cli, lake_path, "--format", "csv", "--file", file) == "m\n4\n"
    for arguments in (["-"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 5 AS x"))
        assert ask(run_cli, lake_path, "--format", "csv", *arguments) == "x\n5\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    answer = run_cli("sql", "--lake", lake_path)
    assert answer.status == 2
    assert "no SQL to run" in answer.err
    assert run_cli("sql", "--lake", lake_path, "--file", file, "SELECT 1").status == 2


def test_tensors_are_tables(run_cli, lake_path) -> None:
    query = (
        'SELECT step, "row", values, squared_norm(values) AS n FROM gradients WHERE step = 2 AND "row" = 1'
    )
    assert (
        ask(run_cli, lake_path, "--format", "csv", query)
        == 'step,row,values,n\n2,1,"[9.0, 10.0, 11.0]",302.0\n'
    )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELEC 1", 'lakebed: Parser Error: syntax error at or near "SELEC"'),
        ("SELECT nope FROM training_steps", "lakebed: Binder Error"),
        (
            "SELECT * FROM nope",
            "lakebed: Catalog Error: Table with name nope does not exist; the lake has activation_rows",
        ),
        ("SELECT 'x'::INTEGER", "lakebed: Conversion Error"),
        ("SELECT run::INTEGER FROM training_steps", "lakebed: Conversion Error"),
    ],
)
@pytest.mark.parametrize("form", ["table", "json", "parquet"])
def test_errors_are_one_line(run_cli, lake_path, tmp_path, query, message, form) -> None:
    answer = run_cli("sql", "--lake", lake_path, "--format", form, "--output", tmp_path / "o", query)
    assert answer.status == 1
    assert answer.err.startswith(message)
    assert answer.err.count("\n") == 1
    assert answer.out == ""
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_read_or_written(run_cli, lake_path, tmp_path) -> None:
    answer = run_cli("sql", "--lake", tmp_path / "none", "SELECT 1")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "no lake at" in answer.err
    answer = run_cli("sql", "--lake", lake_path, "--output", tmp_path / "no/such/o.csv", "SELECT 1")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "cannot write" in answer.err


def test_a_closed_pipe_is_silent(lake_path) -> None:
    for query in ("SELECT range FROM range(1000000)", "SELECT 1"):
        first, second = os.pipe()
        process = subprocess.Popen(
            _command("sql", "--lake", lake_path, "--format", "csv", query),
            stdout=second,
            stderr=subprocess.PIPE,
        )
        os.close(second)
        os.close(first)  # the reader is gone before the first line
        assert process.communicate(timeout=60)[1] == b""


# -- the shell ---------------------------------------------------------------------------------------------------


def typed(lake_path: str, text: str) -> None:
    with Lake.open(lake_path) as lake, create_pipe_input() as keys:
        keys.send_text(text)
        Shell(lake).loop(input=keys, output=DummyOutput(), history=InMemoryHistory())


def test_the_shell_goes_on_after_errors_and_over_lines(lake_path, capsys) -> None:
    typed(
        lake_path,
        "SELECT\r42 AS answer;\rSELECT nope;\r.nope\r.schema nope\rSELECT 5\x03.format csv\rSELECT 7\rAS seven;\r;\r.quit\r",
    )
    out = capsys.readouterr().out
    assert "holds ref; .help lists commands" in out
    assert "answer" in out
    assert "    42" in out
    assert out.count("error: ") == 3
    assert "error: .nope is no command of this shell" in out
    assert out.endswith("seven\n7\n")


def test_the_shells_commands(lake_path, capsys) -> None:
    typed(lake_path, ".tables\r.schema steps\r.help\r\x04")
    out = capsys.readouterr().out
    for expected in (
        "training_steps\n",
        "gradients\n",
        "specs\n",
        "number of optimizer steps taken",
        ".format NAME",
    ):
        assert expected in out


def test_a_damaged_lake_does_not_end_the_shell(tmp_path, capsys) -> None:
    with Lake.create(tmp_path / "x.lake") as lake:
        shell = Shell(lake)
        folder = tmp_path / "x.lake/tables/extractions/run=ref"
        folder.mkdir(parents=True)
        (folder / "u.parquet").write_bytes(b"x")
        assert shell.run("SELECT * FROM steps;")
        (folder / "u.parquet").unlink()
        assert shell.run("SELECT 3 AS three;")
    out = capsys.readouterr().out
    assert out.startswith("error: receipt tables/extractions/run=ref/u.parquet is damaged")
    assert "three" in out


def test_what_runs_and_what_waits() -> None:
    assert all(is_whole(text) for text in ("", "SELECT 1;", "SELECT\n1;\n", ".tables"))
    assert not any(is_whole(text) for text in ("SELECT 1", "SELECT\n1"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("SELECT * FROM train", {"training_steps", "training_batches"}),
        ("SELECT gradient_l", {"gradient_l2"}),
        ("SELECT squ", {"squared_norm("}),
        ("sel", {"SELECT"}),
        (".sch", {".schema"}),
        (".schema runs", set()),
        (".schema singular_v", {"singular_values", "singular_vectors"}),
        ("", set()),
    ],
)
def test_completion(line: str, expected: set[str]) -> None:
    found = SqlCompleter().get_completions(Document(line), CompleteEvent())
    assert {completion.text for completion in found} == expected


def test_history_lies_where_xdg_says(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "lakebed/sql_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local/state/lakebed/sql_history"


def test_values_for_eyes_and_for_programs() -> None:
    assert shown(0.1 + 0.2) == "0.3"
    assert shown(math.nan) == "nan"
    assert shown({"a": [1.0, None]}) == "{a: [1, NULL]}"
    assert plain((1, {2: b"\x01"})) == [1, {"2": "01"}]

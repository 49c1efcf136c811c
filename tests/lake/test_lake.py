"""Opening, naming, asking: what a lake says when all is well and when it is not."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lakebed.lake import Lake, LakebedError, Unit
from lakebed.lake.axis import publish
from lakebed.lake.errors import (
    InvalidName,
    LakeExists,
    LakeNotFound,
    MissingData,
    QueryError,
    SchemaMismatch,
    StorageRefused,
    UnknownName,
)
from lakebed.lake.names import RESERVED, check_run_name, content_hash, encode_name, spec_id
from lakebed.lake.schema import TABLES
from lakebed.lake.units import conform
from lakebed.lake.verify import verify

# -- places ------------------------------------------------------------------------------------------------------


def test_a_place_without_a_lake_is_refused_with_what_makes_one(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for place in ("nothing", "file", "file/below", "folder"):
        with pytest.raises(LakeNotFound, match=f"no lake at .*{place}: make one with `lakebed demo"):
            Lake.open(tmp_path / place)
    with pytest.raises(LakeNotFound, match="cannot open nope://x: Protocol not known: nope"):
        Lake.open("nope://x")
    with pytest.raises(LakeNotFound, match="an empty path names no lake"):
        Lake.open("")


def test_a_lake_is_made_only_where_nothing_stands(tmp_path) -> None:
    Lake.create(tmp_path / "deep/er/x.lake").close()
    with pytest.raises(LakeExists, match="exists and is not empty: name a new folder"):
        Lake.create(tmp_path / "deep/er/x.lake")
    with pytest.raises(LakeExists):
        Lake.create(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageRefused, match="Not a directory"):
        Lake.create(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    Lake.create(tmp_path / "empty").close()
    with (
        Lake.open_or_create(tmp_path / "new.lake") as made,
        Lake.open_or_create(tmp_path / "new.lake") as again,
    ):
        assert made.id == again.id


def test_paths_may_be_relative_or_end_in_a_slash(tmp_path, monkeypatch, write_unit) -> None:
    monkeypatch.chdir(tmp_path)
    with Lake.create("x.lake/") as lake:
        write_unit(lake, [1], {"w": np.ones((1, 2), np.float32)})
        monkeypatch.chdir("/")
        assert lake.sql("SELECT step FROM training_steps").fetchall() == [(1,)]
    with Lake.open(tmp_path / "x.lake") as lake:
        assert lake.runs() == ["ref"]


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["a", "Run-1", "7", "x_y.z+2@main", "a" * 100])
def test_run_names_that_can_be_folders_everywhere(run: str) -> None:
    assert check_run_name(run) == run


@pytest.mark.parametrize(
    "run", ["", ".", "..", "a/b", "a b", "-a", ".a", "é", "a\n", "a=b", "a%", "a" * 101, "a\\b", "_"]
)
def test_other_run_names_are_refused(run: str, lake: Lake) -> None:
    with pytest.raises(InvalidName, match=r"1 to 100 letters, digits or \. _ \+ @ -"):
        lake.unit(Unit("trace", run, "u"))


AWKWARD = ["a/b", "../../x", ".", "..", "", "step", "layer", "zarr.json", "x" * 300, "x" * 299 + "y", "ü", "a b", "%2F",
           "a.b", "~", "a\x00b", "日本" * 60]  # fmt: skip


def test_folder_names_are_safe_and_differ() -> None:
    encoded = [encode_name(name) for name in AWKWARD]
    assert len(set(encoded)) == len(AWKWARD)
    for folder in encoded:
        assert re.fullmatch(r"[A-Za-z0-9._%~-]{1,200}", folder)
        assert not folder.startswith(".")
        assert folder not in RESERVED


@given(st.text(max_size=80), st.text(max_size=80))
def test_different_names_have_different_folders(one: str, other: str) -> None:
    assert (encode_name(one) == encode_name(other)) == (one == other)


def test_awkward_parameter_names_hold_their_own_cells(lake: Lake, write_unit) -> None:
    arrays = {name: np.full((1, 2), number, np.float32) for number, name in enumerate(AWKWARD)}
    write_unit(lake, [1], arrays)
    publish(lake)
    assert verify(lake).ok
    for number, name in enumerate(AWKWARD):
        assert (lake.tensor("gradients", name, "ref").read(1) == number).all()
    rows = dict(lake.sql("SELECT parameter, values[1] FROM gradients").fetchall())
    assert rows == {name: float(number) for number, name in enumerate(AWKWARD)}
    assert {path.parts[len(Path(lake.uri).parts)] for path in Path(lake.uri).rglob("*")} <= {
        "lakebed.json", "tables", "tensors", "rows"
    }  # fmt: skip


def test_identities_do_not_depend_on_order() -> None:
    assert spec_id({}) == ""
    assert spec_id({"a": 1, "b": [1, 2]}) == spec_id({"b": [1, 2], "a": 1})
    assert re.fullmatch("[0-9a-f]{12}", spec_id({"a": 1}))
    assert spec_id({"a": 1}) != spec_id({"a": 2})
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        spec_id({"a": float("nan")})


# -- an empty lake, and what is not there ------------------------------------------------------------------------


def test_an_empty_lake_answers_with_typed_empty_tables(lake: Lake) -> None:
    assert lake.runs() == []
    assert lake.summary() == []
    for name, table in TABLES.items():
        relation = lake.sql(f"SELECT * FROM {name}")
        assert relation.columns == ["run", *table.names()]
        assert relation.fetchall() == []
        assert lake.table(name).collect().is_empty()
    for view in ("gradients", "weights", "singular_vectors", "specs"):
        assert lake.sql(f"SELECT * FROM {view}").fetchall() == []
    assert lake.table("gradients").collect().is_empty()
    publish(lake)
    assert "no runs yet" in repr(lake)


def test_what_is_unknown_is_answered_with_what_there_is(filled: Lake, lake: Lake) -> None:
    cases = {
        r"no table 'nope'; there are activation_rows, attention_patterns": lambda: filled.table("nope"),
        r"no run 'third' in .*; it has other, ref": lambda: filled.tensor("gradients", "b", "third"),
        r"which run\? .* has other, ref": lambda: filled.tensor("gradients", "b"),
        r"run 'ref' holds no weights; it holds gradients": lambda: filled.tensor("weights", "b", "ref"),
        r"run 'ref' holds no gradients 'x'; it has a\.w, b, c\.w": lambda: filled.tensor(
            "gradients", "x", "ref"
        ),
    }
    for message, call in cases.items():
        with pytest.raises(UnknownName, match=message):
            call()
    with pytest.raises(
        QueryError,
        match=r"Table with name nope does not exist; the lake has activation_rows, activation_values",
    ):
        filled.sql("SELECT * FROM nope")
    with pytest.raises(MissingData, match=r"stores no gradients 'b' at step 99; stored are 0:31"):
        filled.tensor("gradients", "b", "ref").read([3, 99])


def test_missing_weights_name_the_command_that_replays_them(lake: Lake, write_unit) -> None:
    write_unit(lake, [0, 8], {"w": np.ones((2, 2), np.float32)}, quantity="weights")
    with pytest.raises(
        MissingData, match=r"stored are 0, 8; .*`lakebed extract weights --run ref --steps 5`"
    ):
        lake.tensor("weights", "w").read(5)


def test_steps_of_a_dataset_by_its_parameters(lake: Lake) -> None:
    for rank, steps in ((1, (1, 2)), (2, (2, 3))):
        with lake.unit(Unit("probe", "ref", f"rank-{rank}", steps, parameters={"rank": rank})):
            pass
    assert lake.dataset_steps("ref", "probe", {"rank": 1}) == [1, 2]
    assert lake.dataset_steps("ref", "probe", {"rank": 2}) == [2, 3]
    assert lake.dataset_steps("ref", "probe") == []
    rows = lake.sql("SELECT spec, dataset, parameters FROM specs ORDER BY parameters").fetchall()
    assert rows == [(spec_id({"rank": rank}), "probe", f'{{"rank":{rank}}}') for rank in (1, 2)]


# -- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        [{"step": 1, "loss": 0.5}, {"step": 2}],
        {"step": [1, 2], "loss": [0.5, None]},
        pl.DataFrame({"step": [1, 2], "loss": [0.5, None]}),
        pa.table({"loss": pa.array([0.5, None], pa.float32()), "step": pa.array([1, 2], pa.int32())}),
        {"step": np.array([1, 2]), "loss": [0.5, None]},
    ],
)
def test_rows_in_any_shape_become_the_declared_columns(data) -> None:
    table = conform("training_steps", data)
    assert table.schema == TABLES["training_steps"].arrow_schema()
    assert table["step"].to_pylist() == [1, 2]
    assert table["loss"].to_pylist() == [0.5, None]
    assert table["learning_rate"].null_count == 2


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        ("training_steps", [{"step": 1, "lost": 1.0}], "has no column lost; it has step, loss,"),
        ("training_steps", [{"loss": 1.0}], "lack their key column 'step'"),
        ("training_steps", {"step": ["x"]}, "column 'step' .* does not fit int64"),
        ("training_steps", {"step": [1.5]}, "column 'step' .* does not fit int64"),
        ("training_steps", {"step": [[1]]}, "column 'step' .* does not fit int64"),
        ("training_steps", {"step": [1, 2], "loss": [1.0]}, "columns of unequal length"),
        ("steps", {"step": [2**70]}, "column 'step' .* does not fit int64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(table, data, message) -> None:
    with pytest.raises(SchemaMismatch, match=message):
        conform(table, data)


def test_rows_of_an_unknown_table_are_refused() -> None:
    with pytest.raises(UnknownName, match="no table 'nope'; there are activation_rows"):
        conform("nope", [])


def test_no_rows_are_no_error(lake: Lake) -> None:
    with lake.unit(Unit("trace", "ref", "empty")) as writer:
        writer.rows("training_steps", [])
    assert lake.sql("SELECT * FROM training_steps").fetchall() == []
    assert lake.runs() == ["ref"]


def test_rows_are_stored_sorted_by_key(lake: Lake) -> None:
    with lake.unit(Unit("eval", "ref", "u")) as writer:
        writer.rows(
            "evaluations",
            [{"step": 2, "split": "a", "metric": "m"}, {"step": 1, "split": "b", "metric": "m"}],
        )
        writer.rows("evaluations", [{"step": 1, "split": "a", "metric": "m"}])
    (entry,) = lake.table_files("evaluations")
    frame = pl.read_parquet(Path(lake.uri, entry.path))
    assert frame.select("step", "split").rows() == [(1, "a"), (1, "b"), (2, "a")]


def test_infinities_nans_and_bytes_survive(lake: Lake) -> None:
    with lake.unit(Unit("trace", "ref", "u")) as writer:
        writer.rows("steps", [{"step": 1, "learning_rate": float("nan"), "rng_state": b"\x00\xff"}])
        writer.rows("steps", [{"step": 2, "learning_rate": float("-inf")}])
    rows = lake.sql("SELECT learning_rate, rng_state FROM steps ORDER BY step").fetchall()
    assert np.isnan(rows[0][0])
    assert rows[0][1] == b"\x00\xff"
    assert rows[1] == (float("-inf"), None)


# -- a session ---------------------------------------------------------------------------------------------------


def test_parameters_summaries_and_macros(filled: Lake) -> None:
    assert filled.sql("SELECT count(*) FROM training_steps WHERE step < ?", [3]).fetchall() == [(6,)]
    found = filled.session.execute("SELECT count(*) FROM training_steps WHERE step = $step", {"step": 3})
    assert found.fetchall() == [(2,)]
    assert filled.session.execute("SUMMARIZE training_steps").fetchall()
    assert filled.session.execute("DESCRIBE gradients").fetchall()[4][:2] == ("values", "FLOAT[]")
    assert filled.sql("SELECT squared_norm([3, 4]), abs_cosine([1, 0], [-2, 0])").fetchall() == [(25.0, 1.0)]
    assert filled.table("training_steps", "ref").collect().height == 32


def test_two_sessions_see_what_the_other_commits(filled: Lake, write_unit) -> None:
    with Lake.open(filled.uri) as other:
        query = "SELECT count(*), max(step) FROM training_steps WHERE run = 'ref'"
        assert other.sql(query).fetchall() == [(32, 31)]
        write_unit(filled, [40], {"b": np.ones((1, 3), np.float32)})
        assert other.sql(query).fetchall() == [(33, 40)]
        assert other.table("training_steps", "ref").collect().height == 33
        assert other.sql("SELECT values FROM gradients WHERE step = 40").fetchall() == [([1.0, 1.0, 1.0],)]
        assert 40 in other.tensor("gradients", "b", "ref").steps


def test_a_table_that_was_empty_shows_what_came(lake: Lake) -> None:
    query = "SELECT step FROM evaluations"
    assert lake.sql(query).fetchall() == []
    with lake.unit(Unit("eval", "ref", "u")) as writer:
        writer.rows("evaluations", [{"step": 1, "split": "a", "metric": "m"}])
    assert lake.sql(query).fetchall() == [(1,)]


def test_repr_names_runs_and_escapes_html(filled: Lake, write_unit) -> None:
    assert re.search(r"run ref: trace 0:31 \(0\.0 MB, 32 rows\)", repr(filled))
    html = filled._repr_html_()
    assert "<td>ref</td><td>trace</td><td>0:31</td>" in html
    with filled.unit(Unit("<b>", "ref", "u", (1,))):
        pass
    assert "&lt;b&gt;" in filled._repr_html_()
    tensor = filled.tensor("gradients", "a.w", "ref")
    assert repr(tensor) == "<Tensor gradients/a.w of run 'ref': (32, 4, 3), float32, steps 0…31>"


def test_reading_steps_in_any_order_and_shape(filled: Lake) -> None:
    tensor = filled.tensor("gradients", "a.w", "ref")
    whole = tensor.read()
    assert tensor.shape == whole.shape == (32, 4, 3)
    assert tensor.read(5).shape == (4, 3)
    np.testing.assert_array_equal(tensor.read([9, 2, 9]), whole[[9, 2, 9]])
    np.testing.assert_array_equal(tensor.read(slice(4, 8)), whole[4:9])
    np.testing.assert_array_equal(tensor.read(slice(4, None, 5)), whole[4::5])
    np.testing.assert_array_equal(tensor.read(np.array([3])), whole[[3]])
    assert tensor.read([]).shape == (0, 4, 3)


def test_closing_twice_and_asking_again(filled: Lake) -> None:
    filled.sql("SELECT 1")
    filled.close()
    filled.close()
    assert filled.sql("SELECT count(*) FROM training_steps").fetchall() == [(64,)]


def test_timestamps_are_utc(lake: Lake) -> None:
    with lake.unit(Unit("eval", "ref", "u")):
        pass
    (text,) = lake.sql("SELECT created_at FROM extractions").fetchall()[0]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(text)
    assert abs(age.total_seconds()) < 60


# -- elsewhere than on a disk ------------------------------------------------------------------------------------


def test_a_lake_behind_a_uri(write_unit) -> None:
    """Writing, SQL and verify go through fsspec."""
    filesystem = fsspec.filesystem("memory")
    with Lake.create("memory://bucket/x.lake") as lake:
        write_unit(lake, range(8), {"a/b": np.arange(24, dtype=np.float32).reshape(8, 3)})
        with pytest.raises(LakeExists):
            Lake.create(lake.uri)
        with Lake.open(lake.uri) as again:
            assert again.runs() == ["ref"]
            assert again.tensor("gradients", "a/b").read(2).tolist() == [6.0, 7.0, 8.0]
            assert again.sql("SELECT sum(step) FROM training_steps").fetchall() == [(28,)]
            assert again.sql("SELECT values[3] FROM gradients WHERE step = 7").fetchall() == [(23.0,)]
            publish(again)
            assert verify(again).ok
            filesystem.pipe_file("/bucket/x.lake/tensors/ref/gradients/a%2Fb/c/0/0", b"x")
            assert [found.reason[:7] for found in verify(again).damaged] == ["1 bytes"]
    filesystem.rm("/bucket", recursive=True)


def test_every_error_is_a_lakebed_error() -> None:
    import lakebed.lake.errors as errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), LakebedError)
        assert getattr(errors, name).__doc__

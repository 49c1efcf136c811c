"""The catalog serves readers without lakebed, shows whole units only, and can be written again at any time."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pytest
import zarr
from lakebed.lake import Lake
from lakebed.lake.catalog import write_catalog
from lakebed.lake.errors import StorageFull
from lakebed.lake.macros import MACROS
from lakebed.lake.schema import TABLES
from lakebed.lake.storage import Storage


def asked(folder: str, query: str, connect: str = "duckdb.connect('catalog.duckdb', read_only=True)") -> str:
    """What plain DuckDB, started in `folder`, prints for a query."""
    program = f"import duckdb\nwith {connect} as c:\n    print(c.sql({query!r}).fetchall())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_database_answers_in_the_lakes_folder(filled: Lake, tmp_path) -> None:
    write_catalog(filled)
    query = "SELECT run, count(*), sum(squared_norm([1, 2])) FROM training_steps GROUP BY run ORDER BY run"
    assert asked(filled.uri, query) == "[('other', 32, 160.0), ('ref', 32, 160.0)]"
    # The paths are relative: the lake may be moved.
    filled.close()
    moved = Path(filled.uri).rename(tmp_path / "moved.lake")
    assert asked(str(moved), query).startswith("[('other', 32")


def test_views_and_comments_cover_the_schema(filled: Lake) -> None:
    written = write_catalog(filled)
    with duckdb.connect(str(written.database), read_only=True) as connection:
        views = dict(
            connection.execute("SELECT view_name, comment FROM duckdb_views() WHERE NOT internal").fetchall()
        )
        assert views.keys() == set(written.views) >= {*TABLES, "specs"}
        assert views["training_steps"] == TABLES["training_steps"].about
        columns = connection.execute(
            "SELECT comment FROM duckdb_columns() WHERE table_name = 'training_steps' AND column_name = 'loss'"
        ).fetchall()
        macros = connection.execute(
            "SELECT function_name FROM duckdb_functions() WHERE NOT internal"
        ).fetchall()
    assert columns[0][0].startswith("training loss")
    assert {name for (name,) in macros} >= {signature.split("(")[0] for signature in MACROS}


def test_views_sql_runs_as_it_is(filled: Lake) -> None:
    write_catalog(filled)
    program = "duckdb.connect()"
    query = "SELECT count(*) FROM training_steps"
    script = f"import duckdb\nc = {program}\nc.execute(open('views.sql').read())\nprint(c.execute({query!r}).fetchall())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=filled.uri, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[(64,)]", done.stderr


def test_an_unfinished_unit_is_in_no_view(filled: Lake) -> None:
    whole = next(Path(filled.uri, "tables/training_steps/run=ref").iterdir())
    (whole.parent / "left-behind.parquet").write_bytes(whole.read_bytes())
    write_catalog(filled)
    assert asked(filled.uri, "SELECT count(*) FROM training_steps") == "[(64,)]"


def test_writing_again_takes_in_what_came(filled: Lake, write_unit) -> None:
    first = write_catalog(filled)
    before = Path(first.views_file).read_bytes()
    assert write_catalog(filled).to_json() == first.to_json()
    assert Path(first.views_file).read_bytes() == before
    write_unit(filled, [40], {"b": np.ones((1, 3), np.float32)})
    write_catalog(filled)
    assert asked(filled.uri, "SELECT max(step) FROM training_steps") == "[(40,)]"
    steps = zarr.open_array(Path(filled.uri, "tensors/ref/gradients/step"), mode="r")[:]
    assert steps[32] == 40
    assert (steps[33:] < 0).all()
    assert not [path for path in Path(filled.uri).iterdir() if path.name.startswith(".")]


def test_a_reader_at_work_keeps_its_catalog_and_never_sees_half_of_one(filled: Lake) -> None:
    written = write_catalog(filled)
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                with duckdb.connect(str(written.database), read_only=True) as connection:
                    assert connection.execute(
                        "SELECT count(*) FROM duckdb_views() WHERE NOT internal"
                    ).fetchall()[0][0]
                assert Path(written.views_file).read_text().endswith(";\n")
            except BaseException as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(4):
        write_catalog(filled)
    stop.set()
    reader.join()
    assert not failures


def test_an_empty_lake_has_a_catalog_of_empty_views(lake: Lake) -> None:
    write_catalog(lake)
    assert asked(lake.uri, "SELECT count(*) FROM singular_values") == "[(0,)]"
    assert asked(lake.uri, "SELECT count(*) FROM specs") == "[(0,)]"


@pytest.mark.parametrize("name", ["it's.lake", "sp ace.lake", "ünï.lake"])
def test_awkward_folder_names(tmp_path, write_unit, name: str) -> None:
    with Lake.create(tmp_path / name) as lake:
        write_unit(lake, [1], {"b": np.ones((1, 3), np.float32)})
        write_catalog(lake)
        assert lake.sql("SELECT step FROM training_steps").fetchall() == [(1,)]
        assert asked(lake.uri, "SELECT step FROM training_steps") == "[(1,)]"


def test_behind_a_uri_there_is_views_sql_alone_and_it_says_so(write_unit) -> None:
    with Lake.create("memory://catalog/x.lake") as lake:
        write_unit(lake, [1], {"b": np.ones((1, 3), np.float32)})
        written = write_catalog(lake)
        text = lake.storage.read("views.sql").decode()
        assert written.database is None
        assert "no catalog.duckdb" in str(written.note)
        assert "'memory:///catalog/x.lake/tables/training_steps/run=ref/" in text
        with duckdb.connect() as connection:
            connection.register_filesystem(fsspec.filesystem("memory"))
            connection.execute(text)
            assert connection.execute("SELECT step FROM training_steps").fetchall() == [(1,)]
    fsspec.filesystem("memory").rm("/catalog", recursive=True)


def test_a_catalog_that_could_not_be_written_leaves_the_old_one(filled: Lake, monkeypatch) -> None:
    written = write_catalog(filled)
    before = {path: Path(path).read_bytes() for path in (written.views_file, str(written.database))}
    write_file = Storage._write_file

    def full(storage: Storage, path: str, data: bytes) -> None:
        write_file(storage, path, data[: len(data) // 2] if "views.sql" in path else data)
        if "views.sql" in path:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Storage, "_write_file", full)
    with pytest.raises(StorageFull):
        write_catalog(filled)
    assert {path: Path(path).read_bytes() for path in before} == before
    assert not [path for path in Path(filled.uri).iterdir() if path.name.startswith(".")]

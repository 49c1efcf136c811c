"""docs/lake-format.md: each block runs with its one library and prints what it says; each limitation has its test."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pytest
import xarray
from lakebed.lake import Lake, Unit
from lakebed.lake.axis import publish
from lakebed.lake.catalog import write_catalog
from lakebed.lake.collect import collect, plan_collection
from lakebed.lake.compact import compact, plan_compaction
from lakebed.lake.errors import StorageRefused
from lakebed.lake.names import encode_name

PAGE = Path(__file__).resolve().parents[2] / "docs/lake-format.md"
BLOCKS = re.findall(r"^```python reader=(\w+)\n(.*?)^```\n```text\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
READERS = {"duckdb", "polars", "pyarrow", "xarray", "zarr", "pandas", "torch", "lakebed", "fsspec", "dask"}
# What a reader may bring along.
COMPANY = {"xarray": {"zarr", "pandas"}}

# Hides packages as if they were not installed.
HOOK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in {refused} else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture(scope="module", params=["as written", "compacted", "collected"])
def demo(request, tmp_path_factory) -> str:
    """The page's lake; its two units also compacted, with what was superseded still there, and without."""
    path = str(tmp_path_factory.mktemp("doc") / "demo.lake")
    with Lake.create(path) as lake:
        with lake.unit(Unit("trace", "demo", "trace-00000100-00000200", (100, 200, 300))) as writer:
            block = writer.tensor_rows("gradients", (100, 200, 300), 4)
            block.write("layers.0.weight", np.arange(18, dtype=np.float32).reshape(3, 2, 3))
            writer.rows("training_steps", [{"step": 100, "loss": 0.5}, {"step": 200, "loss": 0.25}])
        with lake.unit(Unit("trace", "demo", "trace-00000300", (300,))) as writer:
            writer.rows("training_steps", [{"step": 300, "loss": 0.125}])
        write_catalog(lake)
        if request.param != "as written":
            assert [done.committed for done in compact(lake, plan_compaction(lake))] == [True]
        if request.param == "collected":
            collect(lake, plan_collection(lake, 0))
    return path


def test_the_page_has_a_block_for_every_reader() -> None:
    assert {reader for reader, _, _ in BLOCKS} == {"duckdb", "polars", "pyarrow", "xarray", "zarr"}
    assert len(BLOCKS) == PAGE.read_text().count("```python")


@pytest.mark.parametrize(
    ("reader", "code", "printed"), BLOCKS, ids=[f"{n}-{b[0]}" for n, b in enumerate(BLOCKS)]
)
def test_a_block_prints_what_the_page_says(demo: str, reader: str, code: str, printed: str) -> None:
    refused = READERS - {reader} - COMPANY.get(reader, set())
    program = HOOK.format(refused=sorted(refused)) + code
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=demo, capture_output=True, text=True, check=False
    )
    assert done.stdout == printed, done.stderr


def test_the_hook_refuses_lakebed() -> None:
    program = HOOK.format(refused=sorted(READERS)) + "import lakebed"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "No module named 'lakebed'" in done.stderr


def test_every_limitation_has_its_test() -> None:
    limits = PAGE.read_text().split("## Limitations")[1].strip().splitlines()[2:]
    named = {match.group(1) for line in limits if (match := re.search(r"`(test_\w+)`$", line))}
    assert len(named) == len(limits)
    there = {
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert named - there == set()


# -- limitations that no other test holds ------------------------------------------------------------------------


def test_sql_narrows_to_float32(lake: Lake, write_unit) -> None:
    write_unit(lake, [1], {"double": np.array([[1 / 3]]), "integer": np.array([[2**24 + 1]])})
    rows = dict(lake.sql("SELECT parameter, values[1] FROM gradients").fetchall())
    assert rows == {"double": float(np.float32(1 / 3)), "integer": float(2**24)}
    assert lake.tensor("gradients", "double").read(1)[0] == 1 / 3
    assert lake.tensor("gradients", "integer").read(1)[0] == 2**24 + 1


def test_sql_flattens_leading_axes(lake: Lake, write_unit) -> None:
    write_unit(lake, [1], {"w": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)})
    rows = lake.sql('SELECT "row", values[1] FROM gradients ORDER BY "row"').fetchall()
    assert rows == [(row, 4.0 * row) for row in range(6)]


def test_the_catalog_has_no_tensor_views(filled: Lake) -> None:
    written = write_catalog(filled)
    assert not {"gradients", "weights", "singular_vectors"} & set(written.views)
    assert "-- Tensors (weights, gradients, ...) are Zarr arrays" in Path(written.views_file).read_text()


def test_plain_zarr_sees_what_was_published(lake: Lake, write_unit) -> None:
    def steps() -> list[int]:
        with xarray.open_zarr(
            Path(lake.uri, "tensors/ref/gradients"), consolidated=False, chunks=None
        ) as found:
            return found.step.values.tolist()

    write_unit(lake, [7], {"w": np.ones((1, 3), np.float32)}, block_rows=4)
    publish(lake)
    assert steps() == [7, -2, -3, -4]  # three rows of the block hold nothing
    write_unit(lake, [3], {"w": np.ones((1, 3), np.float32)}, block_rows=4)
    assert steps() == [7, -2, -3, -4]
    publish(lake)
    assert steps() == [7, -2, -3, -4, 3, -6, -7, -8]


def test_polars_reads_a_memory_uri(write_unit) -> None:
    with Lake.create("memory://polars/x.lake") as lake:
        write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})
        assert lake.table("training_steps", "ref").select("run", "step").collect().rows() == [("ref", 1)]
        assert lake.sql("SELECT step FROM training_steps").pl().rows() == [(1,)]
        assert lake.table("gradients").collect().height == 1
    fsspec.filesystem("memory").rm("/polars", recursive=True)


def test_a_replaced_receipt_of_the_same_name_is_not_noticed(lake: Lake, write_unit) -> None:
    unit = write_unit(lake, [1], {"w": np.ones((1, 3), np.float32)})
    query = "SELECT step FROM training_steps"
    assert lake.sql(query).fetchall() == [(1,)]
    Path(lake.uri, lake.receipts.all()[0].key).unlink()
    with Lake.open(lake.uri) as other:
        write_unit(other, [5], {"w": np.ones((1, 3), np.float32)}, name=unit.name)
        assert other.sql(query).fetchall() == [(5,)]
    assert lake.sql(query).fetchall() == [(1,)]
    with Lake.open(lake.uri) as again:
        assert again.sql(query).fetchall() == [(5,)]


def test_lazy_relations_raise_duckdbs_errors(filled: Lake) -> None:
    relation = filled.sql("SELECT run::INTEGER FROM training_steps")
    with pytest.raises(duckdb.ConversionException):
        relation.fetchall()


def test_folder_names_keep_case() -> None:
    assert encode_name("W") == "W"
    assert encode_name("w") == "w"


def test_without_hard_links_a_lake_is_refused(tmp_path, monkeypatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageRefused, match=r"cannot write lakebed\.json in .*: Operation not permitted"):
        Lake.create(tmp_path / "x.lake")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

"""A query opens the chunks it needs and no others, and gives the rows it would give over a plain table."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from lakebed.lake import Lake, Unit

# Two runs, three parameters, four chunks of eight steps each: 24 chunks in all.
FILTERS = [
    ("true", 24),
    ("run = 'ref'", 12),
    ("run = 'none'", 0),
    ("parameter = 'b'", 8),
    ("parameter IN ('b', 'c.w') AND run = 'other'", 8),
    ("step = 3", 6),
    ("step IN (3, 30) AND parameter = 'b' AND run = 'ref'", 2),
    ("step BETWEEN 6 AND 9 AND parameter = 'a.w' AND run = 'ref'", 2),
    ("step >= 24", 6),
    ("step < 0", 0),
    ("NOT (step BETWEEN 8 AND 30) AND run = 'ref'", 6),
    ("(step = 1 OR step = 20) AND parameter = 'b' AND run = 'ref'", 2),
    ("(parameter = 'b' AND step = 0) OR (parameter = 'c.w' AND step = 31)", 4),
    ("parameter LIKE 'a%' AND run = 'ref' AND step < 8", 3),
    ("parameter = 'a.w' AND \"row\" = 2 AND step = 9 AND run = 'ref'", 1),
    ('"row" = 3', 8),
    ('"row" >= 1 AND step < 8', 4),
    ('"row" = 99', 0),
    ("parameter = 'b' OR step = 0", 12),
    ("step = 4 AND values[1] > 0 AND run = 'ref'", 3),
    ("parameter IS NULL", 0),
]


def rows_and_chunks(lake: Lake, query: str) -> tuple[list[tuple[object, ...]], int]:
    before = lake.chunks_read
    rows = lake.session.execute(query).fetchall()
    return rows, lake.chunks_read - before


@pytest.mark.parametrize(("where", "chunks"), FILTERS)
def test_filters_choose_chunks_and_rows(filled: Lake, where: str, chunks: int) -> None:
    query = f'SELECT run, step, parameter, "row", values FROM {{}} WHERE {where} ORDER BY ALL'
    found, opened = rows_and_chunks(filled, query.format("gradients"))
    filled.session.connection.execute("CREATE TABLE plain AS SELECT * FROM gradients")
    assert found == filled.session.connection.execute(query.format("plain")).fetchall()
    assert opened == chunks


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM gradients",
        "SELECT DISTINCT run, step, parameter FROM gradients",
        'SELECT max("row") FROM gradients WHERE "row" < 3',
        "SELECT step FROM gradients WHERE parameter = 'b' LIMIT 1",
    ],
)
def test_without_values_no_chunk_is_opened(filled: Lake, query: str) -> None:
    rows, opened = rows_and_chunks(filled, query)
    assert rows
    assert opened == 0


def test_counts_are_right_without_opening_chunks(filled: Lake) -> None:
    assert filled.sql("SELECT count(*) FROM gradients").fetchall() == [(2 * 32 * (4 + 1 + 2),)]


def test_limit_stops_reading(filled: Lake) -> None:
    rows, opened = rows_and_chunks(filled, "SELECT values FROM gradients LIMIT 1")
    assert len(rows) == 1
    # One chunk is read alone; a second pull may start the readers ahead, of which there are a few.
    assert opened < 12


def test_memory_of_a_scan_does_not_grow_with_the_trace(lake: Lake, write_unit) -> None:
    """The scan holds a few chunks at a time; what it allocates is measured, the process's high-water mark is not."""
    import tracemalloc

    for start in range(0, 320, 16):
        write_unit(lake, range(start, start + 16), {"w": np.ones((16, 256, 256), np.float32)}, block_rows=16)
    total = 320 * 256 * 256 * 4
    tracemalloc.start()
    rows = lake.session.execute(
        "SELECT step, sum(squared_norm(values)) FROM gradients GROUP BY step"
    ).fetchall()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {norm for _, norm in rows} == {256.0 * 256}
    assert peak < total / 2


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_polars_reads_the_same_rows(filled: Lake, engine: str) -> None:
    table = filled.table("gradients")
    whole = table.collect(engine=engine)
    is_row = pl.col("row") == 1
    cases = {
        "filter": (table.filter(is_row & (pl.col("step") < 4)), whole.filter(is_row & (pl.col("step") < 4))),
        "head before filter": (table.head(10).filter(is_row), whole.head(10).filter(is_row)),
        "head before a filter on the index": (
            table.head(250).filter(pl.col("parameter") == "b"),
            whole.head(250).filter(pl.col("parameter") == "b"),
        ),
        "filter before head": (table.filter(is_row).head(3), whole.filter(is_row).head(3)),
        "slice": (table.slice(5, 3), whole.slice(5, 3)),
        "tail": (table.tail(4), whole.tail(4)),
        "columns": (table.select("step", "row"), whole.select("step", "row")),
    }
    for label, (lazy, expected) in cases.items():
        assert lazy.collect(engine=engine).equals(expected), label
    top = table.sort("step", "row", "parameter", "run", descending=True).head(3).collect(engine=engine)
    assert top.equals(whole.sort("step", "row", "parameter", "run", descending=True).head(3))


def test_polars_filters_choose_chunks(filled: Lake) -> None:
    before = filled.chunks_read
    filled.table("gradients", "ref").filter(
        (pl.col("parameter") == "b") & pl.col("step").is_between(8, 15)
    ).collect()
    assert filled.chunks_read - before == 1


@pytest.mark.parametrize(
    "where", ["parameter LIKE '%w'", "parameter LIKE 'a%'", "step % 8 = 1", "step > 3.5"]
)
def test_other_functions_are_decided_after_reading(filled: Lake, where: str) -> None:
    """Limitation of docs/lake-format.md: DuckDB hands over comparisons with constants of the column's type, no more."""
    rows, opened = rows_and_chunks(filled, f"SELECT step, values FROM gradients WHERE {where}")
    assert 0 < len(rows) < 448
    assert opened == 24


def test_a_join_and_a_sum_reach_every_number(filled: Lake) -> None:
    query = """SELECT a.step, sum(list_dot_product(a.values, b.values)) AS product
               FROM gradients a JOIN gradients b USING (step, parameter, "row")
               WHERE a.run = 'ref' AND b.run = 'other' AND parameter = 'a.w' GROUP BY a.step ORDER BY a.step"""
    found = np.array(filled.sql(query).fetchall())[:, 1]
    left, right = (filled.tensor("gradients", "a.w", run).read() for run in ("ref", "other"))
    np.testing.assert_allclose(found, (left * right).sum((1, 2)), rtol=1e-5)


def test_singular_vectors_are_rows_by_rank_and_side(lake: Lake) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 3, 2, 4, 2, 5)).astype(np.float32)  # step, layer, head, rank, width
    flat = rng.standard_normal((3, 2, 6, 7)).astype(np.float32)  # step, layer, rank, width
    with lake.unit(Unit("svd", "ref", "svd", (1, 2, 3))) as writer:
        block = writer.tensor_rows("svd", [1, 2, 3], 4)
        for name, array in (("W_QK.U", left), ("W_QK.Vh", right), ("W_in.U", flat)):
            block.write(name, array)
    query = """SELECT values FROM singular_vectors WHERE step = 2 AND matrix = 'W_QK' AND layer = 1 AND head = 0
               AND "rank" = 2 AND side = 'right'"""
    before = lake.chunks_read
    (found,) = lake.session.execute(query).fetchall()
    assert lake.chunks_read - before == 1
    np.testing.assert_array_equal(found[0], right[1, 1, 0, 1])
    (found,) = lake.session.execute(
        "SELECT values, head FROM singular_vectors WHERE step = 3 AND matrix = 'W_in' AND layer = 0 AND \"rank\" = 1"
    ).fetchall()
    np.testing.assert_array_equal(found[0], flat[2, 0, 0])
    assert found[1] is None


def test_tensor_sql_does_not_import_pandas_and_pyarrow_still_converts_to_it():
    import subprocess
    import sys

    script = (
        "import sys; from lakebed.lake import duckdb_source; import pyarrow as pa; "
        "assert not any(name.split('.')[0] == 'pandas' for name in sys.modules); "
        "assert list(pa.table({'a': [1, 2]}).to_pandas()['a']) == [1, 2]; import pandas; pandas.DataFrame"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

"""Compaction changes where rows lie and nothing else: not what a reader sees, whenever it looks, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import fsspec
import lakebed.lake.compact as compacting
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lakebed.lake import Lake, Unit
from lakebed.lake.collect import collect, plan_collection
from lakebed.lake.compact import compact, plan_compaction
from lakebed.lake.compactions import Compaction, counted
from lakebed.lake.errors import (
    CorruptFile,
    InputMismatch,
    InvalidName,
    SchemaMismatch,
    UnknownName,
)
from lakebed.lake.storage import Storage
from lakebed.lake.verify import verify

# Units of two datasets with tables of their own and one in common.
_TABLES = {"svd": ("singular_values", "steps"), "eval": ("evaluations", "steps")}
# Without shrinking: every example makes files.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
# All that lakebed knows of units, but where their rows lie.
_UNITS = "SELECT * EXCLUDE (files) FROM extractions ORDER BY run, unit"
# How a reader without lakebed lists files, who lets the last row of a unit count: see docs/lake-format.md.
_PLAIN = """
SELECT list(DISTINCT file.path) FROM (
    SELECT unnest(arg_max(files, filename)) AS file
    FROM read_parquet('{0}/tables/extractions/**/*.parquet', filename = true, hive_partitioning = true)
    GROUP BY run, unit
) WHERE starts_with(file.path, 'tables/steps/')
"""


def make(lake: Lake, dataset: str, step: int, run: str = "ref", inputs: str = "x", rows: int = 3) -> Unit:
    """One unit of `rows` rows in a table of its own, one in `steps` and a gradient."""
    unit = Unit(dataset, run, f"{dataset}-{step:08d}", (step,), {"of": dataset}, {"checkpoint": inputs})
    with lake.unit(unit) as writer:
        if dataset == "svd":
            of = [
                {
                    "step": step,
                    "matrix": "W",
                    "layer": 0,
                    "head": at % 2,
                    "rank": 1 + at,
                    "singular_value": step / (1 + at),
                }
                for at in range(rows)
            ]
        else:
            of = [{"step": step, "split": f"s{at}", "metric": "m", "value": float(at)} for at in range(rows)]
        writer.rows(_TABLES[dataset][0], of)
        writer.rows("steps", [{"step": 2 * step + (dataset == "svd"), "sha256": f"{dataset}{step}"}])
        block = writer.tensor_rows("gradients", (2 * step + (dataset == "svd"),), 1)
        block.write("w", np.full((1, 2), step, np.float32))
    return unit


def seen(lake: Lake) -> dict[str, list[tuple[object, ...]]]:
    """Every row of the tables, what is known of units, and the tensors' steps."""
    found = {
        name: lake.sql(f"FROM {name} ORDER BY ALL").fetchall()
        for name in ("singular_values", "evaluations", "steps", "specs")
    }
    found["units"] = lake.sql(_UNITS).fetchall()
    found["gradients"] = lake.sql("SELECT run, step, values FROM gradients ORDER BY ALL").fetchall()
    return found


def all_compacted(lake: Lake, **options: object) -> list[bool]:
    """Whether each group was committed."""
    return [done.committed for done in compact(lake, plan_compaction(lake, **options))]  # type: ignore[arg-type]


def check(lake: Lake, expected: dict[str, list[tuple[object, ...]]]) -> None:
    """A reader from before, a new one and verify agree with `expected`."""
    assert seen(lake) == expected
    with Lake.open(lake.uri) as other:
        assert seen(other) == expected
        result = verify(other)
        assert result.ok, result.damaged
    assert len({row[:2] for row in expected["steps"]}) == len(expected["steps"])
    with duckdb.connect() as plain:
        ((listed,),) = plain.execute(_PLAIN.format(lake.uri)).fetchall()
        found = plain.read_parquet([f"{lake.uri}/{path}" for path in listed], hive_partitioning=True)
        rows = found.project("run, step, sha256").order("ALL").fetchall()
    assert rows == lake.sql("SELECT run, step, sha256 FROM steps ORDER BY ALL").fetchall()


@pytest.fixture
def many(lake: Lake) -> Lake:
    """Twelve units of each dataset in run `ref`, two in run `other`."""
    for step in range(12):
        for dataset in _TABLES:
            make(lake, dataset, step)
    for step in range(2):
        make(lake, "svd", step, "other")
    return lake


def test_rows_and_units_stay_and_files_become_few(many: Lake) -> None:
    before = seen(many)
    assert len(many.table_files("singular_values")) == 14
    assert all_compacted(many) == [True, True, True]
    check(many, before)
    assert len(many.table_files("singular_values")) == 2
    assert len(many.table_files("steps")) == 3
    assert len(many.table_files("extractions")) == 3
    assert plan_compaction(many) == []
    assert many.dataset_steps("ref", "svd", {"of": "svd"}) == list(range(12))


def test_a_merged_file_is_sorted_in_row_groups_that_filters_skip(lake: Lake, monkeypatch) -> None:
    monkeypatch.setattr(compacting, "_ROW_GROUP", 8)
    for step in (3, 1, 2, 0):
        make(lake, "svd", step, rows=4)
    all_compacted(lake)
    (entry,) = lake.table_files("singular_values")
    file = pq.ParquetFile(Path(lake.uri, entry.path))
    assert file.read().column("step").to_pylist() == [step for step in range(4) for _ in range(4)]
    ranges = [
        (of.min, of.max)
        for of in (file.metadata.row_group(at).column(0).statistics for at in range(file.num_row_groups))
    ]
    assert ranges == [(0, 1), (2, 3)]


def test_extraction_goes_on_after_a_compaction(many: Lake) -> None:
    all_compacted(many)
    collect(many, plan_collection(many, 0))
    with Lake.open(many.uri) as other:
        unit = Unit("svd", "ref", "svd-00000003", (3,), {"of": "svd"}, {"checkpoint": "x"})
        found = other.find_receipt(unit)
        assert found is not None
        assert (found.content_hash, found.rows, found.kept_in) == (unit.content_hash, 4, found.key)
        with pytest.raises(InputMismatch, match=r"made from other inputs \(checkpoint\)"):
            other.find_receipt(Unit("svd", "ref", unit.name, (3,), {"of": "svd"}, {"checkpoint": "y"}))
    with Lake.open(many.uri) as other:
        before = seen(other)
        make(other, "svd", 3)
        with pytest.raises(InputMismatch, match=r"made from other inputs \(checkpoint\)"):
            make(other, "svd", 3, inputs="y")
        check(other, before)
    for step in range(12, 16):
        make(many, "svd", step)
    after = seen(many)
    assert len(after["singular_values"]) == len(before["singular_values"]) + 12
    assert all_compacted(many) == [True]
    check(many, after)
    assert len(many.table_files("singular_values", "ref")) == 1


def test_a_unit_compacted_and_collected_while_it_was_made_again_is_not_doubled(many: Lake) -> None:
    """The writer looked before another process made the unit, compacted it and collected its receipt."""
    late = Lake.open(many.uri)
    late.refresh()
    make(many, "svd", 99)
    all_compacted(many)
    collect(many, plan_collection(many, 0))
    before = seen(many)
    make(late, "svd", 99)
    check(many, before)
    check(late, before)
    late.close()


@given(st.data())
@settings(
    max_examples=25,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_order_of_any_compactions_keeps_every_row(monkeypatch, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, Lake.create(f"{folder}/x.lake") as lake:
        step = 0
        for _ in range(data.draw(st.integers(2, 7), "actions")):
            action = data.draw(st.sampled_from(["write", "compact", "compact", "collect", "stale"]))
            if action == "write" or step == 0:
                for _ in range(data.draw(st.integers(1, 4))):
                    make(
                        lake,
                        data.draw(st.sampled_from(sorted(_TABLES))),
                        step,
                        data.draw(st.sampled_from("ab")),
                    )
                    step += 1
                continue
            before = seen(lake)
            if action == "collect":
                collect(lake, plan_collection(lake, 0))
            else:
                monkeypatch.setattr(compacting, "_UNITS", data.draw(st.sampled_from([2, 5, 4000])))
                tables = data.draw(
                    st.sets(st.sampled_from(["singular_values", "evaluations", "steps", "extractions"]))
                )
                groups = plan_compaction(lake, tables=tables)
                chosen = data.draw(st.permutations(groups))[: data.draw(st.integers(0, len(groups)))]
                if action == "stale":
                    # Planned on what another compaction has superseded by now.
                    with Lake.open(lake.uri) as other:
                        all_compacted(
                            other, tables=data.draw(st.sets(st.sampled_from(["steps", "evaluations"])))
                        )
                list(compact(lake, chosen))
            check(lake, before)


def test_tables_limit_what_is_merged(many: Lake) -> None:
    before = seen(many)
    groups = plan_compaction(many, "ref", ["singular_values"])
    assert [(group.dataset, list(group.sources)) for group in groups] == [("svd", ["singular_values"])]
    all_compacted(many, run="ref", tables=["singular_values"])
    assert len(many.table_files("singular_values", "ref")) == 1
    assert len(many.table_files("steps", "ref")) == 24
    check(many, before)
    # The rest later, over the compaction that stands.
    all_compacted(many)
    assert len(many.table_files("steps", "ref")) == 2
    check(many, before)


def test_names_that_do_not_exist_are_answered_with_those_that_do(many: Lake) -> None:
    with pytest.raises(UnknownName, match="no table 'nope'; there are activation_rows, attention_patterns"):
        plan_compaction(many, tables=["nope"])
    with pytest.raises(UnknownName, match=r"no run 'nope' in .*; it has other, ref"):
        plan_compaction(many, run="nope")
    with pytest.raises(InvalidName, match="unit name '~compacted' is not usable"):
        many.unit(Unit("svd", "ref", "~compacted"))


def test_what_is_not_whole_is_not_compacted(many: Lake) -> None:
    entry = many.table_files("singular_values", "ref")[0]
    path = Path(many.uri, entry.path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(CorruptFile, match="its checksum is not the receipt's"):
        all_compacted(many, run="ref", datasets=["svd"])
    path.unlink()
    with pytest.raises(CorruptFile, match="a file of svd of run 'ref' is missing: run `lakebed verify`"):
        all_compacted(many, run="ref", datasets=["svd"])
    path.write_bytes(whole)
    assert verify(many).unreferenced_files == 0
    assert all_compacted(many, run="ref", datasets=["svd"]) == [True]


def test_columns_of_another_version_are_refused(many: Lake, monkeypatch) -> None:
    from lakebed.lake.columns import Column, Table
    from lakebed.lake.schema import TABLES

    table = TABLES["singular_values"]
    wider = Table(table.name, table.key, table.about, (*table.columns, Column("new", "DOUBLE", "")))
    monkeypatch.setitem(TABLES, "singular_values", wider)
    with pytest.raises(SchemaMismatch, match="was written by another version of lakebed"):
        all_compacted(many, datasets=["svd"])


def test_a_damaged_compaction_is_named_with_what_mends_it(many: Lake) -> None:
    all_compacted(many)
    (key,) = {of.key for of in many.receipts.all("ref", "svd")}
    path = Path(many.uri, key)
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
    with Lake.open(many.uri) as other:
        with pytest.raises(
            CorruptFile, match=r"~compacted/0000000\d.parquet is damaged .*restore it from a copy"
        ):
            other.runs()
        assert key in {found.path for found in verify(other).damaged}
    path.unlink()  # what it superseded counts again
    with Lake.open(many.uri) as other:
        assert verify(other).ok
        other.refresh()
        assert len(other.table_files("singular_values", "ref")) == 12
    path.write_bytes(whole)
    (entry,) = many.table_files("singular_values", "ref")
    Path(many.uri, entry.path).unlink()
    with Lake.open(many.uri) as other:
        (found,) = [of for of in verify(other).damaged if of.path == entry.path]
        assert (found.reason, found.unit, found.dataset) == ("missing", None, "svd")
        assert f"remove {key}, then run `lakebed extract svd" in found.remedy


# -- several at once ---------------------------------------------------------------------------------------------


def test_of_two_compactions_of_the_same_units_one_counts(many: Lake) -> None:
    before = seen(many)
    with Lake.open(many.uri) as other:
        mine, theirs = plan_compaction(many), plan_compaction(other)
        assert [done.committed for done in compact(other, theirs)] == [True] * 3
        assert [done.committed for done in compact(many, mine)] == [False] * 3
    check(many, before)
    superseded = 3 * 26 + 0
    assert verify(many).unreferenced_files == superseded, "the loser left files"


def test_compactions_of_different_units_both_count(many: Lake, monkeypatch) -> None:
    """The other takes the number that was ours a moment ago."""
    before = seen(many)
    create, planned = Storage.create, plan_compaction(many, "ref", datasets=["svd"])
    with Lake.open(many.uri) as other:
        theirs = plan_compaction(other, "ref", datasets=["eval"])

        def late(self: Storage, key: str, data: bytes) -> bool:
            if "~compacted" in key and self is many.storage and theirs:
                assert [done.committed for done in compact(other, [theirs.pop()])] == [True]
            return create(self, key, data)

        monkeypatch.setattr(Storage, "create", late)
        assert [done.committed for done in compact(many, planned)] == [True]
    check(many, before)
    assert {of.key[-12:] for of in many.receipts.all("ref")} == {"0001.parquet", "0002.parquet"}


def test_a_late_compaction_under_a_number_that_was_collected_does_not_count(many: Lake) -> None:
    """It shares units with a later one, so that their rows would stand twice."""
    receipts = tuple(many.receipts.all("ref", "svd"))
    later, earlier = Compaction("ref", 5, receipts[:6]), Compaction("ref", 4, receipts[4:])
    apart = Compaction("ref", 3, receipts[8:])
    assert counted([earlier, later]) == [later]
    assert counted([apart, earlier, later]) == [later, apart]


def test_an_answer_that_was_lost_keeps_the_files(many: Lake, monkeypatch) -> None:
    before, create = seen(many), Storage.create

    def lost(self: Storage, key: str, data: bytes) -> bool:
        made = create(self, key, data)
        if "~compacted" not in key or not made:
            return made
        if outcome is TimeoutError:
            raise TimeoutError
        return False

    monkeypatch.setattr(Storage, "create", lost)
    outcome: object = False
    assert all_compacted(many, run="ref", datasets=["svd"]) == [True]
    check(many, before)
    outcome = TimeoutError
    with pytest.raises(TimeoutError):
        all_compacted(many, run="ref", datasets=["eval"])
    check(many, before)


def test_readers_and_a_writer_see_whole_rows_while_others_compact(many: Lake) -> None:
    stop, failures = threading.Event(), list[BaseException]()

    def repeat(action: object) -> None:
        try:
            while not stop.is_set():
                action()  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    def read() -> None:
        with Lake.open(many.uri) as lake, lake.pinned():
            steps = [step for (step,) in lake.sql("SELECT step FROM steps WHERE run = 'ref'").fetchall()]
            units = lake.sql("SELECT unit FROM extractions WHERE run = 'ref'").fetchall()
            assert len(steps) == len(set(steps)) == len(units) >= 24

    def compact_all() -> None:
        with Lake.open(many.uri) as lake:
            all_compacted(lake)

    threads = [threading.Thread(target=repeat, args=[of]) for of in (read, read, compact_all, compact_all)]
    for thread in threads:
        thread.start()
    for step in range(100, 130):
        make(many, "svd", step)
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    many.refresh()
    assert len(many.receipts.all("ref")) == 24 + 30
    check(many, seen(many))


def test_a_reader_that_loses_a_file_is_told_to_ask_again(many: Lake) -> None:
    query = "SELECT count(*) FROM steps"
    with many.pinned():
        with Lake.open(many.uri) as other:
            all_compacted(other)
            collect(other, plan_collection(other, 0))
        with pytest.raises(CorruptFile, match=r"was compacted, and `lakebed gc` removed it .* ask again"):
            many.sql(query).fetchall()
    assert many.sql(query).fetchall() == [(26,)]


def test_a_query_that_loses_a_file_between_two_rows_says_so(many: Lake) -> None:
    query = "SELECT count(*) FROM steps"
    with many.pinned():
        assert many.sql(query).fetchall() == [(26,)]
        with Lake.open(many.uri) as other:
            all_compacted(other)
            collect(other, plan_collection(other, 0))
        with pytest.raises(CorruptFile, match=r"was compacted, and `lakebed gc` removed it .* ask again"):
            many.session.execute(query).fetchall()
    assert many.session.execute(query).fetchall() == [(26,)]


# -- killed ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lakebed.lake import Lake
from lakebed.lake.compact import compact, plan_compaction
from lakebed.lake.storage import Storage

lake, left = Lake.open(sys.argv[1]), int(sys.argv[2])

def counting(call):
    def counted(self, key, data):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, key, data)
    return counted

Storage.write, Storage.create = counting(Storage.write), counting(Storage.create)
list(compact(lake, plan_compaction(lake)))
"""


# Of each of three groups two files and the compaction are put.
@pytest.mark.parametrize("puts", range(10))
def test_a_killed_compaction_changes_nothing_that_a_reader_sees(many: Lake, puts: int) -> None:
    before = seen(many)
    done = subprocess.run([sys.executable, "-c", KILLED, many.uri, str(puts)], check=False)
    assert done.returncode == (-signal.SIGKILL if puts < 9 else 0)
    check(many, before)
    unfinished = [of for of in plan_collection(many, 0) if of.kind == "unfinished"]
    assert len(unfinished) == puts % 3
    all_compacted(many)
    check(many, before)
    collect(many, plan_collection(many, 0))
    check(many, before)
    assert verify(many).unreferenced_files == 0


def test_killed_at_any_time(many: Lake) -> None:
    before = seen(many)
    for delay in np.linspace(0.0, 0.12, 8):
        child = os.fork()
        if child == 0:
            with Lake.open(many.uri) as lake:
                all_compacted(lake)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check(many, before)


# -- elsewhere than on a disk ------------------------------------------------------------------------------------


@pytest.fixture
def remote() -> Iterator[Lake]:
    with Lake.create("memory://compact/x.lake") as lake:
        yield lake
    fsspec.filesystem("memory").rm("/compact", recursive=True)


def test_a_lake_behind_a_uri(remote: Lake) -> None:
    for step in range(12):
        make(remote, "svd", step)
    before = seen(remote)
    assert all_compacted(remote) == [True]
    assert seen(remote) == before
    collect(remote, plan_collection(remote, 0))
    with Lake.open(remote.uri) as again:
        assert seen(again) == before
        assert verify(again).ok
        assert verify(again).unreferenced_files == 0

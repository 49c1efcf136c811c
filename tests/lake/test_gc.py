"""Garbage is what no receipt names and nobody is about to: everything else stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from lakebed.lake import Lake, Unit
from lakebed.lake.catalog import write_catalog
from lakebed.lake.collect import Garbage, collect, plan_collection, totals
from lakebed.lake.compact import compact, plan_compaction
from lakebed.lake.errors import CorruptFile
from lakebed.lake.verify import verify


def age(path: Path, seconds: float = 7200.0) -> Path:
    """Makes a file look as old as that."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def left_behind(lake: Lake) -> dict[str, Path]:
    """What writers that were killed leave, by what it is."""
    root = Path(lake.uri)
    found = {
        "chunk": root / "tensors/ref/gradients/a.w/c/9/0/0",
        "chunk in writing": root / "tensors/ref/gradients/a.w/c/9/0/.0.ab12cd34.tmp",
        "rows": root / "tables/training_steps/run=ref/trace-00000099-aaaa.parquet",
        "receipt in writing": root / "tables/extractions/run=ref/.trace-00000099.parquet.ab12cd34.tmp",
        "catalog in writing": root / ".catalog.duckdb.ab12cd34.tmp",
        "its log": root / ".catalog.duckdb.ab12cd34.tmp.wal",
    }
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    return found


def compact_all(lake: Lake) -> None:
    assert all(done.committed for done in compact(lake, plan_compaction(lake)))


def keys(garbage: list[Garbage], lake: Lake) -> set[Path]:
    return {Path(lake.uri, of.key) for of in garbage}


def test_a_lake_without_garbage(filled: Lake) -> None:
    write_catalog(filled)
    (Path(filled.uri) / "notes.txt").write_text("not of the lake")
    (Path(filled.uri) / "tables/training_steps/run=ref/README.md").write_text("nor this")
    assert plan_collection(filled, 0) == []


def test_what_killed_writers_left_goes_when_it_is_old(filled: Lake) -> None:
    left = left_behind(filled)
    before = filled.sql("FROM gradients ORDER BY ALL").fetchall()
    assert plan_collection(filled) == []
    for path in left.values():
        age(path)
    garbage = plan_collection(filled)
    assert keys(garbage, filled) == set(left.values())
    assert totals(garbage) == {
        "superseded": {"files": 0, "bytes": 0},
        "unfinished": {"files": 2, "bytes": 10},
        "temporary": {"files": 4, "bytes": 20},
    }
    seen: list[None] = []
    collect(filled, garbage, lambda: seen.append(None))
    assert len(seen) == 6
    assert not [path for path in left.values() if path.exists()]
    assert filled.sql("FROM gradients ORDER BY ALL").fetchall() == before
    assert verify(filled).unreferenced_files == 0


def test_a_unit_in_progress_is_never_touched(filled: Lake) -> None:
    """It wrote its first chunk two hours ago, and another just now."""
    with filled.unit(Unit("trace", "ref", "late", (40, 41, 42, 43, 44, 45, 46, 47, 48))) as writer:
        first = writer.tensor_rows("gradients", range(40, 48))
        first.write("b", np.ones((8, 3), np.float32))
        for path in Path(filled.uri, "tensors/ref/gradients/b/c/4").iterdir():
            age(path)
        second = writer.tensor_rows("gradients", [48])
        second.write("b", np.ones((1, 3), np.float32))
        with Lake.open(filled.uri) as other:
            assert plan_collection(other) == []
    assert filled.tensor("gradients", "b", "ref").read(48).tolist() == [1, 1, 1]
    assert verify(filled).ok


def test_superseded_files_go_an_hour_after_their_compaction(filled: Lake) -> None:
    for path in Path(filled.uri).rglob("*.parquet"):
        age(path)
    compact_all(filled)
    before = filled.sql("FROM training_steps ORDER BY ALL").fetchall()
    assert plan_collection(filled) == []
    for path in Path(filled.uri).glob("tables/extractions/*/~compacted/*"):
        age(path)
    garbage = plan_collection(filled)
    assert totals(garbage)["superseded"]["files"] == 16
    assert garbage[0].key.startswith("tables/extractions/"), "receipts go before what they name"
    collect(filled, garbage)
    assert filled.sql("FROM training_steps ORDER BY ALL").fetchall() == before
    assert verify(filled).ok
    assert verify(filled).unreferenced_files == 0


def test_a_compaction_that_was_compacted_goes_too(filled: Lake, write_unit) -> None:
    compact_all(filled)
    write_unit(filled, [40], {"b": np.ones((1, 3), np.float32)})
    compact_all(filled)
    names = [path.name for path in Path(filled.uri).glob("tables/extractions/run=ref/~compacted/*")]
    assert sorted(names) == ["00000001.parquet", "00000002.parquet"] or len(names) == 2
    collect(filled, plan_collection(filled, 0))
    assert len(list(Path(filled.uri).glob("tables/extractions/run=ref/~compacted/*"))) == 1
    assert len(list(Path(filled.uri).glob("tables/training_steps/run=ref/*"))) == 1
    assert filled.sql("SELECT count(*) FROM training_steps").fetchall() == [(65,)]
    assert verify(filled).ok


def test_with_a_receipt_that_cannot_be_read_nothing_goes(filled: Lake) -> None:
    receipt = next(Path(filled.uri, "tables/extractions/run=ref").iterdir())
    receipt.write_bytes(receipt.read_bytes()[:-30])
    with Lake.open(filled.uri) as other, pytest.raises(CorruptFile, match="is damaged"):
        plan_collection(other, 0)


def test_a_glob_sees_compacted_rows_twice_until_gc(filled: Lake) -> None:
    def counted() -> int:
        query = f"SELECT count(*) FROM read_parquet('{filled.uri}/tables/training_steps/*/*.parquet')"
        return int(duckdb.sql(query).fetchall()[0][0])

    assert counted() == 64
    compact_all(filled)
    assert counted() == 128
    collect(filled, plan_collection(filled, 0))
    assert counted() == 64


def test_a_catalog_of_before_is_written_again_by_gc(filled: Lake, tmp_path) -> None:
    def counted(views: Path) -> list[tuple[int]]:
        with duckdb.connect() as plain:
            plain.execute(f"SET file_search_path = '{filled.uri}'")
            plain.execute(views.read_text())
            found: list[tuple[int]] = plain.execute("SELECT count(*) FROM training_steps").fetchall()
            return found

    views = Path(write_catalog(filled).views_file)
    kept = tmp_path / "views.sql"
    kept.write_bytes(views.read_bytes())
    compact_all(filled)
    assert counted(views) == [(64,)], "what it names stays"
    collect(filled, plan_collection(filled, 0))
    assert counted(views) == [(64,)]
    with pytest.raises(duckdb.IOException):
        counted(kept)


def test_writers_and_compactions_go_on_beside_it(lake: Lake, write_unit) -> None:
    stop, failures = threading.Event(), list[BaseException]()

    def repeat() -> None:
        try:
            while not stop.is_set():
                with Lake.open(lake.uri) as other:
                    compact_all_or_less(other)
                    # Seconds are long enough for the writers of this test.
                    collect(other, plan_collection(other, 3))
                    assert verify(other).ok
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    started = time.time()
    steps = 0
    while time.time() < started + 6:
        write_unit(lake, [steps], {"w": np.full((1, 3), steps, np.float32)}, block_rows=1)
        steps += 1
    stop.set()
    thread.join()
    assert not failures, failures
    assert lake.sql("SELECT count(*), count(DISTINCT step) FROM training_steps").fetchall() == [
        (steps, steps)
    ]
    assert lake.tensor("gradients", "w").read()[:, 0].tolist() == list(range(steps))
    assert verify(lake).ok


def compact_all_or_less(lake: Lake) -> None:
    list(compact(lake, plan_compaction(lake)))


KILLED = """
import os, signal, sys
from lakebed.lake import Lake
from lakebed.lake.collect import collect, plan_collection

with Lake.open(sys.argv[1]) as lake:
    left = int(sys.argv[2])

    def count():
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    collect(lake, plan_collection(lake, 0), count)
"""


@pytest.mark.parametrize("removed", [1, 4, 8, 13])
def test_killed_on_the_way_it_has_done_no_harm(filled: Lake, removed: int) -> None:
    before = filled.sql("FROM training_steps ORDER BY ALL").fetchall()
    compact_all(filled)
    killed = subprocess.run([sys.executable, "-c", KILLED, filled.uri, str(removed)], check=False)
    assert killed.returncode < 0
    with Lake.open(filled.uri) as other:
        assert other.sql("FROM training_steps ORDER BY ALL").fetchall() == before
        assert verify(other).ok
        assert len(plan_collection(other, 0)) == 16 - removed
        collect(other, plan_collection(other, 0))
        assert verify(other).unreferenced_files == 0

"""Verifying a lake that is well, and what is information rather than damage."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake import Lake, Unit
from lakebed.lake.axis import publish
from lakebed.lake.errors import UnknownName
from lakebed.lake.verify import verify


def test_an_empty_lake_is_well(lake: Lake) -> None:
    result = verify(lake)
    assert result.to_json() == {
        "ok": True,
        "files": 0,
        "bytes": 0,
        "damaged": [],
        "unreferenced": {"files": 0, "bytes": 0},
    }


def test_every_file_is_counted_once(filled: Lake) -> None:
    publish(filled)
    seen: list[tuple[int, int, int, int]] = []
    result = verify(filled, progress=lambda *state: seen.append(state))
    receipts = filled.receipts.all()
    named = [entry for receipt in receipts for entry in receipt.files]
    assert len(named) == 8 * (3 + 1)
    assert result.files == len(named) + len(receipts)
    assert len(seen) == len(named)
    assert seen[-1] == (len(named), len(named), sum(e.bytes for e in named), sum(e.bytes for e in named))
    assert result.ok
    files = [path for path in Path(filled.uri).glob("t*/**/*") if path.is_file()]
    checked = [
        path for path in files if path.name != "zarr.json" and "gradients/step/c" not in path.as_posix()
    ]
    assert result.bytes == sum(path.stat().st_size for path in checked)


def test_one_run_alone(filled: Lake) -> None:
    chunk = Path(filled.uri, "tensors/other/gradients/b/c/0/0")
    chunk.write_bytes(b"x")
    Path(filled.uri, "tables/training_steps/run=other/left.parquet").write_bytes(b"left")
    assert verify(filled, "ref").ok
    assert verify(filled, "ref").unreferenced_files == 0
    result = verify(filled, "other")
    assert [damage.path for damage in result.damaged] == ["tensors/other/gradients/b/c/0/0"]
    assert (result.unreferenced_files, result.unreferenced_bytes) == (1, 4)
    with pytest.raises(UnknownName, match=r"no run 'third' in .*; it has other, ref"):
        verify(filled, "third")


def test_what_a_killed_writer_left_is_counted_and_is_no_damage(filled: Lake) -> None:
    root = Path(filled.uri)
    (root / "tensors/ref/gradients/a.w/c/9/0").mkdir(parents=True)
    (root / "tensors/ref/gradients/a.w/c/9/0/0").write_bytes(b"12345")
    (root / "tensors/ref/gradients/a.w/c/9/0/.0.ab12cd34.tmp").write_bytes(b"12")
    (root / "tables/training_steps/run=ref/trace-00000099-aaaa.parquet").write_bytes(b"123")
    (root / "tensors/ref/gradients/never").mkdir()  # a writer killed before it wrote the array's metadata
    result = verify(filled)
    assert result.ok
    assert (result.unreferenced_files, result.unreferenced_bytes) == (3, 10)
    publish(filled)
    assert filled.sql("SELECT count(*) FROM training_steps").fetchall() == [(64,)]


def test_a_step_held_by_two_units_is_named(lake: Lake, write_unit) -> None:
    array = {"w": np.ones((1, 3), np.float32)}
    write_unit(lake, [5], array, name="one")
    write_unit(lake, [5], array, name="two", table=False)
    (found,) = verify(lake).damaged
    assert found.path == "tables/extractions/run=ref/two.parquet"
    assert "gradients at step 5 of run ref is held twice" in found.reason


def test_rows_that_share_their_key_are_named(lake: Lake) -> None:
    for name in ("one", "two"):
        with lake.unit(Unit("svd", "ref", name)) as writer:
            rows = [{"step": 1, "matrix": "W_in", "layer": 0, "head": None, "rank": rank} for rank in (1, 2)]
            writer.rows("singular_values", rows)
    (found,) = verify(lake).damaged
    assert found.path == "tables/singular_values"
    first = "(run 'ref', step 1, matrix 'W_in', layer 0, head None, rank 1)"
    assert found.reason == f"2 keys stand more than once, the first of them {first} 2 times"


def test_a_stale_coordinate_is_no_damage_and_a_wrong_one_is(filled: Lake, write_unit) -> None:
    publish(filled)
    write_unit(filled, [40], {"b": np.ones((1, 3), np.float32)})
    assert verify(filled).ok, "the coordinate is older than the receipts, not wrong"
    receipt = next(receipt for receipt in filled.receipts.all("ref") if 8 in receipt.steps)
    Path(filled.uri, receipt.key).unlink()
    (found,) = verify(filled).damaged
    assert "row 8 says step 8, the receipts say nothing" in found.reason
    assert "lakebed catalog" in found.remedy
    publish(filled)
    assert verify(filled).ok


def test_findings_are_plain_data(filled: Lake) -> None:
    Path(filled.uri, "tensors/ref/gradients/b/c/0/0").unlink()
    (found,) = json.loads(json.dumps(verify(filled).to_json()))["damaged"]
    assert set(found) == {"path", "reason", "remedy", "run", "unit", "dataset"}


def test_memory_stays_flat(lake: Lake) -> None:
    big = np.random.default_rng(0).standard_normal((1, 2048, 2048)).astype(np.float32)
    for step in range(4):
        with lake.unit(Unit("trace", "ref", f"u{step}", (step,))) as writer:
            writer.tensor_rows("gradients", [step], 1).write("w", big)
    tracemalloc.start()
    result = verify(lake)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.ok
    assert result.bytes > 4 * 14e6
    assert peak < result.bytes

"""A drop takes the units it names and nothing else, compacted or not, and leaves no file of theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lakebed.lake import Lake, Unit
from lakebed.lake.catalog import VIEWS_FILE, write_catalog
from lakebed.lake.collect import plan_collection
from lakebed.lake.compact import compact, plan_compaction
from lakebed.lake.drop import drop, plan_drop
from lakebed.lake.errors import UnknownName
from lakebed.lake.verify import verify


def make(lake: Lake, dataset: str, step: int, run: str = "r") -> Unit:
    """A unit with a row in `evaluations` and a gradient."""
    unit = Unit(dataset, run, f"{dataset}-{step:08d}", (step,), {}, {"made": "up"})
    with lake.unit(unit) as writer:
        writer.rows("evaluations", [{"step": step, "split": dataset, "metric": "m", "value": float(step)}])
        writer.tensor_rows("gradients", (step,), 1).write("w", np.full((1, 2), step, np.float32))
    return unit


def rows(lake: Lake) -> list[tuple[object, ...]]:
    return lake.sql("SELECT run, split, step, value FROM evaluations ORDER BY ALL").fetchall()


def gradients(lake: Lake) -> list[tuple[object, ...]]:
    return lake.sql("SELECT run, step, values FROM gradients ORDER BY ALL").fetchall()


def compacted(lake: Lake, datasets: set[str]) -> None:
    assert all(of.committed for of in compact(lake, plan_compaction(lake, datasets=datasets)))


@pytest.fixture
def two(lake: Lake) -> Lake:
    """Datasets trace and eval of run r, and trace of run s."""
    for step in (1, 2, 3, 4):
        make(lake, "trace", step)
        make(lake, "eval", step + 10)
    make(lake, "trace", 1, "s")
    return lake


@pytest.mark.parametrize("when", ["never", "once", "between", "twice"])
def test_units_go_with_their_files_and_others_stay(two: Lake, when: str) -> None:
    if when in ("once", "twice"):
        compacted(two, {"trace"})
    if when in ("between", "twice"):
        for step in (5, 6):
            make(two, "trace", step)
    if when == "twice":
        compacted(two, {"trace"})
    expected = [of for of in rows(two) if of[:2] != ("r", "trace")]
    kept = [of for of in gradients(two) if of[0] == "s" or of[1] > 10]
    what = plan_drop(two, "r", {"trace"})
    size = sum(Path(two.uri, path).stat().st_size for path in what.files)
    assert what.bytes == size > 0
    assert len(what.units) == (6 if when in ("between", "twice") else 4)
    drop(two, what)
    assert not [path for path in what.files if Path(two.uri, path).exists()]
    with Lake.open(two.uri) as other:
        for each in (two, other):
            assert rows(each) == expected
            assert gradients(each) == kept
            assert each.dataset_steps("r", "trace") == []
            assert each.dataset_steps("r", "eval") == [11, 12, 13, 14]
        assert verify(other).ok
        assert {of.kind for of in plan_collection(other, 0)} <= {"superseded"}


def test_what_was_dropped_can_be_made_again(two: Lake) -> None:
    before = rows(two), gradients(two)
    compacted(two, {"trace"})
    drop(two, plan_drop(two, "r", {"trace"}))
    for step in (1, 2, 3, 4):
        make(two, "trace", step)
    compacted(two, {"trace"})
    with Lake.open(two.uri) as other:
        assert (rows(other), gradients(other)) == before == (rows(two), gradients(two))
        assert verify(other).ok


def test_a_compaction_of_several_datasets_keeps_the_others(two: Lake, monkeypatch) -> None:
    """No compaction of ours holds two datasets; one of another tool may, and its other units must stay."""
    from lakebed.lake.compactions import compaction_key
    from lakebed.lake.receipts import receipts_to_parquet

    two.refresh()
    two.storage.create(compaction_key("r", 1), receipts_to_parquet(two.receipts.all("r")))
    two.refresh()
    expected = [of for of in rows(two) if of[:2] != ("r", "trace")]
    drop(two, plan_drop(two, "r", {"trace"}))
    with Lake.open(two.uri) as other:
        assert rows(other) == rows(two) == expected


def test_a_killed_drop_leaves_files_that_no_receipt_names(two: Lake, monkeypatch) -> None:
    what = plan_drop(two, "r", {"trace"})
    remove = two.storage.remove

    def die(key: str) -> None:
        if key.startswith(("tables/evaluations", "tensors/")):
            raise KeyboardInterrupt
        remove(key)

    monkeypatch.setattr(two.storage, "remove", die)
    with pytest.raises(KeyboardInterrupt):
        drop(two, what)
    with Lake.open(two.uri) as other:
        assert not [of for of in rows(other) if of[:2] == ("r", "trace")]
        assert {of.key for of in plan_collection(other, 0)} >= set(what.files)
        assert verify(other).ok


def test_a_catalog_is_written_again(two: Lake) -> None:
    write_catalog(two)
    what = plan_drop(two, "r", {"trace"})
    drop(two, what)
    text = (Path(two.uri) / VIEWS_FILE).read_text()
    assert not [path for path in what.files if path in text]


def test_nothing_to_drop_and_no_such_run(two: Lake) -> None:
    drop(two, plan_drop(two, "r", {"attributions"}))
    assert len(rows(two)) == 9
    with pytest.raises(UnknownName, match="no run 'x'"):
        plan_drop(two, "x", {"trace"})

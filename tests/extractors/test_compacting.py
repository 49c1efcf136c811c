"""An extraction of many intervals leaves few files, and knows afterwards what it made."""

from __future__ import annotations

import shutil
from pathlib import Path

import lakebed.lake.compact as compacting
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.collect import collect, plan_collection
from lakebed.lake.datasets import UPDATE_NORMS, Need
from lakebed.lake.verify import verify

from tests import attribution_lake
from tests.attribution_lake import RUN


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return attribution_lake.build(tmp_path_factory.mktemp("compacting"))


class Bars:
    """Notes what is drawn."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.done = 0

    def start(self, label: str, total: int, done: int = 0) -> None:
        self.started.append((label, total))
        self.done = done

    def advance(self, done: int = 1, note: str = "") -> None:
        self.done += done


def norms(lake: Lake) -> list[tuple[object, ...]]:
    return lake.sql("FROM update_slices ORDER BY ALL").fetchall()


def test_many_units_are_merged_at_the_end_and_few_are_not(trained, tmp_path, monkeypatch) -> None:
    plain, merged = (
        Path(shutil.copytree(trained, tmp_path / name)) for name in ("plain.lake", "merged.lake")
    )
    with Lake.open(plain) as lake:
        extract(lake, RUN, (Need(UPDATE_NORMS),), "0:24")
        expected = norms(lake)
        assert len(lake.table_files("update_slices")) == 24
        units = lake.sql("SELECT unit, content_hash, steps, rows FROM extractions ORDER BY ALL").fetchall()
    monkeypatch.setattr(compacting, "_MANY", 20)
    with Lake.open(merged) as lake:
        bars = Bars()
        first = extract(lake, RUN, (Need(UPDATE_NORMS),), "0:16", progress=bars)
        assert bars.started[-1] == ("compacting", 16)
        assert bars.done == 16
        assert len(lake.table_files("update_slices")) == 1
        collect(lake, plan_collection(lake, 0))
        second = extract(lake, RUN, (Need(UPDATE_NORMS),), "0:24")
        assert (first.made, second.made) == (
            {UPDATE_NORMS: list(range(1, 17))},
            {UPDATE_NORMS: list(range(17, 25))},
        )
        assert second.standing == {UPDATE_NORMS: 16}
        assert len(lake.table_files("update_slices")) == 9, "eight more are not many"
        for compacted in compacting.compact(lake, compacting.plan_compaction(lake)):
            assert compacted.committed
        third = extract(lake, RUN, (Need(UPDATE_NORMS),), "0:24")
        assert (third.made, third.standing) == ({UPDATE_NORMS: []}, {UPDATE_NORMS: 24})
        assert norms(lake) == expected
        found = lake.sql("SELECT unit, content_hash, steps, rows FROM extractions ORDER BY ALL").fetchall()
        assert found == units
        assert verify(lake).ok


def test_what_cannot_be_merged_does_not_fail_an_extraction(trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compacting, "_MANY", 20)
    with Lake.open(shutil.copytree(trained, tmp_path / "x.lake")) as lake:
        extract(lake, RUN, (Need(UPDATE_NORMS),), "0:8")
        Path(lake.uri, lake.table_files("update_slices")[0].path).write_bytes(b"x")
        result = extract(lake, RUN, (Need(UPDATE_NORMS),), "0:16")
        assert result.made == {UPDATE_NORMS: list(range(9, 17))}
        assert len(lake.table_files("update_slices")) == 16

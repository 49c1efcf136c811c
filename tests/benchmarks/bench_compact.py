"""A report over a lake of 2,000 units, each a file and a receipt, before `lakebed compact` and after, and after `lakebed gc`.

Each lake is asked by a new process. Beside it, in the same run, a process that only imports the libraries a report needs, since
no compaction spares that; "the report" is what a process takes beyond it. Processor seconds stand beside wall time, for machines
that have other work.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lakebed.lake import Lake, Unit
from lakebed.lake.collect import collect, plan_collection
from lakebed.lake.compact import compact, plan_compaction

UNITS, REPEATS, RANKS = 2_000, 5, 4
_IMPORTS = "import click, duckdb, numpy, pydantic, pyarrow.parquet"
_QUERY = "import sys; sys.argv.insert(1, 'query'); from lakebed.cli import main; main()"


def build(path: Path | str) -> None:
    """Singular values of one small matrix at 2,000 steps, a unit per step."""
    with Lake.create(path) as lake:
        for step in range(UNITS):
            with lake.unit(Unit("svd", "ref", f"svd-{step:08d}", (step,))) as writer:
                rows = [
                    {
                        "step": step,
                        "matrix": "W_QK",
                        "layer": 0,
                        "head": 0,
                        "matrix_rows": 16,
                        "matrix_columns": 16,
                        "rank": 1 + at,
                        "singular_value": 1.0 / (1 + at + step),
                    }
                    for at in range(RANKS)
                ]
                writer.rows("singular_values", rows)


def _taken(program: str, *words: str) -> tuple[float, float]:
    """(wall, processor) seconds of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _query(lake: Path) -> tuple[float, float]:
    words = [
        "weight-svd-trace",
        "--lake",
        str(lake),
        "--matrix",
        "W_QK",
        "--out",
        f"{lake}.out",
        "--overwrite",
    ]
    return _taken(_QUERY, *words, "--chart-format", "none", "--rows-format", "jsonl")


def _rows(lake: Path) -> bytes:
    """What the report wrote, without the lake's own name."""
    written = Path(f"{lake}.out", "weight_svd_singular_values.jsonl").read_bytes()
    return written.replace(str(lake).encode(), b"")


def _compact(before: Path, lake: Path, gc: bool) -> float:
    """Makes a compacted copy; seconds that compacting took."""
    shutil.copytree(before, lake)
    with Lake.open(lake) as opened:
        started = time.perf_counter()
        assert all(done.committed for done in compact(opened, plan_compaction(opened)))
        seconds = time.perf_counter() - started
        if gc:
            collect(opened, plan_collection(opened, 0))
    return seconds


def run() -> dict[str, float | str]:
    """Medians, and ratios of them."""
    with tempfile.TemporaryDirectory() as folder:
        lakes = {name: Path(folder) / f"{name}.lake" for name in ("before", "after", "collected")}
        build(lakes["before"])
        seconds = [
            _compact(lakes["before"], lakes[name], name == "collected") for name in ("after", "collected")
        ]
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ("imports", *lakes)}
        for _ in range(REPEATS):
            taken["imports"].append(_taken(_IMPORTS))
            for name, path in lakes.items():
                taken[name].append(_query(path))
        assert _rows(lakes["before"]) == _rows(lakes["after"]) == _rows(lakes["collected"])
        assert _rows(lakes["before"]).count(b"\n") == UNITS * RANKS
    wall, cpu = (
        {name: statistics.median(of[at] for of in values) for name, values in taken.items()} for at in (0, 1)
    )
    report = {name: cpu[name] - cpu["imports"] for name in lakes}
    return {
        "what": f"weight-svd-trace over {UNITS:,} units of one file each",
        "compacting, s": min(seconds),
        "imports alone, s of processor": cpu["imports"],
        **{f"process, {name}, s of processor": cpu[name] for name in lakes},
        **{f"process, {name}, s": wall[name] for name in lakes},
        "the report, before / after (>= 5)": report["before"] / report["after"],
        "the report, before / collected (>= 5)": report["before"] / report["collected"],
        "process, before / after": cpu["before"] / cpu["after"],
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

"""Requests of a report over 2,000 units in a bucket, each a file and a receipt, before `lakebed compact` and after `lakebed gc`.

The server is moto on loopback, which answers at once and shares the processor with the client: what counts is the requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

from lakebed.lake import Lake
from lakebed.lake.collect import collect, plan_collection
from lakebed.lake.compact import compact, plan_compaction

from tests import s3_server
from tests.benchmarks.bench_compact import UNITS, build

_QUERY = "import sys; sys.argv.insert(1, 'query'); from lakebed.cli import main; main()"


def _report(server: s3_server.Server, uri: str, out: Path) -> tuple[Counter[str], float, bytes]:
    """Requests by kind, seconds, and the rows."""
    words = ["weight-svd-trace", "--lake", uri, "--matrix", "W_QK", "--out", str(out), "--overwrite"]
    words += ["--chart-format", "none", "--rows-format", "jsonl"]
    started = time.perf_counter()
    with server.counted(uri) as asked:
        subprocess.run([sys.executable, "-c", _QUERY, *words], check=True, capture_output=True)
    rows = (out / "weight_svd_singular_values.jsonl").read_bytes()
    return Counter(kind for kind, _ in asked), time.perf_counter() - started, rows


def run() -> dict[str, float | str]:
    """Requests and seconds, before and after."""
    with (
        tempfile.TemporaryDirectory() as folder,
        s3_server.running() as server,
        patch.dict(os.environ, server.environment),
    ):
        server.make_bucket("bench")
        uri = "s3://bench/x.lake"
        with server.counted(uri) as written:
            build(uri)
        before, seconds_before, rows = _report(server, uri, Path(folder))
        with Lake.open(uri) as lake, server.counted(uri) as compacting:
            assert all(done.committed for done in compact(lake, plan_compaction(lake)))
        with Lake.open(uri) as lake:
            collect(lake, plan_collection(lake, -60))
        after, seconds_after, same = _report(server, uri, Path(folder))
    assert rows == same
    return {
        "what": f"weight-svd-trace over {UNITS:,} units of one file each on s3://",
        "requests to write a unit": len(written) / UNITS,
        "requests of the report, before": before.total(),
        "requests of the report, after": after.total(),
        "of them GET, before": before["GET"],
        "of them GET, after": after["GET"],
        "before / after": before.total() / after.total(),
        "requests to compact": len(compacting),
        "process, before, s": seconds_before,
        "process, after, s": seconds_after,
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

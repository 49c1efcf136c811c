"""Three seeds through the whole pipeline on a disk, on a Ray cluster of two machines, and in a bucket: one report, to the digit.

The lakes are checked, and the rows of `cross-seed` compared; that they are the same is the point, and the seconds are beside
it. The bucket is a local server in Python, one request at a time, so its seconds say nothing of a real store.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lakebed.extractors.executor import Executor, Sequential
from lakebed.extractors.ray_executor import RayExecutor
from lakebed.lake import Lake
from lakebed.lake.verify import verify
from lakebed.queries.cross_seed import CrossSeed
from lakebed.queries.results import Results

from tests import cross_seed_lake, s3_server

SEEDS = (11, 13, 17)
_STORE = 80 << 20


def place(folder: Path, lake: str, executor: Executor) -> tuple[float, dict[str, list[Any]]]:
    """(seconds, rows of the report by section) of the pipeline in that lake."""
    folder.mkdir()
    plan = cross_seed_lake.plan(folder, lake=lake, seeds=SEEDS, candidates=("winner",))
    started = time.perf_counter()
    cross_seed_lake.run(plan, executor=executor)
    seconds = time.perf_counter() - started
    with Lake.open(lake) as opened:
        assert verify(opened).ok
        with Results(opened, CrossSeed.parse({})) as results:
            return seconds, {name: results.frame(name).rows() for name in results.row_sets()}


def run() -> dict[str, float | str]:
    """Seconds by place, and the rows they have in common."""
    torch.set_num_threads(1)
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": _STORE, "include_dashboard": False}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"disk": place(folder / "disk", f"{folder}/disk.lake", Sequential())}
        cluster = Cluster(initialize_head=True, head_node_args=size)
        try:
            cluster.add_node(num_cpus=1, object_store_memory=_STORE)
            ray = RayExecutor(cluster.address)
            try:
                found["cluster"] = place(folder / "cluster", f"{folder}/cluster.lake", ray)
            finally:
                ray.close()
        finally:
            cluster.shutdown()
        with s3_server.running() as server, patch.dict(os.environ, server.environment):
            server.make_bucket("bench")
            found["bucket"] = place(folder / "bucket", "s3://bench/seeds.lake", Sequential())
    rows = found["disk"][1]
    for where, (_, told) in found.items():
        assert told == rows, f"the report of the {where} is another"
    return {
        "what": f"{len(SEEDS)} seeds, every stage of the pipeline",
        **{f"{where}, s": seconds for where, (seconds, _) in found.items()},
        "rows of the report, the same in each": sum(map(len, rows.values())),
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

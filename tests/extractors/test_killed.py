"""A recorder killed at random moments: what has a receipt is intact, and training ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from lakebed.extractors.states import StateReader
from lakebed.lake import Lake
from lakebed.lake.verify import verify

from tests.extractors.test_training import assert_same_state

KILLS = 20

# One process imports torch and generates the task; each life is a fork of it that trains until it is killed.
NURSERY = """
import os, sys
import torch
torch.set_num_threads(1)
from lakebed.lake import Lake
from lakebed.extractors.training import train
from lakebed.engine.symbolic_kv import generate_benchmark
sys.path.insert(0, {root!r})
from tests.extractors.conftest import small_config
config = small_config()
benchmark = generate_benchmark(config.benchmark)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with Lake.open_or_create({lake!r}) as lake:
                train(lake, "r", config, benchmark=benchmark, anchor_every=2)
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


def test_twenty_kills_lose_nothing_that_was_finished(tmp_path, trained_lake):
    path = tmp_path / "k.lake"
    root = os.getcwd()
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY.format(lake=str(path), root=root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    assert nursery.stdout.readline() == "ready\n"
    random.seed(11)

    receipts = path / "tables" / "extractions" / "run=r"

    def count() -> int:
        return len(list(receipts.glob("*.parquet")))

    def live(kill_after: int | None) -> int:
        """One life; killed somewhere in the work that follows its `kill_after`-th new receipt."""
        first = count()
        nursery.stdin.write("go\n")
        nursery.stdin.flush()
        child = int(nursery.stdout.readline())
        if kill_after is not None:
            deadline = time.monotonic() + 20
            while count() < first + kill_after and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.08))
            os.kill(child, signal.SIGKILL)
        return int(nursery.stdout.readline())

    killed, reached = 0, set()
    for life in range(KILLS):
        killed += os.WIFSIGNALED(live(life % 2))
        if not (path / "lakebed.json").exists():
            continue
        with Lake.open(path) as lake:
            result = verify(lake)
            assert result.ok, result.damaged
            if "r" in lake.runs() and lake.table_files("steps", "r"):
                reader = StateReader(lake, "r")
                last = reader.steps[-1]
                reached.add(last)
                assert reader.steps == list(range(last + 1))
                assert_same_state(reader.read(last), StateReader(trained_lake, "exact").read(last))
    assert killed == KILLS
    assert len(reached) > 4
    assert live(None) == 0
    nursery.stdin.close()
    nursery.wait(timeout=30)
    with Lake.open(path) as lake:
        ours, theirs = StateReader(lake, "r"), StateReader(trained_lake, "exact")
        assert ours.steps == theirs.steps
        for step in (17, 48):
            assert_same_state(ours.read(step), theirs.read(step))
        name = "blocks.1.attn.q_proj.weight"
        assert (
            lake.tensor("gradients", name, "r").read()
            == trained_lake.tensor("gradients", name, "exact").read()
        ).all()
        assert verify(lake).ok

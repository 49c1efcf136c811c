"""Work on a Ray cluster of two machines leaves the lake that one process leaves, whoever is killed meanwhile."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from lakebed.extractors.executor import UnitFailed, Work
from lakebed.extractors.plan import extract
from lakebed.extractors.ray_executor import NoRoom, RayExecutor, RayMissing, RayUnavailable
from lakebed.lake import Lake

from tests.attribution_lake import RUN
from tests.same_lake import assert_part, assert_same
from tests.shared_work import STEPS, Bar, Mortal, fail, needs, sleep_and_tell

_STORE = 80 << 20


@pytest.fixture(scope="module")
def address():
    """A cluster of two machines with one CPU each, and nothing of it left behind."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": _STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=_STORE)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.fixture
def two(address, tmp_path):
    """The executor of that cluster."""
    executor = RayExecutor(address, logs=tmp_path / "logs")
    yield executor
    executor.close()


def test_units_are_spread_over_the_machines_and_come_back_in_order(two) -> None:
    bar = Bar()
    units = [Work.of(f"unit {at}", sleep_and_tell, 8, value=at) for at in range(6)]
    bar.start("sleeping", 48)
    found = two.run(units, bar)
    assert two.workers == 2
    assert [value for value, _ in found] == list(range(6))
    assert len({node for _, node in found}) == 2
    assert bar.done == 48
    assert len(bar.notes) > 6, "workers tell how far they are"


def test_two_machines_leave_the_same_lake_though_a_worker_is_killed(
    extracted_alone, attribution_lake_path, two, tmp_path
) -> None:
    path, bar, mortal = tmp_path / "x.lake", Bar(), Mortal(two, tmp_path)
    shutil.copytree(attribution_lake_path, path)
    with Lake.open(path) as lake, Lake.open(attribution_lake_path) as before:
        made = extract(lake, RUN, needs(), STEPS, bar, executor=mortal)
        before.refresh()
        stood = {receipt.unit for receipt in before.receipts.all(RUN)}
        fresh = [receipt for receipt in lake.receipts.all(RUN) if receipt.unit not in stood]
        assert made.rows == sum(receipt.rows for receipt in fresh)
    assert mortal.mark.exists()
    assert bar.done == bar.total == 25 + 24
    assert_same(extracted_alone, path)


def test_a_killed_driver_and_two_at_once_do_each_unit_once(
    extracted_alone, attribution_lake_path, two, tmp_path
) -> None:
    path, asked = tmp_path / "x.lake", needs()[:4]
    shutil.copytree(attribution_lake_path, path)

    def drive() -> subprocess.Popen[str]:
        program = (
            "import sys; from lakebed.lake import Lake; from lakebed.extractors.plan import extract\n"
            "from lakebed.extractors.ray_executor import RayExecutor\n"
            "from tests.shared_work import *; from tests.attribution_lake import RUN\n"
            "executor = RayExecutor(sys.argv[2], 1)\n"
            "executor.run([], Bar()); print('ready', flush=True)\n"
            "with Lake.open(sys.argv[1]) as lake:\n"
            "    made = extract(lake, RUN, needs()[:4], STEPS, executor=executor)\n"
            "    print(sum(map(len, made.made.values())))"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program, path, two.address], stdout=subprocess.PIPE, text=True
        )

    receipts = path / "tables" / "extractions" / f"run={RUN}"

    def standing() -> dict[str, int]:
        return {entry.name: entry.stat().st_mtime_ns for entry in receipts.glob("*.parquet")}

    before, deadline = len(standing()), time.monotonic() + 60
    killed = drive()
    while len(standing()) < before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=10)
    left = standing()
    assert before < len(left) < before + 60
    other, two.limit = drive(), 1
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with Lake.open(path) as lake:
        made = extract(lake, RUN, asked, STEPS, executor=two)
    out, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    assert 0 < sum(map(len, made.made.values())) < 4 * 25
    assert 0 < int(out) < 4 * 25, "both found work to do"
    assert left.items() <= standing().items(), "what stood was not done again"
    assert_part(extracted_alone, path)


def test_what_goes_wrong_is_one_line_and_a_log(two, tmp_path) -> None:
    with pytest.raises(
        UnitFailed, match=r"^unit x: ValueError: nothing can be done about it \(log: .*unit-x.log\)$"
    ):
        two.run([Work.of("unit x", fail, how="it")], Bar())
    log = (tmp_path / "logs" / "unit-x.log").read_text()
    assert log.startswith("so far so good\n")
    assert "shared_work.py" in log


def test_a_request_that_no_machine_fits_is_refused(address) -> None:
    executor = RayExecutor(address, gpus=2)
    with pytest.raises(
        NoRoom, match=r"asks for 1 CPUs, 2 GPUs, .* \(1 CPUs, 0 GPUs, .* GiB\): lower --worker-cpus"
    ):
        executor.run([Work.of("unit x", fail, how="it")], Bar())
    executor.close()


def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            RayUnavailable, match=f"no Ray cluster at {where}: .*refused; start one with `ray start"
        ):
            RayExecutor(where).run([Work.of("unit x", fail, how="it")], Bar())


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(RayMissing, match=r"pip install 'lakebed\[ray\]'"):
        RayExecutor()

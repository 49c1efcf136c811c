"""A report cannot recompute a forward pass: in its process there is nothing to compute one with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.lake import Lake
from lakebed.queries.registry import load_report, report_names

from tests import trained_probe_lake

from .conftest import make_svd_lake, make_trace_lake
from .cross_seed_rows import make_cross_seed_lake

_PROGRAM = """
import json, sys
from importlib.machinery import ModuleSpec
class NoTorch:  # found, for those who only look whether it is there, but not importable
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers") or name.startswith(("lakebed.engine", "lakebed.extractors")):
            return ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"{spec.name} is out of a report's reach")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, NoTorch())
from lakebed.lake import Lake
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report
name, uri, options, out, charts = sys.argv[1:]
with Lake.open(uri) as lake:
    report = load_report(name)
    asked = report.parse({**report.demo_options, **json.loads(options)})
    print(json.dumps(run_report(lake, asked, out, chart_formats=charts.split(",") if charts else [])))
print(json.dumps(sorted(name for name in ("altair", "vl_convert", "zarr") if name in sys.modules)))
"""
# Reports over weights and what training logged read a made-up lake; those over a probe a trained one, which has four pairs of a
# type and no attention of corrupted records; those over updates a copy of that, with these steps.
_MADE_UP = {
    "optimizer-update-trace": "traced",
    "weight-svd-trace": "ref",
    "weight-svd-patterns": "ref",
    "cross-seed": "made_seed_0002",
}
_UPDATES = {"checkpoints": "50,100,150", "window": "50:52"}
_OPTIONS = {
    "attention-retrieval-chain-report": {"max_pairs_per_type": 4, "record_side": ["clean"]},
    # Eleven components there take more than the eight changes of four pairs.
    "output-route-closure": {"pair_type": ["support_value", "query_key"]},
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    path = tmp_path_factory.mktemp("lakes") / "both.lake"
    make_svd_lake(path, [1, 2, 3]).lake.close()
    make_trace_lake(path, [1, 2, 3]).lake.close()
    make_cross_seed_lake(path).close()
    return str(path)


def options_of(name):
    """Beside those of the demo."""
    report = load_report(name)
    given = {"run": _MADE_UP.get(name, "r"), **_OPTIONS.get(name, {})}
    if report.demo_steps in _UPDATES:
        given["steps"] = _UPDATES[report.demo_steps]
        if "max_pairs_per_type" in report.model_fields:
            given["max_pairs_per_type"] = 4
    return given


@pytest.fixture(scope="module")
def updated_path(probe_lake_path, tmp_path_factory):
    """The trained lake with what reports over updates need."""
    path = tmp_path_factory.mktemp("updated") / "updated.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as lake:
        benchmark = generate_benchmark(trained_probe_lake.config().benchmark)
        build_probe(lake, "r", "train-probe", ("train",), examples_per_split=4, benchmark=benchmark)
        for spacing, steps in _UPDATES.items():
            reports = [
                load_report(name) for name in report_names() if load_report(name).demo_steps == spacing
            ]
            asked = [of.parse({**of.demo_options, **options_of(of.report_name())}) for of in reports]
            extract(lake, "r", [need for of in asked for need in of.needs()], steps)
    return path


def run_report_alone(name, uri, out, charts):
    options = json.dumps(options_of(name))
    words = [sys.executable, "-c", _PROGRAM, name, str(uri), options, str(out), charts]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "nanobind" not in found.stderr
    printed, modules = found.stdout.splitlines()
    return json.loads(printed), json.loads(modules)


@pytest.mark.parametrize("name", report_names())
def test_every_report_runs_without_torch(name, uri, probe_lake_path, updated_path, tmp_path):
    lake = updated_path if load_report(name).demo_steps in _UPDATES else probe_lake_path
    lake = uri if name in _MADE_UP else lake
    printed, modules = run_report_alone(name, lake, tmp_path / "out", "svg")
    assert (tmp_path / "out" / Path(printed["report"]).name).is_file()
    assert "zarr" not in modules


def test_charts_are_imported_only_when_asked_for(uri, tmp_path):
    printed, modules = run_report_alone("weight-svd-patterns", uri, tmp_path / "out", "")
    assert printed["plots"] == {}
    assert modules == []

"""A report cannot recompute a forward pass: in its process there is nothing to compute one with."""

import json
import subprocess
import sys

import pytest
from lakebed.queries.registry import report_names

from .conftest import make_svd_lake, make_trace_lake

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
from lakebed.queries.needs import MissingData
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report
name, uri, run, out, charts = sys.argv[1:]
with Lake.open(uri) as lake:
    try:
        report = load_report(name)
        asked = report.parse({**report.demo_options, "run": run})
        printed = run_report(lake, asked, out, chart_formats=charts.split(",") if charts else [])
    except MissingData as error:
        print(json.dumps({"missing": str(error)}))
    else:
        print(json.dumps(printed))
print(json.dumps(sorted(name for name in ("altair", "vl_convert", "zarr") if name in sys.modules)))
"""
_RUNS = {"optimizer-update-trace": "traced"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    path = tmp_path_factory.mktemp("lakes") / "both.lake"
    make_svd_lake(path, [1, 2, 3]).lake.close()
    make_trace_lake(path, [1, 2, 3]).lake.close()
    return str(path)


def run_report_alone(name, uri, out, charts):
    words = [sys.executable, "-c", _PROGRAM, name, uri, _RUNS.get(name, "ref"), str(out), charts]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "nanobind" not in found.stderr
    printed, modules = found.stdout.splitlines()
    return json.loads(printed), json.loads(modules)


@pytest.mark.parametrize("name", report_names())
def test_every_report_runs_without_torch(name, uri, tmp_path):
    printed, modules = run_report_alone(name, uri, tmp_path / "out", "svg")
    assert "report" in printed or "lakebed extract --for" in printed["missing"]
    assert "zarr" not in modules


def test_charts_are_imported_only_when_asked_for(uri, tmp_path):
    printed, modules = run_report_alone("weight-svd-patterns", uri, tmp_path / "out", "")
    assert printed["plots"] == {}
    assert modules == []

"""A report cannot recompute a forward pass: in its process there is nothing to compute one with."""

import json
import subprocess
import sys
from pathlib import Path

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
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report
name, uri, options, out, charts = sys.argv[1:]
with Lake.open(uri) as lake:
    report = load_report(name)
    asked = report.parse({**report.demo_options, **json.loads(options)})
    print(json.dumps(run_report(lake, asked, out, chart_formats=charts.split(",") if charts else [])))
print(json.dumps(sorted(name for name in ("altair", "vl_convert", "zarr") if name in sys.modules)))
"""
# Reports over weights and updates read a made-up lake; those over a probe a trained one, which has four pairs of a type and no
# attention of corrupted records.
_MADE_UP = {"optimizer-update-trace": "traced", "weight-svd-trace": "ref", "weight-svd-patterns": "ref"}
_OPTIONS = {"attention-retrieval-chain-report": {"max_pairs_per_type": 4, "record_side": ["clean"]}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    path = tmp_path_factory.mktemp("lakes") / "both.lake"
    make_svd_lake(path, [1, 2, 3]).lake.close()
    make_trace_lake(path, [1, 2, 3]).lake.close()
    return str(path)


def run_report_alone(name, uri, out, charts):
    options = json.dumps({**_OPTIONS.get(name, {}), "run": _MADE_UP.get(name, "r")})
    words = [sys.executable, "-c", _PROGRAM, name, str(uri), options, str(out), charts]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "nanobind" not in found.stderr
    printed, modules = found.stdout.splitlines()
    return json.loads(printed), json.loads(modules)


@pytest.mark.parametrize("name", report_names())
def test_every_report_runs_without_torch(name, uri, probe_lake_path, tmp_path):
    lake = uri if name in _MADE_UP else probe_lake_path
    printed, modules = run_report_alone(name, lake, tmp_path / "out", "svg")
    assert (tmp_path / "out" / Path(printed["report"]).name).is_file()
    assert "zarr" not in modules


def test_charts_are_imported_only_when_asked_for(uri, tmp_path):
    printed, modules = run_report_alone("weight-svd-patterns", uri, tmp_path / "out", "")
    assert printed["plots"] == {}
    assert modules == []

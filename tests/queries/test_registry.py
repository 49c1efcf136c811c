import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from lakebed.queries import registry
from lakebed.queries.registry import UnknownReport, load_report, report_names, report_summary


def test_reports_are_found_by_file_name():
    assert {"weight-svd-trace", "weight-svd-patterns", "optimizer-update-trace"} <= set(report_names())
    for name in report_names():
        assert load_report(name).report_name() == name
        assert load_report(name).summary() == report_summary(name) != ""


def test_an_unknown_report_lists_those_there_are():
    with pytest.raises(UnknownReport, match=r"no report 'weight-svd'; there are .*weight-svd-patterns"):
        load_report("weight-svd")


def test_listing_imports_no_report_and_no_heavy_package():
    code = (
        "import sys; from lakebed.queries.registry import *; [report_summary(n) for n in report_names()];"
        "print([m for m in ('pydantic', 'duckdb', 'polars', 'altair', 'numpy', 'lakebed.lake') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_reports_of_other_packages_by_entry_point(monkeypatch):
    entry = EntryPoint("my-report", "lakebed.queries.weight_svd_trace:WeightSVDTrace", "lakebed.reports")
    monkeypatch.setattr(registry, "_others", lambda: {"my-report": entry})
    report_names.cache_clear()
    try:
        assert "my-report" in report_names()
        assert load_report("my-report").__name__ == "WeightSVDTrace"
        assert "weight_svd_trace" in report_summary("my-report")
    finally:
        report_names.cache_clear()

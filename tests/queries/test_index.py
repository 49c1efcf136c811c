"""The demo's page: every report has its place in one story, whatever order it was made in."""

from __future__ import annotations

import json
import re

from lakebed.queries.index import CHAPTERS, write_index
from lakebed.queries.registry import load_report, report_names


def test_every_report_has_a_chapter_and_a_place_of_its_own():
    places = {name: load_report(name).place for name in report_names()}
    assert {chapter for chapter, _ in places.values()} == set(CHAPTERS) - {99}
    assert len(set(places.values())) == len(places)


def test_reports_are_told_chapter_by_chapter(tmp_path):
    names = ["component-output-rescue", "weight-svd-patterns", "attention-geometry-trace", "weight-svd-trace"]
    made = []
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        content = {"report": name, "findings": [f"**{name}** found `x`."], "warnings": ["Mind the gap."]}
        (folder / "report.json").write_text(json.dumps(content))
        (folder / "plot.svg").write_text("<svg/>")
        made.append({"report": str(folder / "report.json"), "plots": {"plot": str(folder / "plot.svg")}})
    write_index(tmp_path / "index.html", "Title", "Lead", {"fact": "1"}, made)
    text = (tmp_path / "index.html").read_text()
    headings = re.findall(r'<h[23](?: id="([^"]*)"| class="chapter")>([^<]*)', text)
    assert [name or question for name, question in headings] == [
        CHAPTERS[1],
        "attention-geometry-trace",
        CHAPTERS[3],
        "weight-svd-trace",
        "weight-svd-patterns",
        CHAPTERS[11],
        "component-output-rescue",
    ]
    assert "<b>weight-svd-trace</b> found <code>x</code>." in text
    assert 'src="weight-svd-trace/plot.svg"' in text
    assert text.count("Mind the gap.") == 4

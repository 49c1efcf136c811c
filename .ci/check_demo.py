"""Checks what a shortened demo wrote: its last line, its lake, its index and every file the reports name."""

import json
import re
import sys
from pathlib import Path

from lakebed.lake import Lake
from lakebed.lake.verify import verify
from lakebed.queries.registry import load_report, report_names

last = json.loads(Path(sys.argv[1]).read_text().splitlines()[-1])
assert set(last) == {"accuracy", "steps", "seconds", "lake", "lake_bytes", "index", "reports"}, sorted(last)
assert last["steps"] == 96, last
assert 0 <= last["accuracy"] <= 1, last
assert set(last["reports"]) == {name for name in report_names() if load_report(name).in_demo}, last
assert len(last["reports"]) >= 11, last
index = Path(last["index"])
page = index.read_text()
links = re.findall(r'(?:href|src)="([^"#]+)"', page)
missing = [link for link in links if not (index.parent / link).is_file()]
assert len(links) > 20, links
assert not missing, missing
for markdown in last["reports"].values():
    assert len(Path(markdown).read_text()) > 500, markdown
with Lake.open(last["lake"]) as lake:
    assert lake.sql("select count(*) from training_steps where run = 'demo'").fetchall() == [(96,)]
    assert lake.sql("select count(distinct step) from gradients where run = 'demo'").fetchall() == [(96,)]
    ((events,),) = lake.sql("select count(*) from events where probe = 'probe'").fetchall()
    assert events > 500, events
    for table in ("readouts where stage = 'logits'", "component_logits where component = 'L1MLP'"):
        ((measured,),) = lake.sql(f"select count(distinct event) from {table} and probe = 'probe'").fetchall()
        assert measured == events, (table, measured)
    result = verify(lake)
    assert result.ok, result
print(f"demo checked: {len(links)} links, {last['lake_bytes']:,} bytes of lake verified")

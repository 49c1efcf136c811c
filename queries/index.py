"""One page over several reports: what each found, its charts, and where its rows are. Plain HTML, readable offline."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 76rem; margin: 2.5rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.5rem; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; color: #444; margin: 1rem 0 2rem; padding: 0; list-style: none; }
.facts b { color: #1c1e21; font-size: 1.15rem; display: block; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; border: 1px solid #eee; }
figcaption, .files { color: #555; font-size: .9rem; } code, pre { background: #f4f5f7; border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .8rem 1rem; overflow-x: auto; }
nav a { margin-right: 1.2rem; }
"""


def write_index(
    path: Path, title: str, lead: str, facts: Mapping[str, str], reports: Sequence[Mapping[str, Any]]
) -> None:
    """Writes `path` over reports as `run_report` returned them, in the order given; links are relative to it."""
    names = [_name(report) for report in reports]
    listed = "".join(
        f"<li><b>{html.escape(value)}</b>{html.escape(key)}</li>" for key, value in facts.items()
    )
    links = "".join(f'<a href="#{name}">{name}</a>' for name in names)
    body = "".join(_section(path.parent, name, report) for name, report in zip(names, reports, strict=True))
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>'
        f"<h1>{html.escape(title)}</h1><p>{lead}</p><ul class='facts'>{listed}</ul><nav>{links}</nav>{body}</body></html>\n"
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _name(report: Mapping[str, Any]) -> str:
    content = json.loads(Path(report["report"]).read_text(encoding="utf-8"))
    return str(content["report"])


def _section(folder: Path, name: str, report: Mapping[str, Any]) -> str:
    content = json.loads(Path(report["report"]).read_text(encoding="utf-8"))
    found = "".join(f"<p>{_inline(line)}</p>" for line in content["findings"])
    warned = "".join(f"<p><b>Note.</b> {_inline(line)}</p>" for line in content["warnings"])
    plots = {key: path for key, path in report["plots"].items() if path.endswith((".svg", ".png"))}
    charts = "".join(_figure(folder, key, path, report["plots"]) for key, path in plots.items())
    files = {key: value for key, value in report.items() if isinstance(value, str) and Path(value).is_file()}
    links = ", ".join(
        f'<a href="{_relative(folder, path)}">{html.escape(key)}</a>' for key, path in files.items()
    )
    return f'<h2 id="{name}">{name}</h2>{found}{warned}{charts}<p class="files">Files: {links}</p>'


def _figure(folder: Path, key: str, path: str, plots: Mapping[str, str]) -> str:
    interactive = next(
        (other for other in (plots.get(f"{key}.html"), Path(path).with_suffix(".html")) if other), ""
    )
    link = ""
    if interactive and Path(interactive).is_file():
        target = _relative(folder, str(interactive))
        link = f'<figcaption><a href="{target}">interactive: {html.escape(key)}</a></figcaption>'
    alt = html.escape(key.replace("_", " "))
    return f'<figure><img src="{_relative(folder, path)}" alt="{alt}">{link}</figure>'


def _relative(folder: Path, path: str) -> str:
    return html.escape(os.path.relpath(path, folder).replace(os.sep, "/"), quote=True)


def _inline(text: str) -> str:
    """Markdown of one sentence: `code` and **bold** only."""
    escaped = html.escape(text, quote=False)
    for mark, tag in (("`", "code"), ("**", "b")):
        parts = escaped.split(mark)
        escaped = "".join(
            part + (f"<{'/' * (i % 2)}{tag}>" if i < len(parts) - 1 else "") for i, part in enumerate(parts)
        )
    return escaped

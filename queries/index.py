"""One page over several reports: what each found, its charts, and where its rows are. Plain HTML, readable offline."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registry import load_report

if TYPE_CHECKING:
    from .report import Report

# What a reader asks, chapter by chapter; they are those of docs/guide.md. Reports of others come last.
CHAPTERS: Mapping[int, str] = {
    1: "Which mechanism does the trained model use?",
    2: "Which of several routes does training choose?",
    3: "When did the weights form it?",
    4: "When did its directions come to mean something?",
    5: "How well does the head match?",
    6: "Which updates between checkpoints grew it?",
    7: "What moved a score, and which link of the chain moved first?",
    8: "What did each training step do, and why?",
    9: "Which code does the readout use, and does the answer need it?",
    10: "Do the routes account for the answer?",
    11: "Which components carry it, and what makes up for them?",
    12: "Does the same role form in every seed?",
    99: "More",
}

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 76rem; margin: 2.5rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { margin-top: 4rem; border-top: 2px solid #444; padding-top: 1.5rem; }
h3 { margin-top: 2.5rem; font-size: 1.15rem; } .about { margin-top: -.6rem; color: #555; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; color: #444; margin: 1rem 0 2rem; padding: 0; list-style: none; }
.facts b { color: #1c1e21; font-size: 1.15rem; display: block; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; border: 1px solid #eee; }
figcaption, .files { color: #555; font-size: .9rem; } code, pre { background: #f4f5f7; border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .8rem 1rem; overflow-x: auto; }
nav li { margin: .25rem 0; } nav a { white-space: nowrap; }
"""


def write_index(
    path: Path, title: str, lead: str, facts: Mapping[str, str], reports: Sequence[Mapping[str, Any]]
) -> None:
    """Writes `path` over reports as `run_report` returned them, in the order of their story; links are relative to it."""
    told = sorted(
        ((load_report(_name(of)), of) for of in reports),
        key=lambda told: (told[0].place, told[0].report_name()),
    )
    listed = "".join(
        f"<li><b>{html.escape(value)}</b>{html.escape(key)}</li>" for key, value in facts.items()
    )
    chapters: dict[str, list[tuple[type[Report], Mapping[str, Any]]]] = {}
    for report, written in told:
        chapters.setdefault(CHAPTERS.get(report.place[0], CHAPTERS[99]), []).append((report, written))
    links = "".join(
        f"<li>{html.escape(question)} "
        + ", ".join(f'<a href="#{of.report_name()}">{of.report_name()}</a>' for of, _ in held)
        + "</li>"
        for question, held in chapters.items()
    )
    body = "".join(
        f'<h2 class="chapter">{html.escape(question)}</h2>'
        + "".join(_section(path.parent, report, written) for report, written in held)
        for question, held in chapters.items()
    )
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>'
        f"<h1>{html.escape(title)}</h1><p>{lead}</p><ul class='facts'>{listed}</ul><nav><ol>{links}</ol></nav>"
        f"{body}</body></html>\n"
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _name(report: Mapping[str, Any]) -> str:
    content = json.loads(Path(report["report"]).read_text(encoding="utf-8"))
    return str(content["report"])


def _section(folder: Path, of: type[Report], report: Mapping[str, Any]) -> str:
    name = of.report_name()
    content = json.loads(Path(report["report"]).read_text(encoding="utf-8"))
    found = "".join(f"<p>{_inline(line)}</p>" for line in content["findings"])
    warned = "".join(f"<p><b>Note.</b> {_inline(line)}</p>" for line in content["warnings"])
    plots = {key: path for key, path in report["plots"].items() if path.endswith((".svg", ".png"))}
    charts = "".join(_figure(folder, key, path, report["plots"]) for key, path in plots.items())
    files = {key: value for key, value in report.items() if isinstance(value, str) and Path(value).is_file()}
    links = ", ".join(
        f'<a href="{_relative(folder, path)}">{html.escape(key)}</a>' for key, path in files.items()
    )
    title = f'<h3 id="{name}">{html.escape(of.summary())}</h3><p class="about"><code>{name}</code></p>'
    return f'{title}{found}{warned}{charts}<p class="files">Files: {links}</p>'


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

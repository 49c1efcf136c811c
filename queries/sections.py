"""The `.sql` file of a report: one SELECT per section, each a row set or a helper view.

    -- rows: metric_rows        a row set, written to the output folder
    -- view: top_heads          read by later sections, charts, tables and findings; not written out
    -- arrays: projections      made by the report's `arrays` method from the sections before; has no SQL of its own

A section is one SELECT (or WITH … SELECT). It may read the lake's tables, the parameters `$run`, `$steps`, `$lake` and
those of the report's fields, and every section before it by name; sections are materialised in order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("rows", "view", "arrays")
_DIRECTIVE = re.compile(r"--\s*(\w+)\s*:(.*)")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_READS = re.compile(r"\b(?:FROM|JOIN)\s+([A-Za-z_]\w*)", re.IGNORECASE)
_PARAMETER = re.compile(r"\$([a-z]\w*)")


class SectionError(ValueError):
    """A report's `.sql` file that does not keep to the form: a mistake of its author, not of its user."""


@dataclass(frozen=True)
class Section:
    """One statement of a report."""

    kind: str
    name: str
    sql: str

    def reads(self) -> set[str]:
        """Names after FROM and JOIN: lake tables, earlier sections and the statement's own CTEs."""
        return set(_READS.findall(_without_comments(self.sql)))

    def parameters(self) -> set[str]:
        """Names of the parameters it uses."""
        return set(_PARAMETER.findall(_without_comments(self.sql)))


def parse_sections(text: str, source: str) -> list[Section]:
    """Sections in order; raises SectionError for an unknown directive, a doubled name or an empty section."""
    found: list[tuple[str, str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        directive = _DIRECTIVE.fullmatch(line.strip())
        if directive:
            kind, name = directive[1], directive[2].strip()
            if kind not in KINDS:
                raise SectionError(
                    f"{source}:{number}: unknown directive {kind!r}; there are {', '.join(KINDS)}"
                )
            if not _NAME.fullmatch(name):
                raise SectionError(f"{source}:{number}: {name!r} is no section name")
            if any(name == other for _, other, _ in found):
                raise SectionError(f"{source}:{number}: section {name!r} stands twice")
            found.append((kind, name, []))
        elif found:
            found[-1][2].append(line)
        elif line.strip() and not line.strip().startswith("--"):
            raise SectionError(f"{source}:{number}: SQL before the first '-- rows:' or '-- view:'")
    return [_section(kind, name, "\n".join(lines), source) for kind, name, lines in found]


def _section(kind: str, name: str, text: str, source: str) -> Section:
    sql = text.strip().removesuffix(";").rstrip()
    bare = _without_comments(sql).strip()
    if kind == "arrays":
        if bare:
            raise SectionError(
                f"{source}: section {name!r} is made by the report's arrays method; it has no SQL"
            )
        return Section(kind, name, "")
    if not bare:
        raise SectionError(f"{source}: section {name!r} is empty")
    if not re.match(r"(SELECT|WITH|FROM|UNPIVOT|PIVOT)\b", bare, re.IGNORECASE) or ";" in bare:
        raise SectionError(f"{source}: section {name!r} must be one SELECT statement")
    return Section(kind, name, sql)


def _without_comments(sql: str) -> str:
    return re.sub(r"--[^\n]*", "", sql)

"""The schema of a lake, printed from its one declaration: as text, Markdown or JSON."""

from __future__ import annotations

import json
from typing import Any

from ..lake.errors import UnknownName
from ..lake.macros import MACROS
from ..lake.schema import FORMAT_VERSION, QUANTITIES, TABLES, VIEWS, Table

SCHEMA_FORMATS = ("text", "markdown", "json")


def schema(only: str | None = None) -> dict[str, Any]:
    """Tables, tensors, views and macros as plain data; `only` picks the one of that name. Raises UnknownName."""
    found: dict[str, list[dict[str, Any]]] = {
        "tables": [_table(table) for table in TABLES.values()],
        "tensors": [
            {"name": quantity.view, "quantity": quantity.name, "about": quantity.about}
            for quantity in QUANTITIES.values()
        ],
        "views": [{"name": name, "about": about, "sql": sql} for name, (about, sql) in VIEWS.items()],
        "macros": [
            {"name": signature.split("(")[0], "signature": signature, "about": about, "sql": sql}
            for signature, (about, sql) in MACROS.items()
        ],
    }
    if only is not None:
        picked = {
            kind: [entry for entry in entries if entry["name"] == only] for kind, entries in found.items()
        }
        if not any(picked.values()):
            names = [str(entry["name"]) for entries in found.values() for entry in entries]
            raise UnknownName(
                f"no table, tensor, view or macro {only!r}; there are {', '.join(sorted(set(names)))}"
            )
        found = picked
    return {"format": FORMAT_VERSION, **found}


def _table(table: Table) -> dict[str, Any]:
    columns = [
        {"name": "run", "type": "VARCHAR", "about": "name of the run; from the path, not stored in the file"}
    ]
    columns += [{"name": column.name, "type": column.type, "about": column.about} for column in table.columns]
    return {
        "name": table.name,
        "about": table.about,
        "key": list(dict.fromkeys(["run", *table.key])),
        "columns": columns,
    }


def schema_text(only: str | None = None, form: str = "text") -> str:
    """The schema in one of SCHEMA_FORMATS, with a line break at its end."""
    found = schema(only)
    if form == "json":
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    return _markdown(found) if form == "markdown" else _text(found)


def _text(found: dict[str, Any]) -> str:
    lines: list[str] = []
    for table in found["tables"]:
        lines += [f"{table['name']}  ({', '.join(table['key'])})", f"  {table['about']}"]
        name_width = max(len(column["name"]) for column in table["columns"])
        types = [
            column["type"] if len(column["type"]) <= 20 else "STRUCT(…)[]" for column in table["columns"]
        ]
        type_width = max(map(len, types))
        for column, kind in zip(table["columns"], types, strict=True):
            lines.append(f"  {column['name']:{name_width}}  {kind:{type_width}}  {column['about']}")
        lines.append("")
    for tensor in found["tensors"]:
        lines += [
            f"{tensor['name']}  (tensor: Zarr quantity {tensor['quantity']})",
            f"  {tensor['about']}",
            "",
        ]
    for view in found["views"]:
        lines += [f"{view['name']}  (view)", f"  {view['about']}", f"  {view['sql']}", ""]
    for macro in found["macros"]:
        lines += [f"{macro['signature']}  (macro)", f"  {macro['about']}", ""]
    return "\n".join(lines)


def _markdown(found: dict[str, Any]) -> str:
    lines: list[str] = []
    for table in found["tables"]:
        lines += [
            f"## {table['name']}",
            "",
            f"{_sentence(table['about'])} Key: {', '.join(table['key'])}.",
            "",
        ]
        lines += ["| column | type | meaning |", "| --- | --- | --- |"]
        lines += [
            f"| `{column['name']}` | `{column['type']}` | {_escaped(column['about'])} |"
            for column in table["columns"]
        ]
        lines.append("")
    for title, kind, name in (
        ("Tensors", "tensors", "name"),
        ("Views", "views", "name"),
        ("Macros", "macros", "signature"),
    ):
        if found[kind]:
            lines += [f"## {title}", ""]
            lines += [f"* `{entry[name]}`: {_escaped(entry['about'])}" for entry in found[kind]]
            lines.append("")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")

"""The packaged run configurations, and how a TOML file becomes a document or a one-line complaint."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ... import LakebedError

SUFFIX = ".toml"


class ConfigError(LakebedError, ValueError):
    """An unusable configuration, in one line: file, dotted key, what is wrong, what is allowed."""


def named_configs() -> list[str]:
    """Names of the packaged configurations, sorted; each can be given to `load_config`."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX))


def load_document(
    name_or_path: str | os.PathLike[str], overrides: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Source name and parsed TOML of a packaged name or a path, with the overrides merged in.

    A string without a path separator and without a `.toml` suffix is a packaged name; all else is a path.
    """
    given = os.fspath(name_or_path)
    is_path = not isinstance(name_or_path, str) or given.endswith(SUFFIX) or Path(given).name != given
    source, text = _read_path(given) if is_path else _read_named(given)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError(f"{source}: not TOML: {problem}") from None
    for key, value in overrides.items():
        _merge(document, key.split("."), value, source)
    return source, document


def _read_path(path: str) -> tuple[str, str]:
    try:
        return path, Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: unreadable: {problem}") from None


def _read_named(name: str) -> tuple[str, str]:
    if name not in named_configs():
        raise ConfigError(
            f"no configuration named {name!r}; named configurations: {', '.join(named_configs())} "
            f"(a file is given as a path ending in {SUFFIX})"
        )
    return name, resources.files(__name__).joinpath(name + SUFFIX).read_text(encoding="utf-8")


def _merge(document: dict[str, Any], path: list[str], value: Any, source: str) -> None:
    *tables, last = path
    for depth, name in enumerate(tables, start=1):
        document = document.setdefault(name, {})
        if not isinstance(document, dict):
            raise ConfigError(f"{source}: {'.'.join(path)}: {'.'.join(path[:depth])} is a value, not a table")
    if isinstance(value, Mapping) and isinstance(document.get(last), dict):
        for name, inner in value.items():
            _merge(document[last], [name], inner, source)
    else:
        document[last] = dict(value) if isinstance(value, Mapping) else value


def describe(source: str, problem: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first of pydantic's complaints, and the number of further ones."""
    errors = problem.errors(include_url=False)
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    line = ": ".join(part for part in (source, key, _complaint(first, model)) if part)
    return " ".join(line.split()) + more


def _complaint(error: ErrorDetails, model: type[BaseModel]) -> str:
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return "is required and missing"
    if error["type"] == "extra_forbidden":
        allowed = sorted(_table_at(model, error["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"unknown key; {hint}allowed: {', '.join(allowed)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{message}, not {error['input']!r}"


def _table_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    for name in path:
        annotation = model.model_fields[str(name)].annotation
        candidates = (annotation, *get_args(annotation))
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model

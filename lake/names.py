"""Names that become paths, and canonical JSON that becomes identities."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from .errors import InvalidName

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,99}")
_LONGEST_FOLDER = 200
# Folders of a Zarr group that hold its coordinates; a tensor of the same name must not land there.
RESERVED = frozenset({"step", "layer", "head", "rank", "zarr.json"})


def check_run_name(run: str) -> str:
    """Returns `run` if it can be a folder name on every file system and object store, else raises InvalidName."""
    if not _RUN_NAME.fullmatch(run):
        raise InvalidName(
            f"run name {run!r} is not usable: 1 to 100 letters, digits or . _ + @ -, starting with a letter or digit"
        )
    return run


def encode_name(name: str) -> str:
    """The folder name of a tensor: percent-encoded, at most 200 characters, unique per name.

    The true name stands in the array's attributes (`name`) and in table `parameters`; this is only its address.
    """
    encoded = quote(name, safe="._-")
    if encoded in RESERVED or encoded.startswith(".") or not encoded:
        encoded = f"%{ord(name[0]):02X}{encoded[1:]}" if name else "%"
    if len(encoded) > _LONGEST_FOLDER:
        encoded = f"{encoded[: _LONGEST_FOLDER - 17]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return encoded


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def spec_id(parameters: Mapping[str, Any]) -> str:
    """The 12-hex identity of a dataset's parameters; the empty mapping has the empty identity."""
    if not parameters:
        return ""
    return hashlib.sha256(canonical_json(parameters).encode()).hexdigest()[:12]


def content_hash(inputs: Mapping[str, Any]) -> str:
    """SHA-256 hex over canonical JSON: what a unit was made from."""
    return hashlib.sha256(canonical_json(inputs).encode()).hexdigest()

"""Checkpoint folders as transformers writes them: config.json with model.safetensors, one or a subfolder for each step."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import LakebedError
from ..engine.adapters import Adapter, UnknownAdapter, load_adapter
from ..lake.names import canonical_json
from .checkpoints import STATE_DICT, CheckpointError, find_checkpoints, step_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_STEP_FOLDER = re.compile(r"(step|checkpoint)[-_]?\d+")
# Where a model came from and what wrote it, which says nothing of its arithmetic.
_ABOUT_THE_FILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}


@dataclass(frozen=True)
class HuggingFaceCheckpoints:
    """Weights file of each step, ascending, and the model they are of."""

    files: dict[int, Path]
    family: str
    config: str
    adapter: Adapter


def find(folder: str | Path, step: int | None = None) -> HuggingFaceCheckpoints | None:
    """The checkpoints of a folder, or None for a folder of another kind. `step` is that of a folder without a number.

    Raises CheckpointError, naming the file, for a config of a family without an adapter, a missing weights file, and
    subfolders of different models.
    """
    place = Path(folder)
    if not place.is_dir() or any(place.glob("step_*.pt")):
        return None
    parts = [path for path in place.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]
    configs = [
        path for path in (place / CONFIG, *(part / CONFIG for part in sorted(parts))) if path.is_file()
    ]
    if not configs:
        held = next((path for path in (place, *parts) if (path / WEIGHTS).is_file()), None)
        if held is None:
            return None
        raise CheckpointError(f"{held} holds {WEIGHTS} and no {CONFIG}, which says what model it is")
    stepped = _stepped_files(place) if not parts and step is None else []
    document = _read(configs)
    family = document.get("model_type")
    if not isinstance(family, str):
        if stepped:
            return None
        raise CheckpointError(f"{configs[0]} has no model_type, so it is no {CONFIG} of transformers")
    text = canonical_json({key: value for key, value in document.items() if key not in _ABOUT_THE_FILE})
    try:
        adapter = load_adapter(family, text)
    except LakebedError as error:
        if stepped and isinstance(error, UnknownAdapter):
            return None  # weights of any model come in, only without its layers and heads
        raise CheckpointError(f"{configs[0]}: {error}") from error
    files = (
        {step_of(path): path for path in find_checkpoints(place)} if stepped else _files(place, parts, step)
    )
    return HuggingFaceCheckpoints(files, family, text, adapter)


def _stepped_files(place: Path) -> list[Path]:
    """Weights files that name their step, as `lakebed import` takes them from any model."""
    found = [path for path in place.glob("*.safetensors") if path.name != WEIGHTS and "-of-" not in path.name]
    return [] if (place / WEIGHTS).is_file() else found


def _files(place: Path, parts: list[Path], step: int | None) -> dict[int, Path]:
    """Of a folder with both, such as a trainer leaves behind, the subfolders are the steps, unless `step` is given."""
    if parts and step is None:
        found: dict[int, Path] = {}
        for part in parts:
            at = step_of(part)
            if at in found:
                raise CheckpointError(
                    f"{found[at].parent.name} and {part.name} in {place} are both step {at}"
                )
            found[at] = _weights_file(part)
        return dict(sorted(found.items()))
    return {step or 0: _weights_file(place)}


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS, STATE_DICT):
        if (folder / name).is_file():
            return folder / name
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    sharded = " in one file: save it again with a larger max_shard_size" if "-of-" in held else ""
    raise CheckpointError(f"no {WEIGHTS} and no {STATE_DICT} in {folder}{sharded}; it holds {held}")


def _read(configs: list[Path]) -> Mapping[str, Any]:
    """The one model that all configs describe."""
    first, *others = (_document(path) for path in configs)
    for path, other in zip(configs[1:], others, strict=True):
        keys = (first.keys() | other.keys()) - _ABOUT_THE_FILE
        differing = sorted(key for key in keys if first.get(key) != other.get(key))
        if differing:
            raise CheckpointError(
                f"{path} is another model than {configs[0]}: {differing[0]} is {other.get(differing[0])!r}, "
                f"not {first.get(differing[0])!r}"
            )
    return first


def _document(path: Path) -> Mapping[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} holds a {type(held).__name__}, not the settings of a model")
    return held

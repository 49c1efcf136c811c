"""Bringing in checkpoints made elsewhere: `step_*.pt` and `*.safetensors`, one unit per file. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..engine.config import RunConfig
from ..engine.decoder import SymbolicKVDecoder
from ..engine.tap import TrainingState
from ..lake import Lake
from ..lake.axis import publish
from .progress import Progress, Silent
from .runs import RecordingError, RunInfo, parameter_row, register_run
from .trace_writer import write_state
from .training import ADAPTER

_STEP = re.compile(r"(\d+)(?!.*\d)")


class CheckpointError(RecordingError):
    """A checkpoint file that cannot be imported; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """One file: its step, weights by name (aliases of tied tensors left out), and Adam's state if it holds one."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    step_counts: dict[str, int]
    learning_rate: float | None
    metrics: str | None
    tied_to: dict[str, list[str]]


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    run: str
    imported: list[int]
    standing: int
    with_moments: int
    bytes: int


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Files named after their step, ascending: `step_*.pt` if there are any, else `*.safetensors`.

    Raises CheckpointError in the guide's words for a missing folder, and when there is nothing to import.
    """
    place = Path(folder)
    if not place.is_dir():
        raise CheckpointError(f"Checkpoint directory not found: {place}")
    files = sorted(place.glob("step_*.pt")) or sorted(place.glob("*.safetensors"))
    if not files:
        held = sorted(path.name for path in place.iterdir())[:5]
        raise CheckpointError(
            f"no step_*.pt and no *.safetensors in {place}; it holds {', '.join(held) or 'nothing'}"
        )
    by_step: dict[int, Path] = {}
    for path in files:
        step = step_of(path)
        if step in by_step:
            raise CheckpointError(f"{by_step[step].name} and {path.name} in {place} are both step {step}")
        by_step[step] = path
    return [by_step[step] for step in sorted(by_step)]


def step_of(path: Path) -> int:
    """The last number in a file's name."""
    match = _STEP.search(path.stem)
    if match is None:
        raise CheckpointError(f"{path} does not name its step: call it step_000250{path.suffix}")
    return int(match.group(1))


def import_checkpoints(
    lake: Lake,
    folder: str | Path,
    run: str,
    config: RunConfig | None = None,
    progress: Progress | None = None,
) -> ImportResult:
    """Imports every checkpoint of a folder as run `run`; those that stand already are compared by hash and left.

    With `config` the weights are checked against the model it describes, and layers and heads are known.
    """
    progress = progress or Silent()
    files = find_checkpoints(folder)
    expected = None if config is None else _expected_shapes(config)
    info = RunInfo(
        source="import",
        adapter=None if config is None else ADAPTER,
        config=None if config is None else config.canonical_json(),
        seed=None if config is None else config.seed,
        store="checkpoints",
    )
    progress.start(f"importing {run}", len(files))
    standing = set(lake.table("steps", run).select("step").collect()["step"])
    imported: list[int] = []
    with_moments = total = 0
    for path in files:
        data = path.read_bytes()
        identity = hashlib.sha256(data).hexdigest()
        checkpoint = read_checkpoint(path, expected)
        if expected is not None:
            _check_shapes(checkpoint, expected)
        if not imported and not standing:
            _register(lake, run, info, checkpoint)
        state = TrainingState(checkpoint.weights, dict(checkpoint.optimizer), checkpoint.step_counts)
        write_state(
            lake,
            run,
            checkpoint.step,
            state,
            identity,
            source_uri=path.resolve().as_uri(),
            learning_rate=checkpoint.learning_rate,
            metrics=checkpoint.metrics,
        )
        if checkpoint.step not in standing:
            imported.append(checkpoint.step)
            total += len(data)
        with_moments += bool(checkpoint.optimizer)
        progress.advance(note=f"step {checkpoint.step}")
    publish(lake, run)
    return ImportResult(run, imported, len(files) - len(imported), with_moments, total)


def _register(lake: Lake, run: str, info: RunInfo, checkpoint: Checkpoint) -> None:
    rows = [
        parameter_row(
            position, name, tensor, checkpoint.tied_to.get(name, []), 0 if checkpoint.step_counts else None
        )
        for position, (name, tensor) in enumerate(checkpoint.weights.items())
    ]
    register_run(lake, run, info, rows)


def read_checkpoint(path: Path, expected: Collection[str] | None = None) -> Checkpoint:
    """Reads one file without unpickling anything but tensors and plain containers; raises CheckpointError.

    `expected` are the model's parameter names in its order, where they are known: of two names of one tensor it decides
    which is the parameter and which the alias (safetensors sorts names, and keeps no order of its own).
    """
    step = step_of(path)
    payload = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pt(path)
    if "step" in payload and int(payload["step"]) != step:
        raise CheckpointError(f"{path} says step {payload['step']} inside and step {step} in its name")
    weights, tied_to = _without_aliases(path, payload["model_state"], list(expected or ()))
    optimizer, counts, rate = _optimizer_state(path, payload.get("optimizer_state"), weights)
    metrics = payload.get("metrics")
    text = json.dumps(metrics, sort_keys=True, default=str) if metrics else None
    return Checkpoint(path, step, weights, optimizer, counts, rate, text, tied_to)


def _load_pt(path: Path) -> Mapping[str, Any]:
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds pickled objects besides tensors, and lakebed unpickles nothing: save it again with plain "
            "tensors, numbers, strings, lists and dicts, or as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint ({reason}): copy it again"
        ) from error
    if not isinstance(payload, Mapping) or not isinstance(payload.get("model_state"), Mapping):
        keys = ", ".join(map(str, payload)) if isinstance(payload, Mapping) else type(payload).__name__
        raise CheckpointError(f"{path} has no model_state; it holds {keys}")
    return payload


def _load_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return {"model_state": load_file(path)}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}): copy it again") from error


def _without_aliases(
    path: Path, state: Mapping[str, Any], expected: list[str]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Each tensor once, under its first name; safetensors keeps no aliases, so equal bits of a tied head count too."""
    weights: dict[str, Tensor] = {}
    tied_to: dict[str, list[str]] = {}
    order = [name for name in expected if name in state]
    for name in [*order, *(name for name in state if name not in order)]:
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: model_state entry {name!r} is a {type(tensor).__name__}, not a tensor"
            )
        owner = next((held for held, other in weights.items() if _same(held, other, name, tensor)), None)
        if owner is None:
            weights[name] = tensor
        else:
            tied_to.setdefault(owner, []).append(name)
    return weights, tied_to


def _same(held: str, other: Tensor, name: str, tensor: Tensor) -> bool:
    if other.shape != tensor.shape or other.dtype != tensor.dtype:
        return False
    shared = other.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    if shared and other.storage_offset() == tensor.storage_offset():
        return True
    return {held, name} == {"token_embedding.weight", "lm_head.weight"} and torch.equal(other, tensor)


def _optimizer_state(
    path: Path, state: Any, weights: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int], float | None]:
    """torch's optimizer state dict, by parameter name: its integer keys count parameters in the model's order."""
    if not state:
        return {}, {}, None
    try:
        order = [index for group in state["param_groups"] for index in group["params"]]
        names = dict(zip(order, weights, strict=True))
        counts = dict.fromkeys(weights, 0)
        tensors: dict[str, dict[str, Tensor]] = {}
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if key == "step":
                    counts[names[index]] = int(value)
                elif isinstance(value, Tensor):
                    tensors.setdefault(key, {})[names[index]] = value
        return tensors, counts, float(state["param_groups"][0]["lr"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path}: optimizer_state does not match the {len(weights)} parameters of model_state"
        ) from error


def _expected_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = SymbolicKVDecoder(config.model, config.benchmark.vocabulary_size)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    for name, shape in expected.items():
        if found.get(name) != shape:
            held = f"has shape {found[name]}" if name in found else "is missing"
            raise CheckpointError(
                f"{checkpoint.path} is no checkpoint of this config: {name} {held}, the config's model has {shape}"
            )
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise CheckpointError(f"{checkpoint.path} holds {extra[0]!r}, which the config's model does not have")

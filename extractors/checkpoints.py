"""Reading a checkpoint file made elsewhere: what it holds by parameter name. Nothing is unpickled."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..engine.adapters import Adapter
from .runs import RecordingError

STATE_DICT = "pytorch_model.bin"
"""Where transformers put the bare state dict before safetensors."""
# Without a config: names under which the embedding and its tied head are usually found.
_TIED = {"lm_head.weight": ("token_embedding.weight", "wte.weight", "transformer.wte.weight")}

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


def read_checkpoint(path: Path, step: int, adapter: Adapter | None = None) -> Checkpoint:
    """Reads one file without unpickling anything but tensors and plain containers; raises CheckpointError.

    `adapter` is that of the model, where it is known. It has the parameters in the model's order: of two names of one tensor
    that decides which is the parameter and which the alias (safetensors sorts names, and keeps no order of its own).
    """
    payload = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pt(path)
    if "step" in payload and int(payload["step"]) != step:
        raise CheckpointError(f"{path} says step {payload['step']} inside and step {step} in its name")
    weights, tied_to = _without_aliases(path, payload["model_state"], adapter)
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
    if path.name == STATE_DICT and isinstance(payload, Mapping):
        return {"model_state": payload}
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
    path: Path, state: Mapping[str, Any], adapter: Adapter | None
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Each tensor once, under its first name; safetensors keeps no aliases, so equal bits of a tied head count too."""
    weights: dict[str, Tensor] = {}
    tied_to: dict[str, list[str]] = {}
    order = [] if adapter is None else [name for name in adapter.parameter_shapes(state) if name in state]
    for name in dict.fromkeys([*order, *state]):
        if adapter is not None and adapter.is_buffer(name):
            continue
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: model_state entry {name!r} is a {type(tensor).__name__}, not a tensor"
            )
        tied = _TIED if adapter is None else adapter.tied
        owner = next(
            (held for held, other in weights.items() if _same(other, tensor, held in tied.get(name, ()))),
            None,
        )
        if owner is None:
            weights[name] = tensor
        else:
            tied_to.setdefault(owner, []).append(name)
    return weights, tied_to


def _same(held: Tensor, tensor: Tensor, may_be_tied: bool) -> bool:
    if held.shape != tensor.shape or held.dtype != tensor.dtype:
        return False
    shared = held.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    if shared and held.storage_offset() == tensor.storage_offset():
        return True
    return may_be_tied and torch.equal(held, tensor)


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

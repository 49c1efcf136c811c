"""Bringing in checkpoints made elsewhere: `step_*.pt`, `*.safetensors` and transformers' folders, one unit per file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..engine.adapters import Adapter, check_weights, load_adapter
from ..engine.config import RunConfig
from ..engine.forward import WeightMismatch
from ..engine.tap import TrainingState
from ..lake import Lake
from ..lake.axis import publish
from . import hugging_face
from .checkpoints import Checkpoint, CheckpointError, find_checkpoints, read_checkpoint, step_of
from .progress import Progress, Silent
from .runs import RunInfo, parameter_row, register_run
from .trace_writer import write_state
from .training import ADAPTER


@dataclass(frozen=True)
class Source:
    """What a folder offers: a weights file for each step, ascending, and the model they are of, where it is known."""

    files: Mapping[int, Path]
    info: RunInfo = field(default_factory=lambda: RunInfo(source="import", store="checkpoints"))
    adapter: Adapter | None = None


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    run: str
    imported: list[int]
    standing: int
    with_moments: int
    bytes: int


def find_source(folder: str | Path, config: RunConfig | None = None, step: int | None = None) -> Source:
    """What there is to import in a folder. A `config.json` beside the weights says the model's family and sizes, `config`
    those of a symbolic-KV run; `step` is that of a folder which holds one set of weights and no number.

    Raises CheckpointError in the guide's words for a missing folder, and when there is nothing to import.
    """
    theirs = None if config is not None else hugging_face.find(folder, step)
    if theirs is not None:
        info = RunInfo(source="import", adapter=theirs.family, config=theirs.config, store="checkpoints")
        return Source(theirs.files, info, theirs.adapter)
    files = {step_of(path): path for path in find_checkpoints(folder)}
    if step is not None:
        raise CheckpointError(
            f"--step is for a folder with config.json and one model.safetensors; the files of {folder} name their steps"
        )
    if config is None:
        return Source(files)
    text = config.canonical_json()
    info = RunInfo(source="import", adapter=ADAPTER, config=text, seed=config.seed, store="checkpoints")
    return Source(files, info, load_adapter(ADAPTER, text))


def import_checkpoints(
    lake: Lake,
    folder: str | Path,
    run: str,
    config: RunConfig | None = None,
    progress: Progress | None = None,
    step: int | None = None,
) -> ImportResult:
    """Imports every checkpoint of a folder as run `run`; those that stand already are compared by hash and left.

    Where the model is known (see `find_source`) the weights are checked against it, and layers and heads are known.
    """
    progress = progress or Silent()
    source = find_source(folder, config, step)
    progress.start(f"importing {run}", len(source.files))
    standing = set(lake.table("steps", run).select("step").collect()["step"])
    imported: list[int] = []
    with_moments = total = 0
    for at, path in source.files.items():
        data = path.read_bytes()
        identity = hashlib.sha256(data).hexdigest()
        checkpoint = read_checkpoint(path, at, source.adapter)
        if source.adapter is not None:
            _check(checkpoint, source.adapter)
        if at == next(iter(source.files)):
            _register(lake, run, source.info, checkpoint)
        state = TrainingState(checkpoint.weights, dict(checkpoint.optimizer), checkpoint.step_counts)
        write_state(
            lake,
            run,
            at,
            state,
            identity,
            source_uri=path.resolve().as_uri(),
            learning_rate=checkpoint.learning_rate,
            metrics=checkpoint.metrics,
        )
        if at not in standing:
            imported.append(at)
            total += len(data)
        with_moments += bool(checkpoint.optimizer)
        progress.advance(note=f"step {at}")
    publish(lake, run)
    return ImportResult(run, imported, len(source.files) - len(imported), with_moments, total)


def _register(lake: Lake, run: str, info: RunInfo, checkpoint: Checkpoint) -> None:
    rows = [
        parameter_row(
            position, name, tensor, checkpoint.tied_to.get(name, []), 0 if checkpoint.step_counts else None
        )
        for position, (name, tensor) in enumerate(checkpoint.weights.items())
    ]
    register_run(lake, run, info, rows)


def _check(checkpoint: Checkpoint, adapter: Adapter) -> None:
    try:
        check_weights(checkpoint.weights, adapter.parameter_shapes(checkpoint.weights))
    except WeightMismatch as error:
        raise CheckpointError(f"{checkpoint.path} is no checkpoint of this config: {error}") from error

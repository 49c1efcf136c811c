"""Registering a run: what was trained, its parameters, their slices and its examples; written once per run."""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import LakebedError
from ..engine.adapters import Adapter, load_adapter
from ..engine.optimizer import numeric_environment
from ..lake import Lake, Unit
from ..lake.datasets import RUN
from ..lake.names import canonical_json


class RecordingError(LakebedError):
    """A run cannot be recorded, continued or replayed as asked."""


class ReplayMismatch(RecordingError):
    """The replayed state differs from the live one: something besides the optimizer changed weights or moments."""


@dataclass(frozen=True)
class RunInfo:
    """What a lake should know of a run beyond its tensors. `adapter` and `config` go together."""

    source: str = "record"
    adapter: str | None = None
    config: str | None = None
    seed: int | None = None
    store: str = "exact"
    anchor_every: int | None = None
    optimizer: Mapping[str, Any] | None = None
    parent_run: str | None = None
    parent_step: int | None = None
    historical_replay: str | None = None
    examples: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    def identity(self) -> dict[str, Any]:
        """What must not differ when a run is continued."""
        return {
            "adapter": self.adapter,
            "config": None if self.config is None else hashlib.sha256(self.config.encode()).hexdigest(),
            "seed": self.seed,
            "parent": [self.parent_run, self.parent_step],
        }


def describe_run(info: RunInfo, optimizer: torch.optim.Optimizer, store: str, anchor_every: int) -> RunInfo:
    """Adds how the run is recorded: the optimizer's class, and what may change the last bit of its update."""
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    return replace(
        info,
        store=store,
        anchor_every=anchor_every,
        optimizer={"class": kind, "environment": numeric_environment()},
    )


def register_run(lake: Lake, run: str, info: RunInfo, parameters: list[dict[str, Any]]) -> None:
    """Writes tables runs, parameters, slices, stages and examples, unless the run stands; InputMismatch if it differs."""
    unit = Unit(RUN, run, "run", inputs=info.identity())
    if lake.find_receipt(unit) is not None:
        return
    adapter = None if info.adapter is None or info.config is None else load_adapter(info.adapter, info.config)
    with lake.unit(unit) as writer:
        writer.rows("runs", [_run_row(info)])
        writer.rows("parameters", [_described(row, adapter) for row in parameters])
        if adapter is not None:
            shapes = {row["parameter"]: tuple(row["shape"]) for row in parameters}
            writer.rows("slices", [asdict(part) for part in adapter.slices(shapes)])
            writer.rows("stages", _stage_rows(adapter))
        if info.examples:
            writer.rows("examples", list(info.examples))


def _stage_rows(adapter: Adapter) -> list[dict[str, Any]]:
    """Rows of table stages; the layer that writes layer_3_post_attn is 3, embedding and final_norm have none."""
    return [
        {
            "stage": stage,
            "position": position,
            "layer": int(stage.split("_")[1]) if stage.startswith("layer_") else None,
            "layer_norm_eps": adapter.layer_norm_eps if stage == "final_norm" else None,
        }
        for position, stage in enumerate(adapter.stages())
    ]


def _run_row(info: RunInfo) -> dict[str, Any]:
    config_hash = None if info.config is None else hashlib.sha256(info.config.encode()).hexdigest()
    return {
        "source": info.source,
        "adapter": info.adapter,
        "config": info.config,
        "config_hash": config_hash,
        "seed": info.seed,
        "store": info.store,
        "anchor_every": info.anchor_every,
        "optimizer": None if info.optimizer is None else canonical_json(dict(info.optimizer)),
        "parent_run": info.parent_run,
        "parent_step": info.parent_step,
        "historical_replay": info.historical_replay,
        "torch_version": torch.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _described(row: dict[str, Any], adapter: Adapter | None) -> dict[str, Any]:
    if adapter is None:
        return row
    about = adapter.describe(row["parameter"])
    return {
        **row,
        "module": about.module,
        "layer": about.layer,
        "kind": about.kind,
        "is_bias": about.is_bias,
        "transformer_lens_name": about.transformer_lens_name,
    }


def model_parameters(model: nn.Module, group_of: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of table parameters for a live model; a tied tensor is one row, its other names in `tied_to`."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    return [
        parameter_row(position, of[0], tensors[key], of[1:], group_of.get(of[0]))
        for position, (key, of) in enumerate(names.items())
    ]


def parameter_row(
    position: int, name: str, tensor: Tensor, tied_to: Sequence[str] = (), group: int | None = None
) -> dict[str, Any]:
    """One row of table parameters, without what only an adapter knows."""
    return {
        "parameter": name,
        "position": position,
        "shape": list(tensor.shape),
        "numel": tensor.numel(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "tied_to": list(tied_to),
        "optimizer_group": group,
    }


def run_row(lake: Lake, run: str) -> dict[str, Any]:
    """The row of table runs; raises UnknownName when there is no such run."""
    lake.require_run(run)
    rows = lake.table("runs", run).collect().to_dicts()
    if not rows:
        raise RecordingError(f"run {run!r} was never fully registered: remove it or use another name")
    row: dict[str, Any] = rows[0]
    return row

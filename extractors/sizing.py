"""How large a lake will be, and how long making it takes, before anything is made.

Tensors are counted exactly: the layouts are those that the writer will choose, uncompressed. Rows are counted exactly where
they follow from the model, and take the bytes a row took in the demo's lake. Times are the bytes over a measured pace of
writing, and the arithmetic of forward and backward passes over a measured, or given, pace of computing.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..engine.adapters import load_adapter
from ..lake.codec import Layout, choose_layout, encode
from ..lake.errors import LakebedError
from .recorder import ANCHOR_EVERY
from .trace_block import block_rows
from .training import ADAPTER, load

# Bytes of a row in Parquet, as measured in the lake that `lakebed demo` makes.
_ROW_BYTES = {
    "parameter_updates": 110.0,
    "attention_patterns": 24.0,
    "head_writes": 15.0,
    "readouts": 17.0,
    "component_logits": 8.0,
    "attributions": 34.0,
}
# Of a matrix product of large sides, what a decoder's passes reach of the pace.
_EFFICIENCY = 0.4


class InvalidSize(LakebedError, ValueError):
    """Sizes of a model that there cannot be."""


@dataclass(frozen=True)
class ModelSize:
    """What counts of a decoder."""

    shapes: Mapping[str, tuple[int, ...]]
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int
    positions: int

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Load:
    """What is recorded and extracted."""

    steps: int
    """Recorded steps."""
    checkpoints: int
    """Steps at which a probe is asked."""
    records: int
    events: int
    pairs: int
    """Causal patch pairs of a scalar."""
    scalars: int
    """Scalars attributed at every recorded step of the window."""
    window: int
    """Recorded steps whose update is attributed."""
    anchor_every: int = ANCHOR_EVERY


@dataclass(frozen=True)
class Pace:
    """What this machine does."""

    flops: float
    """Floating-point operations a second, in large matrix products."""
    write: float
    """Bytes a second, encoded and written."""
    measured: bool = True


@dataclass(frozen=True)
class Part:
    """One line of a plan."""

    name: str
    about: str
    bytes: float
    objects: int
    chunk: str
    seconds: float


def size_of_config(name: str) -> ModelSize:
    """The model of a configuration by name or TOML file. Raises ConfigError."""
    config = load(name)
    shapes = load_adapter(ADAPTER, config.canonical_json()).parameter_shapes()
    model = config.model
    return ModelSize(shapes, model.n_layers, model.n_heads, model.d_model, model.d_ff, model.max_seq_len)


def size_of_decoder(
    n_layers: int, n_heads: int, d_model: int, d_ff: int, vocabulary: int, positions: int
) -> ModelSize:
    """A GPT-2-like decoder: learned positions, biases, two LayerNorms a layer, tied unembedding. Raises InvalidSize."""
    if min(n_layers, n_heads, d_model, d_ff, vocabulary, positions) < 1:
        raise InvalidSize("a decoder has at least one layer, head, dimension, neuron, token and position")
    if d_model % n_heads:
        raise InvalidSize(
            f"--d-model {d_model} is not a multiple of --heads {n_heads}: heads share it equally"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (vocabulary, d_model),
        "position_embedding.weight": (positions, d_model),
        "final_norm.weight": (d_model,),
        "final_norm.bias": (d_model,),
    }
    for layer in range(n_layers):
        block = f"blocks.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.{leaf}": (d_model,) for leaf in ("weight", "bias")}
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{block}.attn.{projection}.weight"] = (d_model, d_model)
            shapes[f"{block}.attn.{projection}.bias"] = (d_model,)
        shapes |= {f"{block}.ff.fc_in.weight": (d_ff, d_model), f"{block}.ff.fc_in.bias": (d_ff,)}
        shapes |= {f"{block}.ff.fc_out.weight": (d_model, d_ff), f"{block}.ff.fc_out.bias": (d_model,)}
    return ModelSize(shapes, n_layers, n_heads, d_model, d_ff, positions)


def plan(size: ModelSize, work: Load, pace: Pace) -> list[Part]:
    """The parts of a lake, what is recorded first."""
    return [*_recorded(size, work, pace), *_extracted(size, work, pace)]


def stepwise_checkpoints(size: ModelSize, work: Load) -> float:
    """Bytes of the other way: weights and both moments saved at every step."""
    return 12.0 * size.parameters * work.steps


def _recorded(size: ModelSize, work: Load, pace: Pace) -> list[Part]:
    rows = block_rows(work.anchor_every)
    blocks = math.ceil(work.steps / work.anchor_every)
    layouts = [choose_layout(shape, np.float32, rows) for shape in size.shapes.values()]
    gradient_bytes = 4.0 * size.parameters * work.steps
    anchors = 1 + blocks
    anchor_layouts = [choose_layout(shape, np.float32, 1) for shape in size.shapes.values()]
    anchor_bytes = 12.0 * size.parameters * anchors
    updates = len(size.shapes) * work.steps
    update_bytes = updates * _ROW_BYTES["parameter_updates"]
    return [
        Part(
            "gradients",
            f"{work.steps:,} recorded steps",
            gradient_bytes,
            sum(_chunks(layout, work.steps) for layout in layouts),
            _chunk_text(layouts),
            gradient_bytes / pace.write,
        ),
        Part(
            "anchors",
            f"weights and both moments, {anchors:,} times",
            anchor_bytes,
            3 * anchors * sum(_chunks(layout, 1) for layout in anchor_layouts),
            _chunk_text(anchor_layouts),
            anchor_bytes / pace.write,
        ),
        Part(
            "updates",
            f"{updates:,} rows of norms and terms",
            update_bytes,
            2 * blocks,
            "",
            update_bytes / pace.write,
        ),
    ]


def _extracted(size: ModelSize, work: Load, pace: Pace) -> list[Part]:
    tokens = work.records * size.positions
    forward = 2.0 * size.parameters * tokens
    stages = 2 * size.n_layers + 2
    # A record's roles cover about a third of its positions.
    kept = max(1, tokens // 3)
    activation = choose_layout((kept, size.d_model), np.float32, 1)
    activation_bytes = 4.0 * kept * size.d_model * stages * work.checkpoints
    heads = size.n_layers * size.n_heads
    attention = work.checkpoints * work.events * heads
    attention_bytes = attention * (_ROW_BYTES["attention_patterns"] + 8.0 * size.positions / 2)
    writes = attention * 5
    others = (
        work.checkpoints
        * work.events
        * (stages * _ROW_BYTES["readouts"] + (heads + 2 * size.n_layers + 2) * _ROW_BYTES["component_logits"])
        + writes * _ROW_BYTES["head_writes"]
    )
    width = size.d_model // size.n_heads
    svd_bytes = (
        4.0
        * work.checkpoints
        * (
            heads * (4 * width * size.d_model + 4 * (width * width + width * size.d_model))
            + 2 * size.n_layers * (size.d_model**2 + size.d_model * size.d_ff)
        )
    )
    svd_flops = work.checkpoints * size.n_layers * 2 * 14.0 * size.d_ff * size.d_model**2
    parts = len(size.shapes) + 4 * heads + size.n_layers * size.d_ff
    slices = work.window * work.scalars * parts
    passes = work.window * 6.0 * size.parameters * work.pairs * size.positions
    pace_of_passes = pace.flops * _EFFICIENCY

    def part(name: str, about: str, size: float, objects: int, chunk: str, flops: float) -> Part:
        # Writing runs beside computing: the longer of the two counts.
        return Part(name, about, size, objects, chunk, max(flops / pace_of_passes, size / pace.write))

    return [
        part(
            "svd",
            f"of every head and MLP, {work.checkpoints:,} checkpoints",
            svd_bytes,
            work.checkpoints * (12 * size.n_layers + 2),
            "",
            svd_flops,
        ),
        part(
            "activations",
            f"at roles, {stages} stages, {work.checkpoints:,} checkpoints",
            activation_bytes,
            work.checkpoints * stages * _chunks(activation, 1),
            _chunk_text([activation]),
            forward * work.checkpoints,
        ),
        part("attention", f"{attention:,} rows", attention_bytes, 2 * work.checkpoints, "", 0.0),
        part(
            "readouts, writes, components", f"{writes:,} rows and more", others, 6 * work.checkpoints, "", 0.0
        ),
        part(
            "attributions",
            f"{work.scalars} scalars over {work.window:,} steps, {slices:,} rows",
            slices * _ROW_BYTES["attributions"],
            2 * work.window * work.scalars,
            "",
            passes * 1.5,
        ),
    ]


def _chunks(layout: Layout, steps: int) -> int:
    cells = math.prod(
        math.ceil(max(1, size) / chunk)
        for size, chunk in zip(layout.row_shape, layout.chunk_cells, strict=True)
    )
    return math.ceil(steps / layout.chunk_rows) * cells


def _chunk_text(layouts: Sequence[Layout]) -> str:
    """The chunk of the largest array."""
    largest = max(layouts, key=lambda layout: math.prod(layout.row_shape))
    shape = (largest.chunk_rows, *largest.chunk_cells)
    size = math.prod(shape) * largest.dtype.itemsize
    return f"{' × '.join(map(str, shape))} ({size / 2**20:.1f} MiB)"


def measure_pace(folder: Path | None = None, flops: float | None = None, write: float | None = None) -> Pace:
    """Times a second of matrix products and of encoding and writing chunks, where a pace is not given."""
    measured = flops is None or write is None
    return Pace(flops or _measured_flops(), write or _measured_write(folder), measured)


def _measured_flops(side: int = 1024) -> float:
    a = torch.randn(side, side)
    a @ a
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        a @ a
        count += 1
    return 2.0 * side**3 * count / (time.perf_counter() - started)


def _measured_write(folder: Path | None) -> float:
    chunk = np.random.default_rng(0).normal(size=(8, 128, 1024)).astype(np.float32)
    written, started = 0, time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        while time.perf_counter() - started < 0.3:
            (Path(scratch) / f"{written}").write_bytes(encode(chunk))
            written += chunk.nbytes
    return written / (time.perf_counter() - started)

"""Tiny lakes for report tests: numpy SVDs of random-walk weights, and a trace of invented numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lakebed.lake import Lake, Unit
from lakebed.lake.datasets import SVD_MATRICES


def random_walk(steps, layers=2, heads=2, d_model=12, d_ff=20, seed=0, size=0.3):
    """Weights by name, Float64[step, layer, rows, d_model or d_ff], each step a random move from the one before."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (d_model, d_model),
        "k": (d_model, d_model),
        "v": (d_model, d_model),
        "o": (d_model, d_model),
    }
    shapes |= {"W_in": (d_ff, d_model), "W_out": (d_model, d_ff)}
    walk = {}
    for name, shape in shapes.items():
        moves = rng.normal(size=(len(steps), layers, *shape)) * size
        moves[0] /= size
        walk[name] = np.cumsum(moves, 0) / np.sqrt(shape[1])
    return walk


def matrices_of(walk, heads):
    """Matrix stacks as the definitions name them: (step, layer, head, rows, columns), no head axis for the MLP."""
    steps, layers, d_model, _ = walk["q"].shape
    rows = {name: walk[name].reshape(steps, layers, heads, d_model // heads, d_model) for name in "qkv"}
    columns = np.swapaxes(walk["o"].reshape(steps, layers, d_model, heads, d_model // heads), 2, 3)
    return {
        "W_QK": np.swapaxes(rows["q"], -1, -2) @ rows["k"],
        "W_OV": np.swapaxes(rows["v"], -1, -2) @ np.swapaxes(columns, -1, -2),
        "W_Q": rows["q"],
        "W_K": rows["k"],
        "W_V": rows["v"],
        "W_O": columns,
        "W_in": walk["W_in"],
        "W_out": walk["W_out"],
    }


def decompose(matrices, heads):
    """(sigma, left vectors in rows, right vectors in rows) by matrix; products cut at the head width."""
    found = {}
    for name in SVD_MATRICES:
        matrix = matrices[name]
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        keep = matrix.shape[-1] // heads if name in ("W_QK", "W_OV") else sigma.shape[-1]
        found[name] = (
            sigma[..., :keep],
            np.swapaxes(left, -1, -2)[..., :keep, :].astype(np.float32),
            right[..., :keep, :].astype(np.float32),
        )
    return found


def write_svd(lake, run, steps, decomposed, shapes):
    """One unit of dataset svd over all steps."""
    steps = [int(step) for step in steps]
    with lake.unit(Unit("svd", run, f"svd-{steps[0]}", tuple(steps), inputs={"made": "up"})) as writer:
        block = writer.tensor_rows("svd", steps, 1)
        for name, (sigma, left, right) in decomposed.items():
            grid = np.indices(sigma.shape)
            head = grid[2].ravel().tolist() if sigma.ndim == 4 else [None] * sigma.size
            writer.rows(
                "singular_values",
                {
                    "step": np.array(steps)[grid[0].ravel()],
                    "matrix": [name] * sigma.size,
                    "layer": grid[1].ravel(),
                    "head": head,
                    "matrix_rows": [shapes[name][0]] * sigma.size,
                    "matrix_columns": [shapes[name][1]] * sigma.size,
                    "rank": grid[-1].ravel() + 1,
                    "singular_value": sigma.ravel(),
                },
            )
            block.write(f"{name}.U", np.ascontiguousarray(left))
            block.write(f"{name}.Vh", np.ascontiguousarray(right))


def make_svd_lake(path, steps, run="ref", heads=2, change=None, **sizes):
    """A lake with one run's SVDs; returns (lake, steps, {matrix: (sigma, left, right)}). `change` edits them first."""
    matrices = matrices_of(random_walk(steps, heads=heads, **sizes), heads)
    decomposed = decompose(matrices, heads)
    if change:
        change(decomposed)
    lake = Lake.open_or_create(path)
    write_svd(lake, run, steps, decomposed, {name: matrix.shape[-2:] for name, matrix in matrices.items()})
    return SimpleNamespace(lake=lake, steps=list(steps), svd=decomposed, matrices=matrices, run=run)


@pytest.fixture
def svd(tmp_path: Path):
    """Five unevenly spaced steps, two layers, two heads."""
    made = make_svd_lake(tmp_path / "svd.lake", [250, 500, 750, 1500, 1750])
    yield made
    made.lake.close()

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


def trace_tables(
    steps, parameters=("embed", "blocks.0.w", "blocks.1.w", "head"), seed=3, examples=6, width=9
):
    """Rows of a trace whose tensors are drawn at random: the terms add up, the norms are those of the tensors."""
    rng = np.random.default_rng(seed)
    step_rows, batch_rows, update_rows = [], [], []
    for number, step in enumerate(steps):
        coefficient = float(np.float32(0.5 + 0.6 * rng.random()))
        coefficient = min(1.0, coefficient)
        raw_square = 0.0
        for place, name in enumerate(parameters):
            size = width + place
            raw, current, momentum, decay, residual, weight = rng.normal(size=(6, size))
            residual *= 1e-7
            update = 0.01 * (current + momentum) - 1e-4 * decay + residual
            raw_square += float(raw @ raw)
            norms = {
                "weight_l2_before": weight,
                "weight_l2": weight + update,
                "gradient_l2": raw,
                "clipped_gradient_l2": coefficient * raw,
                "delta_l2": update,
                "exp_avg_l2": momentum,
                "exp_avg_sq_l2": momentum**2,
                "current_gradient_l2": 0.01 * current,
                "momentum_l2": 0.01 * momentum,
                "weight_decay_l2": 1e-4 * decay,
                "residual_l2": residual,
                "raw_sgd_l2": 1e-3 * raw,
                "clipped_sgd_l2": 1e-3 * coefficient * raw,
            }
            update_rows.append(
                {name: float(np.linalg.norm(tensor)) for name, tensor in norms.items()}
                | {
                    "step": step,
                    "parameter": name,
                    "numel": size,
                    "has_gradient": True,
                    "optimizer_step": step,
                    "nonfinite_gradient_entries": 0,
                    "gradient_max_abs": float(abs(raw).max()),
                    "delta_max_abs": float(abs(update).max()),
                    "update_dot_negative_gradient": float(-update @ raw),
                    "update_dot_negative_clipped_gradient": float(-coefficient * (update @ raw)),
                    "update_gradient_cosine": float(
                        -update @ raw / np.linalg.norm(update) / np.linalg.norm(raw)
                    ),
                    "current_gradient_dot_update": float(0.01 * current @ update),
                    "momentum_dot_update": float(0.01 * momentum @ update),
                    "weight_decay_dot_update": float(-1e-4 * decay @ update),
                    "residual_dot_update": float(residual @ update),
                }
            )
        step_rows.append(
            {
                "step": step,
                "loss": 5.0 / (1 + number) + 0.01 * float(rng.normal()),
                "token_accuracy": 0.1,
                "learning_rate": 1e-3,
                "pre_clip_grad_norm": raw_square**0.5,
                "grad_clip_norm": 1.0,
                "clip_coefficient": coefficient,
                "batch_size": 2,
                "nonfinite_gradient_entries": 0,
                "seconds": 0.01,
            }
        )
        ids = rng.choice(examples, 2, replace=False)
        batch_rows.append({"step": step, "split": "train", "sample_ids": [f"train_{i:06d}" for i in ids]})
    return step_rows, batch_rows, update_rows


def make_trace_lake(path, steps, run="traced", change=None, **options):
    """A lake with one trace; returns its rows beside it. `change(step_rows, batch_rows, update_rows)` edits them."""
    step_rows, batch_rows, update_rows = trace_tables(steps, **options)
    examples = [
        {
            "split": "train",
            "sample_id": f"train_{i:06d}",
            "position": i,
            "tokens": ["W", "K00", "V001"],
            "query_keys": [f"K{i:02d}"] * (1 + i % 2),
            "answer_values": [f"V{i:03d}"] * (1 + i % 2),
        }
        for i in range(6)
    ]
    if change:
        change(step_rows, batch_rows, update_rows)
    names = list(dict.fromkeys(row["parameter"] for row in update_rows))
    lake = Lake.open_or_create(path)
    with lake.unit(Unit("run", run, "run")) as writer:
        writer.rows("runs", [{"source": "train", "historical_replay": "exact", "store": "exact"}])
        writer.rows("examples", examples)
        writer.rows(
            "parameters",
            [
                {
                    "parameter": name,
                    "position": i,
                    "numel": 9 + i,
                    "shape": [9 + i],
                    "module": None if name == "head" else f"module {i}",
                }
                for i, name in enumerate(names)
            ],
        )
    with lake.unit(Unit("trace", run, "trace", tuple(steps))) as writer:
        writer.rows("training_steps", step_rows)
        if batch_rows:
            writer.rows("training_batches", batch_rows)
        writer.rows("parameter_updates", update_rows)
    return SimpleNamespace(
        lake=lake,
        run=run,
        steps=list(steps),
        step_rows=step_rows,
        batch_rows=batch_rows,
        update_rows=update_rows,
    )


@pytest.fixture
def trace(tmp_path: Path):
    """Eight recorded steps of four parameters."""
    made = make_trace_lake(tmp_path / "trace.lake", range(1, 9))
    yield made
    made.lake.close()


def assert_same(row, wanted, rel=1e-9, near=1e-12):
    """Row and expectation agree: numbers to `rel`, everything else exactly."""
    for key, value in wanted.items():
        if isinstance(value, float):
            assert row[key] == pytest.approx(value, rel=rel, abs=near), key
        else:
            assert row[key] == value, key

"""Dataset svd: singular values and vectors of every head's and MLP's weight matrices (definitions 1 §H)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..engine.svd import align_signs, weight_matrix_svd
from ..lake import UnitWriter
from ..lake.datasets import SVD, SVD_MATRICES
from . import dataset
from .runs import RecordingError
from .states import State
from .threads import small_work


class SVDExtractor(dataset.Extractor):
    """Full spectra in float64; every vector, float32, in rows: Float[step, layer, head, rank, width].

    Head products have at most head-width ranks: their SVD is that of the thin factors' core. Left and right vectors of
    a rank share one sign, fixed so that the largest entry of the left one is positive.
    """

    name = SVD
    version = 1
    needs_moments = False

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes table singular_values and quantity svd for one step."""
        weights = context.adapter().head_weights(state.weights)
        rows: list[dict[str, Any]] = []
        side = max(size for weight in weights.values() for size in weight.shape)
        for matrix in SVD_MATRICES:
            try:
                with small_work(side):
                    found = weight_matrix_svd(matrix, weights)
            except ValueError as error:
                raise RecordingError(
                    f"svd of {matrix} at step {state.step} of run {context.run!r}: {error}"
                ) from error
            left, right = align_signs(found.U, found.Vh)
            rows.append(_values(state.step, matrix, found.S, left.shape[-2], right.shape[-1]))
            # Vectors stand in rows, so that one SQL row is one vector.
            context.write_tensor(
                writer, SVD, f"{matrix}.U", state.step, _float32(left.mT), _names(left, matrix, 0)
            )
            context.write_tensor(
                writer, SVD, f"{matrix}.Vh", state.step, _float32(right), _names(right, matrix, 1)
            )
        writer.rows(
            "singular_values", {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        )


def _values(step: int, matrix: str, values: torch.Tensor, height: int, width: int) -> dict[str, Any]:
    """Float64[layer, (head,) rank] as columns, a row per singular value."""
    shape = values.shape if values.ndim == 3 else (values.shape[0], 1, values.shape[1])
    layer, head, rank = (axis.reshape(-1) for axis in np.indices(shape))
    count = values.numel()
    heads = head.astype(object) if values.ndim == 3 else np.full(count, None, object)
    return {
        "step": np.full(count, step),
        "matrix": np.full(count, matrix, object),
        "layer": layer.astype(np.int32),
        "head": heads,
        "matrix_rows": np.full(count, height),
        "matrix_columns": np.full(count, width),
        "rank": (rank + 1).astype(np.int32),
        "singular_value": values.reshape(-1).numpy(),
    }


def _float32(vectors: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = vectors.to(torch.float32).contiguous().numpy()
    return array


def _names(vectors: torch.Tensor, matrix: str, side: int) -> list[str]:
    outer = ["layer", "head"][: vectors.ndim - 2]
    width = vectors.shape[-2] if side == 0 else vectors.shape[-1]
    return [*outer, f"rank_of_{min(vectors.shape[-2:])}", f"size_{width}"]


def build() -> dataset.Extractor:
    """The extractor, for the registry."""
    return SVDExtractor()

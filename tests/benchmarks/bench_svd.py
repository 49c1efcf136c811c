"""Thin-factor SVD of W_QK against the dense SVD of the d × d product it stands for, for one layer's heads.

Run it: ``python tests/benchmarks/bench_svd.py``. GPT-2 small's sizes; the ratio is what counts, not the seconds.
"""

from __future__ import annotations

import time

import torch
from lakebed.engine.svd import product_svd, qk_factors, split_heads


def run(d_model: int = 768, n_heads: int = 12, repeats: int = 3) -> dict[str, float | str]:
    """Time both ways on the same weights (best of ``repeats`` for the fast one; the dense one runs once)."""
    generator = torch.Generator().manual_seed(0)
    shape = (n_heads, d_model, d_model)
    query, key = (torch.randn(shape[1:], generator=generator, dtype=torch.float64) for _ in range(2))
    left, right = qk_factors(split_heads(query, n_heads), split_heads(key, n_heads))

    thin_seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        thin = product_svd(left, right)
        thin_seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    dense = torch.linalg.svd(left @ right, full_matrices=False)
    dense_seconds = time.perf_counter() - start

    rank = thin.S.shape[-1]
    error = ((thin.S - dense.S[..., :rank]).abs() / dense.S[..., :rank]).max()
    return {
        "what": f"SVD of W_QK, {n_heads} heads, d_model {d_model}, d_head {d_model // n_heads}, float64",
        "thin_seconds": min(thin_seconds),
        "dense_seconds": dense_seconds,
        "speedup": dense_seconds / min(thin_seconds),
        "largest_relative_error_of_a_singular_value": float(error),
    }


def main() -> None:
    for name, value in run().items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.6g')}")


if __name__ == "__main__":
    main()

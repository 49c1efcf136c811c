"""Reading and writing a lake's tensors, as ratios to what a user would do instead.

Run it: ``python tests/benchmarks/bench_tensors.py``. Three comparisons, medians of several repeats in one process:

* the norm per step of one 128 × 128 gradient over 1,000 steps: SQL over `gradients`, against NumPy over zarr-python;
* the history of that parameter over 1,000 steps: the lake, against 1,000 safetensors files of a 626k-parameter model,
  loaded as checkpoints are, and mapped to read the one tensor (from the page cache: the files were just written);
* writing gradient chunks: the lake's codec path, receipt included, against zarr-python.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from lakebed.lake import Lake, Unit
from lakebed.lake.axis import publish
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

STEPS = 1000
BLOCK = 64
SHAPE = (128, 128)
NAME = "blocks.0.attn.q_proj.weight"
MODEL_PARAMETERS = 626_000


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def write_lake(path: Path, gradients: np.ndarray[Any, Any]) -> Lake:
    """Float[step, rows, columns] as gradients of NAME, in units of BLOCK steps."""
    lake = Lake.create(path)
    for start in range(0, len(gradients), BLOCK):
        steps = range(start, min(start + BLOCK, len(gradients)))
        with lake.unit(Unit("trace", "bench", f"trace-{start:08d}", tuple(steps))) as writer:
            writer.tensor_rows("gradients", steps, BLOCK).write(NAME, gradients[start : start + BLOCK])
    publish(lake)
    return lake


def norms_by_sql(lake: Lake) -> np.ndarray[Any, Any]:
    """L2 norm per step, in SQL."""
    rows = lake.session.execute(
        "SELECT step, sqrt(sum(list_dot_product(values, values))) AS norm FROM gradients "
        f"WHERE parameter = '{NAME}' GROUP BY step ORDER BY step"
    ).fetchall()
    return np.array([norm for _, norm in rows])


def norms_by_zarr(path: Path) -> np.ndarray[Any, Any]:
    """The same in NumPy over zarr-python, a block at a time as a careful user would."""
    array = zarr.open_array(path / "tensors/bench/gradients" / NAME, mode="r")
    steps = zarr.open_array(path / "tensors/bench/gradients/step", mode="r")[:]
    parts = []
    for start in range(0, len(steps), BLOCK):
        block = np.asarray(array[start : start + BLOCK]).reshape(-1, SHAPE[0] * SHAPE[1])
        parts.append(np.sqrt(np.einsum("ij,ij->i", block, block)))
    return np.concatenate(parts)[np.argsort(np.where(steps < 0, np.iinfo(np.int64).max, steps))][
        : (steps >= 0).sum()
    ]


def history_by_lake(path: Path) -> np.ndarray[Any, Any]:
    """Float[step, rows, columns]: every step of one parameter."""
    with Lake.open(path) as lake:
        return lake.tensor("gradients", NAME, "bench").read()


def history_by_loading(folder: Path) -> np.ndarray[Any, Any]:
    """The same from one file per step, each loaded as a checkpoint is."""
    return np.stack([load_file(file)[NAME] for file in sorted(folder.iterdir())])


def history_by_mapping(folder: Path) -> np.ndarray[Any, Any]:
    """The same from files that are mapped: only the one tensor is read of each."""
    parts = []
    for file in sorted(folder.iterdir()):
        with safe_open(file, framework="np") as tensors:
            parts.append(tensors.get_tensor(NAME))
    return np.stack(parts)


def write_safetensors(folder: Path, gradients: np.ndarray[Any, Any]) -> None:
    """One file per step with the parameter among the rest of a small model."""
    rest = MODEL_PARAMETERS - gradients[0].size
    others = {f"other.{index}": np.zeros(rest // 30, np.float32) for index in range(30)}
    folder.mkdir()
    for step, gradient in enumerate(gradients):
        save_file({NAME: gradient, **others}, folder / f"{step:06d}.safetensors")


def write_zarr(path: Path, gradients: np.ndarray[Any, Any]) -> None:
    """The same chunks and codecs through zarr-python."""
    array = zarr.create_array(
        path,
        shape=gradients.shape,
        chunks=(BLOCK, *SHAPE),
        dtype="float32",
        compressors=[
            zarr.codecs.BloscCodec(typesize=4, cname="lz4", clevel=5, shuffle="bitshuffle"),
            zarr.codecs.Crc32cCodec(),
        ],
    )
    for start in range(0, len(gradients), BLOCK):
        array[start : start + BLOCK] = gradients[start : start + BLOCK]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(steps: int = STEPS, repeats: int = 5) -> dict[str, float | str]:
    """All three comparisons; Gaussian gradients, which compress as little as any."""
    gradients = np.random.default_rng(0).standard_normal((steps, *SHAPE)).astype(np.float32)
    megabytes = gradients.nbytes / 1e6
    folder = Path(tempfile.mkdtemp())
    try:
        lake = write_lake(folder / "bench.lake", gradients)
        truth = np.sqrt((gradients.astype(np.float64) ** 2).sum((1, 2)))
        np.testing.assert_allclose(norms_by_sql(lake), truth, rtol=1e-4)
        np.testing.assert_allclose(norms_by_zarr(folder / "bench.lake"), truth, rtol=1e-4)
        sql = median_seconds(lambda: norms_by_sql(lake), repeats)
        plain = median_seconds(lambda: norms_by_zarr(folder / "bench.lake"), repeats)
        lake.close()

        write_safetensors(folder / "files", gradients)
        np.testing.assert_array_equal(history_by_lake(folder / "bench.lake"), gradients)
        np.testing.assert_array_equal(history_by_mapping(folder / "files"), gradients)
        ours = median_seconds(lambda: history_by_lake(folder / "bench.lake"), repeats)
        mapped = median_seconds(lambda: history_by_mapping(folder / "files"), repeats)
        loaded = median_seconds(lambda: history_by_loading(folder / "files"), min(3, repeats))

        file_bytes, lake_bytes = (_bytes(folder / name) for name in ("files", "bench.lake"))
        counter = iter(range(1000))
        lake_write = median_seconds(
            lambda: write_lake(folder / f"write-{next(counter)}.lake", gradients).close(), repeats
        )
        zarr_write = median_seconds(
            lambda: write_zarr(folder / f"write-{next(counter)}.zarr", gradients), repeats
        )
    finally:
        shutil.rmtree(folder)
    return {
        "what": f"gradients of one {SHAPE[0]} x {SHAPE[1]} parameter over {steps} steps, float32",
        "sql_norm_megabytes_per_second": megabytes / sql,
        "zarr_numpy_norm_megabytes_per_second": megabytes / plain,
        "sql_speed_over_zarr_numpy": plain / sql,
        "history_from_the_lake_seconds": ours,
        "history_speedup_over_loading_safetensors": loaded / ours,
        "history_speedup_over_mapping_safetensors_in_page_cache": mapped / ours,
        "bytes_of_the_safetensors_over_bytes_of_the_lake": file_bytes / lake_bytes,
        "write_megabytes_per_second": megabytes / lake_write,
        "write_speed_over_zarr_python": zarr_write / lake_write,
    }


def main() -> None:
    for name, value in run().items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.4g')}")


if __name__ == "__main__":
    main()

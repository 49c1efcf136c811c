"""How long `weight-svd-patterns` takes as a process, over a lake of the guide's size: 14 steps, 3 layers, 4 heads, d 128.

Beside it, in the same run: starting Python with the imports every report needs, so that what remains is the report.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from lakebed.lake import Lake, Unit

STEPS = (250, 500, 750, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 5000, 5250, 5500)
LAYERS, HEADS, D_MODEL, D_FF = 3, 4, 128, 512
_IMPORTS = "import duckdb, pydantic, click; from lakebed.lake import Lake; import lakebed.lake.sources"
_QUERY = "import sys; sys.argv.insert(1, 'query'); from lakebed.cli import main; main()"


def build(path: Path, steps: tuple[int, ...] = STEPS) -> None:
    """A lake with the SVDs of random matrices of the sizes of the formation run."""
    rng = np.random.default_rng(0)
    width = D_MODEL // HEADS
    shapes = dict.fromkeys(("W_QK", "W_OV"), (D_MODEL, D_MODEL, width))
    shapes |= dict.fromkeys(("W_Q", "W_K", "W_V"), (width, D_MODEL, width))
    shapes |= {
        "W_O": (D_MODEL, width, width),
        "W_in": (D_FF, D_MODEL, D_MODEL),
        "W_out": (D_MODEL, D_FF, D_MODEL),
    }
    with Lake.create(path) as lake, lake.unit(Unit("svd", "ref", "svd", tuple(steps))) as writer:
        block = writer.tensor_rows("svd", steps, 1)
        for name, (rows, columns, ranks) in shapes.items():
            outer = (len(steps), LAYERS) if name in ("W_in", "W_out") else (len(steps), LAYERS, HEADS)
            sigma = np.sort(rng.random((*outer, ranks)), -1)[..., ::-1]
            grid = np.indices(sigma.shape)
            heads = [None] * sigma.size if len(outer) == 2 else grid[2].ravel()
            writer.rows(
                "singular_values",
                {
                    "step": np.array(steps)[grid[0].ravel()],
                    "matrix": [name] * sigma.size,
                    "layer": grid[1].ravel(),
                    "head": heads,
                    "matrix_rows": [rows] * sigma.size,
                    "matrix_columns": [columns] * sigma.size,
                    "rank": grid[-1].ravel() + 1,
                    "singular_value": sigma.ravel(),
                },
            )
            block.write(f"{name}.U", rng.normal(size=(*outer, ranks, rows)).astype(np.float32))
            block.write(f"{name}.Vh", rng.normal(size=(*outer, ranks, columns)).astype(np.float32))


def _seconds(program: str, *words: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True)
    return time.perf_counter() - started


def run(repeats: int = 5) -> dict[str, float]:
    """Medians of wall seconds: the process with rows and Markdown only, with SVG charts, and the bare imports."""
    measured: dict[str, list[float]] = {
        "imports": [],
        "rows_and_markdown": [],
        "with_svg_charts": [],
        "rank_16": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        lake, out = Path(folder) / "bench.lake", Path(folder) / "out"
        build(lake)
        words = (
            "weight-svd-patterns",
            "--lake",
            str(lake),
            "--out",
            str(out),
            "--overwrite",
            "--chart-format",
        )
        for _ in range(repeats):
            measured["imports"].append(_seconds(_IMPORTS))
            measured["rows_and_markdown"].append(_seconds(_QUERY, *words, "none"))
            measured["with_svg_charts"].append(_seconds(_QUERY, *words, "svg"))
            measured["rank_16"].append(_seconds(_QUERY, *words, "none", "--max-vector-rank", "16"))
    medians = {name: statistics.median(values) for name, values in measured.items()}
    return {**medians, "rows_over_imports": medians["rows_and_markdown"] / medians["imports"]}


def main() -> None:
    """Prints the measurements as JSON."""
    print(json.dumps({name: round(value, 3) for name, value in run().items()}, indent=2))


if __name__ == "__main__":
    main()

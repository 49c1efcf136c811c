"""A small lake, and the way tests write units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from lakebed.lake import Lake, Unit

Arrays = dict[str, np.ndarray[Any, Any]]
WriteUnit = Callable[..., Unit]


@pytest.fixture
def lake(tmp_path) -> Iterator[Lake]:
    with Lake.create(tmp_path / "small.lake") as made:
        yield made


@pytest.fixture
def write_unit() -> WriteUnit:
    """write_unit(lake, steps, arrays, run=…, name=…): one unit with a gradient array per name and a row per step."""

    def write(
        lake: Lake,
        steps: Sequence[int],
        arrays: Arrays,
        run: str = "ref",
        name: str | None = None,
        block_rows: int = 8,
        quantity: str = "gradients",
        inputs: dict[str, Any] | None = None,
        table: bool = True,
    ) -> Unit:
        unit = Unit("trace", run, name or f"trace-{steps[0]:08d}", tuple(steps), inputs=inputs or {})
        with lake.unit(unit) as writer:
            block = writer.tensor_rows(quantity, steps, block_rows)
            for label, array in arrays.items():
                block.write(label, array)
            if table:
                writer.rows("training_steps", [{"step": step, "loss": step / 3} for step in steps])
        return unit

    return write


@pytest.fixture
def filled(lake: Lake, write_unit: WriteUnit) -> Lake:
    """Runs `ref` and `other`, gradients of a.w (4 × 3), b (3) and c.w (2 × 3) at steps 0 … 31, in chunks of 8 steps."""
    rng = np.random.default_rng(0)
    for run in ("ref", "other"):
        for start in range(0, 32, 8):
            arrays = {
                name: rng.standard_normal((8, *shape)).astype(np.float32)
                for name, shape in {"a.w": (4, 3), "b": (3,), "c.w": (2, 3)}.items()
            }
            write_unit(lake, range(start, start + 8), arrays, run)
    return lake

"""Running the command line inside the test, and a lake for it to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from lakebed.cli import main
from lakebed.lake import Lake, Unit


class Answer(NamedTuple):
    """Exit status, standard output and standard error."""

    status: int
    out: str
    err: str


RunCli = Callable[..., Answer]


@pytest.fixture
def run_cli(capsys) -> RunCli:
    """run_cli("sql", "--lake", …) runs the command as its process would."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(int(done.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def lake_path(tmp_path_factory) -> str:
    """A lake with run `ref`: four training steps, two parameters, gradients of one, and two datasets with a rank each."""
    path = str(tmp_path_factory.mktemp("cli") / "small.lake")
    with Lake.create(path) as lake:
        with lake.unit(Unit("trace", "ref", "trace-1", (1, 2, 3, 4))) as writer:
            block = writer.tensor_rows("gradients", (1, 2, 3, 4), 4)
            block.write("w", np.arange(24, dtype=np.float32).reshape(4, 2, 3))
            writer.rows("training_steps", [{"step": step, "loss": 1 / (3 * step)} for step in (1, 2, 3, 4)])
            parameters = [("w", [2, 3], 6), ("b", [3], 3)]
            writer.rows(
                "parameters",
                [{"parameter": name, "shape": shape, "numel": numel} for name, shape, numel in parameters],
            )
            run = {"source": "train", "seed": 7, "store": "exact", "config": json.dumps({"layers": 2})}
            writer.rows("runs", [run])
        for rank in (1, 2):
            with lake.unit(Unit("probe", "ref", f"probe-{rank}", (2,), parameters={"rank": rank})):
                pass
    return path

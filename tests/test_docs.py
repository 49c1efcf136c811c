"""Every command of the README and the docs runs, every command line is documented, and every help has an example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from lakebed.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Run elsewhere: with only one library importable, against a local S3 server.
OWN_TEST = {"lake-format.md", "storage.md"}
NEEDS_S3 = {"storage.md"}
# Minutes of training, run by make demo and continuous integration.
TOO_LONG = re.compile(r"^(make |git |pip |lakebed demo)", re.MULTILINE)


def blocks(page: Path, languages: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```({languages})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a demo.lake of 64 recorded steps, its svd, a probe with its attention, some attributions, and checkpoints."""
    folder = tmp_path_factory.mktemp("docs")
    import torch
    from lakebed.engine.config import load_config
    from lakebed.engine.training import TrainingLoop

    torch.set_num_threads(1)
    run(folder, "lakebed train demo --lake demo.lake --run demo --num-steps 64 --threads 1")
    run(folder, "lakebed probe build --lake demo.lake --run demo")
    run(folder, "lakebed extract svd attention --lake demo.lake --run demo --steps 0:64:8 --threads 1")
    scalar = "qk_rank_separation,head=L1H1,rank=4,stage=layer_0_post_mlp"
    roles = "support_key_role=support_key,distractor_key_role=key_distractors"
    run(
        folder,
        f"lakebed extract attributions --scalar {scalar},{roles} --pair-type support_value --lake demo.lake --run demo "
        "--steps 20:24 --threads 1",
    )
    loop = TrainingLoop(load_config("demo"))
    (folder / "checkpoints").mkdir()
    for step in (1, 2):
        loop.train_step()
        state = {
            "step": step,
            "model_state": loop.model.state_dict(),
            "optimizer_state": loop.optimizer.state_dict(),
        }
        torch.save(state, folder / "checkpoints" / f"step_{step:06d}.pt")
    return folder


def run(folder: Path, script: str, program: tuple[str, ...] = ("bash", "-euo", "pipefail", "-c")) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(workplace, page):
    for language, script in blocks(page, "sh|python") if page.name not in NEEDS_S3 else ():
        if language == "sh" and not TOO_LONG.search(script):
            run(workplace, script)
        elif language == "python" and page.name not in OWN_TEST:
            run(workplace, script, (sys.executable, "-c"))
    if page.name in OWN_TEST:
        return
    for _, query in blocks(page, "sql"):
        shown = run(workplace, query, ("lakebed", "sql", "--lake", "demo.lake", "--format", "jsonl"))
        assert shown.strip(), f"no rows: {query}"


def test_the_page_on_storage_runs_against_a_local_server(s3, tmp_path):
    """Its endpoint and keys are those of a MinIO; here they are the local server's."""
    s3.make_bucket("lab")
    page = ROOT / "docs" / "storage.md"
    ((_, script),), ((_, program),) = blocks(page, "sh"), blocks(page, "python")
    lines = [line for line in script.splitlines() if not line.startswith("export AWS_")]
    shown = run(tmp_path, "\n".join(lines))
    assert '"ok": true' in shown
    shown = run(tmp_path, program, (sys.executable, "-c"))
    assert shown.endswith("(64, 64)\n")
    assert len(lines) < len(script.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_documented_and_its_help_has_an_example(name):
    shown = CliRunner().invoke(cli, [name, "--help"])
    assert shown.exit_code == 0, shown.output
    assert "lakebed" in shown.output.split("Options:")[-1] or "Example" in shown.output, shown.output
    assert any(f"lakebed {name}" in page.read_text(encoding="utf-8") for page in PAGES), (
        f"lakebed {name} is in no page"
    )


def test_the_group_lists_every_command():
    shown = CliRunner().invoke(cli, ["--help"]).output
    for name, about in COMMANDS.items():
        assert f"  {name} " in shown
        assert about.split(":")[0].split(",")[0] in " ".join(shown.split())

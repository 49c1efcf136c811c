"""The house stands: imports follow the arrows, files stay short, and the wheel holds every room."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cli", "engine", "extractors", "lake", "queries")
# Which rooms a room may look into, besides itself and the root, where LakebedError and __version__ live.
ARROWS = {
    "cli": {"queries", "extractors", "lake"},
    "queries": {"lake"},
    "extractors": {"engine", "lake"},
    "lake": set(),
    "engine": set(),
}


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_rooms(source: str, package: tuple[str, ...]) -> set[str]:
    """Rooms that `source` imports, wherever in the file; `package` is its own, as ("lakebed", "lake", …)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = (*base, *(node.module.split(".") if node.module else ()))
            targets = [(*whole, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and str(name.value).startswith("lakebed."):
                targets = [tuple(str(name.value).split("."))]
        for target in targets:
            if len(target) > 1 and target[0] == "lakebed" and target[1] in PACKAGES:
                found.add(target[1])
    return found


def strays(sources: dict[Path, str]) -> list[str]:
    """Imports against the arrows, as `file -> room`."""
    found = []
    for path, source in sources.items():
        inside = path.relative_to(ROOT).parts
        rooms = imported_rooms(source, ("lakebed", *inside[:-1])) - {inside[0]} - ARROWS[inside[0]]
        found += [f"{'/'.join(inside)} -> {room}" for room in sorted(rooms)]
    return found


def test_imports_follow_the_arrows() -> None:
    assert strays({path: path.read_text() for path in modules()}) == []


@pytest.mark.parametrize(
    ("place", "source", "room"),
    [
        ("queries/x.py", "from ..engine.svd import product_svd", "engine"),
        ("queries/x.py", "from .. import extractors", "extractors"),
        ("lake/x.py", "import lakebed.engine", "engine"),
        ("engine/adapters/x.py", "def f():\n    from ...lake import Lake", "lake"),
        ("engine/adapters/x.py", "if 1:\n    from ... import lake", "lake"),
        ("cli/x.py", "from lakebed.engine import svd", "engine"),
        ("queries/x.py", "import importlib\nimportlib.import_module('lakebed.extractors.svd')", "extractors"),
    ],
)
def test_a_stray_import_is_seen(place: str, source: str, room: str) -> None:
    assert strays({ROOT / place: source}) == [f"{place} -> {room}"]


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("queries/x.py", "from ..lake import Lake\nfrom .. import LakebedError\nfrom .report import Report"),
        ("engine/adapters/x.py", "from .. import decoder\nfrom ... import LakebedError"),
        ("cli/x.py", "from ..lake.engine_room import x"),
    ],
)
def test_a_proper_import_is_no_stray(place: str, source: str) -> None:
    assert strays({ROOT / place: source}) == []


def test_files_stay_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules()}
    assert [f"{name}: {length} lines" for name, length in lengths.items() if length >= 400] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names inside a wheel built from a copy of what git would carry."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_the_wheel_holds_every_module_and_every_data_file(wheel: set[str]) -> None:
    kinds = (".py", ".sql", ".toml")
    expected = {
        f"lakebed/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    }
    assert expected - wheel == set()
    assert "lakebed/__init__.py" in wheel


def test_the_wheel_puts_nothing_beside_its_own_name(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert all(top == "lakebed" or top.endswith(".dist-info") for top in tops)
    assert not [name for name in wheel if name.startswith("lakebed/tests/")]

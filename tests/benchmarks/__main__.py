"""`python -m tests.benchmarks [NAME…]`: every measured comparison, as ratios within one run."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(names: list[str]) -> None:
    """Runs bench_*.py of this folder and prints what each measured, then one JSON line."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    chosen = [name for name in found if not names or name.removeprefix("bench_") in names]
    if not chosen:
        raise SystemExit(
            f"no such benchmark; there are {', '.join(name.removeprefix('bench_') for name in found)}"
        )
    measured: dict[str, dict[str, float | str]] = {}
    console = Console()
    for name in chosen:
        started = time.perf_counter()
        measured[name] = importlib.import_module(f"tests.benchmarks.{name}").run()
        table = Table(
            "what", "value", title=f"{name} ({time.perf_counter() - started:.0f} s)", title_justify="left"
        )
        table.columns[1].justify = "right"
        for what, value in measured[name].items():
            table.add_row(what, value if isinstance(value, str) else f"{value:,.4g}")
        console.print(table)
    print(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1:])

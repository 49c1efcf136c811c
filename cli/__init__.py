"""The `lakebed` command."""


def main() -> None:
    """Entry point of the console script."""
    raise SystemExit("not built yet")

"""The command line: thin; it parses, calls and prints."""

from .main import cli, main

__all__ = ["cli", "main"]

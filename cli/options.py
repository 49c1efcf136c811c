"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def lake_option(function: Function) -> Function:
    """`--lake PATH_OR_URI`, or LAKEBED_LAKE."""
    return click.option(
        "--lake",
        "lake_uri",
        required=True,
        envvar="LAKEBED_LAKE",
        show_envvar=True,
        metavar="PATH|URI",
        help="The lake: a folder, or a URI such as s3://bucket/my.lake.",
    )(function)


def run_option(function: Function) -> Function:
    """`--run NAME`."""
    return click.option("--run", required=True, metavar="NAME", help="Name of the run.")(function)


def steps_option(function: Function) -> Function:
    """`--steps`, in the grammar of lake/steps.py."""
    return click.option(
        "--steps",
        metavar="STEPS",
        help="Steps: 500, 250:5500 (those there are), 250:5500:250 (exactly those), first, last, all; joined by commas.",
    )(function)

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


def threads_option(function: Function) -> Function:
    """`--threads`."""
    return click.option(
        "--threads", type=click.IntRange(1), help="Threads torch may use [default: one per core, at most 8]."
    )(function)


def recording_options(function: Function) -> Function:
    """What `train` and `trace` share."""
    for option in (
        threads_option,
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps."),
        click.option(
            "--anchor-every",
            type=click.IntRange(1, 4096),
            default=64,
            show_default=True,
            help="Steps between stored weights and moments; the rest is replayed, bit for bit.",
        ),
        click.option(
            "--store",
            type=click.Choice(["exact", "full"]),
            default="exact",
            show_default=True,
            help="exact: gradients and anchors; full: weights and moments at every step too.",
        ),
    ):
        function = option(function)
    return function

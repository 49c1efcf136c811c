"""Which steps: the one grammar that every `--steps` option takes, and how steps are written back to a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from .errors import LakebedError


class StepSyntax(LakebedError):
    """A `--steps` value that is not in the grammar."""


def select_steps(text: str | None, available: Sequence[int]) -> list[int]:
    """The steps that `text` names, ascending; not all of them need be in `available`.

    Grammar: comma-separated parts of `N` (that step), `A:B` (every available step from A to B), `A:B:S` (A, A+S, … up
    to B, available or not), `first`, `last`, `all`. None means all.

    >>> select_steps("250:750:250,last", [250, 500, 900])
    [250, 500, 750, 900]
    >>> select_steps("300:1000", [250, 500, 900])
    [500, 900]
    """
    found: set[int] = set()
    for part in (text or "all").split(","):
        found.update(_part(part.strip(), sorted(available)))
    return sorted(found)


def _part(part: str, available: Sequence[int]) -> Iterable[int]:
    if part == "all":
        return available
    if part in ("first", "last"):
        return available[:1] if part == "first" else available[-1:]
    try:
        numbers = [int(number) if number else None for number in part.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] is not None and numbers[0] >= 0:
        return [numbers[0]]
    if len(numbers) == 2:
        low, high = numbers
        return [step for step in available if (low is None or step >= low) and (high is None or step <= high)]
    if len(numbers) == 3 and None not in numbers:
        low, high, stride = numbers
        assert low is not None
        assert high is not None
        assert stride is not None
        if 0 <= low <= high and stride > 0:
            return range(low, high + 1, stride)
    raise StepSyntax(
        f"cannot read steps {part!r}: write 500, 250:5500, 250:5500:250, first, last or all, joined by commas"
    )


def summarize_steps(steps: Iterable[int]) -> str:
    """Steps as a person writes them, in the grammar of `select_steps` while that stays short.

    >>> summarize_steps([250, 500, 750, 1000, 1003])
    '250:1000:250, 1003'
    """
    values = sorted({int(step) for step in steps})
    parts: list[str] = []
    index = 0
    while index < len(values):
        stop = index + 1
        stride = values[stop] - values[index] if stop < len(values) else 0
        while stop + 1 < len(values) and values[stop + 1] - values[stop] == stride:
            stop += 1
        if stop - index >= 2:
            suffix = f":{stride}" if stride != 1 else ""
            parts.append(f"{values[index]}:{values[stop]}{suffix}")
            index = stop + 1
        else:
            parts.append(str(values[index]))
            index += 1
    if not parts:
        return "none"
    return (
        ", ".join(parts) if len(parts) <= 6 else f"{', '.join(parts[:5])} … {parts[-1]} ({len(values)} steps)"
    )


def step_option(steps: Iterable[int]) -> str:
    """Steps as a `--steps` value that selects exactly them, for commands we tell a user to run."""
    values = sorted({int(step) for step in steps})
    strides = {b - a for a, b in pairwise(values)}
    if len(values) > 2 and len(strides) == 1:
        return f"{values[0]}:{values[-1]}:{strides.pop()}"
    return ",".join(map(str, values))

"""The grammar of --steps."""

from __future__ import annotations

import doctest

import lakebed.lake.steps as steps_module
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lakebed.lake.steps import StepSyntax, select_steps, step_option, summarize_steps

THERE = [0, 250, 500, 900]


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(steps_module)
    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, THERE),
        ("all", THERE),
        ("first", [0]),
        ("last", [900]),
        ("first,last", [0, 900]),
        ("7", [7]),
        ("250:", [250, 500, 900]),
        (":250", [0, 250]),
        (":", THERE),
        ("1:499", [250]),
        ("600:800", []),
        ("0:1000:500", [0, 500, 1000]),
        (" 500 , 500,0 ", [0, 500]),
    ],
)
def test_grammar(text, expected) -> None:
    assert select_steps(text, THERE) == expected


@pytest.mark.parametrize(
    "text", ["x", "", "1:2:3:4", "1:9:0", "9:1:2", "1.5", "-3", "1;2", ":9:3", "1,,2", "first:last"]
)
def test_what_is_not_in_it_is_refused_with_the_grammar(text) -> None:
    if text == "":
        assert select_steps(text, THERE) == THERE
        return
    with pytest.raises(StepSyntax, match="write 500, 250:5500, 250:5500:250, first, last or all"):
        select_steps(text, THERE)


def test_nothing_there() -> None:
    assert select_steps("first,last,all,1:9", []) == []
    assert summarize_steps([]) == "none"


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=40))
def test_an_option_selects_exactly_its_steps(steps) -> None:
    assert select_steps(step_option(steps), []) == sorted(steps)


@given(st.sets(st.integers(0, 300), max_size=40))
def test_a_summary_that_is_whole_selects_its_steps(steps) -> None:
    text = summarize_steps(steps)
    if steps and "…" not in text:
        assert select_steps(text, sorted(steps)) == sorted(steps)
    assert len(text) < 200

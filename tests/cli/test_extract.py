"""`lakebed extract --for`, given once or several times."""

from __future__ import annotations

import re

import click
import pytest
from lakebed.cli.extract import report_needs
from lakebed.cli.query import report_options
from lakebed.queries.registry import load_report, report_names

HEAD = ["--head-layer", "1", "--head=1", "--context-stage", "layer_0_post_mlp"]
SEPARABILITY = ["--projection-rank", "4", "--include-full-residual", "--group-by", "query_key"]
BILINEAR = ["--rank", "4", "--support-role", "support_key", "--distractor-role", "key_distractors"]


def test_several_reports_need_what_each_needs_with_the_options_it_has():
    first, second = "contextual-key-separability", "bilinear-qk-match-separation"
    together = report_needs([first, second], "demo", "0:10", [*SEPARABILITY, *HEAD, *BILINEAR])
    # --group-by is an option of both.
    alone = report_needs([first], "demo", "0:10", [*HEAD, *SEPARABILITY])
    alone += report_needs([second], "demo", "0:10", [*HEAD, *BILINEAR, "--group-by", "query_key"])
    assert together == alone
    assert {need.dataset for need in together} > {"activations"}


def test_a_report_that_is_named_twice_is_asked_once():
    assert report_needs(["weight-svd-trace"] * 2, "demo", None, []) == report_needs(
        ["weight-svd-trace"], "demo", None, []
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rnak", "4"], r"No such option '--rnak'.*--rank"),
        (["attention"], r"with --for no dataset is named, and 'attention' follows no option"),
        (
            ["--rank", "4", "--support-role", "support_key"],
            r"bilinear-qk-match-separation: --distractor-role is required",
        ),
        (["--rank"], r"'--rank' requires an argument"),
    ],
)
def test_what_no_report_takes_or_one_lacks_is_said(run_cli, words, message):
    both = ["--for", "weight-svd-trace", "--for", "bilinear-qk-match-separation"]
    answer = run_cli("extract", *both, "--lake", "no.lake", "--run", "demo", *HEAD, *words)
    assert answer.status == (1 if "is required" in message else 2)
    assert re.search(message, " ".join(answer.err.split()))


def test_an_option_is_a_switch_in_every_report_or_in_none():
    kinds: dict[str, set[bool]] = {}
    for name in report_names():
        for option in report_options(load_report(name)):
            for flag in (*option.opts, *option.secondary_opts):
                kinds.setdefault(flag, set()).add(isinstance(option, click.Option) and option.is_flag)
    assert [flag for flag, found in kinds.items() if len(found) > 1] == []
    assert {True} in kinds.values()

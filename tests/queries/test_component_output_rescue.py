"""Every row against the stepwise procedure in float64; statistics in plain Python; what is refused, and why."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.component_options import (
    NotAblatable,
    NotDownstream,
    OverlappingComponents,
    UnknownComponent,
)
from lakebed.queries.component_output_rescue import EmptyGroup, NothingPutBack
from lakebed.queries.pair_selection import TooFewPairs
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.rescue import IncompleteRuns
from lakebed.queries.results import Results
from lakebed.queries.run import run_report
from lakebed.queries.scalar_pairs import ScalarMismatch

from tests.stepwise_rescue import World, statistics

from . import rescue_lake
from .conftest import assert_same
from .float64_decoder import load_weights
from .rescue_lake import make_lake
from .route_reference import load_pairs

RUN, STEPS = "r", (50, 100, 150)
SCALARS = (
    "moving_answer_margin",
    "fixed_source_competitor_margin",
    "correct_value_logit",
    "negative_answer_loss",
)
GROUPS = ("L1H1", "L1MLP", "L1H3,L1H1", "L1MLP,L1H2,L1H3")
OPTIONS = {
    "run": RUN,
    "steps": ",".join(map(str, STEPS)),
    "scalar": SCALARS,
    "margin_side": ("clean", "corrupted"),
    "source_component": ("L0H2", "L0MLP"),
    "patch_component": ("L1H1", "L1MLP"),
    "patch_group": GROUPS[2:],
    "pair_type": ("query_key", "support_value"),
    "max_pairs_per_type": 2,
}
# float32 passes in the lake, float64 here.
CLOSE = {"rel": 2e-3, "near": 3e-5}
ROW_SETS = ("rescue_rows", "summary_rows", "pair_rows")


def report(**options):
    given = {**OPTIONS, **options}
    return load_report("component-output-rescue").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def written(lake, asked, out, charts=()):
    printed = run_report(lake, asked, out, chart_formats=charts, overwrite=True)
    rows = {
        name: [json.loads(line) for line in Path(printed[name]).read_text().splitlines()] for name in ROW_SETS
    }
    return (
        rows,
        json.loads(Path(printed["report"]).read_text()),
        Path(printed["markdown"]).read_text(),
        printed,
    )


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    import shutil

    path = tmp_path_factory.mktemp("rescue") / "rescue.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as opened:
        extract(opened, RUN, report().needs(), OPTIONS["steps"])
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    pairs = load_pairs(lake, RUN, "probe", OPTIONS["pair_type"], OPTIONS["max_pairs_per_type"])
    return World(lake, RUN, STEPS, 4, pairs, load_weights)


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, report(), tmp_path_factory.mktemp("out") / "out", charts=("svg",))


def restorations():
    for source in OPTIONS["source_component"]:
        for group in GROUPS:
            labels = group.split(",")
            yield source, "+".join(labels), lambda d, t, _, s=source, g=labels: d.restored_writes(t, s, g)


def stages_of(label):
    return sorted(
        {f"layer_{of[1]}_post_{'mlp' if of.endswith('MLP') else 'attn'}" for of in label.split("+")}
    )


def test_rescue_rows_are_the_stepwise_procedure(found, world):
    rows = found[0]["rescue_rows"]
    wanted = list(world.rows(OPTIONS["margin_side"], SCALARS, list(restorations())))
    assert len(rows) == len(wanted) == 2 * 2 * 2 * 4 * len(SCALARS) * 2 * len(GROUPS)
    for row, (key, clean, ablated, patched) in zip(rows, wanted, strict=True):
        assert_same(
            row,
            {
                "source_step": key.source_step,
                "target_step": key.target_step,
                "endpoint_kind": key.kind,
                "pair_id": key.pair.pair_id,
                "pair_type": key.pair.pair_type,
                "margin_side": key.side,
                "scalar_name": key.scalar,
                "source_component": key.source,
                "patch_component": key.label,
                "patch_group_id": key.label,
                "patch_components": key.label.split("+"),
                "patch_stage": "+".join(stages_of(key.label)),
                "patch_stages": stages_of(key.label),
                "clean_scalar": float(clean),
                "source_ablated_scalar": float(ablated),
                "patched_scalar": float(patched),
                "total_drop": float(clean - ablated),
                "rescue": float(patched - ablated),
                "unrecovered": float(clean - patched),
            },
            **CLOSE,
        )
        # Of the row's own numbers, to the last digit.
        assert row["total_drop"] == row["clean_scalar"] - row["source_ablated_scalar"]
        assert row["rescue"] == row["patched_scalar"] - row["source_ablated_scalar"]
        assert row["unrecovered"] == row["clean_scalar"] - row["patched_scalar"]
        assert row["rescue_fraction"] == pytest.approx(row["rescue"] / row["total_drop"])
        assert row["improved_by_patch"] == (abs(row["unrecovered"]) < abs(row["total_drop"]))
    assert max(abs(row["rescue"]) for row in rows) > 0.05


def test_summary_rows_are_statistics_of_the_rows(found):
    rows, content, _, _ = found
    keys = ("scalar_name", "endpoint_kind", "source_component", "patch_component", "patch_stage")
    groups = {}
    for row in rows["rescue_rows"]:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary = rows["summary_rows"]
    assert len(summary) == len(groups) == len(SCALARS) * 2 * 2 * len(GROUPS)
    for row in summary:
        assert_same(row, statistics(groups[tuple(row[key] for key in keys)]), rel=1e-9, near=1e-9)
    assert content["summary_rows"] == summary


def test_the_same_components_in_another_order_are_patched_alike(lake, tmp_path):
    groups = ("L1H3,L1H1,L1MLP", "L1MLP,L1H1,L1H3", "L1H3,L1H1,L1MLP,L1H3")
    asked = report(patch_component=(), patch_group=groups)
    assert [patch.label for patch in asked.patches[:2]] == ["L1H3+L1H1+L1MLP", "L1MLP+L1H1+L1H3"]
    assert len(asked.patches) == 4
    assert len(asked.interventions()) == 4
    extract(lake, RUN, asked.needs(), OPTIONS["steps"])
    rows, _, _, _ = written(lake, asked, tmp_path / "out")
    by_group = {}
    for row in rows["rescue_rows"]:
        by_group.setdefault(row["patch_group_id"], []).append(row["patched_scalar"])
    assert by_group["L1H3+L1H1+L1MLP"] == by_group["L1MLP+L1H1+L1H3"]


def test_everything_downstream_put_back_leaves_the_direct_path_missing(lake, world, tmp_path):
    """Definitions 4 §K.5, in the scalars: the final LayerNorm and U of the clean last stage less the source's write."""
    every = ",".join(f"L1H{head}" for head in range(4)) + ",L1MLP"
    asked = report(
        source_component=("L0MLP",), patch_component=(), patch_group=(every,), margin_side=("clean",)
    )
    extract(lake, RUN, asked.needs(), OPTIONS["steps"])
    rows, _, _, _ = written(lake, asked, tmp_path / "out")

    def make(decoder, tokens, _):
        clean = decoder.stages(tokens)
        last = clean["layer_1_post_mlp"] - decoder.write("L0MLP", clean)
        return {"logits": decoder.final(last) @ decoder.U.T}

    wanted = world.rows(("clean",), SCALARS, [("L0MLP", "direct", make)])
    for row, (_, _, _, patched) in zip(rows["rescue_rows"], wanted, strict=True):
        assert row["patched_scalar"] == pytest.approx(float(patched), rel=2e-3, abs=3e-5)


def test_the_files_and_keys_are_the_contract(found):
    rows, content, markdown, printed = found
    assert {name: Path(printed[name]).name for name in ROW_SETS} == {
        "rescue_rows": "component_output_rescue_rows.jsonl",
        "summary_rows": "component_output_rescue_summary_rows.jsonl",
        "pair_rows": "component_output_rescue_pairs.jsonl",
    }
    assert Path(printed["report"]).name == "component_output_rescue_report.json"
    assert set(printed["plots"]) == {"rescue_fraction", "rescue_trajectory"}
    assert [row["pair_id"] for row in rows["pair_rows"]] == list(
        dict.fromkeys(row["pair_id"] for row in rows["rescue_rows"])
    )
    assert content["scalar_names"] == list(SCALARS)
    assert set(map(int, content["checkpoint_paths_by_step"])) == set(STEPS)
    assert content["pair_construction"]["constructed_counts"] == {"query_key": 2, "support_value": 2}
    assert "rescue" in content["calculation"]
    assert markdown.index("taking L0H2 away") < markdown.index("## ")


def made_up(**options):
    given = {
        "run": rescue_lake.RUN, "pair_type": ("support_value",), "scalar": ("correct_value_logit",),
        "source_component": ("L0H0",), "patch_component": ("L1MLP",),
    }  # fmt: skip
    return load_report("component-output-rescue").parse({**given, **options})


GONE, PATCHED = "without L0H0", "without L0H0, clean L1MLP"


def test_fractions_from_means_and_per_row(tmp_path):
    """Definitions 4 §K.6: drops 2 and 8, rescues 1 and 2."""
    logits = {"clean": [10.0, 10.0], GONE: [8.0, 2.0], PATCHED: [9.0, 4.0]}
    with make_lake(tmp_path / "m.lake", made_up(), logits) as lake:
        rows, _, markdown, _ = written(lake, made_up(), tmp_path / "out")
    for row in rows["summary_rows"]:
        assert row["mean_rescue_fraction_from_means"] == pytest.approx(0.3)
        assert row["mean_recovery_fraction_per_row"] == pytest.approx(0.375)
        assert row["improved_fraction"] == 1
    assert (
        "At step 20 taking L0H0 away lowers `correct_value_logit` by **5** (10 → 5, mean of 2 records)"
        in markdown
    )
    assert "the clean write of **L1MLP** gives back most of that, **30 %**" in markdown


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-40, 40).map(lambda n: n / 4)] * 3), min_size=1, max_size=5))
def test_statistics_of_any_numbers(tmp_path_factory, values):
    clean, gone, patched = (list(of) for of in zip(*values, strict=True))
    logits = {"clean": clean, GONE: gone, PATCHED: patched}
    path = tmp_path_factory.mktemp("any") / "m.lake"
    with make_lake(path, made_up(), logits) as lake, Results(lake, made_up()) as results:
        rows = [
            {
                "clean_scalar": c, "source_ablated_scalar": a, "patched_scalar": p,
                "total_drop": c - a, "rescue": p - a, "unrecovered": c - p,
            }
            for c, a, p in values
        ]  # fmt: skip
        for row in results.rows("FROM summary_rows"):
            assert_same(row, statistics(rows), rel=1e-9, near=1e-9)
        for row, (c, a, p) in zip(
            results.rows("FROM rescue_rows WHERE endpoint_kind = 'target'"), values, strict=True
        ):
            fraction = None if c == a else (p - a) / (c - a)
            assert row["rescue_fraction"] == (None if fraction is None else pytest.approx(fraction))


def test_a_drop_of_nothing_has_no_fraction_and_is_said_to_mean_nothing(tmp_path):
    logits = {"clean": [10.0, 10.0], GONE: [10.25, 9.75], PATCHED: [9.0, 4.0]}
    with make_lake(tmp_path / "m.lake", made_up(), logits) as lake:
        rows, _, markdown, printed = written(lake, made_up(), tmp_path / "out", charts=("svg",))
    assert {row["mean_rescue_fraction_from_means"] for row in rows["summary_rows"]} == {None}
    assert {row["has_something_to_rescue"] for row in rows["summary_rows"]} == {False}
    assert "so there is nothing to rescue and the fractions mean nothing there" in markdown
    assert "gives back most" not in markdown
    assert "rescue_fraction" not in printed["plots"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_component": None}, InvalidOption, "--source-component is required"),
        ({"source_component": ("embedding",)}, NotAblatable, "--source-component: embedding cannot be zeroed"),
        ({"patch_component": ("embedding",)}, NotAblatable, "--patch-component: embedding cannot be zeroed"),
        ({"patch_group": ("L1H0,embedding",)}, NotAblatable, "--patch-group: embedding cannot be zeroed"),
        ({"source_component": ("head 1",)}, UnknownComponent, "cannot read component 'head 1': write a head as L0H1"),
        ({"patch_component": ("L1N4",)}, UnknownComponent, "cannot read component 'L1N4'"),
        ({"patch_component": (), "patch_group": ()}, NothingPutBack, "name what is put back: --patch-component L0MLP"),
        ({"patch_group": ("",)}, EmptyGroup, "--patch-group '' is empty: write heads and MLPs with commas"),
        ({"patch_group": ("L1H0,,L1MLP",)}, EmptyGroup, "--patch-group 'L1H0,,L1MLP' has an empty label"),
        ({"patch_component": ("L0H2",)}, OverlappingComponents, "L0H2 stands among the sources"),
        ({"source_component": ("L0H2", "L1H0"), "patch_component": (), "patch_group": ("L1MLP,L1H0",)}, OverlappingComponents, "L1H0 stands among the sources"),
        ({"patch_component": ("L0H1",)}, NotDownstream, "L0H1 cannot lie between source L0H2 and the answer; after L0H2 come L0MLP, and the heads and MLPs of layers 1 and up"),
        ({"source_component": ("L0H2", "L1H0")}, NotDownstream, "L1H1, L1H3, L1H2 cannot lie between source L1H0 and the answer; after L1H0 come L1MLP"),
        ({"pair_type": None}, InvalidOption, "--pair-type is required"),
        ({"scalar": ("loss",)}, InvalidOption, "--scalar should be 'moving_answer_margin'"),
        ({"margin_side": ("both",)}, InvalidOption, "--margin-side should be 'clean' or 'corrupted'"),
        ({"endpoint_role": ("middle",)}, InvalidOption, "--endpoint-role should be 'source' or 'target'"),
        ({"denominator_threshold": -1.0}, InvalidOption, "--denominator-threshold should be greater than or equal to 0"),
        ({"scalar_value_tolerance": -1.0}, InvalidOption, "--scalar-value-tolerance should be greater than or equal to 0"),
        ({"markdown_top_k_rows": 0}, InvalidOption, "--markdown-top-k-rows should be greater than 0"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        report(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_component": ("L0H7",)}, UnknownComponent, "no component L0H7; run 'r' has embedding, and in each of layers 0–1 heads 0–3"),
        ({"patch_component": ("L5MLP",)}, UnknownComponent, "no component L5MLP"),
        ({"patch_group": ("L1H1,L2H0",)}, UnknownComponent, "no component L2H0"),
        ({"patch_group": ("L1H1,L1MLP",)}, MissingData, "needs interventions .* Run: lakebed extract --for component-output-rescue .*--patch-group L1H1,L1MLP"),
        ({"steps": "50"}, ReportFailed, "a change lies between two steps"),
        ({"split": ("train",)}, UnknownName, "probe 'probe' has no split 'train'"),
        ({"max_pairs_per_type": 9999, "min_pairs_per_type": 9999}, TooFewPairs, "requested minimum causal patch pairs"),
    ],
)  # fmt: skip
def test_what_the_lake_lacks_is_named(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run_report(lake, report(**options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_weights_than_the_readouts_are_refused(tmp_path):
    logits = {"clean": [10.0], GONE: [8.0], PATCHED: [9.0]}
    with make_lake(tmp_path / "m.lake", made_up(), logits, readout_shift=0.5) as lake:
        with pytest.raises(
            ScalarMismatch, match="Scalar recomputation mismatch: correct_value_logit of the clean record"
        ):
            run_report(lake, made_up(), tmp_path / "out", chart_formats=[])
        run_report(lake, made_up(scalar_value_tolerance=0.6), tmp_path / "out", chart_formats=[])


@pytest.mark.parametrize(
    "missing", [{PATCHED: [9.0, None]}, {GONE: [None, 8.0]}, {"clean": [10.0, 10.0], PATCHED: []}]
)
def test_pairs_without_all_their_runs_are_refused(tmp_path, missing):
    logits = {"clean": [10.0, 10.0], GONE: [8.0, 2.0], PATCHED: [9.0, 4.0], **missing}
    with (
        make_lake(tmp_path / "m.lake", made_up(), logits) as lake,
        pytest.raises(IncompleteRuns, match=r"there are \d rows of 4: some pair lacks runs"),
    ):
        run_report(lake, made_up(), tmp_path / "out", chart_formats=[])


def test_an_end_of_the_interval_alone(lake, tmp_path):
    rows, content, _, _ = written(lake, report(endpoint_role=("source", "source")), tmp_path / "out")
    assert {row["endpoint_kind"] for row in rows["rescue_rows"]} == {"source"}
    assert content["endpoint_roles"] == ["source"]
    assert content["findings"][0].startswith("At step 100 taking L0H2 away")


def test_nobodys_write_gives_anything_back(tmp_path):
    logits = {"clean": [10.0, 10.0], GONE: [8.0, 2.0], PATCHED: [8.0, 1.0]}
    with make_lake(tmp_path / "m.lake", made_up(), logits) as lake:
        _, content, _, _ = written(lake, made_up(), tmp_path / "out")
    assert content["findings"][1] == "No clean write alone gives back 5 % of that: L1MLP -10 %."


def test_a_source_that_does_harm(tmp_path):
    logits = {"clean": [10.0, 10.0], GONE: [12.0, 14.0], PATCHED: [11.0, 11.0]}
    with make_lake(tmp_path / "m.lake", made_up(), logits) as lake:
        _, content, _, _ = written(lake, made_up(), tmp_path / "out")
    assert "taking L0H0 away raises `correct_value_logit` by **3** (10 → 13" in content["findings"][0]
    assert "the clean write of **L1MLP** gives back most of that, **66.7 %** (-2;" in content["findings"][1]


def test_what_is_named_twice_counts_once_in_the_order_given():
    asked = report(
        source_component=("L0MLP", "L0H2", "L0MLP"),
        patch_component=("L1MLP", "L1H1", "L1MLP"),
        patch_group=("L1H1,L1H1", "L1H1"),
    )
    assert asked.source_component == ("L0MLP", "L0H2")
    assert [(patch.source, patch.label) for patch in asked.patches] == [
        (source, label) for source in ("L0MLP", "L0H2") for label in ("L1MLP", "L1H1")
    ]
    # The order in which sources are named is that of the rows, not of the spec.
    assert (
        asked.needs()
        == report(
            source_component=("L0H2", "L0MLP"), patch_component=("L1H1", "L1MLP"), patch_group=()
        ).needs()
    )

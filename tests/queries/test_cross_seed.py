"""The report over seeds: which head holds the role and which grew, against the invented numbers themselves."""

from __future__ import annotations

import json

import pytest
from lakebed.cli.query import query
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.lake import Lake
from lakebed.lake.names import spec_id
from lakebed.queries.cross_seed import CrossSeed
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from .cross_seed_rows import (
    PARAMETERS,
    SEEDS,
    STEPS,
    TERMS,
    growth,
    make_cross_seed_lake,
    ordered,
    run_name,
    write_seed,
)


@pytest.fixture
def lake(tmp_path):
    made = make_cross_seed_lake(tmp_path / "seeds.lake")
    yield made
    made.close()


def rows(lake, section, **options):
    with Results(lake, CrossSeed.parse(options)) as results:
        results.report.check(results)
        return results.rows(f"FROM {section}")


def label(of):
    return f"L{of[0]}H{of[1]}"


def test_holders_and_winners_are_those_of_the_numbers(lake):
    for row, seed in zip(rows(lake, "seed_rows"), SEEDS, strict=True):
        heads = ordered(seed)
        holder = max(SEEDS[seed], key=lambda of: SEEDS[seed][of][1])
        rates = {of: SEEDS[seed][of][1] for of in heads}
        assert (row["seed"], row["holder"], row["winner"]) == (seed, label(holder), label(heads[0]))
        assert row["runner_up"] == label(heads[1])
        assert row["growth"] == growth(seed, heads[0])
        assert row["share_of_growth"] == pytest.approx(
            growth(seed, heads[0]) / sum(max(0.0, growth(seed, of)) for of in heads)
        )
        assert row["formed"] == (rates[holder] > 0.5)
        assert row["formed_heads"] == sum(rate > 0.5 for rate in rates.values())
        assert row["formed_step"] == min(step for step in STEPS if rates[holder] * step / 100 > 0.5)
        assert row["winner_holds"] == (holder == heads[0])


def test_addresses_are_counted(lake):
    for row in rows(lake, "address_rows"):
        of = (row["layer"], row["head"])
        holders = [max(SEEDS[seed], key=lambda each, seed=seed: SEEDS[seed][each][1]) for seed in SEEDS]
        assert row["seeds_held"] == holders.count(of)
        assert row["seeds_won"] == [ordered(seed)[0] for seed in SEEDS].count(of)
        assert row["seeds_formed"] == sum(SEEDS[seed][of][1] > 0.5 for seed in SEEDS)
        assert row["mean_growth"] == pytest.approx(sum(growth(seed, of) for seed in SEEDS) / 3)


def test_terms_stand_beside_their_denominators(lake):
    found = rows(lake, "update_rows")
    assert len(found) == 3 * len(TERMS)
    for row in found:
        assert row["share_of_first_order"] == pytest.approx(TERMS[row["component"]] / 0.8)
        assert row["share_of_actual"] == pytest.approx(TERMS[row["component"]])


def test_the_threshold_says_what_formed_is(lake):
    assert [row["formed"] for row in rows(lake, "seed_rows", formed_at=0.75)] == [True, True, False]
    assert [row["formed"] for row in rows(lake, "seed_rows", formed_at=0.9)] == [False, False, False]


def found_by(lake, **options):
    with Results(lake, CrossSeed.parse(options)) as results:
        return results.report.findings(results), results.report.warnings(results)


def test_findings_answer_the_question(lake):
    lines, warnings = found_by(lake)
    assert lines[0].startswith(
        "**The role forms in every seed: 3 of 3.** At the last scanned step the best head scores a"
    )
    assert "in 70 % to 90 % of 40 events; chance is 12.5 %" in lines[0]
    assert lines[1] == "**Its address moves within layer 1**: L1H0 in seed 1; L1H1 in seed 2; L1H0 in seed 3."
    assert "seed 3 L0H0 0.4 before L1H1 0.1" in lines[2]
    assert lines[2].endswith(
        "In seed 3 that is not the head that holds the role: it formed outside the window."
    )
    assert "seed 2 (L1H1, steps 60 to 64) momentum 75 %, current gradient 37.5 %" in lines[3]
    assert warnings == []


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"formed_at": 0.95}, "**The role forms in no seed: 0 of 3.**", "Over the window"),
        ({"formed_at": 0.85}, "**The role forms in some seeds: 1 of 3.**", "Over the window"),
        (
            {"runs": [run_name(1), run_name(3)]},
            "**The role forms in every seed: 2 of 2.**",
            "**Its address stays: L1H0 in all 2",
        ),
    ],
)
def test_other_answers(lake, options, first, second):
    lines, _ = found_by(lake, **options)
    assert lines[0].startswith(first)
    assert lines[1].startswith(second)


def test_one_seed_answers_nothing(lake):
    _, warnings = found_by(lake, runs=[run_name(2)])
    assert warnings == ["One seed was scanned: whether a role repeats takes at least two."]


def test_a_scan_of_all_heads_on_one_stage_is_marked(tmp_path, monkeypatch):
    from . import cross_seed_rows

    plain = cross_seed_rows._candidate
    monkeypatch.setattr(
        cross_seed_rows, "_candidate", lambda *of: {**plain(*of), "stage": "layer_0_post_mlp"}
    )
    with make_cross_seed_lake(tmp_path / "one.lake") as lake:
        assert found_by(lake)[1] == [
            "All heads were scanned on one stage: heads of other layers are scored on an input they never see."
        ]


def test_the_files_and_charts(lake, tmp_path):
    printed = run_report(lake, CrossSeed.parse({}), tmp_path / "out", chart_formats=("svg",))
    assert set(printed["plots"]) == {"growth", "win_rate", "trajectory"}
    assert set(printed) >= {"report", "markdown", "seed_rows", "seed_csv", "candidate_rows", "candidate_csv"}
    content = json.loads((tmp_path / "out" / "cross_seed_report.json").read_text())
    assert content["runs"] == [run_name(seed) for seed in SEEDS]
    assert (content["spec"], content["role_formed_seeds"], content["num_seeds"]) == (
        spec_id(PARAMETERS),
        3,
        3,
    )
    text = (tmp_path / "out" / "cross_seed_report.md").read_text()
    assert text.startswith("# cross-seed: 3 runs")
    drawing = (tmp_path / "out" / "cross_seed_growth.svg").read_text()
    assert "L1H0 ← layer_0_post_mlp" in drawing
    assert "steps none" not in drawing


def test_trajectories_of_some_steps(lake):
    found = rows(lake, "trajectory", steps="0,100")
    assert {row["step"] for row in found} == {0, 100}
    assert len(rows(lake, "trajectory")) == 3 * 3 * 3
    with pytest.raises(ReportFailed, match="step 70 was not scanned"):
        rows(lake, "trajectory", steps="0,70")
    with pytest.raises(InvalidOption, match="--steps 0:100: name them"):
        CrossSeed.parse({"steps": "0:100"})


# -- what it refuses -----------------------------------------------------------------------------------------


def test_nothing_was_scanned(tmp_path):
    with Lake.create(tmp_path / "empty.lake") as lake:
        with pytest.raises(MissingData, match=r"no seeds were scanned .*Run: lakebed pipeline cross-seed"):
            rows(lake, "seed_rows")


def test_several_scans_must_be_told_apart(lake):
    other = {**PARAMETERS, "rank": [2]}
    write_seed(lake, 1, other, updates=False)
    with pytest.raises(InvalidOption, match="which --spec"):
        rows(lake, "seed_rows")
    assert [row["seed"] for row in rows(lake, "seed_rows", spec=spec_id(other))] == [1]
    assert len(rows(lake, "seed_rows", run=run_name(2))) == 3
    with pytest.raises(UnknownName, match="no scan 'abc'"):
        rows(lake, "seed_rows", spec="abc")
    with pytest.raises(UnknownName, match="run 'made_seed_0002' has no scan"):
        rows(lake, "seed_rows", spec=spec_id(other), runs=[run_name(1), run_name(2)])


def test_runs_that_were_not_scanned(lake):
    with pytest.raises(
        UnknownName, match=r"no candidates of run 'x' .* made_seed_0001, made_seed_0002, made_seed_0003"
    ):
        rows(lake, "seed_rows", runs=["x"])


def test_seeds_scanned_on_different_probes(tmp_path):
    with Lake.create(tmp_path / "two.lake") as lake:
        write_seed(lake, 1)
        write_seed(lake, 2, probe_sha="other")
        with pytest.raises(
            ReportFailed, match="made_seed_0002 and made_seed_0001 were scanned on different probes"
        ):
            rows(lake, "seed_rows")


def test_the_command(lake, tmp_path):
    from click.testing import CliRunner

    words = ["cross-seed", "--lake", lake.uri, "--out", str(tmp_path / "out"), "--chart-format", "none"]
    found = CliRunner().invoke(query, [*words, "--runs", run_name(1), "--runs", run_name(2)])
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["report"].endswith("cross_seed_report.json")

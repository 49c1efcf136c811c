"""Dataset interventions: its rows against plain float64 passes, its specs on the command line, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from lakebed.cli import main
from lakebed.extractors import interventions
from lakebed.extractors.plan import extract
from lakebed.extractors.states import StateReader
from lakebed.lake import Lake
from lakebed.lake.datasets import INTERVENTIONS, Need
from lakebed.lake.errors import MissingData
from lakebed.lake.interventions import (
    ZERO_EACH,
    attend,
    edit_stage,
    intervention,
    intervention_parameters,
    restore,
    shuffle_values,
    zero,
)

from tests import trained_probe_lake as trained
from tests.engine.interventions.plain_walk import Edits, walk
from tests.plain_decoder import PlainDecoder

STEP = 150
PAIRS = {"pair_type": ("support_value", "query_key"), "max_pairs_per_type": 4}
NAMED = [
    intervention("gone", [zero("L0H2")]),
    intervention("mended", [zero("L0H2"), restore("L0MLP")]),
    intervention("looks", [attend("L1H1", "support_value")]),
]


@pytest.fixture
def lake(probe_lake_path, tmp_path):
    shutil.copytree(probe_lake_path, tmp_path / "copy.lake")
    with Lake.open(tmp_path / "copy.lake") as opened:
        yield opened


def rows(lake, query):
    found = lake.sql(query)
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


def answers(lake, probe):
    """Event to its record, prediction, answer, competitors and roles."""
    return {
        row["event"]: row
        for row in rows(
            lake,
            "select e.event, x.tokens, e.prediction_position as p, e.answer_token as y, e.competitors, "
            "(select map_from_entries(list((r.role, r.positions))) from event_roles r "
            f"where r.probe = e.probe and r.event = e.event) as roles from events e join probe_examples x "
            f"using (run, probe, example) where e.probe = '{probe}'",
        )
    }


@pytest.mark.parametrize("side", ["clean", "corrupted"])
def test_rows_are_the_logits_of_plain_passes(lake, side):
    parameters = intervention_parameters(NAMED, record_side=side, components=True, **PAIRS)
    made = extract(lake, trained.RUN, [Need(INTERVENTIONS, parameters)], str(STEP))
    assert made.made == {"interventions": [STEP]}
    probe = "probe" if side == "clean" else "probe.corrupted"
    spec = lake.sql(f"select spec from specs where parameters = '{_json(parameters)}'").fetchall()[0][0]
    found = rows(lake, f"select * from intervention_runs where spec = '{spec}'")
    pairs = rows(
        lake,
        f"select distinct {side}_event as event from (select *, row_number() over (partition by pair_type order by "
        "clean_event) as n from pairs where probe = 'probe' and pair_id is not null and pair_type in ('support_value', "
        "'query_key')) where n <= 4",
    )
    assert {row["event"] for row in found} == {row["event"] for row in pairs}
    assert {row["probe"] for row in found} == {probe}
    decoder = PlainDecoder(StateReader(lake, trained.RUN).read(STEP).weights, 4)
    events = answers(lake, probe)
    named = {**{of["name"]: of["edits"] for of in NAMED}, "clean": []}
    for row in found:
        about = events[row["event"]]
        editor = Edits(named[row["intervention"]], walk(decoder, about["tokens"]), about["roles"], about["p"])
        walked = walk(decoder, about["tokens"], editor)
        logits = walked.logits[about["p"]]
        wrong = logits[about["competitors"]]
        peak = logits.max()
        np.testing.assert_allclose(row["competitor_logits"], wrong, atol=5e-5)
        for column, wanted in (
            ("answer_logit", logits[about["y"]]),
            ("best_wrong_logit", wrong.max()),
            ("value_margin", logits[about["y"]] - wrong.max()),
            ("answer_log_prob", logits[about["y"]] - peak - np.log(np.exp(logits - peak).sum())),
        ):
            assert row[column] == pytest.approx(wanted, abs=5e-5)
        assert row["best_wrong_token"] == about["competitors"][wrong.argmax()]
        assert row["best_token"] == logits.argmax()
        assert row["correct"] == (logits.argmax() == about["y"])
    parts = rows(
        lake,
        "select event, intervention, count(*) as n, abs(sum(answer_dla)) as total, max(abs(answer_dla)) as largest, "
        f"any_value(len(competitor_dla)) as len from intervention_components where spec = '{spec}' group by all",
    )
    assert len(parts) == len(found)
    for row in parts:
        assert row["n"] == 1 + 2 * (4 + 2)
        assert row["len"] == len(events[row["event"]]["competitors"])
        assert row["total"] < 1e-3 * (1 + row["largest"])


def _json(parameters):
    return json.dumps(parameters, sort_keys=True, separators=(",", ":"))


def test_a_second_call_makes_nothing_and_batches_change_nothing(lake, monkeypatch):
    need = Need(INTERVENTIONS, intervention_parameters(NAMED))
    extract(lake, trained.RUN, [need], str(STEP))
    query = "select event, intervention, answer_logit from intervention_runs where intervention in ('gone', 'looks') order by all"
    large = lake.sql(query).fetchall()
    assert extract(lake, trained.RUN, [need], str(STEP)).made == {"interventions": []}
    monkeypatch.setattr(interventions, "_TOKENS", 64)
    other = Need(INTERVENTIONS, intervention_parameters([NAMED[0], NAMED[2]]))
    lake_before = {row[:2] for row in large}
    extract(lake, trained.RUN, [other], str(STEP))
    both = lake.sql(query).fetchall()
    assert len(both) == 2 * len(large)
    assert {row[:2] for row in both} == lake_before
    first, second = both[::2], both[1::2]
    np.testing.assert_allclose([row[2] for row in first], [row[2] for row in second], atol=1e-5)


def test_shuffled_values_do_not_depend_on_the_batch(lake, monkeypatch):
    shuffled = [intervention("shuffled", [shuffle_values("L1H1", "support_value")])]
    query = "select spec, event, answer_logit from intervention_runs where intervention = 'shuffled' order by event, spec"
    extract(lake, trained.RUN, [Need(INTERVENTIONS, intervention_parameters(shuffled))], str(STEP))
    whole = lake.sql(query).fetchall()
    monkeypatch.setattr(interventions, "_TOKENS", 64)
    parameters = intervention_parameters([*shuffled, NAMED[0]])
    extract(lake, trained.RUN, [Need(INTERVENTIONS, parameters)], str(STEP))
    both = lake.sql(query).fetchall()
    assert len(both) == 2 * len(whole)
    np.testing.assert_allclose([row[2] for row in both[::2]], [row[2] for row in both[1::2]], atol=1e-5)


def test_the_view_sets_each_scalar_beside_the_untouched_one(lake):
    extract(lake, trained.RUN, [Need(INTERVENTIONS, intervention_parameters(NAMED))], str(STEP))
    found = rows(
        lake,
        "select v.*, u.value_margin as u, r.value_margin as r from interventions v join intervention_runs u using (spec, event) "
        "join intervention_runs r using (spec, event) where v.scalar = 'value_margin' and u.intervention = 'clean' "
        "and r.intervention = v.intervention and v.intervention = 'gone'",
    )
    assert len(found) == 196
    assert all(row["baseline"] == row["u"] and row["intervened"] == row["r"] for row in found)
    scalars = lake.sql(
        "select distinct scalar from interventions where intervention <> 'clean' order by 1"
    ).fetchall()
    assert [scalar for (scalar,) in scalars] == ["answer_log_prob", "answer_logit", "correct", "value_margin"]


SPEC = """
pair_type = ["support_value"]
max_pairs_per_type = 3
record_side = "corrupted"

[[interventions]]
name = "told the value"
edits = [{stage = "layer_0_post_mlp", operation = "patch", source = "counterpart", position_role = "support_value"}]

[[interventions]]
name = "without L0H1, its MLP mended"
edits = [{zero = "L0H1"}, {restore = "L0MLP"}]
"""


@pytest.fixture
def command(lake, capsys):
    """Runs `lakebed extract DATASET …` on the lake: exit status, standard output, standard error."""

    def run(dataset, *words):
        with pytest.raises(SystemExit) as done:
            main(["extract", dataset, "--lake", str(lake.uri), "--run", trained.RUN, *words])
        captured = capsys.readouterr()
        return done.value.code, captured.out, " ".join(captured.err.split())

    return run


def test_a_spec_in_toml_is_one_command(lake, command, tmp_path):
    (tmp_path / "spec.toml").write_text(SPEC)
    words = ("--spec", str(tmp_path / "spec.toml"), "--steps", str(STEP))
    status, out, error = command("interventions", *words)
    assert status == 0, error
    assert json.loads(out)["made"] == {"interventions": 1}
    lake.refresh()
    patch = edit_stage("layer_0_post_mlp", "patch", source="counterpart", position_role="support_value")
    parameters = intervention_parameters(
        [
            intervention("told the value", [patch]),
            intervention("without L0H1, its MLP mended", [zero("L0H1"), restore("L0MLP")]),
        ],
        record_side="corrupted",
        pair_type=("support_value",),
        max_pairs_per_type=3,
    )
    found = lake.sql(
        f"select intervention, count(*) from intervention_runs join specs using (spec) where parameters = '{_json(parameters)}' "
        "group by 1 order by 1"
    ).fetchall()
    assert found == [("clean", 3), ("told the value", 3), ("without L0H1, its MLP mended", 3)]
    assert json.loads(command("interventions", *words)[1])["standing"] == {"interventions": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown key 'colour'; a spec takes probe, record_side"),
        ("components = 1", "components = 1 is of the wrong type"),
        (
            "[[interventions]]\nname = 'x'\nedits = [{zero = 'L7H0'}]",
            "no component L7H0; this run has layers 0–1",
        ),
        (
            "[[interventions]]\nname = 'x'\nedits = [{zap = 'L0H0'}]",
            "exactly one of zero, restore, stage, attend",
        ),
        (
            "[[interventions]]\nname = 'x'\nedits = [{zero = 'L0H0', at = 1}]",
            "unknown key 'at'; it takes zero",
        ),
        ("interventions = 'some'", "no interventions 'some': name zero_each, or a list"),
        ("record_side = 'left'", "no record_side 'left'; there are clean, corrupted"),
        ("pair_type = ['twins']", "no pair type 'twins'"),
        ("probe = 'other'", "no probe 'other'; it has probe"),
        ("= 1", "cannot read"),
    ],
)
def test_a_wrong_spec_is_one_line(lake, command, tmp_path, text, message):
    (tmp_path / "spec.toml").write_text(text)
    before = lake.sql("select count(*) from extractions").fetchall()
    status, _, error = command("interventions", "--spec", str(tmp_path / "spec.toml"), "--steps", str(STEP))
    assert status != 0
    assert message in error
    assert "Traceback" not in error
    lake.refresh()
    assert lake.sql("select count(*) from extractions").fetchall() == before


def test_a_spec_that_is_not_there_and_one_for_another_dataset(command):
    assert "no spec nowhere.toml" in command("interventions", "--spec", "nowhere.toml")[2]
    assert "--spec is an option of interventions" in command("readouts", "--spec", "x.toml")[2]


def test_a_probe_without_pairs_is_told_how_to_get_them(lake):
    parameters = intervention_parameters(ZERO_EACH, pair_type=("support_value",), split=("nowhere",))
    with pytest.raises(MissingData, match="no causal patch pairs of type support_value in split nowhere"):
        extract(lake, trained.RUN, [Need(INTERVENTIONS, parameters)], str(STEP))

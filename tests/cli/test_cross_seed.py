"""The pipeline over seeds: what it makes, that it makes each thing once, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lakebed.cli.cross_seed import NotConfigured
from lakebed.cli.cross_seed_plan import CrossSeed
from lakebed.cli.cross_seed_select import (
    NoSuchCandidate,
    ScanNotFound,
    ScanRowAmbiguous,
    ScanRowMissing,
    choose,
)
from lakebed.cli.cross_seed_units import STAMP, ForeignReport, TraceNotFound
from lakebed.engine.config import RunConfig
from lakebed.extractors.executor import LocalProcesses, UnitFailed
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import CROSS_SEED_UPDATES, TRACE
from lakebed.lake.drop import drop, plan_drop
from lakebed.lake.verify import verify
from lakebed.queries.output import OutputExists

from tests import cross_seed_lake
from tests.cross_seed_lake import SEEDS, plan, run

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> CrossSeed:
    """Every stage, for winner and runner-up: copy it before you write."""
    torch.set_num_threads(1)
    made = plan(tmp_path_factory.mktemp("seeds"), candidates=("winner", "runner_up"))
    run(made)
    return made


@pytest.fixture
def copied(done, tmp_path) -> CrossSeed:
    """A copy of it."""
    shutil.copytree(Path(done.lake), tmp_path / "seeds.lake")
    shutil.copytree(Path(done.out), tmp_path / "out")
    return dataclasses.replace(done, lake=str(tmp_path / "seeds.lake"), out=str(tmp_path / "out"))


def receipts(of: CrossSeed) -> set[tuple[str, str, str]]:
    with Lake.open(of.lake) as lake:
        lake.refresh()
        return {(each.run, each.unit, each.created_at) for each in lake.receipts.all()}


def files(of: CrossSeed) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(of.out).rglob("*") if path.is_file()}


def table(of: CrossSeed, query: str) -> list[tuple]:
    with Lake.open(of.lake) as lake:
        return lake.sql(query).fetchall()


# -- what it makes -------------------------------------------------------------------------------------------


def test_every_seed_is_a_run_and_its_recorded_window_another(done):
    with Lake.open(done.lake) as lake:
        assert lake.runs() == [
            "small_seed_0011",
            "small_seed_0011@22",
            "small_seed_0013",
            "small_seed_0013@22",
        ]
        for seed in SEEDS:
            assert lake.sql(
                f"SELECT step FROM steps WHERE run = '{done.run(seed)}' ORDER BY step"
            ).fetchall() == [
                (0,),
                (20,),
                (40,),
                (50,),
            ]
            assert lake.dataset_steps(done.traced_run(seed), TRACE) == [23, 24, 25, 26]
        assert verify(lake).ok
        (((one,), (two,)),) = [lake.sql("SELECT DISTINCT seed FROM runs ORDER BY seed").fetchall()]
        assert (one, two) == SEEDS


def test_the_recorded_window_has_the_bits_of_a_training_recorded_from_the_start(done, tmp_path):
    config = RunConfig.from_json(json.dumps(done.seed_config(13)))
    with Lake.create(tmp_path / "plain.lake") as plain, Lake.open(done.lake) as lake:
        train(plain, "r", config, num_steps=26, record="22:26")
        for name in ("blocks.1.attn.q_proj.weight", "token_embedding.weight"):
            for quantity, steps in (("gradients", [23, 26]), ("weights", [26]), ("exp_avg_sq", [26])):
                expected = plain.tensor(quantity, name, "r").read(steps)
                found = lake.tensor(quantity, name, done.traced_run(13)).read(steps)
                assert np.array_equal(expected, found)


def test_heads_are_in_order_of_their_growth(done):
    rows = table(
        done,
        "SELECT seed, place, layer, head, growth, label, stage FROM cross_seed_candidates ORDER BY seed, place",
    )
    separations = {
        (run, layer, head, step): value
        for run, layer, head, step, value in table(
            done, "SELECT run, layer, head, step, separation FROM cross_seed_scans"
        )
    }
    for seed in SEEDS:
        found = [row for row in rows if row[0] == seed]
        assert [row[1] for row in found] == [1, 2, 3, 4]
        for _, _, layer, head, growth, _, stage in found:
            at = {step: separations[done.run(seed), layer, head, step] for step in (20, 50)}
            assert growth == at[50] - at[20]
            assert stage == ("embedding" if layer == 0 else "layer_0_post_mlp")
        assert [row[4] for row in found] == sorted((row[4] for row in found), reverse=True)
        assert [row[5] for row in found] == ["winner", "runner_up", "median", "bottom"]


def test_separations_are_those_of_the_raw_scores(done):
    """From the coordinates themselves, in NumPy: mean score of the support minus that of the distractors, first 4 ranks."""
    run, layer, head, step = done.run(13), 1, 0, 50
    where = f"run = '{run}' AND layer = {layer} AND head = {head} AND step = {step}"
    with Lake.open(done.lake) as lake:
        sides = {
            (example, position): (np.array(query, float), np.array(key, float))
            for example, position, query, key in lake.sql(
                f"SELECT example, position, query, key FROM qk_coordinates WHERE {where}"
            ).fetchall()
        }
        sigma = [
            s
            for (s,) in lake.sql(
                f"SELECT singular_value FROM singular_values WHERE matrix = 'W_QK' AND {where} ORDER BY rank"
            ).fetchall()
        ]
        events = lake.sql(
            f"SELECT example, event, prediction_position FROM events WHERE run = '{run}' AND probe = 'probe'"
        ).fetchall()
        roles: dict[tuple[int, str], list[int]] = {}
        for event, role, position in lake.sql(
            f"SELECT event, role, position FROM positions WHERE run = '{run}' AND probe = 'probe' AND kind = 'role'"
        ).fetchall():
            roles.setdefault((event, role), []).append(position)
    found = []
    for example, event, at in events:
        query = sides[example, at][0]

        def score(position, query=query, example=example):
            key = sides[example, position][1]
            return float((np.array(sigma[:4]) * query[:4] * key[:4]).sum() / np.sqrt(len(query)))

        support, others = (
            np.mean([score(position) for position in roles[event, role] if position <= at])
            for role in ("support_value", "value_distractors")
        )
        found.append(support - others)
    ((separation,),) = table(done, f"SELECT separation FROM cross_seed_scans WHERE {where}")
    assert separation == pytest.approx(np.mean(found), rel=1e-9)


def test_files_say_what_the_tables_say(done):
    winners = json.loads(done.winners.read_text())["winners"]
    rows = list(csv.DictReader(done.winners.with_suffix(".csv").open()))
    held = table(
        done,
        "SELECT seed, head_label, layer, head, growth FROM cross_seed_candidates WHERE place = 1 ORDER BY seed",
    )
    for winner, row, of in zip(winners, rows, held, strict=True):
        assert (
            winner["seed"],
            winner["head_label"],
            winner["head_layer"],
            winner["head"],
            winner["score"],
        ) == of
        assert (int(row["seed"]), row["head_label"], float(row["score"])) == (of[0], of[1], of[4])
        assert float(row["window_delta_qk_match_separation"]) == of[4]
        assert Path(done.out, row["report"]).is_file()
        selection = json.loads(done.selection(of[0]).read_text())
        assert selection["winner"] == winner == selection["candidates"][0]
        assert len(selection["candidates"]) == 4
    manifest = json.loads(done.manifest.read_text())
    assert [row["seed"] for row in manifest["seeds"]] == list(SEEDS)
    config = json.loads(Path(done.out, manifest["seeds"][1]["config"]).read_text())
    assert (config["seed"], config["num_steps"], config["run_name"]) == (13, 50, "small_seed_0013")


def test_sums_of_the_terms_are_those_of_the_report(done):
    ((winner,),) = table(done, "SELECT head_label FROM cross_seed_candidates WHERE seed = 13 AND place = 1")
    layer, head = int(winner[1]), int(winner[3])
    report = json.loads(
        (
            done.adam_folder(13, layer, head, "winner")
            / "bilinear_qk_rank_adam_state_attribution_report.json"
        ).read_text()
    )
    rows = table(
        done,
        f"SELECT component, sum_delta FROM cross_seed_updates WHERE run = '{done.run(13)}' AND layer = {layer} AND head = {head}",
    )
    assert dict(rows) == {of["component"]: of["sum_delta"] for of in report["summary"]["by_component"]}
    ((summed,),) = table(
        done,
        "SELECT sum(weight_decay) FROM attribution_slices WHERE scalar_head = '"
        f"{winner}' AND run = '{done.traced_run(13)}' AND slice_kind = 'parameter' AND split = '__all__' AND "
        "pair_type = '__all__' AND point = 'source'",
    )
    assert dict(rows)["weight_decay"] == pytest.approx(summed, rel=1e-9)


def test_places_are_taken_once():
    four = [{"head_layer": 0, "head": index} for index in range(4)]
    assert [of[0] for of in choose(four, ("winner", "runner_up", "median", "bottom"))] == [
        "winner",
        "runner_up",
        "median",
        "bottom",
    ]
    assert choose(four[:2], ("bottom", "winner", "runner_up")) == [("bottom", 0, 1), ("winner", 0, 0)]
    assert choose(four[:1], ("winner", "median", "bottom")) == [("winner", 0, 0)]
    with pytest.raises(NoSuchCandidate, match="runner_up is head number 2, and 1 are scanned"):
        choose(four[:1], ("runner_up",))


def test_one_stage_for_all_heads_stays_available(copied):
    one = dataclasses.replace(copied, context_stage="layer_0_post_mlp", out=f"{copied.out}-one-stage")
    run(one, "configs", "scan", "select")
    with Lake.open(one.lake) as lake:
        stages = lake.sql(
            "SELECT spec, list(DISTINCT stage ORDER BY stage) FROM cross_seed_candidates GROUP BY spec"
        ).fetchall()
    assert sorted(of for _, of in stages) == [["embedding", "layer_0_post_mlp"], ["layer_0_post_mlp"]]


# -- once, and again -----------------------------------------------------------------------------------------


def test_a_second_run_makes_nothing(copied):
    before = receipts(copied), files(copied)
    run(copied)
    assert (receipts(copied), files(copied)) == before


def test_a_stopped_pipeline_goes_on_where_it_was(copied):
    """Without one scan report and one selection, just those are made."""
    shutil.rmtree(copied.scan_folder(13, 1, 1))
    copied.selection(11).unlink()
    before = files(copied)
    run(copied)
    after = files(copied)
    made = {path for path, at in after.items() if before.get(path) != at}
    assert str(copied.selection(11)) in made
    assert {path for path in made if "bilinear" in path} == {
        path for path in after if path.startswith(str(copied.scan_folder(13, 1, 1)))
    }
    assert not list(Path(copied.out).rglob("*.partial"))


def test_a_report_that_fails_leaves_the_others(copied, monkeypatch):
    shutil.rmtree(Path(copied.out))
    from lakebed.queries import run as running

    whole = running.run_report

    def fail(lake, report, out, **options):
        if (report.run, report.head_layer, report.head) == ("small_seed_0013", 0, 1):
            raise OSError("the disk is gone")
        return whole(lake, report, out, **options)

    monkeypatch.setattr(running, "run_report", fail)
    with pytest.raises(UnitFailed, match="scan of L0H1 of seed 13: OSError: the disk is gone"):
        run(copied)
    assert copied.scan_folder(13, 0, 0).is_dir()
    assert not copied.scan_folder(13, 0, 1).exists()
    monkeypatch.setattr(running, "run_report", whole)
    run(copied)
    assert copied.winners.is_file()


def test_stages_may_be_named_in_any_order_and_one_by_one(done, tmp_path):
    made = plan(tmp_path, seeds=(13,))
    for stage in ("configs", "trace-scan", "scan", "select", "trace-adam", "adam"):
        run(made, stage)
    query = "SELECT * EXCLUDE (run) FROM cross_seed_candidates WHERE seed = 13 ORDER BY place"
    assert table(made, query) == table(done, query)
    query = "SELECT * EXCLUDE (adam_spec) FROM cross_seed_updates WHERE run = 'small_seed_0013' ORDER BY ALL"
    assert set(table(made, query)) <= set(table(done, query))


def test_a_killed_driver_leaves_what_a_rerun_goes_on_from(done, tmp_path):
    """Killed as soon as anything is committed, and again a little later; then it ends with what an undisturbed one has."""
    words = [
        str(Path(sys.executable).parent / "lakebed"),
        *command(tmp_path, "--stage", "configs", "--stage", "trace-scan"),
    ]
    words[words.index("--workers") + 1] = "2"
    for committed in (1, 6):
        driver = subprocess.Popen([*words, "--run-name", "small"], stderr=subprocess.DEVNULL, env=ONE_THREAD)
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "seeds.lake").glob("tables/extractions/*/*.parquet"))) < committed:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.kill()
        driver.wait()
    made = plan(tmp_path)
    run(made, "configs", "trace-scan", "scan", "select")
    for query in (
        "SELECT * FROM cross_seed_candidates ORDER BY ALL",
        "SELECT * FROM cross_seed_scans ORDER BY ALL",
    ):
        assert table(made, query) == table(done, query)
    with Lake.open(made.lake) as lake:
        assert verify(lake).ok


def test_processes_make_the_same_bits(done, tmp_path):
    made = plan(tmp_path)
    run(made, "configs", "trace-scan", "scan", "select", executor=LocalProcesses(2, 1))
    for query in (
        "SELECT * FROM cross_seed_candidates ORDER BY ALL",
        "SELECT * FROM cross_seed_scans ORDER BY ALL",
        "SELECT run, step, parameter, row, values FROM weights WHERE run NOT LIKE '%@%' ORDER BY ALL",
        "SELECT * FROM readouts WHERE run NOT LIKE '%@%' ORDER BY ALL",
    ):
        assert table(made, query) == table(done, query)


def test_rows_that_a_kill_left_out_are_written_from_the_reports_that_stand(copied):
    rows = "SELECT * FROM cross_seed_updates ORDER BY ALL"
    before = table(copied, rows), files(copied)
    with Lake.open(copied.lake) as lake:
        for seed in SEEDS:
            drop(lake, plan_drop(lake, copied.run(seed), {CROSS_SEED_UPDATES}))
    assert table(copied, rows) == []
    run(copied)
    assert (table(copied, rows), files(copied)) == before


def test_a_damaged_row_file_is_made_again_by_the_pipeline(copied):
    path = min(Path(copied.lake).glob("tables/cross_seed_updates/run=small_seed_0013/*.parquet"))
    path.write_bytes(path.read_bytes()[:-9])
    with Lake.open(copied.lake) as lake:
        (found,) = verify(lake).damaged
    assert "give again the `lakebed pipeline cross-seed` that made it" in found.remedy
    Path(copied.lake, found.remedy.split()[1].rstrip(",")).unlink()
    run(copied)
    with Lake.open(copied.lake) as lake:
        assert verify(lake).ok


def test_a_cleanup_drops_the_recorded_steps_and_nothing_else(copied):
    rows = "SELECT * FROM cross_seed_updates ORDER BY ALL"
    attributions = "SELECT count(*) FROM attributions"
    before = table(copied, rows), table(copied, attributions)
    shown = run(copied, "select", cleanup=True)
    assert shown["freed_bytes"] > 100_000
    with Lake.open(copied.lake) as lake:
        lake.refresh()
        assert not lake.receipts.all(dataset=TRACE)
        assert verify(lake).ok
    assert (table(copied, rows), table(copied, attributions)) == before
    assert run(copied, cleanup=True)["freed_bytes"] == 0
    with Lake.open(copied.lake) as lake:
        lake.refresh()
        assert lake.dataset_steps(copied.traced_run(13), TRACE) == []


def test_what_was_dropped_is_recorded_again_for_another_candidate(copied):
    run(copied, "adam", cleanup=True)
    more = dataclasses.replace(copied, candidates=("winner", "bottom"))
    with pytest.raises(TraceNotFound):
        run(more, "adam")
    run(more, "trace-adam", "adam", cleanup=True)
    labels = "SELECT DISTINCT label FROM cross_seed_updates JOIN cross_seed_candidates USING (run, spec, layer, head) ORDER BY ALL"
    assert table(more, labels) == [("bottom",), ("runner_up",), ("winner",)]


def test_a_trace_without_its_reports_is_not_dropped(tmp_path):
    made = plan(tmp_path, seeds=(11,))
    run(made, "configs", "trace-scan", "scan", "trace-adam", cleanup=True)
    with Lake.open(made.lake) as lake:
        lake.refresh()
        assert len(lake.dataset_steps(made.traced_run(11), TRACE)) == 4


# -- what it refuses -----------------------------------------------------------------------------------------


def test_adam_without_its_trace(tmp_path):
    made = plan(tmp_path, seeds=(11,))
    run(made, "configs", "trace-scan", "scan")
    with pytest.raises(
        TraceNotFound,
        match=r"Recorded steps not found: run 'small_seed_0011@22' .* steps 23:26 of seed 11.*--stage trace-adam",
    ):
        run(made, "adam")


def test_a_scan_report_of_another_seed(copied):
    shutil.rmtree(copied.scan_folder(13, 1, 1))
    shutil.copytree(copied.scan_folder(11, 1, 1), copied.scan_folder(13, 1, 1))
    with pytest.raises(
        ForeignReport,
        match=r"l1h1_support_value.* is a report of something else .run small_seed_0011, not small_seed_0013.*states [0-9a-f]{12}, not",
    ):
        run(copied, "select")
    with pytest.raises(OutputExists, match="add --overwrite"):
        run(copied, "scan")
    run(copied, "scan", "select", overwrite=True)


def test_a_scan_report_that_was_changed(copied):
    path = copied.scan_folder(11, 0, 1) / "bilinear_qk_match_separation_report.json"
    path.write_text(path.read_text().replace("L0H1", "L1H1"))
    with pytest.raises(ForeignReport, match="was changed or removed since the report was written"):
        run(copied, "select")
    (path.parent / STAMP).unlink()
    with pytest.raises(ForeignReport, match=r"has no readable pipeline.json"):
        run(copied, "select")
    shutil.rmtree(path.parent)
    with pytest.raises(ScanNotFound, match=r"no scan report of L0H1 of seed 11 .*--stage scan"):
        run(copied, "select")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows: [], ScanRowMissing, "has no summary row of rank_4 at embedding; it has none"),
        (lambda rows: [{**rows[0], "projection": "rank_8"}], ScanRowMissing, "it has rank_8 at embedding"),
        (lambda rows: rows * 2, ScanRowAmbiguous, "has 2 summary rows of rank_4 at embedding"),
        (
            lambda rows: [{k: v for k, v in rows[0].items() if "window" not in k}],
            ScanRowMissing,
            "has no window_delta_qk_match_separation: fewer than two",
        ),
    ],
)
def test_a_summary_that_does_not_have_one_row_of_the_head(copied, change, error, message):
    import hashlib

    folder = copied.scan_folder(11, 0, 1)
    path = folder / "bilinear_qk_match_separation_report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "summary": change(report["summary"])}))
    stamp = json.loads((folder / STAMP).read_text())
    stamp["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / STAMP).write_text(json.dumps(stamp))
    with pytest.raises(error, match=message):
        run(copied, "select")


def test_outputs_of_another_plan_stay_unless_they_may_be_replaced(copied):
    other = dataclasses.replace(copied, window_end=40)
    before = files(copied)
    with pytest.raises(OutputExists, match=r"already exists and is non-empty: .*made otherwise"):
        run(other)
    assert files(copied) == before
    run(other, "configs", "scan", "select", overwrite=True)
    longer = dataclasses.replace(copied, end_step=60)
    with pytest.raises(
        OutputExists, match=r"cross_seed_manifest.json exists and says something else of seed 11, 13"
    ):
        run(longer)


def test_stages_before_configs(done, tmp_path):
    with pytest.raises(NotConfigured, match=r"no .*cross_seed_manifest.json: add --stage configs"):
        run(plan(tmp_path), "scan")
    with pytest.raises(NotConfigured, match="knows no seed 29: add --stage configs"):
        run(dataclasses.replace(done, seeds=(29,)), "scan")
    with pytest.raises(NotConfigured, match="was written for other configurations"):
        run(dataclasses.replace(done, scan_every=10), "scan")


WORDS = {
    "--seed": ["11", "13"],
    "--end-step": ["50"],
    "--window-start": ["20"],
    "--window-end": ["50"],
    "--adam-start-step": ["22"],
    "--adam-end-step": ["26"],
    "--rank": ["4"],
    "--scan-checkpoint-every": ["20"],
}


def command(folder: Path, *more: str, **changed: list[str]) -> list[str]:
    given = {**WORDS, **{f"--{name.replace('_', '-')}": of for name, of in changed.items()}}
    words = ["pipeline", "cross-seed", "--lake", str(folder / "seeds.lake"), "--out", str(folder / "out")]
    words += ["--base-config", str(cross_seed_lake.toml(folder)), "--workers", "1", *more]
    return [*words, *(word for name, of in given.items() for value in of for word in (name, value))]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window_start": ["51"]}, "steps 51 to 50 must lie in order between 0 and --end-step 50"),
        ({"window_end": ["60"]}, "steps 20 to 60 must lie in order between 0 and --end-step 50"),
        ({"window_start": ["-1"]}, "steps -1 to 50 must lie in order"),
        ({"window_start": ["41"], "window_end": ["49"]}, "the window 41 to 49 holds none: widen it"),
        ({"adam_start_step": ["26"]}, "recorded steps 26 to 26 must lie in order .* at least one step apart"),
        ({"adam_end_step": ["51"]}, "recorded steps 22 to 51 must lie in order"),
        ({"end_step": ["0"]}, "--end-step is 0; it must be at least 1"),
        ({"layers": ["0"]}, "--layers is 0"),
        ({"heads": ["-2"]}, "--heads is -2"),
        ({"rank": ["0"]}, "--rank is 0"),
        ({"scan_checkpoint_every": ["0"]}, "--scan-checkpoint-every is 0"),
        ({"min_route_pairs_per_type": ["0"]}, "--min-route-pairs-per-type is 0"),
        ({"seed": ["11", "13", "11"]}, "--seed 11 is named twice"),
        (
            {"layers": ["3"]},
            "--layers is 3; the model has 2 layers of 2 heads, each of 16 singular directions",
        ),
        ({"rank": ["17"]}, "--rank is 17; the model has"),
    ],
)
def test_options_that_make_no_plan(run_cli, tmp_path, changed, message):
    import re

    found = run_cli(*command(tmp_path, **changed))
    assert found.status == 1
    assert re.search(message, found.err), found.err
    assert found.err.count("\n") == 1
    assert not (tmp_path / "seeds.lake").exists()
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(run_cli, tmp_path):
    found = run_cli(*command(tmp_path, "--dry-run"))
    assert found.status == 0, found.err
    shown = json.loads(found.out)
    assert [of["stage"] for of in shown["stages"]] == [
        "configs",
        "trace-scan",
        "scan",
        "select",
        "trace-adam",
        "adam",
    ]
    assert shown["bytes"] == sum(of["bytes"] for of in shown["stages"]) > 0
    assert shown["seconds"] > 0
    assert "trace-adam" in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_a_dry_run_knows_what_is_done(run_cli, copied):
    folder = Path(copied.lake).parent
    before = receipts(copied), files(copied)
    shown = json.loads(run_cli(*command(folder, "--dry-run", "--run-name", "small")).out)
    done = {of["stage"]: of["done"] for of in shown["stages"]}
    assert (done["trace-scan"], done["scan"], done["trace-adam"]) == (2, 2, 2)
    assert (receipts(copied), files(copied)) == before


def test_the_command_does_it_all(run_cli, tmp_path):
    found = run_cli(*command(tmp_path, "--cleanup-adam-trace", seed=["13"], run_name=["s"]))
    assert found.status == 0, found.err
    shown = json.loads(found.out)
    assert shown["runs"] == ["s_seed_0013"]
    assert set(shown["winner"]) == {"13"}
    assert Path(shown["winners"]).is_file()
    assert Path(shown["adam_reports"][0]).is_dir()
    assert shown["freed_bytes"] > 0

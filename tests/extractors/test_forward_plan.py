"""How forward passes are planned: merged, batched, interrupted, refused; and the anchor numbers of the formation run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from lakebed.engine.adapters import load_adapter
from lakebed.engine.capture import CaptureError
from lakebed.engine.config import load_config
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.pre_norm import PreNormModel
from lakebed.engine.tap import TrainingState
from lakebed.extractors import probe_batches, readouts
from lakebed.extractors.forward import DeviceUnavailable
from lakebed.extractors.plan import extract
from lakebed.extractors.probe_batches import ProbeMismatch, load_probe, make_batches
from lakebed.extractors.probes import build_probe, import_probe
from lakebed.extractors.runs import RunInfo, model_parameters, register_run
from lakebed.extractors.states import StateReader
from lakebed.extractors.trace_writer import write_state
from lakebed.lake import Lake
from lakebed.lake.datasets import Need, need_steps
from lakebed.lake.errors import InputMismatch, MissingData, UnknownName
from lakebed.lake.interventions import ZERO_EACH, intervention_parameters
from lakebed.lake.verify import verify

from tests import trained_probe_lake as trained

PROBE = {"probe": "probe"}
TABLES = ("readouts", "attention_patterns", "head_writes", "component_logits", "qk_coordinates")


@pytest.fixture
def probed(probe_lake_path, tmp_path):
    """A copy of the trained run and its probe without any dataset of forward passes."""
    path = tmp_path / "copy.lake"
    shutil.copytree(probe_lake_path, path)
    for receipt in (path / "tables" / "extractions" / f"run={trained.RUN}").iterdir():
        if not receipt.name.startswith(("run", "checkpoint", "trace", "probe", "evaluation")):
            receipt.unlink()
    with Lake.open(path) as lake:
        lake.refresh()
        yield lake


def everything(lake, probe="probe"):
    """Rows of every table, floats as arrays, at one step."""
    found = {}
    for name in TABLES:
        table = lake.sql(f"select * from {name} where probe = '{probe}' and step = 150").to_arrow_table()
        found[name] = table.sort_by(
            [(c, "ascending") for c in table.column_names[:5] if c != "scores"]
        ).to_pydict()
    for stage in ("embedding", "final_norm"):
        found[stage] = lake.tensor("activations", f"{probe}/all/{stage}", trained.RUN).read(150)
    return found


@pytest.mark.parametrize("batch_size", [1, 97, 100_000])
def test_batches_change_nothing(probed, probe_lake_path, batch_size, monkeypatch):
    """Records one by one, sorted by length, or all at once, padded."""
    if batch_size == 97:
        monkeypatch.setattr(probe_batches, "_PADDING", -1.0)
    extract(probed, trained.RUN, trained.NEEDS, "150", batch_size=batch_size)
    with Lake.open(probe_lake_path) as lake:
        ours, theirs = everything(probed), everything(lake)
    for name in TABLES:
        for column, values in theirs[name].items():
            if values and isinstance(values[0], list):
                assert [len(of) for of in values] == [len(of) for of in ours[name][column]]
                values, mine = np.concatenate(values), np.concatenate(ours[name][column])
                np.testing.assert_allclose(mine, values, atol=1e-5, rtol=1e-5)
            elif values and isinstance(values[0], float):
                np.testing.assert_allclose(ours[name][column], values, atol=1e-5, rtol=1e-5)
            else:
                assert ours[name][column] == values, (name, column)
    for stage in ("embedding", "final_norm"):
        np.testing.assert_allclose(ours[stage], theirs[stage], atol=1e-5)


def test_whatever_is_asked_shares_one_pass_per_batch(probed, monkeypatch):
    passes = []
    forward = PreNormModel.forward
    monkeypatch.setattr(
        PreNormModel,
        "forward",
        lambda self, *a, **k: passes.append(k.get("capture")) or forward(self, *a, **k),
    )
    needs = [
        need
        for need in trained.NEEDS
        if need.parameters.get("probe") == "probe" and need.dataset != "interventions"
    ]
    made = extract(probed, trained.RUN, needs, "0,150")
    assert len(passes) == 2  # two steps, and the probe fits in one batch
    assert made.made["qk_coordinates"] == [0, 0, 150, 150]
    assert made.standing == dict.fromkeys(made.made, 0)
    assert extract(probed, trained.RUN, needs, "0,150").rows == 0
    assert len(passes) == 2


def test_a_need_of_some_steps_is_made_at_those_only(probed):
    ablations = intervention_parameters(ZERO_EACH)
    needs = [Need("readouts", PROBE), Need("interventions", ablations, steps="last")]
    made = extract(probed, trained.RUN, needs, "0:150:50")
    assert made.made == {"readouts": [0, 50, 100, 150], "interventions": [150]}
    named = extract(probed, trained.RUN, [Need("interventions", ablations, steps="50,7,150")], "0:150:50")
    assert named.made == {"interventions": [50]}
    assert named.standing == {"interventions": 1}
    assert need_steps(Need("x", steps="7"), [1, 2]) == []
    assert need_steps(Need("x", steps="any"), [2, 1]) == [1, 2]


def test_an_interrupted_extraction_keeps_what_was_finished(probed, monkeypatch):
    written = []
    write = readouts.ReadoutsExtractor.write

    def fails(self, writer, step, captured, made):
        if step == 100:
            raise OSError("power cut")
        written.append(step)
        write(self, writer, step, captured, made)

    needs = [Need("component_logits", PROBE), Need("readouts", PROBE)]
    with monkeypatch.context() as patch:
        patch.setattr(readouts.ReadoutsExtractor, "write", fails)
        with pytest.raises(OSError, match="power cut"):
            extract(probed, trained.RUN, needs, "0:150:50")
    probed.refresh()
    assert probed.dataset_steps(trained.RUN, "readouts", PROBE) == [0, 50] == written
    assert probed.dataset_steps(trained.RUN, "component_logits", PROBE) == [0, 50, 100]
    assert verify(probed).ok
    rest = extract(probed, trained.RUN, needs, "0:150:50")
    assert rest.made == {"component_logits": [150], "readouts": [100, 150]}


def test_two_processes_at_once(probed):
    arguments = ["extract", "activations", "head_writes", "--lake", probed.uri, "--run", trained.RUN]
    arguments += ["--steps", "0:150:10", "--threads", "1"]
    command = "from lakebed.cli import main; main()"
    workers = [
        subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        printed, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        assert json.loads(printed)["made"]["activations"] <= 16
    probed.refresh()
    counts = probed.sql(
        "select count(*), count(distinct (step, event, layer, head, role)) from head_writes"
    ).fetchall()
    assert counts == [(16 * 196 * 8 * 5, 16 * 196 * 8 * 5)]
    assert list(probed.tensor("activations", "probe/roles/embedding", trained.RUN).steps) == list(
        range(0, 151, 10)
    )
    assert verify(probed).ok


@pytest.mark.parametrize(
    ("dataset", "parameters", "error", "message"),
    [
        (
            "readouts",
            {"probe": "x"},
            MissingData,
            r"no probe 'x'; it has probe, .*lakebed probe build --lake .* --probe x",
        ),
        ("qk_coordinates", {"head": "L2H0"}, UnknownName, "no head L2H0; this run has layers 0–1, heads 0–3"),
        ("qk_coordinates", {"head": "2.0"}, UnknownName, "cannot read head '2.0'"),
        ("qk_coordinates", {}, UnknownName, "name it with --head"),
        (
            "qk_coordinates",
            {"head": "L0H0", "stage": "z"},
            UnknownName,
            "no stage 'z'; this run has embedding, layer_0",
        ),
        ("qk_coordinates", {"head": "L0H0", "layernorm_mode": "z"}, UnknownName, "there are head_ln1, none"),
        ("activations", {"layout": "z"}, UnknownName, "no layout 'z'; there are roles, all"),
        (
            "interventions",
            {"interventions": "z"},
            UnknownName,
            "no interventions 'z': name zero_each, or a list",
        ),
        (
            "attention",
            {"query_role": "z"},
            UnknownName,
            "no role 'z'; the events of probe 'probe' have all_query_relation",
        ),
        (
            "head_writes",
            {"query_role": "support_write"},
            ProbeMismatch,
            "several positions in 196 of 196 events",
        ),
    ],
)
def test_what_is_not_there_is_one_line_that_lists_what_is(probed, dataset, parameters, error, message):
    with pytest.raises(error, match=message) as raised:
        extract(probed, trained.RUN, [Need(dataset, parameters)], "0")
    assert "\n" not in str(raised.value)
    assert probed.dataset_steps(trained.RUN, dataset, parameters) == []


def test_a_device_that_is_not_there(probed):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(DeviceUnavailable, match="no device 'mps' on this machine; there is cpu"):
        extract(probed, trained.RUN, [Need("readouts")], "0", device="mps")


def record(**changed):
    roles = {"prediction": 3, "subject": [1, 2], "late": 4}
    line = {
        "sample_id": str(len(changed)),
        "token_ids": [1, 12, 14, 13, 16],
        "events": [{"roles": roles, "answer": 16, "competitors": [17, 18]}],
    }
    return {**line, **changed}


def imported(lake, folder, *records, name="own"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
    import_probe(lake, trained.RUN, str(path), name)
    return {"probe": name}


def test_an_imported_probe_with_its_own_roles(probed, tmp_path):
    lone = {"roles": {"prediction": 2}, "answer": 17, "competitors": [16]}
    probe = imported(probed, tmp_path, record(), record(token_ids=[1, 12, 14], events=[lone]))
    extract(probed, trained.RUN, [Need("head_writes", probe), Need("readouts", probe)], "last")
    roles = probed.sql("select event, role, count(*) from head_writes group by all order by all").fetchall()
    # What stands after the query is no position of a role.
    assert roles == [(0, "subject", 8), (0, "write", 8), (1, "write", 8)]
    with pytest.raises(
        ProbeMismatch, match=r"'subject' has no position in 1 of 2 events .* one in each have prediction"
    ):
        extract(probed, trained.RUN, [Need("attention", {**probe, "query_role": "subject"})], "last")
    # The same question asked of the same tokens, whatever follows them: padding is not seen.
    short = imported(probed, tmp_path, record(token_ids=[1, 12, 14], events=[lone]), name="short")
    extract(probed, trained.RUN, [Need("readouts", short)], "last")
    margins = probed.sql(
        "select value_margin from readouts where stage = 'logits' and (probe = 'short' or (probe = 'own' and event = 1))"
    ).fetchall()
    assert margins[0][0] == pytest.approx(margins[1][0], abs=1e-6)


def test_a_probe_the_model_cannot_read(probed):
    model = load_adapter("symbolic_kv", StateReader(probed, trained.RUN).info["config"]).load_model(
        StateReader(probed, trained.RUN).read(0).weights
    )
    data = load_probe(probed, trained.RUN, "probe")
    data.require_fit(model)
    model.max_positions = 10
    with pytest.raises(ProbeMismatch, match=r"has \d+ tokens, and the model reads at most 10"):
        data.require_fit(model)
    model.max_positions, model.vocabulary_size = 1000, 20
    with pytest.raises(ProbeMismatch, match=r"has token \d+, and the model's vocabulary ends at 19"):
        data.require_fit(model)


def test_another_probe_under_the_same_name_is_refused(probed):
    extract(probed, trained.RUN, [Need("readouts", PROBE)], "0")
    from lakebed.extractors import forward

    load = forward.load_probe

    def other(*arguments):
        from dataclasses import replace

        return replace(load(*arguments), sha256="0" * 64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "load_probe", other)
        with pytest.raises(InputMismatch, match=r"made from other inputs \(probe\)"):
            extract(probed, trained.RUN, [Need("readouts", PROBE)], "0")


def test_a_model_whose_parts_do_not_add_up_is_refused(probed, monkeypatch):
    monkeypatch.setattr(
        PreNormModel,
        "final_norm_parameters",
        lambda self: (self._weights.final_norm[0] * 1.01, self._weights.final_norm[1]),
    )
    with pytest.raises(
        CaptureError, match="step 150 of run 'r': the value margin read off the last residual stage"
    ):
        extract(probed, trained.RUN, [Need("readouts", PROBE)], "150")


def test_a_large_vocabulary_is_never_whole(monkeypatch, probed):
    """Logits of events are made in blocks, and those of other positions not at all."""
    from lakebed.engine import readout, writes

    largest = 0
    first = readout.first_of_

    def watched(scores, value):
        nonlocal largest
        largest = max(largest, scores.numel())
        return first(scores, value)

    for module in (readout, writes):
        monkeypatch.setattr(module, "_BLOCK", 1000)
        monkeypatch.setattr(module, "first_of_", watched)
    extract(probed, trained.RUN, [Need("readouts", PROBE), Need("head_writes", PROBE)], "150")
    assert 0 < largest <= 1000


def test_batches_keep_records_in_order_unless_padding_costs(probed):
    data = load_probe(probed, trained.RUN, "probe")
    lengths = np.array([10] * 20 + [11] * 20)
    from lakebed.extractors.probe_batches import _groups

    assert np.concatenate(_groups(lengths, 100)).tolist() == list(range(40))
    mixed = np.array([10, 50] * 20)
    groups = _groups(mixed, 100)
    assert sorted(np.concatenate(groups).tolist()) == list(range(40))
    assert all(len(set(mixed[group].tolist())) == 1 and mixed[group].sum() <= 100 for group in groups)
    model = load_adapter("symbolic_kv", StateReader(probed, trained.RUN).info["config"]).load_model(
        StateReader(probed, trained.RUN).read(0).weights
    )
    batches = make_batches(data, model, ["prediction"], ["roles"], batch_size=200)
    assert sum(len(batch.row) for batch in batches.batches) == data.events
    for batch in batches.batches:
        last = max(int(batch.position.max()), int((batch.places["roles"] % batch.tokens.shape[1]).max()))
        assert batch.tokens.shape[1] == last + 1
    whole = make_batches(data, model, [], ["all"], batch_size=200)
    assert sum(int((batch.tokens > 0).sum()) for batch in whole.batches) == int((data.tokens > 0).sum())
    assert sum(batch.tokens.numel() for batch in batches.batches) < sum(
        batch.tokens.numel() for batch in whole.batches
    )


def test_anchors_of_the_formation_run_before_training(tmp_path):
    """Definitions 1 §K, probe of 24 records per split, split validation_iid."""
    config = load_config("formation")
    torch.manual_seed(config.seed)
    model = SymbolicKVDecoder(config.model, config.benchmark.vocabulary_size)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with Lake.create(tmp_path / "f.lake") as lake:
        info = RunInfo(adapter="symbolic_kv", config=config.canonical_json())
        register_run(lake, "f", info, model_parameters(model, {}))
        write_state(lake, "f", 0, TrainingState(weights, {}, {}), "initial")
        build_probe(lake, "f")
        head = {"head": "L2H1", "stage": "layer_1_post_mlp", "layernorm_mode": "head_ln1"}
        extract(
            lake, "f", [Need("svd"), Need("readouts", PROBE), Need("qk_coordinates", {**PROBE, **head})], "0"
        )
        margin, accuracy, events = lake.sql(
            "select avg(value_margin), avg(correct::int), count(*) from readouts join events using (probe, event) "
            "where stage = 'logits' and split = 'validation_iid'"
        ).fetchall()[0]
        assert (round(margin, 4), accuracy, events) == (-31.0178, 0, 153)
        sigma = lake.sql(
            "select list(singular_value order by rank) from singular_values where matrix = 'W_QK' and layer = 2 and head = 1"
        ).fetchall()[0][0]
        assert sigma[0] == pytest.approx(0.561332, abs=5e-7)
        assert sum(sigma) ** 2 / sum(s * s for s in sigma) == pytest.approx(28.00141, abs=5e-6)
        assert sum(sigma[:3]) / sum(sigma) == pytest.approx(0.156295, abs=5e-7)
        rows = lake.sql(
            "with scored as (select e.event, p.role, p.position, q.query, k.key, q.query_bias, k.key_bias "
            "from events e join positions p on p.event = e.event and p.kind = 'role' and p.probe = 'probe' "
            "and p.position <= e.prediction_position and p.role in ('support_value', 'value_distractors') "
            "join qk_coordinates q on q.example = e.example and q.position = e.prediction_position "
            "join qk_coordinates k on k.example = e.example and k.position = p.position "
            "where e.probe = 'probe' and e.split = 'validation_iid') select * from scored"
        ).fetchall()
        wanted = {
            "full_with_bias": (0.015545, -0.430508, 0.117647),
            "weight_full": (0.025893, -0.420299, 0.143791),
            "rank_8": (0.021410, -0.242839, 0.169935),
        }
        for form, expected in wanted.items():
            assert separation(rows, np.array(sigma), form) == pytest.approx(expected, abs=2e-6), form


def separation(rows, sigma, form):
    """Separation mean, max-margin mean, win rate (definitions 1 §J.3)."""
    scores: dict[int, dict[str, list[float]]] = {}
    for event, role, _, query, key, query_bias, key_bias in rows:
        products = sigma * np.array(query) * np.array(key)
        total = products[: 8 if form == "rank_8" else None].sum()
        total += query_bias + key_bias if form == "full_with_bias" else 0
        scores.setdefault(event, {}).setdefault(role, []).append(total / np.sqrt(32))
    support = np.array([of["support_value"][0] for of in scores.values()])
    mean = np.array([np.mean(of["value_distractors"]) for of in scores.values()])
    most = np.array([max(of["value_distractors"]) for of in scores.values()])
    return (support - mean).mean(), (support - most).mean(), (support > most).mean()

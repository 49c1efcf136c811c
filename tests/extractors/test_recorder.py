"""The recorder on loops of every kind, against what the test itself kept of every step."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from lakebed.engine.optimizer import UnsupportedOptimizer
from lakebed.extractors import Recorder, trace_writer
from lakebed.extractors.runs import RecordingError, ReplayMismatch
from lakebed.extractors.states import StateReader
from lakebed.lake import Lake
from lakebed.lake.errors import InputMismatch, StorageFull
from lakebed.lake.verify import verify
from torch import nn


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x, use=True):
        hidden = torch.tanh(self.mix(self.embed(x)))
        if use:
            hidden = hidden + self.sometimes(hidden)
        return self.out(hidden)


def loss_of(model, step, use=True, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(7, (2, 9), generator=generator)
    return scale * nn.functional.cross_entropy(model(x, use), y)


class Kept:
    """Everything of every step, kept the plain way: clones made around optimizer.step()."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.weights = [self._weights()]
        self.raw, self.moments = [], []

    def _weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def before_clip(self):
        self.raw.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def after_step(self):
        self.weights.append(self._weights())
        state = self.optimizer.state
        names = {p: n for n, p in self.model.named_parameters()}
        self.moments.append(
            {
                key: {names[p]: entry[key].clone() for p, entry in state.items() if key in entry}
                for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")
            }
        )


def run_loop(recorder, model, optimizer, steps, clip=0.05, use=lambda step: True, schedule=True, first=0):
    kept = Kept(model, optimizer)
    for step in range(first + 1, first + steps + 1):
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / step
        optimizer.zero_grad()
        loss = loss_of(model, step, use(step))
        loss.backward()
        kept.before_clip()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        recorder.annotate(loss=loss.item())
        kept.after_step()
    return kept


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)


OPTIMIZERS = {
    "adamw": adamw,
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.01),
    "foreach": lambda model: adamw(model, foreach=True),
    "fused": lambda model: adamw(model, fused=True),
    "maximize": lambda model: adamw(model, maximize=True),
    "groups": lambda model: torch.optim.AdamW(
        [
            {"params": [model.embed.weight], "weight_decay": 0.0},
            {"params": [*model.mix.parameters(), *model.sometimes.parameters()], "betas": (0.8, 0.9)},
        ],
        lr=5e-3,
    ),
}


@pytest.mark.parametrize("clip", [0.05, 1e6, None], ids=["clipped", "not reached", "no clip"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_is_replayed_bit_for_bit(lake, kind, clip):
    model = Net()
    optimizer = OPTIMIZERS[kind](model)
    with Recorder(lake, "r", model, optimizer, anchor_every=4) as recorder:
        kept = run_loop(recorder, model, optimizer, 11, clip, use=lambda step: step % 3 != 0)
    reader = StateReader(lake, "r")
    assert reader.steps == list(range(12))
    assert reader.anchors() == [0, 4, 8, 11]
    for state in reader.iterate(range(12)):
        assert state.weights.keys() == kept.weights[0].keys()
        for name, expected in kept.weights[state.step].items():
            assert torch.equal(state.weights[name], expected), (state.step, name)
        if state.step:
            for key in ("exp_avg", "exp_avg_sq"):
                for name, expected in kept.moments[state.step - 1][key].items():
                    assert torch.equal(getattr(state, key)[name], expected), (state.step, key, name)
    assert reader.verify_replay(0, 4) == 4


@pytest.mark.parametrize("clip", [0.05, None])
def test_gradients_are_the_raw_ones_and_the_coefficient_is_the_applied_one(lake, clip):
    model = Net()
    optimizer = adamw(model)
    with Recorder(lake, "r", model, optimizer, anchor_every=4) as recorder:
        kept = run_loop(recorder, model, optimizer, 7, clip)
    for name in kept.raw[0]:
        stored = lake.tensor("gradients", name, "r").read()
        assert np.array_equal(stored, np.stack([raw[name].numpy() for raw in kept.raw])), name
    rows = lake.sql(
        "select pre_clip_grad_norm, clip_coefficient, loss from training_steps order by step"
    ).fetchall()
    for (norm, coefficient, loss), raw, step in zip(rows, kept.raw, range(1, 8), strict=True):
        expected = np.sqrt(sum(float((g.double() ** 2).sum()) for g in raw.values()))
        assert norm == pytest.approx(expected, rel=1e-12)
        assert coefficient == (pytest.approx(min(1.0, clip / (expected + 1e-6)), rel=1e-6) if clip else 1.0)
        assert loss is not None
        assert step


def test_a_parameter_without_gradient_is_skipped_and_says_so(lake):
    model = Net()
    optimizer = adamw(model)
    with Recorder(lake, "r", model, optimizer, anchor_every=8) as recorder:
        run_loop(recorder, model, optimizer, 8, use=lambda step: step > 5)
    rows = lake.sql(
        "select step, has_gradient, optimizer_step, gradient_l2 from parameter_updates "
        "where parameter = 'sometimes.bias' order by step"
    ).fetchall()
    assert [row[1] for row in rows] == [False] * 5 + [True] * 3
    assert [row[2] for row in rows] == [0] * 5 + [1, 2, 3]
    assert all((row[3] is None) is (not row[1]) for row in rows)
    assert np.isnan(lake.tensor("gradients", "sometimes.bias", "r").read(slice(1, 5))).all()


def test_gradient_accumulation_records_the_sum(lake):
    model = Net()
    optimizer = adamw(model)
    raw = []
    with Recorder(lake, "r", model, optimizer, anchor_every=4):
        for step in range(1, 6):
            optimizer.zero_grad()
            for micro in range(3):
                loss_of(model, 10 * step + micro, scale=1 / 3).backward()
            raw.append(model.mix.weight.grad.clone())
            nn.utils.clip_grad_norm_(model.parameters(), 0.02)
            optimizer.step()
    assert np.array_equal(lake.tensor("gradients", "mix.weight", "r").read(), torch.stack(raw).numpy())


def test_value_clipping_is_no_scalar_and_still_replays(lake):
    model = Net()
    optimizer = adamw(model)
    used = []
    with Recorder(lake, "r", model, optimizer, anchor_every=8):
        for step in range(1, 7):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
            used.append(model.mix.weight.grad.clone())
            optimizer.step()
    assert lake.sql("select count(clip_coefficient) from training_steps").fetchall() == [(0,)]
    assert np.array_equal(lake.tensor("gradients", "mix.weight", "r").read(), torch.stack(used).numpy())
    assert StateReader(lake, "r").verify_replay(0, 6) == 6


def test_a_nan_gradient_is_recorded_and_reported(lake):
    model = Net()
    optimizer = adamw(model)
    with Recorder(lake, "r", model, optimizer, anchor_every=4):
        for step in range(1, 6):
            optimizer.zero_grad()
            poison = torch.tensor([0, 0, float("nan"), 0, float("inf"), 0]) if step == 3 else torch.zeros(6)
            handle = model.mix.bias.register_hook(lambda gradient, poison=poison: gradient + poison)
            loss_of(model, step).backward()
            handle.remove()
            optimizer.step()
    rows = lake.sql("select nonfinite_gradient_entries from training_steps order by step").fetchall()
    assert [count for (count,) in rows][:3] == [0, 0, 2]
    assert rows[3][0] > 2
    found = lake.sql(
        "select step, nonfinite_gradient_entries, isnan(gradient_l2) from parameter_updates "
        "where nonfinite_gradient_entries > 0 and step <= 3"
    ).fetchall()
    assert found == [(3, 2, True)]
    assert StateReader(lake, "r").read(3).weights["mix.bias"].isnan().tolist() == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    weights = StateReader(lake, "r").read(5).weights["mix.bias"]
    assert torch.equal(weights.nan_to_num(7.0), model.mix.bias.detach().nan_to_num(7.0))


def test_other_optimizers_are_refused_by_name_unless_everything_is_stored(lake):
    model = Net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(UnsupportedOptimizer, match=r'torch\.optim\.sgd\.SGD.*store="full"'):
        Recorder(lake, "r", model, sgd)
    assert lake.runs() == []
    with pytest.raises(UnsupportedOptimizer, match="amsgrad"):
        Recorder(lake, "r", model, adamw(model, amsgrad=True))
    with Recorder(lake, "r", model, sgd, store="full", anchor_every=4) as recorder:
        kept = run_loop(recorder, model, sgd, 6)
    for step, expected in enumerate(kept.weights):
        stored = lake.tensor("weights", "mix.weight", "r").read(step)
        assert np.array_equal(stored, expected["mix.weight"].numpy())
    for step in range(1, 7):
        momentum = lake.tensor("momentum_buffer", "mix.weight", "r").read(step)
        assert np.array_equal(momentum, kept.moments[step - 1]["momentum_buffer"]["mix.weight"].numpy())
    rows = lake.sql("select delta_l2, current_gradient_l2 from parameter_updates where step = 2").fetchall()
    assert all(delta > 0 and term is None for delta, term in rows)


def test_a_change_behind_the_optimizers_back_is_an_error_not_a_drift(lake):
    model = Net()
    optimizer = adamw(model)
    recorder = Recorder(lake, "r", model, optimizer, anchor_every=4)
    run_loop(recorder, model, optimizer, 5)
    with torch.no_grad():
        model.mix.weight[0, 0] += 1e-3
    with pytest.raises(ReplayMismatch, match=r"step 8.*weight mix.weight"):
        run_loop(recorder, model, optimizer, 20, first=5)
        recorder.close()
    assert lake.table("steps", "r").collect()["step"].max() == 4
    assert verify(lake).ok
    assert "closed" in repr(recorder)


def test_training_waits_when_the_disk_is_slow(lake, monkeypatch):
    gate = threading.Event()
    written = []
    add = trace_writer.TraceWriter.add

    def slow(self, pending):
        gate.wait()
        written.append(pending.step)
        add(self, pending)

    monkeypatch.setattr(trace_writer.TraceWriter, "add", slow)
    model = Net()
    optimizer = adamw(model)
    recorder = Recorder(lake, "r", model, optimizer, anchor_every=4, queue_steps=2)
    loop = threading.Thread(target=run_loop, args=(recorder, model, optimizer, 12))
    loop.start()
    loop.join(timeout=1.5)
    assert loop.is_alive()
    assert recorder.step <= 6
    gate.set()
    loop.join(timeout=60)
    recorder.close()
    assert written == list(range(1, 13))


def test_a_full_disk_stops_the_recording_and_keeps_what_was_finished(lake, monkeypatch):
    model = Net()
    optimizer = adamw(model)
    recorder = Recorder(lake, "r", model, optimizer, anchor_every=4)
    run_loop(recorder, model, optimizer, 5)
    while lake.receipts.get("r", "trace-00000001-00000004") is None:
        pass

    def full(key, data):
        raise StorageFull(f"no space left while writing {key}")

    monkeypatch.setattr(lake.storage, "write", full)
    with pytest.raises(StorageFull, match="no space left"):
        run_loop(recorder, model, optimizer, 40, first=5)
    monkeypatch.undo()
    assert lake.table("steps", "r").collect()["step"].max() == 4
    assert verify(lake).ok
    loss_of(model, 99).backward()
    optimizer.step()


def test_an_exception_in_the_loop_keeps_the_steps_before_it(lake):
    model = Net()
    optimizer = adamw(model)
    with pytest.raises(ZeroDivisionError), Recorder(lake, "r", model, optimizer, anchor_every=4) as recorder:
        run_loop(recorder, model, optimizer, 6)
        raise ZeroDivisionError
    assert StateReader(lake, "r").steps == list(range(7))


def test_a_run_is_continued_only_from_its_own_last_state(lake):
    model = Net()
    optimizer = adamw(model)
    with Recorder(lake, "r", model, optimizer, anchor_every=4) as recorder:
        kept = run_loop(recorder, model, optimizer, 6)
    with pytest.raises(RecordingError, match=r"stands at step 6, not 0: continue it with start_step=6"):
        Recorder(lake, "r", model, optimizer, anchor_every=4)
    with torch.no_grad():
        model.mix.bias[0] += 1
    with pytest.raises(
        RecordingError, match=r"the model is not run 'r' at step 6: its weights 'mix.bias' differ"
    ):
        Recorder(lake, "r", model, optimizer, anchor_every=4, start_step=6)
    model.load_state_dict({**kept.weights[6], "out.weight": kept.weights[6]["embed.weight"]})
    with Recorder(lake, "r", model, optimizer, anchor_every=4, start_step=6) as recorder:
        more = run_loop(recorder, model, optimizer, 5, first=6)
    final = StateReader(lake, "r").read(9).weights
    assert all(torch.equal(final[name], more.weights[3][name]) for name in final)


def test_two_different_runs_of_one_name_do_not_mix(lake, tmp_path):
    first, second = Net(seed=0), Net(seed=1)
    one, two = adamw(first), adamw(second)
    a = Recorder(lake, "r", first, one, anchor_every=4)
    other = Lake.open(lake.uri)
    with pytest.raises(RecordingError, match="the model is not run 'r' at step 0"):
        Recorder(other, "r", second, two, anchor_every=4)
    twin = Net(seed=0)
    b = Recorder(other, "r", twin, adamw(twin), anchor_every=4)
    run_loop(a, first, one, 4)
    run_loop(b, twin, b._optimizer, 4, clip=None)
    a.close()
    with pytest.raises(InputMismatch, match="made from other inputs"):
        b.close()
    assert verify(lake).ok
    other.close()


def test_options_that_make_no_sense_are_one_line(lake):
    model = Net()
    with pytest.raises(RecordingError, match="no store 'some'; there are exact, full"):
        Recorder(lake, "r", model, adamw(model), store="some")
    with pytest.raises(RecordingError, match="anchor_every is 0"):
        Recorder(lake, "r", model, adamw(model), anchor_every=0)
    recorder = Recorder(lake, "r", model, adamw(model))
    with pytest.raises(RecordingError, match=r"annotate comes after optimizer.step\(\)"):
        recorder.annotate(loss=1.0)
    recorder.close()
    recorder.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_stored_without_loss(lake, dtype):
    model = Net().to(dtype)
    optimizer = adamw(model)
    with Recorder(lake, "r", model, optimizer, anchor_every=4) as recorder:
        kept = run_loop(recorder, model, optimizer, 6)
    for state in StateReader(lake, "r").iterate(range(7)):
        for name, expected in kept.weights[state.step].items():
            assert state.weights[name].dtype == dtype
            assert torch.equal(state.weights[name], expected), (state.step, name)


def test_names_that_no_file_system_likes(lake):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("a/b", "x" * 300, "step", "ünï"):
                self.register_parameter(name, nn.Parameter(torch.randn(3)))

        def forward(self):
            return sum((parameter**2).sum() for parameter in self.parameters())

    model = Odd()
    optimizer = adamw(model)
    with Recorder(lake, "r", model, optimizer, anchor_every=2):
        for _ in range(3):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert np.array_equal(lake.tensor("weights", name, "r").read(3), parameter.detach().numpy())
    names = lake.sql("select distinct parameter from gradients").fetchall()
    assert {name for (name,) in names} == {name for name, _ in model.named_parameters()}


def test_a_forgotten_recorder_closes_itself(tmp_path):
    script = textwrap.dedent(f"""
        import torch
        from torch import nn
        from lakebed.extractors import Recorder
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        recorder = Recorder({str(tmp_path / "f.lake")!r}, "r", model, optimizer)
        for _ in range(5):
            optimizer.zero_grad(); model(torch.ones(4, 3)).pow(2).mean().backward(); optimizer.step()
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Lake.open(tmp_path / "f.lake") as lake:
        assert StateReader(lake, "r").steps == list(range(6))


def test_tied_weights_stand_once(lake):
    model = Net()
    with Recorder(lake, "r", model, adamw(model)):
        pass
    rows = lake.sql("select parameter, tied_to from parameters order by position").fetchall()
    assert ("embed.weight", ["out.weight"]) in rows
    assert "out.weight" not in {name for name, _ in rows}

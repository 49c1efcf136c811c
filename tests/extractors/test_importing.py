"""Checkpoints made elsewhere: what comes in is what was in the file, and what cannot is one line."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from lakebed.cli import main
from lakebed.engine.training import TrainingLoop
from lakebed.extractors.importing import CheckpointError, find_checkpoints, import_checkpoints
from lakebed.extractors.plan import extract
from lakebed.extractors.runs import RecordingError
from lakebed.extractors.states import StateReader
from lakebed.extractors.training import trace
from lakebed.lake.datasets import Need
from lakebed.lake.errors import InputMismatch, MissingData
from lakebed.lake.verify import verify
from safetensors.torch import save_file

from tests.extractors.conftest import small_config
from tests.extractors.test_training import assert_same_state


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, config, benchmark_data):
    """step_000010.pt and step_000020.pt as the reference trainer writes them, and the loop at step 20."""
    folder = tmp_path_factory.mktemp("checkpoints")
    loop = TrainingLoop(config, benchmark_data)
    for step in range(1, 21):
        loop.train_step()
        if step % 10 == 0:
            payload = {
                "step": step,
                "model_state": loop.model.state_dict(),
                "optimizer_state": loop.optimizer.state_dict(),
                "metrics": {"validation_iid": {"loss": 3.25}},
                "config": {"anything": ["plain", 1, None]},
            }
            torch.save(payload, folder / f"step_{step:06d}.pt")
    return folder, loop


def test_weights_and_moments_are_those_of_the_file(lake, checkpoints, config):
    folder, loop = checkpoints
    result = import_checkpoints(lake, folder, "m", config)
    assert (result.imported, result.standing, result.with_moments) == ([10, 20], 0, 2)
    state = StateReader(lake, "m").read(20)
    assert "lm_head.weight" not in state.weights
    named = dict(loop.model.named_parameters())
    for name, parameter in named.items():
        assert torch.equal(state.weights[name], parameter.detach())
        assert torch.equal(state.exp_avg[name], loop.optimizer.state[parameter]["exp_avg"])
        assert torch.equal(state.exp_avg_sq[name], loop.optimizer.state[parameter]["exp_avg_sq"])
    assert set(state.step_counts.values()) == {20}
    row = lake.sql(
        "select metrics, learning_rate, state, has_moments, source_uri from steps where step = 20"
    ).fetchall()[0]
    assert row[:4] == (
        '{"validation_iid": {"loss": 3.25}}',
        config.optimization.learning_rate_at(20),
        "stored",
        True,
    )
    assert row[4].endswith("step_000020.pt")
    tied = lake.sql(
        "select tied_to, module from parameters where parameter = 'token_embedding.weight'"
    ).fetchall()
    assert tied == [(["lm_head.weight"], "token_embedding")]
    again = import_checkpoints(lake, folder, "m", config)
    assert (again.imported, again.standing) == ([], 2)
    assert verify(lake).ok


def test_the_svd_of_imported_and_traced_checkpoints_is_one(
    lake, trained_lake, checkpoints, config, benchmark_data
):
    folder, _ = checkpoints
    import_checkpoints(lake, folder, "m", config)
    extract(lake, "m", [Need("svd")])
    extract(trained_lake, "exact", [Need("svd")], "20")
    query = "select matrix, layer, head, rank, singular_value from singular_values where step = 20 and run = '{}' order by all"
    assert lake.sql(query.format("m")).fetchall() == trained_lake.sql(query.format("exact")).fetchall()


def test_tracing_on_from_an_import_is_no_historical_replay(lake, checkpoints, config):
    folder, _ = checkpoints
    import_checkpoints(lake, folder, "m", config)
    with pytest.raises(RecordingError, match="is no historical replay"):
        trace(lake, "m", 20, 4, require_historical_replay=True)
    result = trace(lake, "m", 20, 4, anchor_every=4)
    assert result.run == "m@20"
    assert StateReader(lake, "m@20").steps == [20, 21, 22, 23, 24]
    assert_same_state(StateReader(lake, "m@20").read(20), StateReader(lake, "m").read(20))
    told = lake.sql("select historical_replay from runs where run = 'm@20'").fetchall()[0][0]
    assert (
        told == "the checkpoint holds no batch order, so the order restarts at the seed's first permutation"
    )


def test_safetensors_without_moments(lake, tmp_path, checkpoints, config):
    _, loop = checkpoints
    weights = {name: parameter.detach().clone() for name, parameter in loop.model.named_parameters()}
    save_file(
        {**weights, "lm_head.weight": weights["token_embedding.weight"].clone()},
        tmp_path / "model-00020.safetensors",
    )
    result = import_checkpoints(lake, tmp_path, "s", config)
    assert (result.imported, result.with_moments) == ([20], 0)
    state = StateReader(lake, "s").read(20)
    assert all(torch.equal(state.weights[name], weight) for name, weight in weights.items())
    with pytest.raises(MissingData, match="has weights but no optimizer state"):
        trace(lake, "s", 20, 1)


def test_any_model_comes_in_without_a_config(lake, tmp_path):
    weight = torch.randn(3, 4, dtype=torch.bfloat16)
    save_file({"a/b": weight, "n": torch.arange(3, dtype=torch.float64)}, tmp_path / "step_7.safetensors")
    import_checkpoints(lake, tmp_path, "any")
    assert np.array_equal(lake.tensor("weights", "a/b", "any").read(7), weight.float().numpy())
    types = dict(lake.sql("select parameter, dtype from parameters").fetchall())
    assert types == {"a/b": "bfloat16", "n": "float64"}
    with pytest.raises(RecordingError, match="has no model adapter"):
        extract(lake, "any", [Need("svd")])


def save(folder, name="step_000001.pt", **payload):
    torch.save(payload, folder / name)
    return folder


def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(lake, tmp_path, checkpoints, config):
    folder, loop = checkpoints
    good = loop.model.state_dict()

    def refused(place, message, chosen=config):
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoints(lake, place, "bad", chosen)
        assert "\n" not in str(caught.value)
        assert "bad" not in lake.runs()

    refused(tmp_path / "absent", "Checkpoint directory not found: .*absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"no step_\*\.pt and no \*\.safetensors in .*; it holds nothing")

    def place(name):
        made = tmp_path / name
        made.mkdir()
        return made

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    pickled = place("pickled")
    with open(pickled / "step_000001.pt", "wb") as file:
        pickle.dump({"step": 1, "model_state": Evil()}, file)
    refused(pickled, "unpickles nothing")
    zipped = save(place("zipped"), step=1, model_state=good, extra=Evil())
    refused(zipped, "unpickles nothing")
    assert not (tmp_path / "owned").exists()

    refused(
        save(place("shape"), step=1, model_state=good),
        "is no checkpoint of this config",
        small_config(**{"model.d_ff": 64}),
    )
    refused(save(place("other_step"), step=2, model_state=good), "says step 2 inside and step 1 in its name")
    refused(save(place("no_state"), step=1, weights=good), "has no model_state; it holds step, weights")
    refused(save(place("not_tensor"), step=1, model_state={"a": 3}), "entry 'a' is a int, not a tensor")
    refused(save(place("extra"), step=1, model_state={**good, "new": torch.zeros(2)}), "holds 'new'")
    optimizer = {"state": {}, "param_groups": [{"params": [0, 1], "lr": 0.1}]}
    refused(
        save(place("optimizer"), step=1, model_state=good, optimizer_state=optimizer),
        "optimizer_state does not match",
    )
    torn = place("torn")
    (torn / "step_000001.pt").write_bytes((folder / "step_000010.pt").read_bytes()[:5000])
    refused(torn, "cannot be read as a torch checkpoint")
    bits = place("bits")
    (bits / "model-1.safetensors").write_bytes(b"nonsense")
    refused(bits, "cannot be read as safetensors")
    twice = place("twice")
    for name in ("step_1.pt", "step_01.pt"):
        save(twice, name, step=1, model_state=good)
    refused(twice, "are both step 1")
    nameless = place("nameless")
    save_file({"a": torch.zeros(1)}, nameless / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not name its step"):
        find_checkpoints(nameless)


def test_a_wrong_folder_makes_no_lake(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["import", str(tmp_path / "absent"), "--lake", str(tmp_path / "new.lake"), "--run", "a"])
    assert left.value.code == 1
    assert capsys.readouterr().err == f"lakebed: Checkpoint directory not found: {tmp_path / 'absent'}\n"
    assert not (tmp_path / "new.lake").exists()


def test_other_bytes_for_a_step_that_stands_are_refused(lake, tmp_path, checkpoints, config):
    folder, loop = checkpoints
    import_checkpoints(lake, folder, "m", config)
    changed = {name: tensor + 1 for name, tensor in loop.model.state_dict().items()}
    with pytest.raises(InputMismatch, match="made from other inputs"):
        import_checkpoints(lake, save(tmp_path, "step_000020.pt", step=20, model_state=changed), "m", config)

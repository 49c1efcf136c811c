"""Folders as transformers saves them: every step comes in as it is, and what is no GPT-2 checkpoint is one line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from lakebed.cli import main
from lakebed.extractors.checkpoints import CheckpointError
from lakebed.extractors.importing import import_checkpoints
from lakebed.extractors.plan import extract
from lakebed.extractors.states import StateReader
from lakebed.lake.datasets import Need
from lakebed.lake.errors import InputMismatch
from lakebed.lake.verify import verify
from safetensors.torch import load_file, save_file

from tests.engine.adapters.families import small_gpt2


@pytest.fixture(scope="module")
def models():
    """Two steps of one small GPT-2."""
    first, second = small_gpt2(), small_gpt2()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.25)
    return {20: first, 100: second}


@pytest.fixture
def folder(tmp_path, models):
    """checkpoint-20 and checkpoint-100, as transformers' trainer leaves them."""
    place = tmp_path / "run"
    for step, model in models.items():
        model.save_pretrained(place / f"checkpoint-{step}")
    return place


def test_every_subfolder_is_a_step_with_its_bits(lake, folder, models):
    result = import_checkpoints(lake, folder, "g")
    assert (result.imported, result.standing, result.with_moments) == ([20, 100], 0, 0)
    reader = StateReader(lake, "g")
    for step, model in models.items():
        named = dict(model.named_parameters())
        weights = reader.read(step).weights
        assert list(weights) == list(named)
        assert all(torch.equal(weights[name], parameter) for name, parameter in named.items())
    rows = lake.sql("select stage, position, layer from stages where run = 'g' order by position").fetchall()
    assert rows[:3] == [("embedding", 0, None), ("layer_0_post_attn", 1, 0), ("layer_0_post_mlp", 2, 0)]
    assert rows[-1] == ("final_norm", 7, None)
    ((adapter, config),) = lake.sql("select adapter, config from runs where run = 'g'").fetchall()
    assert adapter == "gpt2"
    assert json.loads(config)["n_embd"] == 24
    assert "transformers_version" not in config
    modules = lake.sql(
        "select module, kind from parameters where parameter = 'transformer.wte.weight'"
    ).fetchall()
    assert modules == [("token_embedding", "embedding")]
    assert import_checkpoints(lake, folder, "g").standing == 2
    assert verify(lake).ok


def test_the_svd_of_a_head_is_that_of_its_columns(lake, folder, models):
    import_checkpoints(lake, folder, "g")
    extract(lake, "g", [Need("svd")])
    found = lake.sql(
        "select step, matrix, layer, head, singular_value from singular_values where run = 'g' order by all desc"
    ).fetchall()
    values: dict[tuple, list[float]] = {}
    for *place, value in found:
        values.setdefault(tuple(place), []).append(value)
    for step, model in models.items():
        for layer, block in enumerate(model.transformer.h):
            fused = block.attn.c_attn.weight.detach().double().numpy()
            out = block.attn.c_proj.weight.detach().double().numpy()
            for head in range(3):
                q, k, v = (fused[:, 24 * part + 8 * head : 24 * part + 8 * (head + 1)] for part in range(3))
                o = out[8 * head : 8 * (head + 1)]
                expected = {"W_QK": q @ k.T, "W_OV": v @ o, "W_Q": q, "W_O": o}
                for name, matrix in expected.items():
                    spectrum = np.linalg.svd(matrix, compute_uv=False)[:8]
                    assert np.allclose(values[step, name, layer, head], spectrum, rtol=1e-9, atol=1e-12)
            fc_in = np.linalg.svd(block.mlp.c_fc.weight.detach().double().numpy(), compute_uv=False)
            assert np.allclose(values[step, "W_in", layer, None], fc_in, rtol=1e-9)


def test_one_folder_is_one_step(lake, folder, models, tmp_path):
    single = folder / "checkpoint-20"
    assert import_checkpoints(lake, single, "zero").imported == [0]
    assert import_checkpoints(lake, single, "named", step=7).imported == [7]
    # A trainer leaves the last weights beside the steps: they come in only when asked for by a step of their own.
    for name in ("config.json", "model.safetensors"):
        shutil.copy(single / name, folder / name)
    assert import_checkpoints(lake, folder, "all").imported == [20, 100]
    assert import_checkpoints(lake, folder, "top", step=120).imported == [120]
    held = load_file(single / "model.safetensors")
    assert torch.equal(
        StateReader(lake, "top").read(120).weights["transformer.wpe.weight"], held["transformer.wpe.weight"]
    )
    # One config.json for all, and files that name their step.
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(single / "config.json", flat)
    save_file(held, flat / "step_000030.safetensors")
    assert import_checkpoints(lake, flat, "flat").imported == [30]
    assert lake.sql("select adapter from runs where run = 'flat'").fetchall() == [("gpt2",)]


def test_an_old_checkpoint_comes_in_without_its_masks_and_with_its_tied_head(lake, tmp_path, models):
    weights = {name.removeprefix("transformer."): weight for name, weight in models[20].state_dict().items()}
    assert "lm_head.weight" in weights
    weights["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    (tmp_path / "config.json").write_text(models[20].config.to_json_string())
    torch.save(weights, tmp_path / "pytorch_model.bin")
    import_checkpoints(lake, tmp_path, "old")
    found = dict(lake.sql("select parameter, tied_to from parameters where run = 'old'").fetchall())
    assert found["wte.weight"] == ["lm_head.weight"]
    assert len(found) == len(list(models[20].named_parameters()))
    assert "h.0.attn.bias" not in found
    # The same as separate copies with equal bits, which is how safetensors holds them.
    (tmp_path / "pytorch_model.bin").unlink()
    save_file({name: weight.clone() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    import_checkpoints(lake, tmp_path, "copied")
    copied = dict(lake.sql("select parameter, tied_to from parameters where run = 'copied'").fetchall())
    assert copied == found


def test_what_is_no_gpt2_checkpoint_is_one_line_and_leaves_nothing(lake, folder, tmp_path, models):
    def refused(message, place=folder, step=None):
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoints(lake, place, "bad", step=step)
        assert "\n" not in str(caught.value)
        assert "bad" not in lake.runs()

    first, second = folder / "checkpoint-20", folder / "checkpoint-100"
    weights, config = (first / "model.safetensors").read_bytes(), (first / "config.json").read_text()

    def with_config(**changed):
        (first / "config.json").write_text(json.dumps({**json.loads(config), **changed}))

    with_config(model_type="llama")
    refused(r"checkpoint-20/config\.json: no model adapter 'llama'; installed are gpt2, symbolic_kv", first)
    with_config(scale_attn_by_inverse_layer_idx=True)
    refused(r"config\.json: adapter gpt2 cannot run scale_attn_by_inverse_layer_idx=True", first)
    with_config(layer_norm_epsilon=0.5)
    refused(r"is another model than .*: layer_norm_epsilon is 0\.5, not 1e-05$")
    with_config(n_embd=48)
    refused(
        r"model\.safetensors is no checkpoint of this config: transformer\.wte\.weight has shape \(61, 24\)",
        first,
    )
    with_config(n_layer=4)
    refused(r"no checkpoint of this config: transformer\.h\.3\.ln_1\.weight is missing", first)
    with_config(n_layer=2)
    refused(
        r"it holds 'transformer\.h\.2\.attn\.c_attn\.bias', which the config's model does not have", first
    )
    (first / "config.json").write_text("{}")
    refused(r"config\.json has no model_type", first)
    (first / "config.json").write_text("[1]")
    refused(r"config\.json holds a list, not the settings of a model", first)
    (first / "config.json").write_text("{")
    refused(r"config\.json cannot be read as JSON", first)
    (first / "config.json").unlink()
    refused(r"checkpoint-20 holds model\.safetensors and no config\.json", first)
    (first / "config.json").write_text(config)

    (first / "model.safetensors").write_bytes(weights[:-100])
    refused(r"model\.safetensors cannot be read as safetensors", first)
    (first / "model.safetensors").unlink()
    refused(r"no model\.safetensors and no pytorch_model\.bin in .*checkpoint-20; it holds config\.json")
    (first / "model-00001-of-00002.safetensors").write_bytes(b"")
    refused(r"in one file: save it again with a larger max_shard_size; it holds", first)
    (first / "model-00001-of-00002.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"wte.weight": Evil()}, first / "pytorch_model.bin")
    refused("unpickles nothing", first)

    (first / "pytorch_model.bin").unlink()
    (first / "model.safetensors").write_bytes(weights)
    named = tmp_path / "named"
    named.mkdir()
    torch.save({"step": 1, "model_state": {"a": torch.zeros(1)}}, named / "step_000001.pt")
    refused("--step is for a folder with config.json and one model.safetensors; the files of", named, step=3)
    refused("Checkpoint directory not found", tmp_path / "absent", step=3)
    shutil.copytree(first, folder / "step_20")
    refused("are both step 20")
    assert second.is_dir()


def test_more_steps_of_another_model_are_refused(lake, folder, tmp_path):
    import_checkpoints(lake, folder / "checkpoint-20", "g")
    small_gpt2(layer_norm_epsilon=0.5).save_pretrained(tmp_path / "other")
    with pytest.raises(InputMismatch):
        import_checkpoints(lake, tmp_path / "other", "g", step=5)


def test_the_command_says_what_it_did_and_a_wrong_folder_makes_no_lake(folder, tmp_path, capsys):
    lake = tmp_path / "made.lake"
    with pytest.raises(SystemExit) as ended:
        main(["import", str(folder), "--lake", str(lake), "--run", "g"])
    assert ended.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["imported"] == [20, 100]
    (folder / "checkpoint-20" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit) as ended:
        main(["import", str(folder / "checkpoint-20"), "--lake", str(tmp_path / "none.lake"), "--run", "g"])
    assert ended.value.code not in (0, None)
    assert "no model adapter 'bert'" in capsys.readouterr().err
    assert not (tmp_path / "none.lake").exists()

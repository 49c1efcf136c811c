"""`lakebed plan` against a lake that was made, and against sizes counted another way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lakebed.cli import main
from lakebed.engine.config import load_config
from lakebed.extractors.sizing import (
    InvalidSize,
    Load,
    Pace,
    plan,
    size_of_config,
    size_of_decoder,
    stepwise_checkpoints,
)

from tests import trained_probe_lake as trained

PACE = Pace(1e12, 1e9, measured=False)


def load(**changed):
    values = {
        "steps": trained.NUM_STEPS,
        "checkpoints": 4,
        "records": 32,
        "events": 196,
        "pairs": 16,
        "scalars": 2,
        "window": 10,
        "anchor_every": 50,
    }
    return Load(**{**values, **changed})


def test_tensors_of_a_plan_are_those_of_a_lake(probe_lake_path):
    """The same number of chunks, and their bytes up to what compression saves."""
    config = trained.config().model
    vocabulary = trained.config().benchmark.vocabulary_size
    size = size_of_decoder(
        config.n_layers, config.n_heads, config.d_model, config.d_ff, vocabulary, config.max_seq_len
    )
    parts = {part.name: part for part in plan(size, load(), PACE)}
    tensors = Path(probe_lake_path) / "tensors" / trained.RUN

    def chunks(quantity):
        found = [path for path in (tensors / quantity).rglob("c/**/*") if path.is_file()]
        return [path for path in found if path.relative_to(tensors / quantity).parts[0] != "step"]

    gradients = chunks("gradients")
    assert parts["gradients"].objects == len(gradients)
    stored = sum(path.stat().st_size for path in gradients)
    # Blocks are padded to a power of two, 64 for 50 steps; NaN padding compresses to nothing.
    assert 0.6 * parts["gradients"].bytes < stored <= 1.02 * parts["gradients"].bytes
    states = [path for quantity in ("exp_avg", "exp_avg_sq") for path in chunks(quantity)]
    # The lake extracted the moments of two more steps, 51 and 52; before the first update there are none.
    assert parts["anchors"].objects == 3 * 4 * len(size.shapes)
    assert len(states) == 2 * (3 + 2) * len(size.shapes)


def test_a_decoders_shapes_are_those_of_the_built_in_one():
    of_config = size_of_config("formation")
    model = load_config("formation").model
    made = size_of_decoder(
        model.n_layers,
        model.n_heads,
        model.d_model,
        model.d_ff,
        load_config("formation").benchmark.vocabulary_size,
        model.max_seq_len,
    )
    assert dict(made.shapes) == dict(of_config.shapes)
    assert made.parameters == 626_048
    assert stepwise_checkpoints(made, load(steps=10)) == 12 * 626_048 * 10


def test_bytes_grow_with_steps_and_checkpoints_and_times_with_bytes():
    size = size_of_config("formation")
    one, two = (
        {
            part.name: part
            for part in plan(size, load(steps=6400 * factor, checkpoints=8 * factor, anchor_every=64), PACE)
        }
        for factor in (1, 2)
    )
    for name in ("gradients", "updates", "activations", "attention", "svd"):
        assert two[name].bytes == pytest.approx(2 * one[name].bytes), name
    assert one["gradients"].seconds == one["gradients"].bytes / PACE.write
    assert one["anchors"].bytes < 0.05 * one["gradients"].bytes
    assert one["gradients"].bytes + one["anchors"].bytes < 0.36 * stepwise_checkpoints(size, load(steps=6400))


def test_the_command_prints_a_table_or_json(capsys):
    words = [
        "plan",
        "--layers",
        "24",
        "--heads",
        "16",
        "--d-model",
        "1792",
        "--flops",
        "1e14",
        "--write",
        "1e9",
    ]
    with pytest.raises(SystemExit) as done:
        main([*words, "--format", "json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert 1.0e9 < found["parameters"] < 1.03e9
    assert not found["timed_here"]
    gradients = next(part for part in found["parts"] if part["name"] == "gradients")
    assert gradients["bytes"] == 4 * found["parameters"] * 10_000
    assert gradients["chunk"] == "1 × 586 × 1792 (4.0 MiB)"
    assert found["bytes"] == pytest.approx(sum(part["bytes"] for part in found["parts"]))
    with pytest.raises(SystemExit) as done:
        main(["plan", "demo"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "gradients" in text
    assert "timed here" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a CONFIG, or a decoder's --layers"),
        (("--layers", "2", "--heads", "2"), "name a CONFIG, or a decoder's --d-model"),
        (("demo", "--d-model", "8"), "--d-model is of a decoder without CONFIG"),
        (("--layers", "2", "--heads", "3", "--d-model", "8"), "--d-model 8 is not a multiple of --heads 3"),
        (("nowhere",), "nowhere"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as done:
        main(["plan", *words])
    assert done.value.code
    assert message in " ".join(capsys.readouterr().err.split())


def test_sizes_that_there_cannot_be():
    with pytest.raises(InvalidSize, match="at least one layer"):
        size_of_decoder(0, 1, 8, 8, 8, 8)

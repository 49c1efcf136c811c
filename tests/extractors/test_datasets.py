"""Datasets svd and weights against dense float64 NumPy, on trained weights."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.extractors.runs import RecordingError
from lakebed.extractors.states import StateReader
from lakebed.extractors.training import train
from lakebed.lake.datasets import SVD_MATRICES, Need
from lakebed.lake.errors import InputMismatch, MissingData, UnknownName
from lakebed.lake.verify import verify

HEADS, WIDTH = 4, 8


def dense(weights, matrix, layer, head):
    """The d×d (or stored) matrix of definitions 1 §H, written with explicit sums over the head's width."""

    def of(name):
        return weights[f"blocks.{layer}.{name}.weight"].numpy().astype(np.float64)

    own = [head * WIDTH + i for i in range(WIDTH)] if head is not None else []
    if matrix == "W_QK":
        return sum(np.outer(of("attn.q_proj")[i], of("attn.k_proj")[i]) for i in own)
    if matrix == "W_OV":
        return sum(np.outer(of("attn.v_proj")[i], of("attn.out_proj")[:, i]) for i in own)
    single = {"W_Q": "attn.q_proj", "W_K": "attn.k_proj", "W_V": "attn.v_proj"}
    if matrix in single:
        return of(single[matrix])[own]
    if matrix == "W_O":
        return of("attn.out_proj")[:, own]
    return of({"W_in": "ff.fc_in", "W_out": "ff.fc_out"}[matrix])


@pytest.mark.parametrize("matrix", SVD_MATRICES)
def test_singular_values_and_vectors_are_those_of_the_dense_matrix(trained_lake, matrix):
    step = 48
    weights = StateReader(trained_lake, "exact").read(step).weights
    mlp = matrix in ("W_in", "W_out")
    values = trained_lake.sql(
        "select layer, head, matrix_rows, matrix_columns, list(singular_value order by rank) from singular_values "
        f"where run = 'exact' and step = {step} and matrix = '{matrix}' group by all order by layer, head"
    ).fetchall()
    assert [(layer, head) for layer, head, *_ in values] == [
        (layer, head) for layer in range(2) for head in ([None] if mlp else range(HEADS))
    ]
    left = trained_lake.tensor("svd", f"{matrix}.U", "exact").read(step)
    right = trained_lake.tensor("svd", f"{matrix}.Vh", "exact").read(step)
    for layer, head, rows, columns, spectrum in values:
        expected = dense(weights, matrix, layer, head)
        assert (rows, columns) == expected.shape
        singular = np.linalg.svd(expected, compute_uv=False)
        assert len(spectrum) == (min(rows, columns) if mlp else WIDTH)
        np.testing.assert_allclose(spectrum, singular[: len(spectrum)], rtol=1e-9)
        assert singular[len(spectrum) :].max(initial=0) < 1e-12
        at = (layer,) if mlp else (layer, head)
        rebuilt = left[at].T.astype(np.float64) @ np.diag(spectrum) @ right[at].astype(np.float64)
        np.testing.assert_allclose(rebuilt, expected, atol=5e-7 * singular[0])


def test_vectors_in_sql_are_the_stored_ones(trained_lake):
    rows = trained_lake.sql(
        "select layer, head, rank, values from singular_vectors where run = 'exact' and step = 24 and matrix = 'W_OV' "
        "and side = 'right' and rank <= 3 order by layer, head, rank"
    ).fetchall()
    stored = trained_lake.tensor("svd", "W_OV.Vh", "exact").read(24)
    assert len(rows) == 2 * HEADS * 3
    for layer, head, rank, values in rows:
        assert np.array_equal(np.array(values, np.float32), stored[layer, head, rank - 1])


def test_a_step_between_anchors_is_as_good_as_one_at_an_anchor(lake, trained_lake, config, benchmark_data):
    """svd of replayed steps equals svd of the same steps of a run that stored them."""
    extract(trained_lake, "exact", [Need("svd")], "5,21")
    extract(trained_lake, "full", [Need("svd")], "5,21")
    rows = trained_lake.sql(
        "select count(*), count(distinct a.step) from singular_values a join singular_values b "
        "using (step, matrix, layer, rank, singular_value) "
        "where a.run = 'exact' and b.run = 'full' and a.head is not distinct from b.head and step in (5, 21)"
    ).fetchall()
    per_step = 2 * (6 * HEADS * WIDTH + 2 * 32)
    assert rows == [(2 * per_step, 2)]


def test_a_second_extraction_makes_nothing_and_other_inputs_are_refused(lake, config, benchmark_data):
    train(lake, "r", config, num_steps=12, benchmark=benchmark_data, anchor_every=4)
    first = extract(lake, "r", [Need("svd"), Need("weights")], "0:12:3")
    assert first.made == {"svd": [0, 3, 6, 9, 12], "weights": [3, 6, 9]}
    assert first.rows > 0
    second = extract(lake, "r", [Need("svd"), Need("weights")], "0:12:3")
    assert second.made == {"svd": [], "weights": []}
    assert second.standing == {"svd": 5, "weights": 5}
    assert len(lake.tensor("weights", "final_norm.bias", "r").steps) == 7
    sql = lake.sql("select count(*) from weights where parameter = 'final_norm.bias' and step = 3").fetchall()
    assert sql == [(1,)]
    assert extract(lake, "r", [Need("moments")], "0:12:3").made == {"moments": [3, 6, 9]}
    for quantity in ("exp_avg", "exp_avg_sq"):
        # Before the first update there are none.
        assert lake.tensor(quantity, "final_norm.bias", "r").steps.tolist() == [3, 4, 6, 8, 9, 12]
    from lakebed.extractors.svd import SVDExtractor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SVDExtractor, "version", 2)
        with pytest.raises(InputMismatch, match="code version 1 in the lake, 2 now"):
            extract(lake, "r", [Need("svd")], "0")


def test_default_steps_are_the_stored_ones(lake, config, benchmark_data):
    train(lake, "r", config, num_steps=10, benchmark=benchmark_data, anchor_every=4)
    assert extract(lake, "r", [Need("svd")]).made == {"svd": [0, 4, 8, 10]}


def test_what_cannot_be_extracted_is_one_line(trained_lake):
    for call, error, message in (
        (
            lambda: extract(trained_lake, "nope", [Need("svd")]),
            UnknownName,
            "no run 'nope' in .*; it has exact, full",
        ),
        (
            lambda: extract(trained_lake, "exact", [Need("x")]),
            UnknownName,
            "no dataset 'x' to extract; there are activations, attention, attributions, component_logits",
        ),
        (
            lambda: extract(trained_lake, "exact", [Need("svd")], "5,99"),
            MissingData,
            "has no step 99; it has 0:48",
        ),
        (lambda: extract(trained_lake, "exact", [Need("svd")], "90:99"), MissingData, "has no steps 90:99"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_weight_that_is_not_finite_has_no_svd_and_the_error_says_where(lake, config, benchmark_data):
    import torch
    from lakebed.engine.training import TrainingLoop
    from lakebed.extractors import Recorder
    from lakebed.extractors.runs import RunInfo

    loop = TrainingLoop(config, benchmark_data)
    info = RunInfo(adapter="symbolic_kv", config=config.canonical_json())
    with Recorder(lake, "r", loop.model, loop.optimizer, anchor_every=2, info=info):
        loop.train_step()
        handle = loop.model.blocks[1].attn.q_proj.weight.register_hook(
            lambda gradient: gradient * float("nan")
        )
        loop.train_step()
        handle.remove()
    with pytest.raises(RecordingError, match="svd of W_QK at step 2 of run 'r'"):
        extract(lake, "r", [Need("svd")], "0:2")
    assert lake.dataset_steps("r", "svd") == [0, 1]
    assert torch.isnan(StateReader(lake, "r").read(2).weights["blocks.1.attn.q_proj.weight"]).any()


def test_two_processes_extract_the_same_units_at_once(lake, config, benchmark_data):
    train(lake, "r", config, num_steps=24, benchmark=benchmark_data, anchor_every=8)
    command = "from lakebed.cli import main; main()"
    arguments = ["extract", "svd", "--lake", lake.uri, "--run", "r", "--steps", "0:24:2", "--threads", "1"]
    workers = [
        subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        printed, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        assert json.loads(printed)["made"]["svd"] <= 13
    lake.refresh()
    assert lake.dataset_steps("r", "svd") == list(range(0, 25, 2))
    counts = lake.sql(
        "select count(*), count(distinct (step, matrix, layer, head, rank)) from singular_values"
    ).fetchall()
    per_step = 2 * (6 * HEADS * WIDTH + 2 * 32)
    assert counts == [(13 * per_step, 13 * per_step)]
    assert list(lake.tensor("svd", "W_QK.U", "r").steps) == list(range(0, 25, 2))
    assert verify(lake).ok


def test_verify_replays_every_block_and_names_the_one_that_differs(lake, config, benchmark_data):
    from lakebed.extractors.replay import verify_replay
    from lakebed.lake.receipts import Unit

    train(lake, "r", config, num_steps=12, benchmark=benchmark_data, anchor_every=4)
    train(lake, "window", config, num_steps=12, benchmark=benchmark_data, anchor_every=4, record="4:8")
    good = verify_replay(lake)
    assert (good.replayed, good.differing) == ({"r": 12, "window": 4}, [])
    # A run whose stored gradients were those of other steps: every checksum is right, and the replay is not.
    rows = lake.receipts.get("r", "trace-00000005-00000008")
    entry = next(tensor for tensor in rows.tensors if tensor.quantity == "gradients")
    name = "blocks.0.attn.q_proj.weight"
    changed = lake.tensor("gradients", name, "r").read([5, 6, 7, 8]) * np.float32(1.5)
    with lake.unit(Unit("trace", "r", "forged")) as writer:
        block = writer.tensor_rows("gradients", entry.steps, 4)
        block.first_row = entry.first_row
        block.write(name, changed)
        block.steps = ()
    found = verify_replay(lake, "r")
    assert found.replayed == {"r": 8}
    assert len(found.differing) == 1
    assert "replaying steps 4 to 8 gives another" in found.differing[0]

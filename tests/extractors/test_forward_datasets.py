"""Datasets of forward passes against a float64 NumPy decoder with whole attention matrices, on a trained checkpoint."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
import pytest
import torch
from lakebed.extractors.states import StateReader
from lakebed.lake import Lake
from lakebed.lake.interventions import ZERO_EACH, intervention_parameters

from tests import trained_probe_lake as trained
from tests.plain_decoder import PlainDecoder, norm

HEADS = 4
# Every record counts the same, so a few of each split stand for all.
EXAMPLES = (0, 1, 9, 17, 18, 25, 31)


class Checked:
    """The extracted lake, and the same run computed plainly at one step."""

    def __init__(self, path, step, probe="probe"):
        self.lake, self.step, self.probe = Lake.open(path), step, probe
        self.weights = StateReader(self.lake, trained.RUN).read(step).weights
        self.decoder = PlainDecoder(self.weights, HEADS)

    def rows(self, query):
        """Rows as dicts; the query may use {at} for the probe and step."""
        found = self.lake.sql(query.format(at=f"probe = '{self.probe}' and step = {self.step}"))
        return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]

    @cached_property
    def records(self):
        rows = self.lake.sql(
            f"select example, tokens from probe_examples where probe = '{self.probe}'"
        ).fetchall()
        return dict(rows)

    @cached_property
    def passes(self):
        return {example: self.decoder.run(self.records[example]) for example in EXAMPLES}

    @cached_property
    def events(self):
        rows = self.lake.sql(
            "select event, example, prediction_position as p, answer_token as y, competitors from events "
            f"where probe = '{self.probe}' order by event"
        )
        found = [dict(zip(rows.columns, row, strict=True)) for row in rows.fetchall()]
        return {row["event"]: row for row in found if row["example"] in EXAMPLES}

    def positions(self, event, role):
        return [position for position in self._roles[event, role] if position <= self.events[event]["p"]]

    @cached_property
    def _roles(self):
        rows = self.lake.sql(
            f"select event, role, list(position order by position) from positions where probe = '{self.probe}' "
            "and kind = 'role' group by all"
        ).fetchall()
        return {(event, role): positions for event, role, positions in rows}

    def readout(self, event, logits):
        about = self.events[event]
        wrong = max(about["competitors"], key=lambda token: logits[token])
        peak = logits.max()
        return {
            "answer_logit": logits[about["y"]],
            "best_wrong_logit": logits[wrong],
            "value_margin": logits[about["y"]] - logits[wrong],
            "answer_log_prob": logits[about["y"]] - peak - np.log(np.exp(logits - peak).sum()),
        }, {
            "best_wrong_token": wrong,
            "best_token": logits.argmax(),
            "correct": logits.argmax() == about["y"],
        }

    @cached_property
    def gradients(self):
        """Event to (w, g by autograd, the same with the standard deviation a constant, margin)."""
        found = {}
        for event, about in self.events.items():
            run = self.passes[about["example"]]
            z = torch.tensor(run.stages["layer_1_post_mlp"][about["p"]], requires_grad=True)
            wrong = max(about["competitors"], key=lambda token: run.logits[about["p"], token])
            difference = torch.tensor(self.decoder.U[about["y"]] - self.decoder.U[wrong])
            gain, bias = (torch.tensor(self.decoder.w[f"final_norm.{leaf}"]) for leaf in ("weight", "bias"))
            both = []
            for frozen in (False, True):
                deviation = (z.var(unbiased=False) + 1e-5).sqrt()
                deviation = deviation.detach() if frozen else deviation
                margin = difference @ ((z - z.mean()) / deviation * gain + bias)
                both.append(torch.autograd.grad(margin, z)[0].numpy())
            found[event] = wrong, *both, margin.item(), float(difference @ bias)
        return found


@pytest.fixture(scope="module", params=[0, 150])
def checked(request, probe_lake_path):
    made = Checked(probe_lake_path, request.param)
    yield made
    made.lake.close()


def near(actual, wanted, tolerance=2e-5):
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


def test_readouts(checked):
    rows = checked.rows("select * from readouts where {at}")
    assert len(rows) == 196 * 7
    for row in rows:
        if row["event"] not in checked.events:
            continue
        about = checked.events[row["event"]]
        run = checked.passes[about["example"]]
        x = run.stages.get(row["stage"])
        if row["stage"] == "logits":
            logits = run.logits[about["p"]]
        else:
            x = x[about["p"]]
            logits = (x if row["stage"] == "final_norm" else checked.decoder.final(x)) @ checked.decoder.U.T
        numbers, exact = checked.readout(row["event"], logits)
        for name, value in numbers.items():
            near(row[name], value)
        assert {name: row[name] for name in exact} == exact


def test_attention(checked):
    rows = checked.rows("select * from attention_patterns where {at} and query_role = 'prediction'")
    assert len(rows) == 196 * 8
    for row in rows:
        if row["event"] not in checked.events:
            continue
        about = checked.events[row["event"]]
        run, p = checked.passes[about["example"]], about["p"]
        assert row["query_position"] == p
        near(row["scores"], run.scores[row["layer"], row["head"]][p, : p + 1].tolist())
        near(row["probabilities"], run.attention[row["layer"], row["head"]][p, : p + 1].tolist())
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-6)
    unnested = checked.rows("select sum(query_position + 1) as wanted from attention_patterns where {at}")
    assert unnested == checked.rows("select count(*) as wanted from attention where {at}")


def test_head_writes(checked):
    rows = checked.rows("select * from head_writes where {at}")
    roles = {"support_key", "support_op", "support_value", "support_write"}
    assert len(rows) == 196 * 8 * 5
    for row in rows:
        if row["event"] not in checked.events:
            continue
        event, about = row["event"], checked.events[row["event"]]
        run = checked.passes[about["example"]]
        if row["role"] == "write":
            write = run.writes[f"L{row['layer']}H{row['head']}"][about["p"]]
        else:
            roles.discard(row["role"])
            write = run.values[row["layer"], row["head"]][checked.positions(event, row["role"])].mean(0)
        numbers, exact = checked.readout(event, checked.decoder.U @ write)
        for name in ("answer_logit", "best_wrong_logit", "value_margin"):
            near(row[name], numbers[name])
        assert row["best_wrong_token"] == exact["best_wrong_token"]
        _, gradient, frozen, *_ = checked.gradients[event]
        near(row["margin_dla"], write @ gradient)
        near(row["margin_dla_frozen"], write @ frozen)
    assert not roles


def test_component_logits_and_that_the_frozen_ones_add_up_to_the_margin(checked):
    rows = checked.rows("select * from component_logits where {at}")
    assert len(rows) == 196 * (1 + 2 * (4 + 1 + 1) + 1)
    sums: dict[int, list[float]] = {}
    for row in rows:
        if row["event"] not in checked.events:
            continue
        about = checked.events[row["event"]]
        _, gradient, frozen, _, bias = checked.gradients[row["event"]]
        name = row["component"]
        held = sums.setdefault(row["event"], [0.0, 0.0])
        held[0] += row["margin_dla"]
        held[1] += row["margin_dla_frozen"]
        if name == "final_norm_bias":
            assert row["margin_dla"] == 0
            near(row["margin_dla_frozen"], bias)
            continue
        write = checked.passes[about["example"]].writes[name][about["p"]]
        near(row["margin_dla"], write @ gradient)
        near(row["margin_dla_frozen"], write @ frozen)
        layer = None if name == "embedding" else int(name[1])
        head = int(name[3]) if row["component_type"] == "attention_head" else None
        assert (row["layer"], row["head"]) == (layer, head)
    for event, (differentiated, frozen) in sums.items():
        margin = checked.gradients[event][3]
        assert frozen == pytest.approx(margin, abs=1e-4)
        assert abs(differentiated) < 2e-3  # LayerNorm is scale-invariant up to its epsilon
    every = checked.rows(
        "select max(abs(total - value_margin)) as worst from (select event, sum(margin_dla_frozen) as total "
        "from component_logits where {at} group by event) join (select event, value_margin from readouts where {at} "
        "and stage = 'logits') using (event)"
    )
    assert every[0]["worst"] < 1e-4


@pytest.mark.parametrize("mode", ["head_ln1", "none"])
def test_qk_coordinates_at_every_rank(checked, mode):
    rows = checked.rows(f"select * from qk_coordinates where {{at}} and layernorm_mode = '{mode}'")
    held = {(row["example"], row["position"]): row for row in rows}
    sigma = np.array(
        [
            row["singular_value"]
            for row in checked.rows(
                f"select singular_value from singular_values where step = {checked.step} and matrix = 'W_QK' "
                "and layer = 1 and head = 1 order by rank"
            )
        ]
    )
    decoder = checked.decoder
    (wq, bq), (wk, bk) = decoder.part(1, "attn.q_proj", 1), decoder.part(1, "attn.k_proj", 1)
    left, values, right = np.linalg.svd(wq.T @ wk)
    stored = {
        side: checked.lake.tensor("svd", f"W_QK.{side}", trained.RUN).read(checked.step)[1, 1]
        for side in ("U", "Vh")
    }
    for event, about in checked.events.items():
        x = checked.passes[about["example"]].stages[trained.STAGE]
        y = norm(x, *decoder.part(1, "ln_1")) if mode == "head_ln1" else x
        query, keys = y[about["p"]], checked.positions(event, "support_write")
        mine = held[about["example"], about["p"]]
        near(mine["query"], (stored["U"].astype(float) @ query).tolist())
        for key in keys:
            other = held[about["example"], key]
            near(other["key"], (stored["Vh"].astype(float) @ y[key]).tolist())
            products = sigma * np.array(mine["query"]) * np.array(other["key"])
            for rank in (1, 3, 8):
                truncated = query @ (left[:, :rank] * values[:rank]) @ right[:rank] @ y[key]
                near(products[:rank].sum(), truncated, 1e-4)
            full = (products.sum() + mine["query_bias"] + other["key_bias"]) / np.sqrt(8)
            near(full, (wq @ query + bq) @ (wk @ y[key] + bk) / np.sqrt(8), 1e-4)
            if mode == "head_ln1":  # the stage this head reads: it is the model's own score
                near(full, checked.passes[about["example"]].scores[1, 1][about["p"], key], 1e-4)


def test_activations_in_both_layouts(checked):
    for layout, count in (("roles", None), ("all", sum(map(len, checked.records.values())))):
        places = checked.lake.sql(
            f"select row, example, position from activation_rows where probe = 'probe' and layout = '{layout}' order by row"
        ).fetchall()
        assert count in (None, len(places))
        for stage in ("embedding", "layer_0_post_attn", "layer_1_post_mlp", "final_norm"):
            array = checked.lake.tensor("activations", f"probe/{layout}/{stage}", trained.RUN).read(
                checked.step
            )
            assert array.shape == (len(places), 32)
            for row, example, position in places:
                if example in checked.passes:
                    wanted = checked.passes[example].stages[stage][position]
                    np.testing.assert_allclose(array[row], wanted, rtol=2e-5, atol=2e-5)


def test_interventions(checked):
    rows = checked.rows("select * from interventions where {at}")
    assert len(rows) == 196 * 10 * 4
    examples = EXAMPLES[:3]
    without = {
        (example, name): checked.decoder.run(checked.records[example], name)
        for example in examples
        for name in ("L0H2", "L1H0", "L0MLP", "L1MLP")
    }
    seen = 0
    for row in rows:
        about = checked.events.get(row["event"])
        run = None if about is None else without.get((about["example"], row["intervention"]))
        if run is None:
            continue
        seen += 1
        baseline = checked.passes[about["example"]]
        for column, of in (("baseline", baseline), ("intervened", run)):
            numbers, exact = checked.readout(row["event"], of.logits[about["p"]])
            near(row[column], {**numbers, "correct": float(exact["correct"])}[row["scalar"]])
    assert seen == 4 * 4 * sum(about["example"] in examples for about in checked.events.values())
    spec = checked.lake.sql("select parameters from specs where dataset = 'interventions'").fetchall()
    assert [json.loads(text) for (text,) in spec] == [intervention_parameters(ZERO_EACH)]


def test_writes_and_biases_rebuild_the_last_stage(checked):
    """The reference's own identity, so that what the rows are checked against is itself whole."""
    for run in checked.passes.values():
        np.testing.assert_allclose(sum(run.writes.values()), run.stages["layer_1_post_mlp"], atol=1e-12)


def test_rows_are_stored_in_the_order_of_their_key(checked):
    import pyarrow.parquet as pq
    from lakebed.lake.schema import TABLES

    for name in (
        "readouts",
        "attention_patterns",
        "head_writes",
        "component_logits",
        "qk_coordinates",
        "intervention_runs",
    ):
        for entry in checked.lake.table_files(name, trained.RUN):
            table = pq.read_table(checked.lake.storage.path(entry.path), partitioning=None)
            key = [column for column in TABLES[name].key if column != "run"]
            rows = list(zip(*(table[column].to_pylist() for column in key), strict=True))
            assert rows == sorted(rows), name
            assert len(set(rows)) == len(rows)

"""Datasets of intervals: what is made, once; the update's split against the recorded norms; and what is refused."""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.scalars import Evaluation, Scalar, ScalarError
from lakebed.engine.tap import TrainingState
from lakebed.extractors import attributions as attributions_module
from lakebed.extractors.interval import NonFiniteUpdate
from lakebed.extractors.plan import extract
from lakebed.extractors.probes import build_probe
from lakebed.extractors.runs import RunInfo, model_parameters, register_run
from lakebed.extractors.states import StateReader
from lakebed.extractors.trace_writer import write_state
from lakebed.lake import Lake
from lakebed.lake.datasets import ATTRIBUTIONS, UPDATE_NORMS, Need, attribution_parameters
from lakebed.lake.errors import InputMismatch, MissingData, UnknownName
from lakebed.lake.verify import verify

RUN = "exact"
SCALAR = {
    "head": "L1H1",
    "rank": 2,
    "stage": "layer_0_post_mlp",
    "layernorm_mode": "head_ln1",
    "record_side": "clean",
    "score_query_role": "prediction",
    "support_key_role": "support_value",
    "distractor_key_role": "value_distractors",
}


def need(integrate=0, pair_type=("support_value",), split=(), most=6, probe="probe", **changed) -> Need:
    return Need(
        ATTRIBUTIONS,
        attribution_parameters(
            "qk_rank_separation",
            {**SCALAR, **changed},
            pair_type=pair_type,
            split=split,
            max_pairs_per_type=most,
            integrate=integrate,
            probe=probe,
        ),
    )


@pytest.fixture(scope="session")
def probed_path(tmp_path_factory, trained, benchmark_data):
    path = tmp_path_factory.mktemp("attributed") / "a.lake"
    shutil.copytree(trained, path)
    with Lake.open(path) as lake:
        build_probe(lake, RUN, examples_per_split=4, max_pairs_per_type=6, benchmark=benchmark_data)
    return path


@pytest.fixture
def lake(probed_path, tmp_path):
    copy = tmp_path / "copy.lake"
    shutil.copytree(probed_path, copy)
    with Lake.open(copy) as opened:
        yield opened


def rows(lake, sql):
    return lake.sql(sql).fetchall()


def test_an_interval_is_made_once_and_a_longer_one_is_another(lake):
    first = extract(lake, RUN, [need(), Need(UPDATE_NORMS)], "8:12")
    assert first.made == {ATTRIBUTIONS: [9, 10, 11, 12], UPDATE_NORMS: [9, 10, 11, 12]}
    again = extract(lake, RUN, [need(), Need(UPDATE_NORMS)], "8:14")
    assert again.made == {ATTRIBUTIONS: [13, 14], UPDATE_NORMS: [13, 14]}
    assert again.standing == {ATTRIBUTIONS: 4, UPDATE_NORMS: 4}
    longer = extract(lake, RUN, [need()], "8,12,14")
    assert longer.made == {ATTRIBUTIONS: [12, 14]}
    held = lake.dataset_intervals(RUN, ATTRIBUTIONS, need().parameters)
    assert held == {*pairwise(range(8, 15)), (8, 12), (12, 14)}
    ends = set(rows(lake, "SELECT DISTINCT source_step, target_step FROM attribution_slices"))
    assert ends == held
    assert verify(lake).ok


def test_terms_are_known_between_recorded_steps_only_and_add_up(lake):
    extract(lake, RUN, [need(), Need(UPDATE_NORMS)], "0:4")
    extract(lake, RUN, [need(), Need(UPDATE_NORMS)], "4,16,40")
    for source, target, gap in rows(
        lake,
        "SELECT source_step, target_step, max(abs(actual_update - adam_current_gradient - adam_historical_momentum "
        "- weight_decay - residual)) FROM attribution_slices GROUP BY ALL ORDER BY ALL",
    ):
        assert (gap is None) == (target > source + 1)
        assert gap is None or gap < 1e-15
    # Before the first step there are no moments, so nothing is carried.
    ((momentum,),) = rows(
        lake, "SELECT max(abs(adam_historical_momentum)) FROM attribution_slices WHERE source_step = 0"
    )
    assert momentum == 0
    # float32 rounding of the weights is all that is left over.
    ((left, moved),) = rows(
        lake,
        "SELECT sqrt(max(residual_squared)), sqrt(max(actual_update_squared)) FROM update_slices WHERE source_step = 3",
    )
    assert 0 < left < 1e-4 * moved


def test_norms_are_those_that_were_recorded(lake):
    """Table parameter_updates was summed while training, by other code."""
    extract(lake, RUN, [Need(UPDATE_NORMS)], "0:12")
    pairs = {
        "actual_update": "delta_l2",
        "raw_sgd": "raw_sgd_l2",
        "clipped_sgd": "clipped_sgd_l2",
        "adam_current_gradient": "current_gradient_l2",
        "adam_historical_momentum": "momentum_l2",
        "weight_decay": "weight_decay_l2",
    }
    for mine, recorded in pairs.items():
        found = rows(
            lake,
            f"SELECT sqrt(n.{mine}_squared), u.{recorded} FROM update_slices n JOIN parameter_updates u ON u.run = n.run "
            "AND u.step = n.target_step AND u.parameter = n.slice WHERE n.slice_kind = 'parameter' AND n.run = 'exact'",
        )
        assert len(found) > 300
        np.testing.assert_allclose(*np.array(found).T, rtol=1e-6, atol=1e-12, err_msg=mine)


def test_norms_of_sums_are_those_of_the_sums(lake):
    """Adam's two terms, and those with the decay, by the recorded step's own replay."""
    extract(lake, RUN, [Need(UPDATE_NORMS)], "5:6")
    reader = StateReader(lake, RUN)
    before = {name: of.double().clone() for name, of in reader.read(5).weights.items()}
    after = reader.read(6).weights
    for name, squared in rows(
        lake, "SELECT slice, reconstructed_squared FROM update_slices WHERE slice_kind = 'parameter'"
    ):
        moved = (after[name].double() - before[name]).square().sum()
        assert squared == pytest.approx(float(moved), rel=1e-3, abs=1e-14)


@pytest.mark.parametrize(("steps", "points", "within"), [("32,48", 8, 1e-3), ("0,40", 48, 1e-3)])
def test_path_contributions_add_up_to_the_actual_change(lake, steps, points, within):
    """Gauss-Legendre along the straight path; from initialization, where LayerNorm bends it most, more points are needed."""
    extract(lake, RUN, [need(integrate=points)], steps)
    ((actual,),) = rows(
        lake, "SELECT avg(target_value - source_value) FROM scalar_changes WHERE quantity = 'value'"
    )
    sums = dict(
        rows(
            lake,
            "SELECT point, sum(actual_update) FROM attribution_slices WHERE slice_kind = 'parameter' AND split = '__all__' "
            "GROUP BY point",
        )
    )
    assert sums["path"] == pytest.approx(actual, rel=within)
    assert abs(sums["source"] - actual) > 10 * abs(sums["path"] - actual)


def test_cells_are_pooled_by_pairs(lake):
    """Gradients are linear in pairs: a pooled cell is the pair-weighted mean of the finest ones, in every part."""
    wanted = need(pair_type=("support_value", "recency"), most=64)
    extract(lake, RUN, [wanted], "16,32")
    cells = rows(
        lake,
        "SELECT split, pair_type, any_value(num_pairs) FROM attribution_slices GROUP BY ALL ORDER BY ALL",
    )
    counts = {(split, kind): count for split, kind, count in cells}
    splits = {split for split, _ in counts} - {"__all__"}
    assert len(splits) > 1
    assert {kind for _, kind in counts} == {"__all__", "support_value", "recency"}
    pairs = [counts[split, kind] for split, kind in counts if "__all__" not in (split, kind)]
    assert counts["__all__", "__all__"] == sum(pairs) > 40
    value = {
        (split, kind, part): (of, total)
        for split, kind, part, of, total in rows(
            lake, "SELECT split, pair_type, slice, actual_update, num_pairs FROM attribution_slices"
        )
    }
    for part in ("blocks.0.attn.q_proj.weight", "L0N3", "L1H1.k_proj"):
        of, total = value["__all__", "__all__", part]
        summed = sum(
            held * count
            for (split, kind, name), (held, count) in value.items()
            if name == part and split != "__all__" and kind != "__all__"
        )
        assert of * total == pytest.approx(summed, rel=1e-5, abs=1e-9)


def test_one_split_and_one_type_make_one_cell(lake):
    extract(lake, RUN, [need(split=("validation_iid",))], "16,32")
    assert rows(lake, "SELECT DISTINCT split, pair_type FROM attribution_slices") == [("__all__", "__all__")]


def test_the_long_view_has_a_row_per_term(lake):
    extract(lake, RUN, [need()], "8:9")
    long = dict(
        rows(
            lake,
            "SELECT term, sum(value) FROM attributions WHERE slice_kind = 'parameter' AND split = '__all__' GROUP BY term",
        )
    )
    wide = rows(
        lake,
        "SELECT sum(actual_update), sum(weight_decay) FROM attribution_slices WHERE slice_kind = 'parameter' "
        "AND split = '__all__'",
    )[0]
    assert (long["actual_update"], long["weight_decay"]) == pytest.approx(wide)
    assert len(long) == 7


def test_an_interrupted_extraction_keeps_what_was_finished(lake, monkeypatch):
    write = attributions_module.AttributionsExtractor.write

    def fails(self, context, writer, *, interval):
        if interval.target_step == 11:
            raise KeyboardInterrupt
        write(self, context, writer, interval=interval)

    with monkeypatch.context() as patch:
        patch.setattr(attributions_module.AttributionsExtractor, "write", fails)
        with pytest.raises(KeyboardInterrupt):
            extract(lake, RUN, [need()], "8:14")
    assert lake.dataset_intervals(RUN, ATTRIBUTIONS, need().parameters) == {(8, 9), (9, 10)}
    assert verify(lake).ok
    assert extract(lake, RUN, [need()], "8:14").made == {ATTRIBUTIONS: [11, 12, 13, 14]}


def test_what_is_shared_or_split_over_calls_is_the_same(lake, probed_path, tmp_path):
    """Two scalars at once, or one after the other; a window at once, or in two halves."""
    other = need(rank=4)
    extract(lake, RUN, [need(), other], "8:12")
    apart = tmp_path / "apart.lake"
    shutil.copytree(probed_path, apart)
    with Lake.open(apart) as second:
        for steps in ("10:12", "8:10"):
            extract(second, RUN, [other], steps)
            extract(second, RUN, [need()], steps)
        query = "SELECT * FROM attribution_slices ORDER BY spec, source_step, split, slice_kind, slice"
        a, b = lake.sql(query).pl(), second.sql(query).pl()
    assert a.equals(b)


@pytest.mark.parametrize(
    ("wanted", "steps", "error", "message"),
    [
        (need(head="L5H0"), "8:9", ScalarError, "no head L5H0; this run has layers 0–1, heads 0–3"),
        (need(rank=9), "8:9", ScalarError, "rank 9 exceeds the width of a head, 8"),
        (
            need(stage="layer_7_post_mlp"),
            "8:9",
            ScalarError,
            "no stage 'layer_7_post_mlp'; this run has embedding",
        ),
        (need(support_key_role="value_distractors"), "8:9", ScalarError, "are both 'value_distractors'"),
        (need(support_key_role="nobody"), "8:9", ScalarError, "no role 'nobody'; these pairs have"),
        (need(pair_type=("sideways",)), "8:9", UnknownName, "no pair type 'sideways'; there are query_key"),
        (need(pair_type=()), "8:9", UnknownName, "name a type, of query_key"),
        (
            need(split=("elsewhere",)),
            "8:9",
            MissingData,
            "no causal patch pairs of type support_value in split elsewhere",
        ),
        (need(probe="other"), "8:9", MissingData, "Probe-set not found"),
        (need(), "8", MissingData, "made between two steps, and --steps leaves 8"),
        (need(most=7, record_side="corrupted"), "8:9", MissingData, "keeps no corrupted record for"),
    ],
)
def test_what_is_not_there_is_one_line_that_says_what_is(lake, wanted, steps, error, message):
    with pytest.raises(error, match=message) as caught:
        extract(lake, RUN, [wanted], steps)
    assert "\n" not in str(caught.value)
    assert rows(lake, "SELECT count(*) FROM attribution_slices") == [(0,)]


def test_another_probe_under_the_same_name_is_refused(lake, benchmark_data):
    extract(lake, RUN, [need()], "8:9")
    for receipt in lake.receipts.all(RUN, "probe"):
        lake.storage.remove(receipt.key)
    build_probe(lake, RUN, examples_per_split=3, max_pairs_per_type=6, benchmark=benchmark_data)
    with pytest.raises(InputMismatch, match="made from other inputs"):
        extract(lake, RUN, [need()], "8:9")


def register(lake, config, name):
    """A run of the same model whose states are written one by one, as an import does."""
    info = RunInfo(source="import", adapter="symbolic_kv", config=config.canonical_json(), seed=1)
    model = SymbolicKVDecoder(config.model, config.benchmark.vocabulary_size)
    register_run(lake, name, info, model_parameters(model, {}))


def test_neighbouring_steps_that_nobody_recorded_have_no_terms(lake, config, benchmark_data):
    """Weights of both ends alone: what the update was is known, not what it is the sum of."""
    register(lake, config, "imported")
    for step, state in enumerate(StateReader(lake, RUN).iterate([16, 17])):
        held = {name: of.clone() for name, of in state.weights.items()}
        write_state(lake, "imported", step, TrainingState(held, {}, {}), f"state {step}")
    build_probe(lake, "imported", examples_per_split=4, max_pairs_per_type=6, benchmark=benchmark_data)
    extract(lake, "imported", [need(), Need(UPDATE_NORMS)], "0:1")
    extract(lake, RUN, [need()], "16:17")
    found = rows(
        lake,
        "SELECT run, sum(actual_update), sum(raw_sgd), sum(weight_decay) FROM attribution_slices "
        "WHERE slice_kind = 'parameter' AND split = '__all__' GROUP BY run ORDER BY run",
    )
    (_, recorded, sgd, decay), (_, imported, *terms) = found
    assert imported == pytest.approx(recorded, rel=1e-9)
    assert sgd is not None
    assert decay is not None
    assert terms == [None, None]


def test_a_step_beyond_the_recording_is_named(lake):
    with pytest.raises(MissingData, match=r"run 'exact' has no step 49; it has 0:48.*lakebed trace"):
        extract(lake, RUN, [need()], "48,49")


class Constant(Scalar):
    """A number that depends on nothing."""

    name: ClassVar[str] = "constant"

    @property
    def sides(self):
        return ("clean",)

    def evaluate(self, passes, basis, frozen):
        return Evaluation(torch.ones(passes.pairs.count))


def test_a_scalar_that_reaches_no_parameter_is_refused(lake, monkeypatch):
    monkeypatch.setattr(attributions_module, "build_scalar", lambda name, parameters: Constant())
    wanted = Need(ATTRIBUTIONS, attribution_parameters("constant", {}, pair_type=("support_value",)))
    with pytest.raises(ScalarError, match="scalar constant reaches no parameter: it has no gradient"):
        extract(lake, RUN, [wanted], "8:9")


def test_weights_that_are_not_finite_are_refused(lake, config):
    reader = StateReader(lake, RUN)
    weights = {name: of.clone() for name, of in reader.read(16).weights.items()}
    register(lake, config, "broken")
    write_state(lake, "broken", 0, TrainingState(weights, {}, {}), "zero")
    damaged = {**weights, "blocks.1.ff.fc_in.weight": weights["blocks.1.ff.fc_in.weight"] * torch.inf}
    write_state(lake, "broken", 1, TrainingState(damaged, {}, {}), "one")
    with pytest.raises(NonFiniteUpdate, match=r"blocks\.1\.ff\.fc_in\.weight from step 0 to 1 is not finite"):
        extract(lake, "broken", [Need(UPDATE_NORMS)], "0:1")

"""Sampling a probe: the published bytes, the same records for the same seed, and every refusal."""

import hashlib

import pytest
from lakebed.engine.symbolic_kv import benchmark_jsonl
from lakebed.engine.symbolic_kv.probes import DEFAULT_SPLITS, ProbeSamplingError, sample_probe


def sha256(records):
    return hashlib.sha256(benchmark_jsonl(records).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("splits", "examples", "published"),
    [
        (DEFAULT_SPLITS, 24, "d4affb2942873966"),
        (DEFAULT_SPLITS, 96, "bf3f05fa388ef677"),
        (("train",), 96, "9337ea39e47ffecd"),
    ],
)
def test_the_published_probes(formation, splits, examples, published):
    records = sample_probe(formation.splits, splits, examples, seed=17)
    assert sha256(records) == published
    assert [record["split"] for record in records] == [split for split in splits for _ in range(examples)]


@pytest.mark.parametrize(("examples", "events"), [(24, 153), (96, 621)])
def test_the_published_query_events(formation, examples, events):
    records = sample_probe(formation.splits, examples_per_split=examples)
    of_split = [record for record in records if record["split"] == "validation_iid"]
    assert sum(len(record["query_events"]) for record in of_split) == events


def test_records_are_the_benchmarks_own_and_depend_on_the_seed(formation):
    records = sample_probe(formation.splits, ("test_iid",), 30, seed=5)
    own = {record["sample_id"]: record for record in formation.splits["test_iid"]}
    assert all(own[record["sample_id"]] is record for record in records)
    assert len({record["sample_id"] for record in records}) == 30
    assert sample_probe(formation.splits, ("test_iid",), 30, seed=6) != records


def test_sampling_leaves_the_benchmark_as_it_was(formation):
    before = sha256(formation.splits["structural_ood"])
    sample_probe(formation.splits, ("structural_ood",), 100)
    assert sha256(formation.splits["structural_ood"]) == before


def test_the_rarest_axes_come_first_and_every_group_takes_its_turn():
    sizes = {5: 1, 7: 2, 6: 4}
    records = [
        {"sample_id": f"{axis}-{i}", "axes": {"num_queries": axis, "active_keys": 2}}
        for axis, size in sizes.items()
        for i in range(size)
    ]
    chosen = sample_probe({"train": records}, ("train",), 6, seed=1)
    # 5 is emptied at once, so its turn goes to 7; when 7 is emptied only 6 is left.
    assert [record["axes"]["num_queries"] for record in chosen] == [5, 7, 6, 7, 6, 6]


def test_a_split_that_is_small_enough_is_kept_in_file_order_without_the_generator():
    few = [{"sample_id": str(i), "axes": {"a": i % 2}} for i in range(4)]
    many = [{"sample_id": str(i), "axes": {"a": 0}} for i in range(50)]
    both = sample_probe({"few": few, "many": many}, ("few", "many"), 4, seed=2)
    assert both[:4] == few
    assert both[4:] == sample_probe({"many": many}, ("many",), 4, seed=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), 24, 17), "no split to sample from; there are train, validation_iid"),
        ((("train", "test_iid", "train"), 24, 17), "split 'train' is named twice"),
        ((("training",), 24, 17), "no split 'training'; the benchmark has train, validation_iid"),
        ((("",), 24, 17), "no split ''; the benchmark has"),
        ((("train",), 0, 17), "examples per split is 0; it must be at least 1"),
        ((("train",), -3, 17), "examples per split is -3"),
    ],
)
def test_what_cannot_be_sampled(formation, arguments, message):
    with pytest.raises(ProbeSamplingError, match=message):
        sample_probe(formation.splits, *arguments)

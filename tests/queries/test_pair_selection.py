"""Which pairs a report takes: scan order, limits, reasons for none, and the records of the corrupted side."""

from __future__ import annotations

import json
import typing
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.lake import Lake, Unit
from lakebed.lake.datasets import PAIR_TYPES
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries import pair_selection
from lakebed.queries.pair_selection import PairOptions, TooFewPairs
from lakebed.queries.probe_report import HeadReport, ProbeReport
from lakebed.queries.report import InvalidOption
from lakebed.queries.results import Results

KEPT = 3
SPLITS = ("iid", "ood")
REASONS = {
    "query_key": "no_alternative_current_key",
    "support_value": "support_write_used_by_prior_read",
    "recency": "no_same_key_stale_write",
    "distractor": "no_distractor_write",
}


class PairsOnly(PairOptions):
    """A report that shows its pairs; its SQL is in the file beside this one."""

    def needs(self):
        return ()


def made_up_pairs(has_pair):
    """Rows of table pairs: event `e` of split iid or ood, two events a record, a pair where `has_pair[e][type]`."""
    rows, taken, corrupted = [], Counter(), 0
    for event, of_types in enumerate(has_pair):
        split = SPLITS[event >= len(has_pair) // 2]
        for pair_type, there in zip(PAIR_TYPES, of_types, strict=True):
            row = {
                "probe": "probe",
                "clean_event": event,
                "pair_type": pair_type,
                "split": split,
                "source_sample_id": f"{split}_{event // 2}",
                "source_query_index": event % 2,
            }
            if not there:
                rows.append({**row, "skip_reason": REASONS[pair_type]})
                continue
            row["pair_id"] = f"{pair_type}:{event}"
            if taken[pair_type, split] < KEPT:
                taken[pair_type, split] += 1
                row["corrupted_event"] = corrupted
                corrupted += 1
            rows.append(row)
    return rows


def make_lake(path, has_pair):
    lake = Lake.open_or_create(path)
    made_with = {"examples_per_split": 9, "seed": 4, "splits": list(SPLITS)}
    probe = {"splits": list(SPLITS), "max_pairs_per_type": KEPT, "metadata": json.dumps(made_with)}
    with lake.unit(Unit("run", "ref", "run")) as writer:
        writer.rows("runs", [{"source": "train"}])
    with lake.unit(Unit("probe", "ref", "probe", parameters={"probe": "probe"})) as writer:
        rows = [
            {"probe": "probe", "source": "symbolic_kv", **probe},
            {"probe": "imported", "source": "jsonl", "splits": ["all"]},
        ]
        writer.rows("probes", rows)
        writer.rows("pairs", made_up_pairs(has_pair))
    return lake


HAS_PAIR = [(True, event % 3 != 0, event > 9, False) for event in range(12)]


@pytest.fixture
def lake(tmp_path):
    with make_lake(tmp_path / "pairs.lake", HAS_PAIR) as opened:
        yield opened


def sides(lake, **options):
    report = PairsOnly.parse({"run": "ref", **options})
    with Results(lake, report) as results:
        return results.rows("FROM sides"), report.facts(lake, results)["pair_construction"]


def scanned(has_pair, types, splits, limit):
    """The construction as a loop: (pairs in order, counts, skip reasons, events looked at)."""
    found, skipped, looked = [], {pair_type: Counter() for pair_type in types}, []
    counts = Counter()
    for event, of_types in enumerate(has_pair):
        if SPLITS[event >= len(has_pair) // 2] not in splits:
            continue
        if all(counts[pair_type] >= limit for pair_type in types):
            break
        looked.append(event)
        for pair_type in types:
            if counts[pair_type] >= limit:
                continue
            if of_types[PAIR_TYPES.index(pair_type)]:
                counts[pair_type] += 1
                found.append((event, pair_type))
            else:
                skipped[pair_type][REASONS[pair_type]] += 1
    return found, counts, {pair_type: dict(of) for pair_type, of in skipped.items()}, looked


def test_the_types_are_those_the_lake_names():
    assert typing.get_args(pair_selection.PairType) == PAIR_TYPES


def test_it_combines_with_a_head():
    class Chain(PairOptions, HeadReport):
        """Both."""

        def needs(self):
            return ()

    report = Chain.parse({"head": "L1H0", "pair_type": ["recency"]})
    assert (report.head_label, report.side_probes()) == ("L1H0", ("probe",))
    assert issubclass(Chain, ProbeReport)


@given(
    has_pair=st.lists(st.tuples(*[st.booleans()] * 4), min_size=2, max_size=14),
    types=st.lists(st.sampled_from(PAIR_TYPES), min_size=1, max_size=6),
    splits=st.sampled_from([(), ("iid",), ("ood",), ("ood", "iid")]),
    limit=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_the_pairs_are_those_of_the_scan(tmp_path_factory, has_pair, types, splits, limit):
    types = list(dict.fromkeys(types))
    wanted, counts, skipped, looked = scanned(has_pair, types, splits or SPLITS, limit)
    with make_lake(tmp_path_factory.mktemp("scan") / "l.lake", has_pair) as lake:
        options = {"pair_type": types, "split": list(splits), "max_pairs_per_type": limit}
        if any(counts[pair_type] < 1 for pair_type in types):
            with pytest.raises(TooFewPairs):
                sides(lake, **options)
            return
        rows, construction = sides(lake, **options)
    assert [(row["clean_event"], row["pair_type"]) for row in rows] == wanted
    assert construction == {
        "requested_pair_types": types,
        "max_pairs_per_type": limit,
        "min_pairs_per_type": 1,
        "scanned_records": len({(SPLITS[event >= len(has_pair) // 2], event // 2) for event in looked}),
        "scanned_queries": len(looked),
        "constructed_counts": {pair_type: counts[pair_type] for pair_type in types},
        "skip_reasons": skipped,
    }


def test_both_sides_of_a_pair_and_their_events(lake):
    rows, _ = sides(
        lake, pair_type=["query_key"], max_pairs_per_type=2, record_side=["corrupted", "clean", "clean"]
    )
    found = [(row["record_side"], row["side_probe"], row["side_event"], row["clean_event"]) for row in rows]
    kept = {row["clean_event"]: row.get("corrupted_event") for row in made_up_pairs(HAS_PAIR)[::4]}
    assert found == [
        ("corrupted", "probe.corrupted", kept[0], 0),
        ("corrupted", "probe.corrupted", kept[1], 1),
        ("clean", "probe", 0, 0),
        ("clean", "probe", 1, 1),
    ]


def test_repeated_types_and_sides_count_once_in_the_order_given():
    report = PairsOnly.parse(
        {"pair_type": ["recency", "query_key", "recency"], "record_side": ["corrupted", "clean", "corrupted"]}
    )
    assert report.pair_type == ("recency", "query_key")
    assert report.record_side == ("corrupted", "clean")
    assert report.side_probes() == ("probe.corrupted", "probe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--pair-type is required"),
        ({"pair_type": []}, "--pair-type Tuple should have at least 1 item"),
        (
            {"pair_type": ["swap"]},
            "--pair-type should be 'query_key', 'support_value', 'recency' or 'distractor'",
        ),
        (
            {"pair_type": ["recency"], "max_pairs_per_type": 0},
            "--max-pairs-per-type should be greater than or",
        ),
        (
            {"pair_type": ["recency"], "min_pairs_per_type": -1},
            "--min-pairs-per-type should be greater than or",
        ),
        (
            {"pair_type": ["recency"], "max_pairs_per_type": 4, "min_pairs_per_type": 5},
            "--min-pairs-per-type 5 exceeds --max-pairs-per-type 4",
        ),
        (
            {"pair_type": ["recency"], "record_side": ["both"]},
            "--record-side should be 'clean' or 'corrupted'",
        ),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(InvalidOption, match=message):
        PairsOnly.parse(options)


def test_too_few_pairs_are_counted_with_the_reasons(lake):
    with pytest.raises(TooFewPairs) as refused:
        sides(lake, pair_type=["query_key", "recency", "distractor"], min_pairs_per_type=3, split=["ood"])
    assert str(refused.value) == (
        "Failed to construct the requested minimum causal patch pairs: recency 2, distractor 0, and at least 3 are asked "
        "for (skipped: recency no_same_key_stale_write 4, distractor no_distractor_write 6) in probe 'probe' of split ood: check --pair-type "
        "and --split, lower --min-pairs-per-type, or build a probe with more --examples-per-split"
    )


def test_more_corrupted_records_than_were_kept_name_the_command_that_keeps_more(lake):
    options = {"pair_type": ["query_key"], "max_pairs_per_type": 5}
    assert len(sides(lake, **options)[0]) == 5
    assert len(sides(lake, **{**options, "max_pairs_per_type": KEPT}, record_side=["corrupted"])[0]) == KEPT
    with pytest.raises(MissingData) as refused:
        sides(lake, **options, record_side=["corrupted"])
    assert str(refused.value) == (
        "probe 'probe' of run 'ref' keeps the corrupted records of 3 pairs per type and split, and up to 5 per type are "
        "asked for: lower --max-pairs-per-type to 3, or make another probe. Run: lakebed probe build --lake "
        f"{lake.uri} --run ref --probe probe-5 --examples-per-split 9 --seed 4 --split iid --split ood "
        "--max-pairs-per-type 5"
    )


def test_fewer_pairs_than_were_kept_may_be_asked_for_by_any_number(lake):
    rows, _ = sides(lake, pair_type=["recency"], max_pairs_per_type=500, record_side=["corrupted"])
    assert [row["clean_event"] for row in rows] == [10, 11]


def test_what_the_run_does_not_have(lake):
    with pytest.raises(
        MissingData, match=r"Probe-set not found: .* it has imported, probe\. Run: lakebed probe build"
    ):
        sides(lake, pair_type=["recency"], probe="other")
    with pytest.raises(UnknownName, match="probe 'probe' has no split 'test'; it has iid, ood"):
        sides(lake, pair_type=["recency"], split=["test"])
    with pytest.raises(
        MissingData, match=r"probe 'imported' of run 'ref' has no causal patch pairs \(source jsonl\)"
    ):
        sides(lake, pair_type=["recency"], probe="imported")

"""Causal patch pairs: published counts, changes that stay where they belong, right answers, and every reason for none."""

import copy
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.symbolic_kv import OracleError, Vocabulary
from lakebed.engine.symbolic_kv.pairs import (
    PAIR_TYPES,
    Pair,
    PairTask,
    Skip,
    check_single_query,
    clean_record,
    corrupt,
    find_pair,
)
from lakebed.engine.symbolic_kv.probes import sample_probe
from lakebed.engine.symbolic_kv.records import Plan, Query, build_record
from lakebed.lake.datasets import PAIR_TYPES as NAMED_PAIR_TYPES


def test_the_types_are_those_the_lake_names():
    assert PAIR_TYPES == NAMED_PAIR_TYPES


def test_the_published_counts(formation):
    task = PairTask(formation.vocabulary, formation.held_out)
    found = Counter(
        pair_type
        for record in sample_probe(formation.splits)
        if record["split"] == "validation_iid"
        for event in record["query_events"]
        for pair_type in PAIR_TYPES
        if isinstance(find_pair(task, record, event, pair_type), Pair)
    )
    assert found == {"query_key": 153, "support_value": 140, "recency": 140, "distractor": 153}


def changed_positions(record, event, pair, replay):
    """Where the definitions allow the corrupted tokens to differ."""
    writes = replay(record["tokens"]).writes
    answer = event["positions"]["answer"]

    def value_place(field):
        return writes[pair.mutation[field]]["place"] + 2

    return {
        "query_key": lambda: {event["positions"]["key"], answer},
        "support_value": lambda: {value_place("support_write_index"), answer},
        "recency": lambda: {value_place("support_write_index"), value_place("stale_write_index"), answer},
        "distractor": lambda: {value_place("distractor_write_index")},
    }[pair.pair_type]()


def check_pair(task, record, event, pair, replay):
    clean, corrupted = clean_record(task, record, pair), corrupt(task, record, pair)
    assert clean["token_ids"] == record["token_ids"]
    assert clean["steps"] == record["steps"]
    differing = {
        place
        for place, (one, other) in enumerate(zip(clean["tokens"], corrupted["tokens"], strict=True))
        if one != other
    }
    assert differing == changed_positions(record, event, pair, replay)
    for side, answer in ((clean, pair.clean_answer_value), (corrupted, pair.corrupted_answer_value)):
        read = replay(side["tokens"]).reads[pair.source_query_index]
        (kept,) = side["query_events"]
        # The oracle: what the tokens alone give, for this read and every one before it.
        assert read["support"]["value"] == read["answer"] == kept["answer_value"] == answer
        for prior in replay(side["tokens"]).reads[: pair.source_query_index]:
            assert prior["support"]["value"] == prior["answer"]
        assert (kept["key"], kept["query_index"]) == (read["key"], 0)
        assert kept["support_write_index"] == read["support"]["index"]
        assert kept["support_positions"]["op"] == read["support"]["place"]
        assert kept["positions"] == event["positions"]
        assert kept["tokens_since_support"] == read["place"] - read["support"]["place"]
        assert kept["writes_since_support"] == event["slot_after_write"] - read["support"]["index"]
        status = "heldout" if (read["key"], answer) in task.held_out else "seen"
        assert kept["answer_pair_type"] == status
        assert side["token_ids"] == [task.vocabulary.ids[token] for token in side["tokens"]]
        assert [write["value"] for write in side["writes"]] == [
            write["value"] for write in replay(side["tokens"]).writes
        ]
        assert side["exact_sequence_signature"] == " ".join(side["tokens"])
        assert (side["source_sample_id"], side["source_query_index"]) == (
            record["sample_id"],
            event["query_index"],
        )
    assert clean["sample_id"] == f"{pair.pair_id}:clean"
    assert corrupted["sample_id"] == f"{pair.pair_id}:corrupted"
    check_transfer(task, record, event, pair)


def check_transfer(task, record, event, pair):
    answers = (pair.clean_answer_value, pair.corrupted_answer_value)
    transfer = (pair.clean_transfer_token, pair.corrupted_transfer_token)
    assert pair.clean_answer_value == event["answer_value"]
    if pair.pair_type == "distractor":
        assert answers[0] == answers[1]
        assert transfer[0] != transfer[1]
        key = pair.mutation["distractor_key"]
    else:
        assert answers[0] != answers[1]
        assert transfer == answers
        key = event["key"]
    if pair.pair_type in ("support_value", "distractor"):
        status = (key, transfer[0]) in task.held_out
        used = {write["value"] for write in record["writes"]}
        candidates = [
            value
            for value in task.vocabulary.value_tokens
            if value not in used and ((key, value) in task.held_out) == status
        ]
        assert transfer[1] == candidates[0]


def check_skip(task, record, event, pair_type, reason, replay):
    """The reason holds, by the tokens alone."""
    stream = replay(record["tokens"])
    read = stream.reads[event["query_index"]]
    writes = [write for write in stream.writes if write["place"] < read["place"]]
    shown = {prior["support"]["index"] for prior in stream.reads[: event["query_index"]]}
    support = read["support"]["index"]
    stale = {write["index"] for write in writes if write["key"] == read["key"]} - {support}
    others = [write for write in writes if write["key"] != read["key"]]
    used = {write["value"] for write in stream.writes}

    def has_replacement(key, value):
        status = (key, value) in task.held_out
        return any(
            other not in used and ((key, other) in task.held_out) == status
            for other in task.vocabulary.value_tokens
        )

    holds = {
        "no_alternative_current_key": not others,
        "no_distractor_write": not others,
        "no_same_key_stale_write": not stale,
        "support_write_used_by_prior_read": support in shown,
        "same_key_stale_writes_used_by_prior_reads": bool(stale) and stale <= shown,
        "no_replacement_value_for_support_pair_type": not has_replacement(read["key"], read["answer"]),
        "no_eligible_distractor_replacement": bool(others)
        and not any(
            write["index"] not in shown and has_replacement(write["key"], write["value"]) for write in others
        ),
    }
    allowed = {
        "query_key": {"no_alternative_current_key"},
        "support_value": {"support_write_used_by_prior_read", "no_replacement_value_for_support_pair_type"},
        "recency": {
            "no_same_key_stale_write",
            "support_write_used_by_prior_read",
            "same_key_stale_writes_used_by_prior_reads",
        },
        "distractor": {"no_distractor_write", "no_eligible_distractor_replacement"},
    }
    assert reason in allowed[pair_type]
    assert holds[reason]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_record_has_sound_pairs_or_a_reason(tasks_and_records, replay, data):
    task, record = data.draw(tasks_and_records)
    for event in record["query_events"]:
        for pair_type in PAIR_TYPES:
            pair = find_pair(task, record, event, pair_type)
            if isinstance(pair, Skip):
                check_skip(task, record, event, pair_type, pair.reason, replay)
            else:
                check_pair(task, record, event, pair, replay)


def test_pairs_of_every_split(formation, replay):
    task = PairTask(formation.vocabulary, formation.held_out)
    for records in formation.splits.values():
        for record in records[:4]:
            for event in record["query_events"]:
                for pair_type in PAIR_TYPES:
                    pair = find_pair(task, record, event, pair_type)
                    if isinstance(pair, Pair):
                        check_pair(task, record, event, pair, replay)


TASK = PairTask(Vocabulary(3, 8), frozenset({("K00", "V06"), ("K01", "V07")}))


def record_of(writes, *queries):
    plan = Plan(tuple(tuple(write.split()) for write in writes), tuple(Query(*query) for query in queries))
    return build_record(plan, TASK.vocabulary, TASK.held_out, split="train", index=7)


def pair_of(record, pair_type, query=0, task=TASK):
    return find_pair(task, record, record["query_events"][query], pair_type)


def test_identity_and_mutation_of_each_type():
    record = record_of(["K02 V02", "K00 V01", "K01 V03", "K00 V00"], (3, "K00", 3))
    assert pair_of(record, "query_key") == Pair(
        "query_key:train_000007:0:K01",
        "query_key",
        "train",
        "train_000007",
        0,
        "V00",
        "V03",
        "V00",
        "V03",
        {
            "changed_role": "current_read_key",
            "clean_query_key": "K00",
            "corrupted_query_key": "K01",
            "clean_support_write_index": 3,
            "corrupted_support_write_index": 2,
        },
    )
    support = pair_of(record, "support_value")
    assert support.pair_id == "support_value:train_000007:0:V04"
    assert support.mutation == {
        "changed_role": "support_write_value",
        "query_key": "K00",
        "support_write_index": 3,
        "clean_support_value": "V00",
        "corrupted_support_value": "V04",
    }
    recency = pair_of(record, "recency")
    assert recency.pair_id == "recency:train_000007:0:1"
    assert recency.mutation == {
        "changed_role": "same_key_write_order_values",
        "query_key": "K00",
        "stale_write_index": 1,
        "support_write_index": 3,
        "clean_latest_value": "V00",
        "corrupted_latest_value": "V01",
    }
    distractor = pair_of(record, "distractor")
    assert distractor.pair_id == "distractor:train_000007:0:2:V04"
    assert distractor.mutation == {
        "changed_role": "distractor_write_value",
        "query_key": "K00",
        "distractor_key": "K01",
        "distractor_write_index": 2,
        "clean_distractor_value": "V03",
        "corrupted_distractor_value": "V04",
    }
    assert (distractor.clean_transfer_token, distractor.corrupted_transfer_token) == ("V03", "V04")


def test_a_held_out_answer_is_replaced_by_a_held_out_value():
    record = record_of(["K01 V00", "K00 V06", "K01 V07"], (2, "K00", 1))
    assert pair_of(record, "support_value") == Skip("no_replacement_value_for_support_pair_type")
    wider = PairTask(TASK.vocabulary, TASK.held_out | {("K00", "V05")})
    assert pair_of(record, "support_value", task=wider).corrupted_answer_value == "V05"


def test_an_earlier_read_forbids_to_change_what_it_shows():
    record = record_of(
        ["K00 V00", "K01 V01", "K00 V02"], (1, "K00", 0), (1, "K01", 1), (2, "K00", 2), (2, "K00", 2)
    )
    assert pair_of(record, "recency", 2) == Skip("same_key_stale_writes_used_by_prior_reads")
    assert pair_of(record, "distractor", 2) == Skip("no_eligible_distractor_replacement")
    assert pair_of(record, "support_value", 3) == Skip("support_write_used_by_prior_read")
    assert pair_of(record, "recency", 3) == Skip("support_write_used_by_prior_read")
    assert pair_of(record, "recency", 0) == Skip("no_same_key_stale_write")


def test_writes_after_the_query_are_no_alternatives():
    record = record_of(["K00 V00", "K00 V01", "K01 V02"], (1, "K00", 1))
    assert pair_of(record, "query_key") == Skip("no_alternative_current_key")
    assert pair_of(record, "distractor") == Skip("no_distractor_write")


def test_reads_after_the_query_keep_their_tokens():
    record = record_of(["K00 V00", "K01 V01"], (1, "K00", 0), (1, "K00", 0))
    corrupted = corrupt(TASK, record, pair_of(record, "support_value"))
    assert corrupted["tokens"][-4:] == ["R", "K00", "V00", "<eos>"]
    assert corrupted["query_events"][0]["answer_value"] == "V02"


def test_an_unknown_type_is_refused():
    record = record_of(["K00 V00", "K01 V01"], (1, "K00", 0))
    with pytest.raises(
        ValueError, match="no pair type 'swap'; there are query_key, support_value, recency, distractor"
    ):
        pair_of(record, "swap")


def damaged(change):
    record = record_of(["K00 V00", "K01 V01", "K00 V02"], (2, "K01", 1))
    made = copy.deepcopy(clean_record(TASK, record, pair_of(record, "query_key")))
    change(made, made["query_events"][0])
    return made


def read_another_key(record, event):
    read = record["steps"][event["step_index"]]
    event["key"] = read["key"] = record["tokens"][read["positions"]["key"]] = "K02"
    record["token_ids"][read["positions"]["key"]] = TASK.vocabulary.ids["K02"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda record, event: record["token_ids"].__setitem__(3, 0),
            "token ids are not those of its tokens",
        ),
        (
            lambda record, event: record["steps"][0].update(value="V05"),
            "step 0 is not what its positions hold",
        ),
        (lambda record, event: event.update(key="K00"), "the query is not the read at step 3"),
        (
            lambda record, event: event.update(answer_value="V00"),
            "is answered V01 in the stream and V00 in the event",
        ),
        (
            lambda record, event: event.update(support_write_index=0),
            "support is not the latest write to its key",
        ),
        (
            lambda record, event: event["support_positions"].update(op=1),
            "support is not the latest write to its key",
        ),
    ],
)
def test_an_inconsistent_record_is_refused(change, message):
    check_single_query(TASK, damaged(lambda record, event: None))
    with pytest.raises(OracleError, match=message):
        check_single_query(TASK, damaged(change))

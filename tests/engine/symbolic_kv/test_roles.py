"""Roles and partition of an event, against a reader of the tokens alone."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.symbolic_kv.records import Plan, Query, build_record
from lakebed.engine.symbolic_kv.roles import PARTITION_ROLES, ROLES, RoleError, event_partition, event_roles
from lakebed.engine.symbolic_kv.vocabulary import Vocabulary


def check_roles(record, event, replay):
    read = replay(record["tokens"]).reads[event["query_index"]]
    writes = replay(record["tokens"]).writes
    at, support = read["place"], read["support"]["place"]
    others = [write["place"] for write in writes if write["place"] != support]
    assert event_roles(record, event) == {
        "prediction": (at + 1,),
        "query_key": (at + 1,),
        "current_read_key": (at + 1,),
        "support_op": (support,),
        "support_key": (support + 1,),
        "support_value": (support + 2,),
        "support_write": (support, support + 1, support + 2),
        "key_distractors": tuple(place + 1 for place in others),
        "value_distractors": tuple(place + 2 for place in others),
        "all_query_relation": (support + 1, support + 2, at + 1),
    }


def expected_part(record, event, position, replay):
    """The part of a position by its token's place in its triple, and what stands in that triple."""
    read = replay(record["tokens"]).reads[event["query_index"]]
    if position == 0:
        return "bos"
    start = position - (position - 1) % 3
    offset = position - start
    if start == read["place"]:
        return ("current_read_op", "current_read_key_self")[offset]
    if record["tokens"][start] == "R":
        return f"prior_read_{('op', 'key', 'answer')[offset]}"
    part = ("op", "key", "value")[offset]
    if start == read["support"]["place"]:
        return f"support_write_{part}"
    of = "same_key_stale" if record["tokens"][start + 1] == read["key"] else "other_key"
    return f"{of}_write_{part}"


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_roles_and_partition_of_any_record(tasks_and_records, replay, data):
    _, record = data.draw(tasks_and_records)
    for event in record["query_events"]:
        check_roles(record, event, replay)
        roles = event_roles(record, event)
        assert tuple(roles) == ROLES
        for positions in roles.values():
            assert list(positions) == sorted(set(positions))
            assert positions[0] >= 0
            assert positions[-1] < len(record["tokens"])
        prediction = event["positions"]["key"]
        partition = event_partition(record, event)
        assert list(partition) == list(range(prediction + 1))
        assert set(partition.values()) <= set(PARTITION_ROLES)
        for position, part in partition.items():
            assert part == expected_part(record, event, position, replay)


def test_every_event_of_the_base_benchmark(formation, replay):
    for records in formation.splits.values():
        for record in records[:12]:
            for event in record["query_events"]:
                check_roles(record, event, replay)
                parts = event_partition(record, event)
                assert all(
                    part == expected_part(record, event, position, replay) for position, part in parts.items()
                )
                assert "other" not in parts.values()


def test_there_are_sixteen_parts_and_their_names_are_the_definitions():
    assert len(PARTITION_ROLES) == len(set(PARTITION_ROLES)) == 16
    assert PARTITION_ROLES[:4] == ("bos", "support_write_op", "support_write_key", "support_write_value")
    assert PARTITION_ROLES[-3:] == ("current_read_op", "current_read_key_self", "other")


def test_distractors_after_the_query_are_listed():
    plan = Plan((("K00", "V00"), ("K01", "V01"), ("K00", "V02")), (Query(1, "K00", 0),))
    record = build_record(plan, Vocabulary(2, 4), frozenset(), split="train", index=0)
    (event,) = record["query_events"]
    roles = event_roles(record, event)
    assert event["positions"]["key"] == 8
    assert roles["value_distractors"] == (6, 12)
    assert max(event_partition(record, event)) == 8


def test_an_event_without_a_distractor_is_refused():
    plan = Plan((("K00", "V00"),), (Query(0, "K00", 0),))
    record = build_record(plan, Vocabulary(2, 4), frozenset(), split="train", index=0)
    with pytest.raises(
        RoleError, match="train_000000: query 0 has no write but its support, so no distractor"
    ):
        event_roles(record, record["query_events"][0])


def test_a_support_after_the_query_is_refused(formation):
    record = copy.deepcopy(formation.splits["train"][0])
    event = record["query_events"][0]
    last = [step for step in record["steps"] if step["op"] == "write"][-1]
    event["support_positions"] = last["positions"]
    with pytest.raises(RoleError, match=r"query 0 has its support write at \d+, after the prediction at \d+"):
        event_roles(record, event)

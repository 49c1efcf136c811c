"""Groups of pairs by their fields: order, names, and values that cannot name a group."""

import json

import pytest
from lakebed.lake.data_groups import PAIR_FIELDS, DataGroupError, group_id, group_pairs, group_values


def pair(**mutation):
    row = dict.fromkeys(PAIR_FIELDS, "x")
    return {
        **row,
        "pair_id": "p1",
        "source_query_index": 2,
        "mutation": json.dumps(mutation),
        "clean_event": 7,
    }


def test_all_pairs_come_first_then_values_in_order():
    pairs = [pair(index=10), pair(index=9), pair(index=10)]
    assert group_pairs(pairs, ["split", "mutation.index"]) == {
        "__all__": {},
        "split=x|mutation.index=9": {"split": "x", "mutation.index": 9},
        "split=x|mutation.index=10": {"split": "x", "mutation.index": 10},
    }


def test_a_pair_is_in_the_group_of_its_values():
    assert group_id(group_values(pair(role="key"), ["mutation.role", "source_query_index"])) == (
        "mutation.role=key|source_query_index=2"
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("colour", "no 'colour' in pair p1; it has pair_id, pair_type, split"),
        ("clean_event", "no 'clean_event' in pair p1"),
        ("mutation.depth", "no 'depth' in pair p1; it has none, many, nested, flag"),
        ("mutation", "an object in pair p1; name one of its values, mutation.none, mutation.many"),
        ("mutation.nested", "an object in pair p1; name one of its values, mutation.nested.a"),
        ("mutation.many", "a list in pair p1; a group needs one value"),
        ("mutation.none", "null in pair p1; a group needs one value"),
        ("mutation.flag.x", "no 'x' in pair p1; it has no fields"),
        ("", "no '' in pair p1"),
    ],
)
def test_a_value_that_names_no_group_is_refused(field, message):
    held = pair(none=None, many=[1], nested={"a": 1}, flag=True)
    with pytest.raises(DataGroupError) as caught:
        group_values(held, [field])
    assert f"--data-group-field {field}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_values_of_one_name_are_refused():
    with pytest.raises(DataGroupError, match=r"both name group mutation\.index=1"):
        group_pairs([pair(index=1), pair(index="1")], ["mutation.index"])

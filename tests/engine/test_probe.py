"""Probes: what a line of JSON becomes, every line that is refused, and tokens a model does not have."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.config import load_config
from lakebed.engine.probe import (
    ProbeFormatError,
    VocabularyMismatch,
    parse_probe_jsonl,
    read_probe_jsonl,
    symbolic_probe,
)
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.engine.symbolic_kv.probes import sample_probe

EVENT = {"roles": {"prediction": 3, "subject": [2, 0], "later": [4]}, "answer": 9, "competitors": [8, 2]}
RECORD = {
    "sample_id": "one",
    "token_ids": [5, 9, 7, 5, 9],
    "tokens": ["the", "cat", "saw", "the", "cat"],
    "events": [EVENT],
}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def changed(record=None, **event):
    """RECORD with some fields of it, or of its event, replaced; None removes a field."""
    made = (
        {**RECORD, **(record or {}), "events": [{**EVENT, **event}]}
        if event
        else {**RECORD, **(record or {})}
    )
    made["events"] = [
        {name: value for name, value in each.items() if value is not None} if isinstance(each, dict) else each
        for each in made["events"]
    ]
    return made


def test_a_line_becomes_a_record():
    probe = parse_probe_jsonl(lines(RECORD, {**RECORD, "sample_id": "two", "split": "held"}), "p")
    one, two = probe.records
    assert (one.sample_id, one.split, two.split) == ("one", "all", "held")
    assert one.token_ids == (5, 9, 7, 5, 9)
    (event,) = one.events
    assert event.roles == {"prediction": (3,), "subject": (0, 2), "later": (4,)}
    assert (event.prediction, event.answer, event.competitors) == (3, 9, (2, 8))
    assert event.partition == {0: "subject", 1: "other", 2: "subject", 3: "prediction"}
    assert (probe.num_events, probe.splits, one.source) == (2, ("all", "held"), None)
    assert [probe.text(token) for token in (5, 7, 9, 8, 99)] == ["the", "saw", "cat", None, None]


def test_the_first_role_that_holds_a_position_is_its_part():
    roles = {"pair": [0, 1], "prediction": 2, "second": [1, 2]}
    probe = parse_probe_jsonl(lines(changed(roles=roles)), "p")
    assert probe.records[0].events[0].partition == {0: "pair", 1: "pair", 2: "prediction"}


def test_texts_may_be_left_out_and_repeated_entries_count_once():
    record = {name: value for name, value in RECORD.items() if name != "tokens"}
    record["events"] = [{"roles": {"prediction": [1], "a": [0, 0]}, "answer": 1, "competitors": [4, 3, 4]}]
    probe = parse_probe_jsonl(lines(record), "p")
    (event,) = probe.records[0].events
    assert (probe.vocabulary, event.roles["a"], event.competitors) == (None, (0,), (3, 4))


def test_the_last_line_needs_no_line_break_and_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + lines(RECORD).rstrip("\n"), encoding="utf-8")
    assert read_probe_jsonl(path) == parse_probe_jsonl(lines(RECORD), "p")


@pytest.mark.parametrize(
    "other",
    [
        {"sample_id": "other"},
        {"split": "other"},
        {"token_ids": [5, 9, 7, 5, 7], "tokens": ["the", "cat", "saw", "the", "saw"]},
        {"tokens": ["a", "cat", "saw", "a", "cat"]},
        {"tokens": None},
        {"events": [{**EVENT, "answer": 7}]},
        {"events": [{**EVENT, "competitors": [8]}]},
        {"events": [{**EVENT, "roles": {"prediction": 2}}]},
        {"events": [EVENT, EVENT]},
        {"events": [{**EVENT, "roles": dict(reversed(EVENT["roles"].items()))}]},
    ],
)
def test_any_other_content_has_another_hash(other):
    same = json.dumps({**RECORD, "split": "all"}, indent=None, separators=(",", ":"))
    assert parse_probe_jsonl(same, "q").sha256 == parse_probe_jsonl(lines(RECORD), "p").sha256
    changed_record = {**RECORD, **other}
    assert (
        parse_probe_jsonl(lines(changed_record), "p").sha256 != parse_probe_jsonl(lines(RECORD), "p").sha256
    )


REFUSED = {
    "not JSON": ("{", "p, line 2 is not JSON: Expecting property name"),
    "blank": ("   ", "p, line 2 is blank: every line must be a JSON record"),
    "no object": ("[1]", "p, line 2 is no JSON object but a list"),
    "key twice": (
        '{"sample_id": "a", "sample_id": "b"}',
        "p, line 2 is not JSON: key 'sample_id' stands twice",
    ),
    "missing": ({"sample_id": "a", "token_ids": [1]}, "p, line 2: events is missing"),
    "missing in an event": (changed(answer=None), r"p, line 2: events\[0\].answer is missing"),
    "no competitors named": (changed(competitors=None), r"events\[0\].competitors is missing"),
    "unknown": (
        changed({"label": 1}),
        "unknown field label; there are sample_id, split, token_ids, tokens, events",
    ),
    "unknown in an event": (
        changed(label=1),
        r"unknown field events\[0\].label; there are roles, answer, competitors",
    ),
    "no tokens": (changed({"token_ids": []}), "line 2: token_ids: List should have at least 1 item"),
    "negative token": (
        changed({"token_ids": [1, -4]}),
        r"token_ids\[1\]: Input should be greater than or equal to 0, not -4",
    ),
    "float token": (
        changed({"token_ids": [1.0]}),
        r"token_ids\[0\]: Input should be a valid integer, not 1.0",
    ),
    "text as token": (
        changed({"token_ids": ["1"]}),
        r"token_ids\[0\]: Input should be a valid integer, not 1",
    ),
    "negative answer": (
        changed(answer=-1),
        r"events\[0\].answer: Input should be greater than or equal to 0",
    ),
    "negative competitor": (
        changed(competitors=[-1]),
        r"events\[0\].competitors\[0\]: Input should be greater",
    ),
    "texts of another length": (changed({"tokens": ["a"]}), "line 2: tokens has 1 texts for 5 token_ids"),
    "another text": (
        changed({"sample_id": "b", "tokens": ["the", "dog", "saw", "the", "dog"]}),
        "line 2: token 9 is 'dog' here and 'cat' before; an id has one text",
    ),
    "no events": (changed({"events": []}), "line 2: events: List should have at least 1 item"),
    "no competitors": (changed(competitors=[]), r"events\[0\].competitors: List should have at least 1 item"),
    "answer competes": (changed(competitors=[9, 2]), r"events\[0\]: answer 9 is among its competitors"),
    "no prediction": (changed(roles={"subject": 1}), r"events\[0\] has no role prediction"),
    "two predictions": (
        changed(roles={"prediction": [1, 2]}),
        r"role prediction must be one position, not \[1, 2\]",
    ),
    "empty role": (
        changed(roles={"prediction": 1, "a": []}),
        r"events\[0\].roles.a is empty; leave the role out of an event that lacks it",
    ),
    "position past the end": (
        changed(roles={"prediction": 5}),
        r"role 'prediction' names position 5; the record has positions 0 to 4",
    ),
    "negative position": (changed(roles={"prediction": 1, "a": [-1]}), "role 'a' names position -1"),
    "text as position": (
        changed(roles={"prediction": "last"}),
        r"events\[0\].roles.prediction must be a position or a list of positions",
    ),
    "truth as position": (changed(roles={"prediction": True}), "must be a position or a list of positions"),
    "reserved": (
        changed(roles={"prediction": 1, "causal_prefix": [0]}),
        "role 'causal_prefix' is reserved for every position up to the prediction",
    ),
    "reserved rest": (changed(roles={"prediction": 1, "other": [0]}), "role 'other' is reserved"),
    "reserved write": (changed(roles={"prediction": 1, "write": [0]}), "role 'write' is reserved"),
    "nameless role": (changed(roles={"prediction": 1, "": [0]}), "at least 1 character"),
    "empty id": (changed({"sample_id": ""}), "line 2: sample_id: String should have at least 1 character"),
    "same id": (changed({"sample_id": "zero"}), "line 2: sample_id 'zero' stands in line 1 already"),
}


@pytest.mark.parametrize("bad", REFUSED)
def test_a_bad_line_is_refused_in_one_line_with_its_number(bad):
    line, message = REFUSED[bad]
    text = (
        lines({**RECORD, "sample_id": "zero"}) + (line if isinstance(line, str) else json.dumps(line)) + "\n"
    )
    with pytest.raises(ProbeFormatError, match=message) as refused:
        parse_probe_jsonl(text, "p")
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ProbeFormatError, match=r"cannot read probe file .*none.jsonl: No such file"):
        read_probe_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ProbeFormatError, match="cannot read probe file"):
        read_probe_jsonl(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ProbeFormatError, match=r"empty.jsonl is empty: a probe has one JSON record per line"):
        read_probe_jsonl(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"sample_id": "\xe9"}')
    with pytest.raises(ProbeFormatError, match="is not UTF-8 text"):
        read_probe_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(ProbeFormatError, match="line 1 is blank"):
        parse_probe_jsonl("\n", "p")


@pytest.mark.parametrize(
    ("record", "largest"), [(RECORD, 9), (changed(answer=30), 30), (changed(competitors=[2, 40]), 40)]
)
def test_tokens_beyond_the_vocabulary_are_refused(record, largest):
    probe = parse_probe_jsonl(lines(record), "p")
    probe.require_vocabulary(largest + 1)
    with pytest.raises(
        VocabularyMismatch, match=f"record 'one' has token {largest}, .* ends at {largest - 1}"
    ):
        probe.require_vocabulary(largest)


def test_tokens_of_other_texts_are_refused():
    probe = parse_probe_jsonl(lines(RECORD), "p")
    texts = [probe.text(token) or f"t{token}" for token in range(10)]
    probe.require_vocabulary(10, texts)
    texts[7] = "sees"
    with pytest.raises(
        VocabularyMismatch, match="record 'one' calls token 7 'saw', and the run calls it 'sees'"
    ):
        probe.require_vocabulary(10, texts)


def test_records_longer_than_the_model_reads_are_refused():
    probe = parse_probe_jsonl(lines(RECORD), "p")
    probe.require_length(5)
    with pytest.raises(ProbeFormatError, match="record 'one' has 5 tokens, and the model reads at most 4"):
        probe.require_length(4)


@st.composite
def records(draw):
    """Any valid record, with every form the format allows."""
    length = draw(st.integers(1, 8))
    tokens = draw(st.lists(st.integers(0, 40), min_size=length, max_size=length))
    place = st.integers(0, length - 1)
    events = []
    for _ in range(draw(st.integers(1, 3))):
        names = st.text("abcdef", min_size=1, max_size=3)
        roles = draw(st.dictionaries(names, st.one_of(place, st.lists(place, min_size=1)), max_size=4))
        roles["prediction"] = draw(st.one_of(place, place.map(lambda position: [position])))
        order = draw(st.permutations(list(roles)))
        answer, *others = draw(st.lists(st.integers(0, 50), min_size=2, max_size=6, unique=True))
        events.append(
            {"roles": {name: roles[name] for name in order}, "answer": answer, "competitors": others}
        )
    return {"sample_id": draw(st.text(min_size=1, max_size=5)), "token_ids": tokens, "events": events}


@given(records())
@settings(max_examples=150, deadline=None)
def test_any_valid_record_keeps_its_content(record):
    (read,) = parse_probe_jsonl(lines(record), "p").records
    assert (read.sample_id, list(read.token_ids)) == (record["sample_id"], record["token_ids"])
    for event, given_event in zip(read.events, record["events"], strict=True):
        assert list(event.roles) == list(given_event["roles"])
        for role, positions in given_event["roles"].items():
            wanted = positions if isinstance(positions, list) else [positions]
            assert list(event.roles[role]) == sorted(set(wanted))
        assert list(event.partition) == list(range(event.prediction + 1))
        for position, part in event.partition.items():
            holders = [role for role, positions in event.roles.items() if position in positions]
            assert part == (holders[0] if holders else "other")
        assert (event.answer, set(event.competitors)) == (
            given_event["answer"],
            set(given_event["competitors"]),
        )
        assert list(event.competitors) == sorted(event.competitors)


def test_the_probe_of_symbolic_records():
    sizes = dict.fromkeys(("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood"), 20)
    overrides = {f"benchmark.{split}.num_samples": size for split, size in sizes.items()}
    config = load_config("tiny", **{**overrides, "benchmark.counterfactual.num_samples": 5})
    benchmark = generate_benchmark(config.benchmark)
    sampled = sample_probe(benchmark.splits, ("test_iid", "structural_ood"), 6)
    probe = symbolic_probe(sampled, benchmark.vocabulary)
    assert probe.splits == ("test_iid", "structural_ood")
    assert probe.vocabulary == benchmark.vocabulary.tokens
    assert (probe.key_tokens, probe.value_tokens) == (tuple(range(10, 18)), tuple(range(18, 146)))
    for record, source in zip(probe.records, sampled, strict=True):
        assert list(record.token_ids) == source["token_ids"]
        assert record.source is source
        for event, asked in zip(record.events, source["query_events"], strict=True):
            assert probe.text(event.answer) == asked["answer_value"] == source["tokens"][event.prediction + 1]
            assert event.competitors == tuple(token for token in range(18, 146) if token != event.answer)

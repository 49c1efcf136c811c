"""The symbolic-KV task: published hashes, every refusal of a bad benchmark, and tensors against records."""

import copy
import hashlib
import json
import random

import pytest
import torch
from lakebed.engine.config import load_config
from lakebed.engine.symbolic_kv import (
    BenchmarkError,
    DuplicateRecordError,
    ExhaustedError,
    HeldOutLeakError,
    HeuristicError,
    OracleError,
    SplitOverlapError,
    Vocabulary,
    benchmark_jsonl,
    generate_benchmark,
    sampling,
)
from lakebed.engine.symbolic_kv.batches import TOKEN_ROLES, collate, encode_records
from lakebed.engine.symbolic_kv.checks import check_benchmark, check_heuristics

PUBLISHED_SHA256 = {
    "train": "d1da85b16adbd88b",
    "validation_iid": "1492e5056a12dd99",
    "test_iid": "59da2e304bc71b35",
    "heldout_pairs": "b24c403d781d8df5",
    "structural_ood": "ee26c6a20207d4ce",
    "counterfactual": "dd96656c63ab4766",
}


@pytest.fixture(scope="module")
def formation():
    return generate_benchmark(load_config("formation").benchmark)


@pytest.fixture(scope="module")
def few(formation):
    """A few records of each split: cheap to copy and to tamper with."""
    return {split: records[:12] for split, records in formation.splits.items()}


SMALL_SIZES = {
    "train": {"num_samples": 40},
    "validation_iid": {"num_samples": 20},
    "test_iid": {"num_samples": 20},
    "heldout_pairs": {"num_samples": 20},
    "structural_ood": {"num_samples": 20},
    "counterfactual": {"num_samples": 10},
}


def small(**overrides):
    """The base benchmark with few records, and some of its keys replaced."""
    dotted = {f"benchmark.{key}": value for key, value in overrides.items()}
    return load_config("formation", benchmark=SMALL_SIZES, **{"model.max_seq_len": 200}, **dotted).benchmark


def test_vocabulary_places():
    vocabulary = Vocabulary(8, 128)
    assert len(vocabulary) == len(vocabulary.tokens) == 146
    assert vocabulary.tokens[:10] == ("<pad>", "<bos>", "<eos>", "SET", "=", ";", "QRY", "ANS", "W", "R")
    assert (vocabulary.tokens[10], vocabulary.tokens[17]) == ("K00", "K07")
    assert (vocabulary.tokens[18], vocabulary.tokens[145]) == ("V000", "V127")
    assert [vocabulary.tokens[place] for place in vocabulary.value_ids] == list(vocabulary.value_tokens)
    assert [vocabulary.tokens[place] for place in vocabulary.key_ids] == list(vocabulary.key_tokens)
    # The width follows the largest number, which is one less than the count.
    assert Vocabulary(100, 101).key_tokens[-1] == "K99"
    assert Vocabulary(100, 101).value_tokens[0] == "V000"


@pytest.mark.parametrize("split", PUBLISHED_SHA256)
def test_base_benchmark_has_the_published_bytes(formation, split):
    text = benchmark_jsonl(formation.splits[split])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PUBLISHED_SHA256[split]


def test_metadata_of_the_base_benchmark(formation):
    metadata = json.loads(json.dumps(formation.metadata))
    assert len(metadata["holdout_pairs"]) == 102
    assert metadata["holdout_pairs"] == sorted(metadata["holdout_pairs"])
    assert metadata["splits"] == {"train": 8000} | dict.fromkeys(list(PUBLISHED_SHA256)[1:], 1024)
    assert metadata["config"] == load_config("formation").benchmark.model_dump(mode="json")
    heuristics = metadata["diagnostics"]["heuristics"]
    assert heuristics["train"]["last_value"] == heuristics["train"]["first_value_of_key"] == 0
    assert heuristics["train"]["most_frequent_value"] == pytest.approx(0.14, abs=0.006)
    assert heuristics["structural_ood"]["most_frequent_value"] == pytest.approx(0.09, abs=0.005)
    leakage = metadata["diagnostics"]["holdout_leakage"]
    assert leakage["train"] == {"held_out_answers": 0, "held_out_writes": 0, "answers": 52105}
    assert leakage["heldout_pairs"]["held_out_answers"] == leakage["heldout_pairs"]["answers"]
    assert all(count == 0 for pair in metadata["diagnostics"]["overlap"].values() for count in pair.values())
    lengths = {
        split: [len(record["tokens"]) for record in records] for split, records in formation.splits.items()
    }
    assert (min(lengths["train"]), max(lengths["train"])) == (50, 56)
    assert (min(lengths["structural_ood"]), max(lengths["structural_ood"])) == (68, 83)


def test_streams_replay_from_their_tokens_alone(formation):
    """Parse the token text with nothing but the grammar, and compare with every annotation."""
    for split, records in formation.splits.items():
        for record in records[:50]:
            tokens = record["tokens"]
            assert (tokens[0], tokens[-1]) == ("<bos>", "<eos>")
            memory, writes, reads = {}, [], []
            for place in range(1, len(tokens) - 1, 3):
                operation, key, value = tokens[place : place + 3]
                if operation == "W":
                    memory[key] = (value, len(writes), place)
                    writes.append((key, value))
                else:
                    assert operation == "R"
                    assert memory[key][0] == value
                    reads.append((key, value, memory[key][1], memory[key][2], place, len(writes) - 1))
            assert writes == [(write["key"], write["value"]) for write in record["writes"]]
            assert len({value for _, value in writes}) == len(writes)
            for (key, value, support, support_place, place, slot), event in zip(
                reads, record["query_events"], strict=True
            ):
                assert (event["key"], event["answer_value"]) == (key, value)
                assert (event["support_write_index"], event["slot_after_write"]) == (support, slot)
                assert event["writes_since_support"] == slot - support >= 1
                assert event["positions"] == {"op": place, "key": place + 1, "answer": place + 2}
                assert event["support_positions"]["value"] == support_place + 2
                assert event["tokens_since_support"] == place - support_place
                assert support >= record["axes"]["active_keys"]
                assert event["answer_pair_type"] == ("heldout" if split == "heldout_pairs" else "seen")


def test_a_counterfactual_changes_one_value_and_the_answers_that_relied_on_it(formation):
    sources = {record["sample_id"]: record for record in formation.splits["test_iid"]}
    for record in formation.splits["counterfactual"]:
        source, changed = sources[record["counterfactual_of"]], record["changed_write_index"]
        differing = [
            new["write_index"]
            for old, new in zip(source["writes"], record["writes"], strict=True)
            if old != new
        ]
        assert differing == [changed]
        assert record["query_plan"] == source["query_plan"]
        relied = 0
        for old, new in zip(source["query_events"], record["query_events"], strict=True):
            relied += new["support_write_index"] == changed
            assert (old["answer_value"] != new["answer_value"]) == (new["support_write_index"] == changed)
        assert relied


def test_the_same_configuration_gives_the_same_bytes_whatever_the_global_seed():
    random.seed(1)
    first = generate_benchmark(small())
    random.seed(2)
    assert generate_benchmark(small()).splits == first.splits
    assert generate_benchmark(small(seed=8)).splits != first.splits


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"train.num_queries": {"min": 30, "max": 30}}, "30 queries in 256 attempts"),
        ({"holdout_answer_pair_fraction": 0.001}, "no unused value makes a held-out pair with key K"),
    ],
)
def test_ranges_that_admit_nothing_are_refused(overrides, expected):
    with pytest.raises(ExhaustedError, match=expected):
        generate_benchmark(small(**overrides))


def test_more_records_than_programs_exist_are_refused(monkeypatch):
    monkeypatch.setattr(sampling, "TRIES_PER_SAMPLE", 20)
    # Two keys alternate, so a program is a first key and four of five values in order: at most 240.
    split = {"active_keys": {"min": 2, "max": 2}, "overwrite_count": {"min": 2, "max": 2}}
    split |= {"num_queries": {"min": 1, "max": 1}, "query_lag": {"min": 1, "max": 1}}
    names = ("validation_iid", "test_iid", "heldout_pairs", "structural_ood")
    sizes = {"train": split | {"num_samples": 241}, **dict.fromkeys(names, split)}
    with pytest.raises(ExhaustedError, match=r"train: only \d+ of 241 distinct records found in 4820 tries"):
        generate_benchmark(small(num_keys=2, num_values=5, **sizes))


def checked(formation, splits, limit=0.4):
    return check_benchmark(splits, formation.held_out, limit)


def rewrite(record, position, token):
    """Put a token into the stream and keep the exact signature consistent, as a careful forger would."""
    record["tokens"][position] = token
    record["exact_sequence_signature"] = " ".join(record["tokens"])


def duplicate_name(splits, held_out):
    splits["train"][1]["sample_id"] = splits["train"][0]["sample_id"]


def duplicate_program(splits, held_out):
    splits["train"][1]["latent_program_signature"] = splits["train"][0]["latent_program_signature"]


def duplicate_sequence(splits, held_out):
    splits["train"].append(
        copy.deepcopy(splits["train"][0]) | {"sample_id": "x", "latent_program_signature": "x"}
    )


def wrong_answer(splits, held_out):
    record = splits["train"][0]
    step = next(step for step in record["steps"] if step["op"] == "read")
    wrong = record["writes"][0]["value"]
    step["value"] = record["query_events"][0]["answer_value"] = wrong
    rewrite(record, step["positions"]["answer"], wrong)


def wrong_event_answer(splits, held_out):
    splits["train"][0]["query_events"][0]["answer_value"] = "V000"


def wrong_support(splits, held_out):
    splits["train"][0]["query_events"][0]["support_write_index"] -= 1


def support_after_answer(splits, held_out):
    event = splits["train"][0]["query_events"][0]
    event["support_positions"]["value"] = event["positions"]["answer"] + 1


def token_differs_from_step(splits, held_out):
    record = splits["train"][0]
    rewrite(record, record["steps"][0]["positions"]["value"], "V127")


def stale_sequence_signature(splits, held_out):
    splits["train"][0]["exact_sequence_signature"] += " "


def missing_event(splits, held_out):
    splits["train"][0]["query_events"].pop()


def surplus_event(splits, held_out):
    events = splits["train"][0]["query_events"]
    events.append(copy.deepcopy(events[-1]))


def event_of_another_read(splits, held_out):
    splits["train"][0]["query_events"][0]["positions"]["op"] += 3


def shared_sequence(splits, held_out):
    splits["test_iid"].append(copy.deepcopy(splits["train"][0]) | {"latent_program_signature": "x"})


def shared_program(splits, held_out):
    splits["test_iid"][0]["latent_program_signature"] = splits["train"][3]["latent_program_signature"]


def held_out_write_in_train(splits, held_out):
    record = splits["train"][0]
    used = {step["write_index"] for step in record["steps"] if step["op"] == "write"}
    used -= {event["support_write_index"] for event in record["query_events"]}
    step = next(step for step in record["steps"] if step.get("write_index") in used and step["op"] == "write")
    value = min(value for key, value in held_out if key == step["key"])
    step["value"] = record["writes"][step["write_index"]]["value"] = value
    rewrite(record, step["positions"]["value"], value)


def seen_answer_in_heldout_pairs(splits, held_out):
    splits["heldout_pairs"].append(copy.deepcopy(splits["train"][0]) | {"latent_program_signature": "x"})
    splits["train"].pop(0)


@pytest.mark.parametrize(
    ("tamper", "error", "expected"),
    [
        (duplicate_name, DuplicateRecordError, "share the sample_id train_000000"),
        (duplicate_program, DuplicateRecordError, "share the latent_program_signature"),
        (duplicate_sequence, DuplicateRecordError, "share the exact_sequence_signature"),
        (wrong_answer, OracleError, "train_000000: query 0 stores V"),
        (wrong_event_answer, OracleError, "train_000000: query 0 stores V000, and the latest write is V"),
        (wrong_support, OracleError, "query 0 names write"),
        (support_after_answer, OracleError, "query 0: the support value is not before the answer"),
        (token_differs_from_step, OracleError, "step 0 is not what its positions hold"),
        (stale_sequence_signature, OracleError, "exact_sequence_signature is not its token stream"),
        (missing_event, OracleError, "has no event"),
        (surplus_event, OracleError, "more query events than reads"),
        (event_of_another_read, OracleError, "query 0 is not the read at step"),
        (shared_sequence, SplitOverlapError, "train and test_iid share 1 exact_sequence_signature"),
        (shared_program, SplitOverlapError, "train and test_iid share 1 latent_program_signature"),
        (held_out_write_in_train, HeldOutLeakError, "train_000000: the pair K.*is held out"),
        (seen_answer_in_heldout_pairs, HeldOutLeakError, "train_000000: the pair K.*is not held out"),
    ],
)
def test_each_check_refuses_what_it_is_there_for(formation, few, tamper, error, expected):
    splits = copy.deepcopy(few)
    checked(formation, splits)
    tamper(splits, formation.held_out)
    with pytest.raises(error, match=expected) as caught:
        checked(formation, splits)
    assert isinstance(caught.value, BenchmarkError)


def test_a_benchmark_a_heuristic_solves_is_refused():
    with pytest.raises(
        HeuristicError, match=r"train: the heuristic most_frequent_value answers 0\.1.* at most 0.05"
    ):
        generate_benchmark(small(heuristic_max_accuracy=0.05))


def test_each_heuristic_on_a_stream_done_by_hand(few):
    def record(writes, slot, key, answer):
        return {
            "writes": [{"key": key, "value": value} for key, value in writes],
            "query_events": [{"slot_after_write": slot, "key": key, "answer_value": answer}],
        }

    writes = [("A", "3"), ("B", "2"), ("A", "2"), ("B", "1")]
    names = ("last_value", "first_value_of_key", "most_frequent_value")
    for slot, key, guesses in [(0, "A", "333"), (1, "A", "232"), (2, "A", "232"), (3, "B", "122")]:
        for name, guess in zip(names, guesses, strict=True):
            assert check_heuristics("s", [record(writes, slot, key, guess)], 1.0)[name] == 1
            assert check_heuristics("s", [record(writes, slot, key, "9")], 1.0)[name] == 0
    half = [record(writes, 3, "B", "1"), record(writes, 3, "B", "9")]
    assert check_heuristics("s", half, 0.5)["last_value"] == 0.5
    with pytest.raises(HeuristicError, match=r"s: the heuristic last_value answers 0\.500"):
        check_heuristics("s", half, 0.49)


def test_a_batch_holds_what_its_records_say(formation):
    records = formation.splits["structural_ood"][:40]
    chosen = torch.tensor([7, 3, 3, 31])
    batch = encode_records(records).batch(chosen)
    picked = [records[index] for index in chosen]
    width = max(len(record["token_ids"]) for record in picked)
    assert batch.token_ids.shape == batch.attention_mask.shape == batch.token_role.shape == (4, width)
    assert batch.sample_ids == tuple(record["sample_id"] for record in picked)
    for row, record in enumerate(picked):
        padding = width - len(record["token_ids"])
        assert batch.token_ids[row].tolist() == record["token_ids"] + [0] * padding
        assert batch.attention_mask[row].tolist() == [True] * (width - padding) + [False] * padding
        assert batch.targets()[row].tolist() == record["token_ids"][1:] + [-100] * padding
        roles = [TOKEN_ROLES[role] for role in batch.token_role[row, 1 : width - padding].tolist()]
        expected = []
        for step in record["steps"]:
            expected += (
                ["op_write", "key_write", "value_write"]
                if step["op"] == "write"
                else ["op_read", "key_read", "value_answer"]
            )
        assert roles == [*expected, "eos"]
    events = [(row, event) for row, record in enumerate(picked) for event in record["query_events"]]
    columns = {
        "row": [row for row, _ in events],
        "query_index": [event["query_index"] for _, event in events],
        "prediction_position": [event["positions"]["answer"] - 1 for _, event in events],
        "answer_token": [picked[row]["token_ids"][event["positions"]["answer"]] for row, event in events],
        "support_key_position": [event["support_positions"]["key"] for _, event in events],
        "support_value_position": [event["support_positions"]["value"] for _, event in events],
        "slot_after_write": [event["slot_after_write"] for _, event in events],
        "writes_since_support": [event["writes_since_support"] for _, event in events],
        "tokens_since_support": [event["tokens_since_support"] for _, event in events],
    }
    for name, column in columns.items():
        assert getattr(batch.events, name).tolist() == column, name


def test_collating_records_is_batching_them_all(formation):
    records = formation.splits["train"][:9]
    whole, batch = encode_records(records), collate(records)
    assert torch.equal(whole.token_ids, batch.token_ids)
    assert torch.equal(whole.events.row, batch.events.row)
    parts = list(whole.batches(4))
    assert [len(part) for part in parts] == [4, 4, 1]
    assert [len(part) for part in whole.batches(4, max_batches=2)] == [4, 4]
    assert sum(len(part.events) for part in parts) == len(batch.events)
    with pytest.raises(ValueError, match="no records"):
        encode_records([])


def test_the_shipped_demo_generates_within_its_checks():
    demo = generate_benchmark(load_config("demo").benchmark)
    assert max(max(scores.values()) for scores in demo.diagnostics["heuristics"].values()) <= 0.4

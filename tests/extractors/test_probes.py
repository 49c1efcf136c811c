"""Probes in a lake: every table against the records they were made from, no-ops, and probes that do not fit."""

import hashlib
import json

import polars as pl
import pytest
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.probe import ProbeFormatError, VocabularyMismatch
from lakebed.engine.symbolic_kv import benchmark_jsonl
from lakebed.engine.symbolic_kv.pairs import PAIR_TYPES, Pair, PairTask, corrupt, find_pair
from lakebed.engine.symbolic_kv.probes import ProbeSamplingError, sample_probe
from lakebed.engine.symbolic_kv.roles import event_partition, event_roles
from lakebed.extractors.probes import ProbeError, build_probe, import_probe
from lakebed.extractors.runs import RunInfo, model_parameters, register_run
from lakebed.lake import Lake, Unit
from lakebed.lake.errors import InputMismatch, InvalidName, UnknownName
from lakebed.lake.verify import verify

SPLITS = ("validation_iid", "heldout_pairs")
EXAMPLES = 8
KEPT = 5


def register(lake, run, config, described=True):
    """A run of the small task that was never trained: probes need no more. Undescribed, its model is unknown."""
    about = {"adapter": "symbolic_kv", "config": config.canonical_json()} if described else {}
    info = RunInfo(source="test", seed=config.seed, **about)
    model = SymbolicKVDecoder(config.model, config.benchmark.vocabulary_size)
    rows = model_parameters(model, {})
    register_run(lake, run, info, rows)


@pytest.fixture(scope="session")
def probed(tmp_path_factory, config, benchmark_data):
    """A lake with run kv and a small probe of it."""
    path = tmp_path_factory.mktemp("probed") / "p.lake"
    with Lake.create(path) as lake:
        register(lake, "kv", config)
        made = build_probe(lake, "kv", "probe", SPLITS, EXAMPLES, 17, KEPT, benchmark_data)
    return path, made


@pytest.fixture
def probed_lake(probed):
    with Lake.open(probed[0]) as lake:
        yield lake


@pytest.fixture(scope="session")
def sampled(benchmark_data):
    return sample_probe(benchmark_data.splits, SPLITS, EXAMPLES, 17)


@pytest.fixture(scope="session")
def task(benchmark_data):
    return PairTask(benchmark_data.vocabulary, benchmark_data.held_out)


@pytest.fixture
def kv_lake(tmp_path, config):
    with Lake.create(tmp_path / "kv.lake") as lake:
        register(lake, "kv", config)
        yield lake


def rows(lake, table, probe="probe"):
    return lake.table(table, "kv").filter(pl.col("probe") == probe).drop("run").collect()


def events_of(records):
    return [(record, event) for record in records for event in record["query_events"]]


def test_the_probe_itself(probed, probed_lake, sampled, benchmark_data):
    sha256 = hashlib.sha256(benchmark_jsonl(sampled).encode()).hexdigest()
    (row,) = rows(probed_lake, "probes").to_dicts()
    vocabulary = benchmark_data.vocabulary
    assert (row["source"], row["sha256"], row["splits"]) == ("symbolic_kv", sha256, list(SPLITS))
    assert row["vocabulary"] == list(vocabulary.tokens)
    assert row["key_tokens"] == list(vocabulary.key_ids)
    assert row["value_tokens"] == list(vocabulary.value_ids)
    assert (row["num_examples"], row["num_events"]) == (16, len(events_of(sampled)))
    assert (row["parent_probe"], row["max_pairs_per_type"]) == (None, KEPT)
    assert json.loads(row["metadata"]) == {
        "examples_per_split": EXAMPLES,
        "seed": 17,
        "splits": list(SPLITS),
        "max_pairs_per_type": KEPT,
        "split_counts": dict.fromkeys(SPLITS, EXAMPLES),
    }
    made = probed[1]
    assert (made.made, made.sha256, made.num_examples, made.num_events) == (
        True,
        sha256,
        16,
        row["num_events"],
    )


def test_records_and_events(probed_lake, sampled, benchmark_data):
    ids = benchmark_data.vocabulary.ids
    examples = rows(probed_lake, "probe_examples").to_dicts()
    for number, (row, record) in enumerate(zip(examples, sampled, strict=True)):
        assert row["example"] == number
        assert (row["sample_id"], row["split"]) == (record["sample_id"], record["split"])
        assert row["tokens"] == record["token_ids"]
        assert json.loads(row["record"]) == record
    for number, (row, (record, event)) in enumerate(
        zip(rows(probed_lake, "events").to_dicts(), events_of(sampled), strict=True)
    ):
        answer = ids[event["answer_value"]]
        assert row == {
            "probe": "probe",
            "event": number,
            "example": sampled.index(record),
            "sample_id": record["sample_id"],
            "split": record["split"],
            "query_index": event["query_index"],
            "prediction_position": event["positions"]["answer"] - 1,
            "answer_token": answer,
            "answer": event["answer_value"],
            "competitors": [token for token in benchmark_data.vocabulary.value_ids if token != answer],
        }


def test_positions_and_the_view_over_them(probed_lake, sampled):
    wanted = []
    for number, (record, event) in enumerate(events_of(sampled)):
        named = [
            ("role", role, place) for role, places in event_roles(record, event).items() for place in places
        ]
        parts = [("partition", part, place) for place, part in event_partition(record, event).items()]
        wanted += [
            ("probe", number, kind, role, place, record["token_ids"][place], record["tokens"][place])
            for kind, role, place in named + parts
        ]
    found = rows(probed_lake, "positions").select(
        "probe", "event", "kind", "role", "position", "token", "text"
    )
    assert sorted(found.rows()) == sorted(wanted)
    whole = probed_lake.sql(
        "SELECT role, positions, tokens FROM event_roles WHERE run = 'kv' AND probe = 'probe' AND event = 3"
    ).fetchall()
    record, event = events_of(sampled)[3]
    roles = {**event_roles(record, event), "causal_prefix": range(event["positions"]["key"] + 1)}
    assert {role: (positions, tokens) for role, positions, tokens in whole} == {
        role: (list(places), [record["token_ids"][place] for place in places])
        for role, places in roles.items()
    }


@pytest.mark.parametrize("probe", ["probe", "probe.corrupted"])
def test_rows_of_activations(probed_lake, probe):
    examples = rows(probed_lake, "probe_examples", probe).to_dicts()
    events = dict(rows(probed_lake, "events", probe).select("event", "example").rows())
    roles = rows(probed_lake, "positions", probe).filter(pl.col("kind") == "role")
    named = sorted({(events[event], place) for event, place in roles.select("event", "position").rows()})
    every = [(row["example"], place) for row in examples for place in range(len(row["tokens"]))]
    found = rows(probed_lake, "activation_rows", probe).sort("layout", "row")
    for layout, wanted in (("roles", named), ("all", every)):
        held = found.filter(pl.col("layout") == layout).select("row", "example", "position").rows()
        assert held == [(row, *place) for row, place in enumerate(wanted)]


def test_pairs_and_their_corrupted_records(probed, probed_lake, sampled, task):
    pairs = {(row["clean_event"], row["pair_type"]): row for row in rows(probed_lake, "pairs").to_dicts()}
    events = rows(probed_lake, "events", "probe.corrupted").to_dicts()
    examples = rows(probed_lake, "probe_examples", "probe.corrupted").to_dicts()
    taken, kept = {}, 0
    for number, (record, event) in enumerate(events_of(sampled)):
        for pair_type in PAIR_TYPES:
            row = pairs.pop((number, pair_type))
            found = find_pair(task, record, event, pair_type)
            source = (row["split"], row["source_sample_id"], row["source_query_index"])
            assert source == (record["split"], record["sample_id"], event["query_index"])
            if not isinstance(found, Pair):
                assert (row["pair_id"], row["corrupted_event"], row["skip_reason"]) == (
                    None,
                    None,
                    found.reason,
                )
                continue
            assert row["skip_reason"] is None
            assert json.loads(row["mutation"]) == found.mutation
            for name in ("pair_id", "clean_answer_value", "corrupted_answer_value"):
                assert row[name] == getattr(found, name)
            for name in ("clean_transfer_token", "corrupted_transfer_token"):
                assert row[name] == getattr(found, name)
            at = (pair_type, record["split"])
            taken[at] = taken.get(at, 0) + 1
            if taken[at] > KEPT:
                assert row["corrupted_event"] is None
                continue
            corrupted = corrupt(task, record, found)
            held = events[row["corrupted_event"]]
            assert (held["sample_id"], held["query_index"]) == (f"{row['pair_id']}:corrupted", 0)
            assert held["answer"] == found.corrupted_answer_value
            assert examples[held["example"]]["tokens"] == corrupted["token_ids"]
            kept += 1
    assert not pairs
    assert kept == len(events) == probed[1].num_corrupted > KEPT * len(PAIR_TYPES)
    (probe,) = rows(probed_lake, "probes", "probe.corrupted").to_dicts()
    assert (probe["source"], probe["parent_probe"], probe["max_pairs_per_type"]) == (
        "corrupted",
        "probe",
        None,
    )


def test_every_file_is_whole_and_every_key_stands_once(probed_lake):
    assert verify(probed_lake).damaged == []


def test_a_damaged_probe_is_mended_by_making_it_again(kv_lake, benchmark_data):
    asked = {"splits": SPLITS, "examples_per_split": 2, "benchmark": benchmark_data}
    first = build_probe(kv_lake, "kv", "mine", **asked)
    (receipt,) = kv_lake.receipts.all("kv", "probe")
    path = next(entry.path for entry in receipt.files if entry.path.startswith("tables/positions/"))
    kv_lake.storage.remove(path)
    (damage,) = verify(kv_lake).damaged
    assert damage.path == path
    assert damage.remedy == (
        f"remove {receipt.key}, then give again the `lakebed probe build` or `lakebed probe import` that made probe "
        "'mine' of run 'kv'"
    )
    kv_lake.storage.remove(receipt.key)
    with Lake.open(kv_lake.uri) as mended:
        assert vars(build_probe(mended, "kv", "mine", **asked)) == vars(first)
        assert verify(mended).damaged == []


def test_the_same_again_does_nothing(probed, probed_lake):
    probed_lake.refresh()
    before = [receipt.unit for receipt in probed_lake.receipts.all("kv")]
    again = build_probe(probed_lake, "kv", "probe", SPLITS, EXAMPLES, 17, KEPT)
    probed_lake.refresh()
    assert not again.made
    assert [receipt.unit for receipt in probed_lake.receipts.all("kv")] == before
    assert vars(again) == {**vars(probed[1]), "made": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 18}, r"\(seed 17, now 18\)"),
        ({"examples_per_split": 9}, r"\(examples_per_split 8, now 9\)"),
        ({"max_pairs_per_type": 6, "seed": 3}, r"\(seed 17, now 3; max_pairs_per_type 5, now 6\)"),
        ({"splits": ("train",)}, r"\(splits validation_iid heldout_pairs, now train\)"),
    ],
)
def test_the_same_name_for_another_probe_is_refused(probed_lake, changes, message):
    asked = {"splits": SPLITS, "examples_per_split": EXAMPLES, "max_pairs_per_type": KEPT, **changes}
    with pytest.raises(InputMismatch, match=message) as refused:
        build_probe(probed_lake, "kv", "probe", **asked)
    assert "probe 'probe' of run 'kv' stands in the lake with other content" in str(refused.value)
    assert str(refused.value).endswith("choose another name with --probe")


def test_the_benchmark_is_drawn_from_the_runs_own_config(kv_lake, probed):
    drawn = build_probe(kv_lake, "kv", "probe", SPLITS, EXAMPLES, 17, KEPT)
    assert vars(drawn) == vars(probed[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"run": "other"}, UnknownName, "no run 'other' in .*; it has kv"),
        ({"name": "a/b"}, InvalidName, "probe name 'a/b' is not usable"),
        ({"name": "x.corrupted"}, InvalidName, "choose --probe x$"),
        ({"splits": ("iid",)}, ProbeSamplingError, "no split 'iid'; the benchmark has train, validation_iid"),
        ({"splits": ()}, ProbeSamplingError, "no split to sample from"),
        ({"examples_per_split": 0}, ProbeSamplingError, "examples per split is 0"),
        ({"max_pairs_per_type": 0}, ProbeError, "max pairs per type is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(kv_lake, benchmark_data, arguments, error, message):
    with pytest.raises(error, match=message):
        build_probe(kv_lake, **{"run": "kv", "benchmark": benchmark_data, **arguments})
    assert kv_lake.table("probes").collect().is_empty()


def test_a_run_of_another_task_has_nothing_to_sample(kv_lake, config):
    register(kv_lake, "foreign", config, described=False)
    with pytest.raises(
        ProbeError, match=r"run 'foreign' has no symbolic-KV benchmark .* `lakebed probe import FILE"
    ):
        build_probe(kv_lake, "foreign")


# -- probes from a file --------------------------------------------------------------------------------------

EVENT = {"roles": {"subject": [4, 1], "prediction": 2, "next": 3}, "answer": 20, "competitors": [30, 21]}
RECORD = {"sample_id": "one", "token_ids": [1, 8, 10, 20, 2], "events": [EVENT, {**EVENT, "answer": 22}]}


@pytest.fixture
def written(tmp_path):
    def write(*records):
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def test_an_imported_probe(kv_lake, written, config):
    path = written(RECORD, {**RECORD, "sample_id": "two", "split": "held"})
    made = import_probe(kv_lake, "kv", path, "questions")
    assert (made.made, made.num_examples, made.num_events, made.num_corrupted) == (True, 2, 4, 0)
    (probe,) = rows(kv_lake, "probes", "questions").to_dicts()
    assert (probe["source"], probe["splits"], probe["max_pairs_per_type"]) == ("jsonl", ["all", "held"], None)
    # The run's configuration tells what the tokens are, though the file does not.
    assert len(probe["vocabulary"]) == config.benchmark.vocabulary_size
    assert len(probe["value_tokens"]) == config.benchmark.num_values
    first, second, *_ = rows(kv_lake, "events", "questions").sort("event").to_dicts()
    assert (first["prediction_position"], first["answer_token"], first["competitors"]) == (2, 20, [21, 30])
    assert first["answer"] == probe["vocabulary"][20]
    assert (second["query_index"], second["answer_token"], second["split"]) == (1, 22, "all")
    positions = rows(kv_lake, "positions", "questions").filter(pl.col("event") == 3)
    assert sorted(positions.select("kind", "role", "position", "token").rows()) == [
        ("partition", "other", 0, 1),
        ("partition", "prediction", 2, 10),
        ("partition", "subject", 1, 8),
        ("role", "next", 3, 20),
        ("role", "prediction", 2, 10),
        ("role", "subject", 1, 8),
        ("role", "subject", 4, 2),
    ]
    assert not import_probe(kv_lake, "kv", path, "questions").made
    assert verify(kv_lake).damaged == []


def test_an_imported_probe_of_a_run_without_an_adapter_has_the_texts_of_its_file(kv_lake, written, config):
    register(kv_lake, "foreign", config, described=False)
    path = written({**RECORD, "tokens": ["a", "b", "c", "d", "e"]})
    import_probe(kv_lake, "foreign", path, "questions")
    (probe,) = kv_lake.table("probes", "foreign").collect().to_dicts()
    known = {token: text for token, text in enumerate(probe["vocabulary"]) if text is not None}
    assert known == {1: "a", 8: "b", 10: "c", 20: "d", 2: "e"}
    assert (probe["key_tokens"], probe["value_tokens"]) == (None, None)
    answers = kv_lake.table("events", "foreign").sort("event").collect()["answer"].to_list()
    assert answers == ["d", None]


def test_another_file_under_the_same_name_is_refused(kv_lake, written):
    import_probe(kv_lake, "kv", written(RECORD), "questions")
    with pytest.raises(
        InputMismatch, match=r"'questions' .* \(its file had other records\): choose another name"
    ):
        import_probe(kv_lake, "kv", written({**RECORD, "split": "held"}), "questions")


def test_a_file_and_a_sampled_probe_cannot_share_a_name(kv_lake, written, benchmark_data):
    import_probe(kv_lake, "kv", written(RECORD), "probe")
    with pytest.raises(InputMismatch, match=r"\(made from jsonl, now symbolic_kv\)"):
        build_probe(kv_lake, "kv", benchmark=benchmark_data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_ids": [1, 8, 10, 999, 2]}, VocabularyMismatch, "record 'one' has token 999"),
        ({"events": [{**EVENT, "answer": 999}]}, VocabularyMismatch, "record 'one' has token 999"),
        (
            {"tokens": ["<bos>", "W", "K00", "cat", "<eos>"]},
            VocabularyMismatch,
            "calls token 20 'cat', and the run",
        ),
        (
            {"token_ids": [1] * 500},
            ProbeFormatError,
            "record 'one' has 500 tokens, and the model reads at most",
        ),
        ({"events": []}, ProbeFormatError, r"questions.jsonl, line 1: events: List should have"),
    ],
)
def test_a_probe_that_does_not_fit_leaves_nothing(kv_lake, written, change, error, message):
    with pytest.raises(error, match=message):
        import_probe(kv_lake, "kv", written({**RECORD, **change}), "questions")
    assert kv_lake.table("probes").collect().is_empty()


def test_a_run_of_another_family_tells_its_vocabulary_by_its_embedding(tmp_path, written):
    with Lake.create(tmp_path / "gpt2.lake") as lake:
        with lake.unit(Unit("run", "gpt2", "run")) as writer:
            writer.rows("runs", [{"source": "import", "adapter": "gpt2", "config": "{}"}])
            shapes = {
                "wte.weight": ("token_embedding", [31, 4]),
                "wpe.weight": ("position_embedding", [5, 4]),
            }
            writer.rows(
                "parameters",
                [
                    {"parameter": name, "module": module, "shape": shape}
                    for name, (module, shape) in shapes.items()
                ],
            )
        beyond = {**RECORD, "events": [{**EVENT, "competitors": [31]}]}
        with pytest.raises(VocabularyMismatch, match="has token 31, and the model's vocabulary ends at 30"):
            import_probe(lake, "gpt2", written(beyond), "questions")
        with pytest.raises(ProbeFormatError, match="has 6 tokens, and the model reads at most 5"):
            import_probe(lake, "gpt2", written({**RECORD, "token_ids": [1] * 6}), "questions")
        assert import_probe(lake, "gpt2", written(RECORD), "questions").made
        assert lake.table("probes", "gpt2").collect()["vocabulary"].to_list() == [None]


def test_an_import_needs_a_run_and_a_name(kv_lake, written):
    with pytest.raises(UnknownName, match="no run 'other'"):
        import_probe(kv_lake, "other", written(RECORD), "questions")
    with pytest.raises(InvalidName, match="marks the corrupted records"):
        import_probe(kv_lake, "kv", written(RECORD), "questions.corrupted")

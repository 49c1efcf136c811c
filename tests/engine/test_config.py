"""Run configurations: what is packaged, what is refused and in which words, and the learning rate by hand."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lakebed.engine.config import (
    ConfigError,
    OptimizationConfig,
    RunConfig,
    ScheduleConfig,
    load_config,
    named_configs,
)
from pydantic import ValidationError


def complaint(name="formation", **overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(name, **overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_packaged_configurations_are_the_published_ones():
    assert named_configs() == ["demo", "formation", "generalization", "generalization_decay", "tiny"]
    formation = load_config("formation")
    assert (formation.num_steps, formation.checkpoint_every_steps, formation.batch_size) == (16000, 250, 128)
    assert formation.checkpointing.save_step_checkpoints
    assert formation.evaluation.tracked_splits == ("validation_iid", "heldout_pairs")
    assert formation.model.embedding_std == 1.0
    for name in ("generalization", "generalization_decay", "tiny"):
        other = load_config(name)
        assert (other.benchmark, other.model) == (formation.benchmark, formation.model)
        assert other.checkpoint_every_steps == 1000
        assert not other.checkpointing.save_step_checkpoints
    decay = load_config("generalization_decay").optimization.schedule
    assert (decay.kind, decay.decay_start_step, decay.decay_end_step) == ("cosine_decay", 8000, 16000)
    assert decay.min_learning_rate == 4e-5
    tiny = load_config("tiny")
    assert (tiny.num_steps, tiny.evaluation.max_eval_batches) == (12000, 4)
    assert tiny.evaluation.tracked_splits == ("validation_iid",)
    assert tiny.checkpointing.best_checkpoint_split == "validation_iid"


@pytest.mark.parametrize("name", named_configs())
def test_every_packaged_configuration_is_named_after_its_file_and_survives_json(name):
    config = load_config(name)
    assert config.run_name == name
    text = config.canonical_json()
    assert RunConfig.from_json(text) == config
    assert RunConfig.from_json(text).canonical_json() == text
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_overrides_merge_tables_and_follow_dotted_keys():
    config = load_config(
        "formation",
        num_steps=10,
        model={"dropout": 0.1},
        benchmark={"train": {"query_lag": {"max": 3}}},
        **{"optimization.learning_rate": 1e-3},
    )
    assert config.num_steps == 10
    assert (config.model.dropout, config.model.d_model) == (0.1, 128)
    assert (config.benchmark.train.query_lag.min, config.benchmark.train.query_lag.max) == (1, 3)
    assert config.optimization.learning_rate == 1e-3
    assert load_config("formation").model.dropout == 0.0


def test_a_path_is_read_and_named_in_its_complaints(tmp_path):
    path = tmp_path / "mine.toml"
    packaged = Path(__file__).parents[2] / "engine" / "configs" / "tiny.toml"
    path.write_text(packaged.read_text().replace('run_name = "tiny"', 'run_name = "mine"'))
    assert load_config(path).run_name == "mine"
    assert load_config(str(path)).model == load_config("tiny").model
    path.write_text(path.read_text().replace("d_ff = 512", "d_ff = 0"))
    with pytest.raises(ConfigError, match=r"mine\.toml: model\.d_ff: .*greater than or equal to 1, not 0"):
        load_config(path)
    path.write_text("seed = = 3")
    with pytest.raises(ConfigError, match=r"mine\.toml: not TOML"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="unreadable"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: no such configuration file"):
        load_config(tmp_path / "absent.toml")


def test_an_unknown_name_is_answered_with_the_names_that_exist():
    assert complaint("formaton").startswith("no configuration named 'formaton'; named configurations: demo, ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"model": {"d_modell": 3}},
            "formation: model.d_modell: unknown key; did you mean d_model? allowed: ",
        ),
        ({"device": "cpu"}, "formation: device: unknown key; allowed: batch_size, benchmark, "),
        (
            {"benchmark.train.query_lag.mean": 1},
            "benchmark.train.query_lag.mean: unknown key; allowed: max, min",
        ),
        (
            {"optimization.schedule.end": 1},
            "optimization.schedule.end: unknown key; allowed: decay_end_step, decay_start_step, kind",
        ),
        ({"seed": True}, "formation: seed: input should be a valid integer, not True"),
        ({"seed": 2**32}, "seed: input should be less than or equal to 4294967295"),
        ({"num_steps": "10"}, "num_steps: input should be a valid integer, not '10'"),
        ({"model.dropout": math.nan}, "model.dropout: input should be a finite number, not nan"),
        ({"model.n_heads": 3}, "model: d_model 128 is not divisible by n_heads 3"),
        (
            {"model.max_seq_len": 82},
            "model.max_seq_len is 82, and the benchmark's longest stream has 83 tokens",
        ),
        ({"model.embedding_std": 0.0}, "model.embedding_std: input should be greater than 0"),
        ({"seed.inner": 1}, "seed.inner: seed is a value, not a table"),
        ({"run_name": ""}, "run_name: string should have at least 1 character"),
        (
            {"benchmark.train.num_queries": {"min": 9}},
            "benchmark.train.num_queries: min 9 exceeds max 7",
        ),
        ({"benchmark.train.active_keys": {"min": 1}}, "benchmark.train: active_keys.min is 1"),
        ({"benchmark.train.num_queries": {"min": 0}}, "benchmark.train: num_queries.min is 0"),
        ({"benchmark.train.query_lag": {"min": 0}}, "benchmark.train: query_lag.min is 0"),
        ({"benchmark.train.query_lag": {"max": 11}}, "query_lag.max is 11, and must stay below "),
        (
            {"benchmark.num_keys": 4},
            "benchmark: structural_ood.active_keys.max is 5, and must not exceed num_keys = 4",
        ),
        (
            {"benchmark.num_values": 10},
            "train can write 11 distinct values, and must not exceed num_values = 10",
        ),
        ({"benchmark.counterfactual": {"num_samples": 1025}}, "must not exceed the 1024 records of test_iid"),
        (
            {"benchmark.counterfactual.source_split": "counterfactual"},
            "source_split: input should be 'train', ",
        ),
        (
            {"benchmark.holdout_answer_pair_fraction": 1.0},
            "holdout_answer_pair_fraction: input should be less than 1",
        ),
        ({"benchmark.benchmark_type": "other"}, "benchmark_type: input should be 'symbolic_kv_stream'"),
        ({"optimization.schedule.min_learning_rate": 0.0}, "a constant schedule has no min_learning_rate"),
        (
            {"optimization.schedule": {"kind": "cosine_decay", "decay_start_step": 300}},
            "cosine_decay needs decay_end_step, min_learning_rate",
        ),
        (
            {"evaluation.tracked_splits": ["validation"]},
            "evaluation.tracked_splits.0: input should be 'train'",
        ),
        ({"evaluation.tracked_splits": []}, "evaluation.tracked_splits: "),
        (
            {"evaluation.analysis_splits": ["train", "train"]},
            "analysis_splits names a split twice: train, train",
        ),
        ({"evaluation.birth_thresholds": {"s": 1.0}}, "evaluation.birth_thresholds.s: unknown key"),
        (
            {"checkpointing": {"save_step_checkpoints": False, "save_best_checkpoint": False}},
            "checkpointing: save_step_checkpoints and save_best_checkpoint are both false",
        ),
        (
            {"checkpointing.best_checkpoint_split": "test_iid"},
            "best_checkpoint_split test_iid is not tracked",
        ),
        ({"checkpointing.best_checkpoint_metric": "w"}, "analysis_splits, which lack heldout_pairs"),
        (
            {"checkpointing.best_checkpoint_metric": "accuracy"},
            "best_checkpoint_metric: input should be 'answer_",
        ),
    ],
)
def test_each_wrong_value_is_refused_in_one_line_that_says_where_and_why(overrides, expected):
    assert expected in complaint(**overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"decay_start_step": 199}, "optimization: schedule.decay_start_step 199 precedes warmup_steps 200"),
        ({"decay_end_step": 8000}, "decay_end_step 8000 must exceed decay_start_step 8000"),
        ({"min_learning_rate": 5e-4}, "schedule.min_learning_rate 0.0005 exceeds learning_rate 0.0004"),
        (
            {"min_learning_rate": -1e-9},
            "schedule.min_learning_rate: input should be greater than or equal to 0",
        ),
    ],
)
def test_a_cosine_schedule_must_fit_its_warmup_and_base(overrides, expected):
    assert expected in complaint("generalization_decay", **{"optimization.schedule": overrides})


def _leaves(model, prefix=""):
    for name, field in model.model_fields.items():
        annotation = field.annotation
        nested = hasattr(annotation, "model_fields")
        yield prefix + name, field.is_required()
        if nested:
            yield from _leaves(annotation, f"{prefix}{name}.")


REQUIRED = [key for key, required in _leaves(RunConfig) if required]


@pytest.mark.parametrize("key", REQUIRED)
def test_every_required_key_is_missed_by_name(key):
    document = json.loads(load_config("formation").canonical_json())
    table = document
    *path, last = key.split(".")
    for name in path:
        table = table[name]
    del table[last]
    with pytest.raises(ConfigError, match=rf"^stored run: {key}: is required and missing$"):
        RunConfig.from_json(json.dumps(document), source="stored run")


def test_optional_fields_are_only_these():
    assert {key for key, required in _leaves(RunConfig) if not required} == {
        "model.embedding_std",
        "optimization.schedule.decay_start_step",
        "optimization.schedule.decay_end_step",
        "optimization.schedule.min_learning_rate",
        "evaluation.max_eval_batches",
        "evaluation.max_analysis_batches",
    }


def test_json_that_is_no_configuration_is_refused():
    with pytest.raises(ConfigError, match=r"^checkpoint 3: not JSON: "):
        RunConfig.from_json("{", source="checkpoint 3")
    with pytest.raises(ConfigError, match="configuration: input should be a valid dictionary"):
        RunConfig.from_json("[]")


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        load_config("formation").num_steps = 3


@given(low=st.integers(0, 20), high=st.integers(0, 20))
def test_a_query_range_is_accepted_exactly_when_it_is_ordered_positive_and_fits(low, high):
    # 5 keys and 12 overwrites already take 2 + 3 * 17 = 53 of 96 positions, which leaves 14 reads.
    override = {"benchmark.structural_ood.num_queries": {"min": low, "max": high}}
    if 1 <= low <= high <= 14:
        assert load_config("formation", **override).benchmark.structural_ood.num_queries.max == high
    else:
        complaint(**override)


def optimization(warmup=200, **schedule):
    return OptimizationConfig(
        learning_rate=4e-4,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.95,
        grad_clip_norm=1.0,
        warmup_steps=warmup,
        schedule=ScheduleConfig(**schedule),
    )


def test_warmup_rises_linearly_to_the_base_and_stays():
    constant = optimization(kind="constant")
    assert constant.learning_rate_at(1) == pytest.approx(2e-6)
    assert constant.learning_rate_at(50) == pytest.approx(1e-4)
    assert constant.learning_rate_at(199) < 4e-4
    assert constant.learning_rate_at(200) == constant.learning_rate_at(201) == 4e-4
    assert constant.learning_rate_at(10**6) == 4e-4
    assert optimization(warmup=0, kind="constant").learning_rate_at(1) == 4e-4
    with pytest.raises(ValueError, match="counted from 1"):
        constant.learning_rate_at(0)


def test_cosine_decay_at_its_boundaries_and_quarters():
    rate = optimization(
        kind="cosine_decay", decay_start_step=1000, decay_end_step=2000, min_learning_rate=4e-5
    ).learning_rate_at
    assert rate(100) == pytest.approx(2e-4)
    assert rate(1000) == 4e-4
    assert 0 < 4e-4 - rate(1001) < 1e-9
    assert rate(1250) == pytest.approx(4e-5 + 3.6e-4 * (1 + math.sqrt(0.5)) / 2)
    assert rate(1500) == pytest.approx(2.2e-4)
    assert rate(1750) == pytest.approx(4e-5 + 3.6e-4 * (1 - math.sqrt(0.5)) / 2)
    assert 0 < rate(1999) - 4e-5 < 1e-9
    assert rate(2000) == rate(5000) == 4e-5


@given(
    warmup=st.integers(0, 50),
    start=st.integers(50, 100),
    length=st.integers(1, 200),
    least=st.floats(0, 4e-4),
)
def test_after_warmup_the_rate_never_rises_and_stays_between_its_bounds(warmup, start, length, least):
    schedule = {"decay_start_step": start, "decay_end_step": start + length, "min_learning_rate": least}
    rate = optimization(warmup, kind="cosine_decay", **schedule).learning_rate_at
    rates = [rate(step) for step in range(max(warmup, 1), start + length + 5)]
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert rates[0] == 4e-4
    assert rates[-1] == least
    assert min(rates) >= least


def test_reading_a_configuration_does_not_import_torch():
    code = "import sys; from lakebed.engine.config import load_config; load_config('tiny'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"

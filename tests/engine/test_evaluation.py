"""Evaluation metrics against a slow computation, one record and one event at a time."""

import json
import math
from collections import defaultdict

import pytest
import torch
from lakebed.engine.config import load_config
from lakebed.engine.evaluation import (
    evaluate_split,
    formation_births,
    is_better_checkpoint,
    language_model_loss,
    value_margin,
)
from lakebed.engine.symbolic_kv.batches import collate
from lakebed.engine.training import TrainingLoop

CONFIG = load_config(
    "formation",
    batch_size=16,
    benchmark={
        "num_keys": 5,
        "num_values": 24,
        "holdout_answer_pair_fraction": 0.45,
        **{
            split: {
                "num_samples": 30,
                "active_keys": {"min": 2, "max": 3},
                "overwrite_count": {"min": 4, "max": 5},
                "num_queries": {"min": 2, "max": 3},
                "query_lag": {"min": 1, "max": 2},
            }
            for split in ("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood")
        },
        "counterfactual": {"num_samples": 10},
    },
    model={"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "embedding_std": 0.3},
    optimization={"learning_rate": 0.01, "warmup_steps": 0},
    # 30 records in batches of 12, 12 and 6, so that pooling and averaging batches differ.
    evaluation={"batch_size": 12, "max_analysis_batches": 2},
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These matrices are tiny: on a busy machine a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loop():
    loop = TrainingLoop(CONFIG)
    for _ in range(40):
        loop.train_step()
    return loop


@torch.no_grad()
def slow_metrics(loop, records, batch_size, analysis_batches):
    """The same metrics from records alone: no padding, no tensor of events."""
    model, vocabulary = loop.model.eval(), loop.benchmark.vocabulary
    values = [vocabulary.ids[token] for token in vocabulary.value_tokens]
    losses, accuracies, analyses = [], [], []
    answers, roles, slices = [], defaultdict(list), defaultdict(lambda: defaultdict(list))
    names = {"W": ("op_write", "key_write", "value_write"), "R": ("op_read", "key_read", "value_answer")}
    for start in range(0, len(records), batch_size):
        token_losses, token_hits, event_rows = [], [], []
        for record in records[start : start + batch_size]:
            ids, tokens = record["token_ids"], record["tokens"]
            output = model.run(torch.tensor([ids]), return_attention=True)
            logits = output.logits[0].double()
            for place in range(1, len(ids)):
                hit = int(logits[place - 1].argmax()) == ids[place]
                token_losses.append(-float(logits[place - 1].log_softmax(dim=0)[ids[place]]))
                token_hits.append(hit)
                operation = (place - 1) // 3 * 3 + 1
                role = "eos" if place == len(ids) - 1 else names[tokens[operation]][place - operation]
                roles[role].append(hit)
            for event in record["query_events"]:
                read, answer = event["positions"]["key"], ids[event["positions"]["answer"]]
                correct = int(logits[read].argmax()) == answer
                answers.append(correct)
                for axis, value in record["axes"].items():
                    slices[axis][str(value)].append(correct)
                for axis in ("writes_since_support", "tokens_since_support", "slot_after_write"):
                    slices[axis][str(event[axis])].append(correct)
                heads = [output.attention[layer, 0, head, read] for layer in range(2) for head in range(2)]
                support = event["support_positions"]["value"]
                others = [float(logits[read, value]) for value in values if value != answer]
                event_rows.append(
                    (
                        max(float(head[read]) for head in heads),
                        max(float(head[support]) for head in heads),
                        float(logits[read, answer]) - max(others),
                    )
                )
        losses.append(mean(token_losses))
        accuracies.append(mean(token_hits))
        analyses.append([mean(column) for column in zip(*event_rows, strict=True)])
    q, r, w = (mean(column) for column in zip(*analyses[:analysis_batches], strict=True))
    total = sum(map(len, roles.values()))
    return {
        "loss": mean(losses),
        "token_accuracy": mean(accuracies),
        "answer_accuracy": mean(answers),
        "num_examples": len(records),
        "token_role_accuracy": {role: mean(hits) for role, hits in roles.items()},
        "token_role_fraction": {role: len(hits) / total for role, hits in roles.items()},
        "write_key_accuracy": mean(roles["key_write"]),
        "read_key_accuracy": mean(roles["key_read"]),
        "write_value_accuracy": mean(roles["value_write"]),
        "slice_accuracy": {
            axis: {value: mean(hits) for value, hits in by_value.items()} for axis, by_value in slices.items()
        },
        "q": q,
        "r": r,
        "w": w,
    }


def mean(values):
    return sum(values) / len(values)


def nested_approx(expected):
    if isinstance(expected, dict):
        return {key: nested_approx(value) for key, value in expected.items()}
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("split", ["validation_iid", "heldout_pairs", "counterfactual"])
def test_metrics_are_those_of_a_computation_per_event(loop, split):
    records = loop.benchmark.splits[split]
    value_ids = loop.benchmark.vocabulary.value_ids
    metrics = evaluate_split(loop.model, loop.encoded(split), CONFIG.evaluation, value_ids, analyse=True)
    slow = slow_metrics(loop, records, 12, 2)
    assert metrics == nested_approx(slow)
    assert json.loads(json.dumps(metrics)) == metrics
    # The comparison tells batches from pools, and right from wrong.
    if split == "validation_iid":
        assert slow["loss"] != pytest.approx(slow_metrics(loop, records, 30, 1)["loss"], rel=1e-5)
        assert 0 < slow["answer_accuracy"] < 1
        assert len(slow["slice_accuracy"]["writes_since_support"]) == 2


def test_the_number_of_batches_can_be_limited(loop):
    split, value_ids = loop.encoded("validation_iid"), loop.benchmark.vocabulary.value_ids
    settings = CONFIG.evaluation.model_copy(update={"max_eval_batches": 1, "max_analysis_batches": None})
    metrics = evaluate_split(loop.model, split, settings, value_ids, analyse=True)
    records = loop.benchmark.splits["validation_iid"]
    assert metrics["num_examples"] == 12
    assert metrics["loss"] == pytest.approx(slow_metrics(loop, records[:12], 12, 1)["loss"], rel=1e-5)
    assert metrics["w"] == pytest.approx(slow_metrics(loop, records, 12, 3)["w"], rel=1e-4)


def test_evaluation_is_without_dropout_and_gives_the_mode_back(loop):
    split, value_ids = loop.encoded("test_iid"), loop.benchmark.vocabulary.value_ids
    for mode in (True, False):
        loop.model.train(mode)
        metrics = evaluate_split(loop.model, split, CONFIG.evaluation, value_ids)
        assert loop.model.training is mode
        assert "q" not in metrics


def test_the_loss_by_hand_on_two_streams_of_different_length(loop):
    records = sorted(loop.benchmark.splits["train"], key=lambda record: len(record["tokens"]))
    batch = collate([records[0], records[-1]])
    assert not batch.attention_mask.all()
    logits = torch.randn(*batch.token_ids.shape, len(loop.benchmark.vocabulary), dtype=torch.float64)
    logits[1, 0, batch.token_ids[1, 1]] = 50.0
    terms, hits = [], []
    for row, record in enumerate((records[0], records[-1])):
        for place, token in enumerate(record["token_ids"][1:]):
            scores = logits[row, place].tolist()
            terms.append(math.log(sum(math.exp(score) for score in scores)) - scores[token])
            hits.append(max(scores) == scores[token])
    loss, accuracy = language_model_loss(logits, batch)
    assert float(loss) == pytest.approx(mean(terms), rel=1e-12)
    assert float(accuracy) == pytest.approx(mean(hits))
    assert sum(hits) >= 1


def test_the_value_margin_ignores_keys_and_specials(loop):
    vocabulary = loop.benchmark.vocabulary
    batch = collate(loop.benchmark.splits["train"][:1])
    logits = torch.zeros(len(batch.events), len(vocabulary))
    logits[:, vocabulary.ids["K00"]] = 9.0
    rows = torch.arange(len(batch.events))
    logits[rows, batch.events.answer_token] = 2.0
    other = next(value for value in vocabulary.value_ids if value not in batch.events.answer_token.tolist())
    logits[:, other] = 0.5
    assert value_margin(logits, batch.events, vocabulary.value_ids).tolist() == [1.5] * len(rows)
    logits[:, other] = 3.0
    assert value_margin(logits, batch.events, vocabulary.value_ids).tolist() == [-1.0] * len(rows)


def test_births_are_first_steps_at_or_above_the_threshold():
    thresholds = CONFIG.evaluation.birth_thresholds
    history = [
        (
            250,
            {
                "a": {"answer_accuracy": 0.5, "q": math.nan, "r": 0.1, "w": -3.0},
                "b": {"answer_accuracy": 0.91},
            },
        ),
        (500, {"a": {"answer_accuracy": 0.9, "q": 0.3, "r": 0.1, "w": 0.9}, "b": {"answer_accuracy": 0.2}}),
        (750, {"a": {"answer_accuracy": 0.1, "q": 0.1, "r": 0.1, "w": 2.0}, "b": {"answer_accuracy": 0.95}}),
    ]
    assert formation_births(history, thresholds) == {
        "a": {"answer_accuracy": 500, "q": 500, "r": None, "w": 750},
        "b": {"answer_accuracy": 250},
    }


def test_the_best_checkpoint_is_decided_by_metric_then_loss_then_order():
    rule = CONFIG.checkpointing
    assert (rule.best_checkpoint_split, rule.best_checkpoint_metric) == ("heldout_pairs", "answer_accuracy")

    def at(accuracy, loss):
        return {"heldout_pairs": {"answer_accuracy": accuracy, "loss": loss}}

    assert is_better_checkpoint(at(0.1, 9.0), None, rule)
    assert is_better_checkpoint(at(0.6, 2.0), at(0.5, 1.0), rule)
    assert not is_better_checkpoint(at(0.4, 0.5), at(0.5, 1.0), rule)
    assert is_better_checkpoint(at(0.5, 0.9), at(0.5, 1.0), rule)
    assert not is_better_checkpoint(at(0.5, 1.0), at(0.5, 1.0), rule)
    assert not is_better_checkpoint(at(0.5, 1.1), at(0.5, 1.0), rule)
    assert not is_better_checkpoint(at(math.nan, 0.0), None, rule)
    assert not is_better_checkpoint(at(math.nan, 0.0), at(0.5, 1.0), rule)
    assert is_better_checkpoint(at(0.0, 5.0), at(math.nan, 0.0), rule)
    least = rule.model_copy(update={"best_checkpoint_metric": "loss", "best_checkpoint_maximize": False})
    assert is_better_checkpoint(at(0.0, 0.9), at(1.0, 1.0), least)
    assert not is_better_checkpoint(at(1.0, 1.1), at(0.0, 1.0), least)

"""Run configurations: one frozen, validated record of everything that decides a training run.

A configuration holds the benchmark, the model, the optimizer, the evaluations and the checkpoint rules. It
holds no path, no device and no worker count: those are arguments of whoever runs it, so that two machines
running one configuration agree on its text (`RunConfig.canonical_json`) and on its hash.

Source: symbolic-KV definitions, A.5 (benchmark) and C (run). Importing this module does not import torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .configs import ConfigError, describe, load_document, named_configs

__all__ = [
    "BenchmarkConfig",
    "BirthThresholds",
    "CheckpointingConfig",
    "ConfigError",
    "CounterfactualConfig",
    "EvaluationConfig",
    "IntegerRange",
    "ModelConfig",
    "OptimizationConfig",
    "RunConfig",
    "ScheduleConfig",
    "SplitConfig",
    "load_config",
    "named_configs",
]

SplitName = Literal[
    "train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual"
]
SampledSplitName = Literal["train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood"]
SAMPLED_SPLITS: tuple[SampledSplitName, ...] = (
    "train",
    "validation_iid",
    "test_iid",
    "heldout_pairs",
    "structural_ood",
)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# numpy's legacy seeding, which a run's seeding includes, takes 32 bits.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, Field(min_length=1)]


class _Table(BaseModel):
    """A TOML table: every key known, every type exact, never changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class IntegerRange(_Table):
    """Inclusive range an integer is drawn from."""

    min: NonNegativeInt
    max: NonNegativeInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} exceeds max {self.max}")
        return self


class SplitConfig(_Table):
    """How many records a sampled split has, and the ranges their counts are drawn from."""

    num_samples: PositiveInt
    active_keys: IntegerRange
    overwrite_count: IntegerRange
    num_queries: IntegerRange
    query_lag: IntegerRange

    @property
    def max_writes(self) -> int:
        """Most writes one record of this split can hold."""
        return self.active_keys.max + self.overwrite_count.max

    @property
    def max_tokens(self) -> int:
        """Longest stream of this split: `<bos>`, three tokens per write and per read, `<eos>`."""
        return 2 + 3 * (self.max_writes + self.num_queries.max)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.active_keys.min < 2:
            raise ValueError(f"active_keys.min is {self.active_keys.min}, and an overwrite needs at least 2")
        if self.num_queries.min < 1:
            raise ValueError("num_queries.min is 0, and every record asks at least 1 query")
        if self.query_lag.min < 1:
            raise ValueError("query_lag.min is 0, and a query waits for at least 1 later write")
        if self.query_lag.max >= self.max_writes:
            raise ValueError(
                f"query_lag.max is {self.query_lag.max}, and must stay below active_keys.max + "
                f"overwrite_count.max = {self.max_writes}"
            )
        return self


class CounterfactualConfig(_Table):
    """The split that changes one write of records sampled from another split."""

    num_samples: PositiveInt
    source_split: SampledSplitName


class BenchmarkConfig(_Table):
    """The symbolic-KV benchmark: vocabulary sizes, held-out pairs and six splits (definitions A.5)."""

    benchmark_type: Literal["symbolic_kv_stream"]
    name: Text
    seed: Seed
    num_keys: PositiveInt
    num_values: PositiveInt
    holdout_answer_pair_fraction: Annotated[float, Field(gt=0, lt=1)]
    heuristic_max_accuracy: Annotated[float, Field(ge=0, le=1)]
    train: SplitConfig
    validation_iid: SplitConfig
    test_iid: SplitConfig
    heldout_pairs: SplitConfig
    structural_ood: SplitConfig
    counterfactual: CounterfactualConfig

    def sampled_splits(self) -> Iterator[tuple[SampledSplitName, SplitConfig]]:
        """Names and settings of the splits drawn from the grammar, in generation order."""
        for name in SAMPLED_SPLITS:
            yield name, getattr(self, name)

    @property
    def vocabulary_size(self) -> int:
        """Ten special tokens, then the keys, then the values."""
        return 10 + self.num_keys + self.num_values

    @property
    def max_tokens(self) -> int:
        """Longest stream any split can hold, in tokens."""
        return max(split.max_tokens for _, split in self.sampled_splits())

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, split in self.sampled_splits():
            if split.active_keys.max > self.num_keys:
                raise ValueError(
                    f"{name}.active_keys.max is {split.active_keys.max}, and must not exceed "
                    f"num_keys = {self.num_keys}"
                )
            if split.max_writes > self.num_values:
                raise ValueError(
                    f"{name} can write {split.max_writes} distinct values, and must not exceed "
                    f"num_values = {self.num_values}"
                )
        source: SplitConfig = getattr(self, self.counterfactual.source_split)
        if self.counterfactual.num_samples > source.num_samples:
            raise ValueError(
                f"counterfactual.num_samples is {self.counterfactual.num_samples}, and must not exceed the "
                f"{source.num_samples} records of {self.counterfactual.source_split}"
            )
        return self


class ModelConfig(_Table):
    """Shape of the decoder (definitions B)."""

    d_model: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    d_ff: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]
    max_seq_len: PositiveInt
    embedding_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of both embedding tables at initialization; 1 is the framework's own."""

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        return self


class ScheduleConfig(_Table):
    """Learning rate after warmup: `constant`, or `cosine_decay` between two steps."""

    kind: Literal["constant", "cosine_decay"]
    decay_start_step: NonNegativeInt | None = None
    decay_end_step: NonNegativeInt | None = None
    min_learning_rate: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _fields_of_kind(self) -> Self:
        names = ("decay_start_step", "decay_end_step", "min_learning_rate")
        given = [name for name in names if getattr(self, name) is not None]
        if self.kind == "constant" and given:
            raise ValueError(f"a constant schedule has no {given[0]}; allowed with cosine_decay only")
        if self.kind == "cosine_decay":
            absent = [name for name in names if name not in given]
            if absent:
                raise ValueError(f"cosine_decay needs {', '.join(absent)}")
        start, end = self.decay_start_step, self.decay_end_step
        if start is not None and end is not None and end <= start:
            raise ValueError(f"decay_end_step {end} must exceed decay_start_step {start}")
        return self


class OptimizationConfig(_Table):
    """AdamW over one parameter group, clipped by the global norm, with a scheduled learning rate."""

    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    grad_clip_norm: Annotated[float, Field(gt=0)]
    warmup_steps: NonNegativeInt
    schedule: ScheduleConfig

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        start, least = self.schedule.decay_start_step, self.schedule.min_learning_rate
        if start is not None and start < self.warmup_steps:
            raise ValueError(f"schedule.decay_start_step {start} precedes warmup_steps {self.warmup_steps}")
        if least is not None and least > self.learning_rate:
            raise ValueError(f"schedule.min_learning_rate {least} exceeds learning_rate {self.learning_rate}")
        return self

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update number `step` (the first is 1).

        `base * step / warmup` up to and including `warmup_steps`, then `base`, or for `cosine_decay`
        `min + (base - min) * (1 + cos(pi * u)) / 2` with `u` running from 0 at the start step to 1 at the end
        step and clamped outside. Source: definitions C, "lr(t)".
        """
        if step < 1:
            raise ValueError(f"updates are counted from 1, so there is no learning rate at step {step}")
        base = self.learning_rate
        if step <= self.warmup_steps:
            return base * (step / self.warmup_steps)  # in this order exactly `base` when warmup ends
        start, end = self.schedule.decay_start_step, self.schedule.decay_end_step
        least = self.schedule.min_learning_rate
        if start is None or end is None or least is None or step <= start:
            return base
        if step >= end:
            return least
        fraction = (step - start) / (end - start)
        return least + (base - least) * 0.5 * (1.0 + math.cos(math.pi * fraction))


class BirthThresholds(_Table):
    """A metric is born at the first evaluation where it reaches its threshold."""

    answer_accuracy: float
    q: float
    r: float
    w: float


class EvaluationConfig(_Table):
    """What is measured at each evaluation, and on how many batches (null: all)."""

    batch_size: PositiveInt
    max_eval_batches: PositiveInt | None = None
    max_analysis_batches: PositiveInt | None = None
    tracked_splits: Annotated[tuple[SplitName, ...], Field(strict=False, min_length=1)]
    analysis_splits: Annotated[tuple[SplitName, ...], Field(strict=False)]
    birth_thresholds: BirthThresholds

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        for name in ("tracked_splits", "analysis_splits"):
            splits = getattr(self, name)
            if len(set(splits)) != len(splits):
                raise ValueError(f"{name} names a split twice: {', '.join(splits)}")
        return self


class CheckpointingConfig(_Table):
    """Which checkpoints a run keeps: every `checkpoint_every_steps`, the best, or both."""

    save_step_checkpoints: bool
    save_best_checkpoint: bool
    best_checkpoint_split: SplitName
    best_checkpoint_metric: Literal["answer_accuracy", "token_accuracy", "loss", "q", "r", "w"]
    best_checkpoint_maximize: bool

    @model_validator(mode="after")
    def _saves_something(self) -> Self:
        if not (self.save_step_checkpoints or self.save_best_checkpoint):
            raise ValueError("save_step_checkpoints and save_best_checkpoint are both false; set one to true")
        return self


class RunConfig(_Table):
    """Everything that decides a training run (definitions C)."""

    run_name: Text
    seed: Seed
    batch_size: PositiveInt
    num_steps: PositiveInt
    log_every_steps: PositiveInt
    eval_every_steps: PositiveInt
    checkpoint_every_steps: PositiveInt
    benchmark: BenchmarkConfig
    model: ModelConfig
    optimization: OptimizationConfig
    evaluation: EvaluationConfig
    checkpointing: CheckpointingConfig

    @model_validator(mode="after")
    def _tables_agree(self) -> Self:
        if self.benchmark.max_tokens > self.model.max_seq_len:
            raise ValueError(
                f"model.max_seq_len is {self.model.max_seq_len}, and the benchmark's longest stream has "
                f"{self.benchmark.max_tokens} tokens"
            )
        best = self.checkpointing
        if best.save_best_checkpoint and best.best_checkpoint_split not in self.evaluation.tracked_splits:
            raise ValueError(
                f"checkpointing.best_checkpoint_split {best.best_checkpoint_split} is not tracked; "
                f"evaluation.tracked_splits: {', '.join(self.evaluation.tracked_splits)}"
            )
        analysed = best.best_checkpoint_split in self.evaluation.analysis_splits
        if best.save_best_checkpoint and best.best_checkpoint_metric in ("q", "r", "w") and not analysed:
            raise ValueError(
                f"checkpointing.best_checkpoint_metric {best.best_checkpoint_metric} is measured only on "
                f"evaluation.analysis_splits, which lack {best.best_checkpoint_split}"
            )
        return self

    def canonical_json(self) -> str:
        """The configuration as one line of JSON, keys sorted: equal configurations, equal text."""
        document = self.model_dump(mode="json")
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "configuration") -> RunConfig:
        """Read what `canonical_json` wrote. `source` names the text in a `ConfigError`."""
        try:
            document = json.loads(text)
        except ValueError as problem:
            raise ConfigError(f"{source}: not JSON: {problem}") from None
        return _validated(source, document)


def load_config(name_or_path: str | os.PathLike[str], **overrides: Any) -> RunConfig:
    """Read a named configuration (`named_configs()`) or a TOML file, with some keys replaced.

    An override is a top-level key (`num_steps=100`), a table merged into the file's
    (`model={"dropout": 0.1}`), or a dotted key (`**{"model.dropout": 0.1}`).

    Raises `ConfigError`, one line, for an unknown name, unreadable TOML, an unknown or missing key, a value
    of the wrong type or out of range, and values that contradict each other.
    """
    source, document = load_document(name_or_path, overrides)
    return _validated(source, document)


def _validated(source: str, document: Any) -> RunConfig:
    try:
        return RunConfig.model_validate(document)
    except ValidationError as problem:
        raise ConfigError(describe(source, problem, RunConfig)) from None

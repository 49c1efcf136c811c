"""The training loop: one AdamW step at a time, resumable bit for bit from any of them.

The loop draws from torch's global CPU generator, as the runs it reproduces do (dropout shares it), so run one
loop at a time in a process. Source: definitions C.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import RunConfig
from .decoder import SymbolicKVDecoder
from .evaluation import Metrics, evaluate_split, language_model_loss
from .symbolic_kv import Benchmark, generate_benchmark
from .symbolic_kv.batches import EncodedSplit, encode_records

TIED_ALIAS, TIED_OWNER = "lm_head.weight", "token_embedding.weight"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One training step: loss and gradient at the weights before the update, on the batch of that step."""

    step: int
    """Number of the update, counted from 1; it leads from the weights of `step - 1` to those of `step`."""
    loss: float
    token_accuracy: float
    learning_rate: float
    pre_clip_grad_norm: float
    clip_coefficient: float
    """`min(1, grad_clip_norm / (norm + 1e-6))` in single precision, the factor actually applied."""
    batch_size: int
    query_event_count: int
    sample_ids: tuple[str, ...]


def _draw_int64() -> int:
    """One draw from the global CPU generator, as a data loader makes it."""
    return int(torch.empty((), dtype=torch.int64).random_().item())


class BatchStream:
    """The record order of a shuffling `DataLoader` without `drop_last`, one batch of indices at a time.

    Each epoch takes two int64 from the global generator: the one a loader draws when it is iterated, unused,
    and the seed of a private generator whose `randperm` is the order. So a position in the stream is four
    integers, and a stream can be continued in the middle of an epoch.
    """

    def __init__(self, num_records: int, batch_size: int) -> None:
        self.num_records, self.batch_size = num_records, batch_size
        self.restart()

    def restart(self) -> None:
        """Forget the position: the next batch begins epoch 1."""
        self.epoch, self.epoch_seed, self.next_batch, self.draws = 0, 0, 0, 0
        self._order = torch.empty(0, dtype=torch.long)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch, the last of which may be smaller."""
        return -(-self.num_records // self.batch_size)

    def skip_draw(self) -> None:
        """Take the draw that iterating any other loader costs."""
        _draw_int64()
        self.draws += 1

    def next(self) -> Tensor:
        """Indices of the next batch, `Int[batch]`; begins the next epoch when one is used up."""
        if self.epoch == 0 or self.next_batch == self.batches_per_epoch:
            self.skip_draw()
            self._begin(self.epoch + 1, _draw_int64())
            self.draws += 1
        start = self.next_batch * self.batch_size
        self.next_batch += 1
        return self._order[start : start + self.batch_size]

    def _begin(self, epoch: int, seed: int) -> None:
        generator = torch.Generator()
        generator.manual_seed(seed)
        self._order = torch.randperm(self.num_records, generator=generator)
        self.epoch, self.epoch_seed, self.next_batch = epoch, seed, 0

    def state(self) -> dict[str, int]:
        """The position, as plain integers."""
        names = ("num_records", "batch_size", "epoch", "epoch_seed", "next_batch", "draws")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from `state`. Raises `ValueError` if it belongs to another split or batch size."""
        for name in ("num_records", "batch_size"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved batch stream has {name} {state[name]}, not {getattr(self, name)}"
                )
        self.restart()
        if state["epoch"]:
            self._begin(state["epoch"], state["epoch_seed"])
        self.next_batch, self.draws = state["next_batch"], state["draws"]


class TrainingLoop:
    """Model, optimizer, data order and step counter of one run.

    Attributes: `model`, `optimizer` (one AdamW group holding every parameter), `step` (updates done so far),
    `config`, `benchmark`, `device`. Building one seeds Python, NumPy and torch with the configuration's seed.
    """

    def __init__(
        self,
        config: RunConfig,
        benchmark: Benchmark | None = None,
        device: str = "cpu",
        train_split: str = "train",
    ) -> None:
        self.config = config
        self.benchmark = generate_benchmark(config.benchmark) if benchmark is None else benchmark
        if self.benchmark.config != config.benchmark:
            raise ValueError("the benchmark given was generated from another configuration than the run's")
        self.train_split = train_split
        self.device = _available(device)
        self._encoded: dict[str, EncodedSplit] = {}
        self._seed()
        self.model = SymbolicKVDecoder(config.model, len(self.benchmark.vocabulary)).to(self.device)
        self._generator_after_build = torch.get_rng_state()
        optimization = config.optimization
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimization.learning_rate,
            betas=(optimization.beta1, optimization.beta2),
            eps=1e-8,
            weight_decay=optimization.weight_decay,
        )
        self.step = 0
        self.stream = BatchStream(len(self.encoded(train_split)), config.batch_size)

    def _seed(self) -> None:
        random.seed(self.config.seed)
        np.random.seed(self.config.seed)
        torch.manual_seed(self.config.seed)

    def encoded(self, split: str) -> EncodedSplit:
        """Tensors of a split, made at its first use. Raises `ValueError` for a split that does not exist."""
        if split not in self._encoded:
            if split not in self.benchmark.splits:
                raise ValueError(f"no split {split!r}; splits: {', '.join(self.benchmark.splits)}")
            self._encoded[split] = encode_records(self.benchmark.splits[split]).to(self.device)
        return self._encoded[split]

    def train_step(self) -> StepMetrics:
        """One update: next batch, learning rate, forward, loss, backward, clip, optimizer step.

        A loss or gradient that is not finite is reported, not hidden: the update goes on with it.
        """
        batch = self.encoded(self.train_split).batch(self.stream.next())
        step = self.step + 1
        learning_rate = self.config.optimization.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad()
        loss, token_accuracy = language_model_loss(self.model(batch.token_ids, batch.attention_mask), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = self.config.optimization.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.step = step
        return StepMetrics(
            step=step,
            loss=loss.item(),
            token_accuracy=token_accuracy.item(),
            learning_rate=learning_rate,
            pre_clip_grad_norm=norm.item(),
            clip_coefficient=torch.clamp(limit / (norm + 1e-6), max=1.0).item(),
            batch_size=len(batch),
            query_event_count=len(batch.events),
            sample_ids=batch.sample_ids,
        )

    def evaluate(self, splits: Iterable[str] | None = None) -> dict[str, Metrics]:
        """Metrics by split (default: the tracked splits), as `evaluation.evaluate_split` defines them.

        Weights and moments stay as they are, but each pass over a split takes the one draw from the global
        generator that iterating a loader costs (two passes where `q`, `r` and `w` are measured), so
        evaluating moves the order of the epochs begun afterwards.
        """
        settings = self.config.evaluation
        metrics: dict[str, Metrics] = {}
        for split in settings.tracked_splits if splits is None else splits:
            analyse = split in settings.analysis_splits
            encoded = self.encoded(split)
            for _ in range(2 if analyse else 1):
                self.stream.skip_draw()
            value_ids = self.benchmark.vocabulary.value_ids
            metrics[split] = evaluate_split(self.model, encoded, settings, value_ids, analyse)
        return metrics

    def loop_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights, moments and the CPU generator, as plain JSON values."""
        state: dict[str, Any] = {"train_split": self.train_split, **self.stream.state()}
        if self.config.model.dropout and self.device.type == "cuda":
            state["device_generator"] = torch.cuda.get_rng_state(self.device).numpy().tobytes().hex()
        return state

    def restore(
        self,
        step: int,
        model_state: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Any],
        loop_state: Mapping[str, Any] | None,
        rng_state: Tensor | None,
    ) -> None:
        """Continue from a checkpoint taken after `step` updates.

        With `loop_state` (and `rng_state`, from `torch.get_rng_state()`) every later loss and weight has the
        bits of the uninterrupted run. Without `rng_state` the generator is rebuilt from the seed and the
        number of draws, which is the same as long as there is no dropout; with dropout it is required. With
        `loop_state` None the batch stream restarts at the seed's first permutation, as the reference's
        resumed runs do. `model_state` may leave out the tied `lm_head.weight`.

        Raises `ValueError` if the states belong to another split, batch size or optimizer, and torch's
        `RuntimeError` if the weights do not fit the model.
        """
        if loop_state is not None and loop_state["train_split"] != self.train_split:
            raise ValueError(f"the checkpoint trained on {loop_state['train_split']}, not {self.train_split}")
        if loop_state is not None and rng_state is None and self.config.model.dropout:
            raise ValueError("a run with dropout needs the checkpoint's generator state to continue exactly")
        self.model.load_state_dict({TIED_ALIAS: model_state[TIED_OWNER], **model_state})
        # The optimizer would otherwise update the caller's moments in place.
        self.optimizer.load_state_dict(copy.deepcopy(dict(optimizer_state)))
        self.optimizer.zero_grad()
        self.step = step
        self._restore_stream(loop_state, rng_state)

    def _restore_stream(self, loop_state: Mapping[str, Any] | None, rng_state: Tensor | None) -> None:
        self._seed()
        torch.set_rng_state(self._generator_after_build)
        if loop_state is None:
            self.stream.restart()
            return
        self.stream.restore(loop_state)
        if "device_generator" in loop_state and self.device.type == "cuda":
            device_generator = torch.frombuffer(
                bytearray.fromhex(loop_state["device_generator"]), dtype=torch.uint8
            )
            torch.cuda.set_rng_state(device_generator, self.device)
        if rng_state is not None:
            torch.set_rng_state(rng_state)
            return
        for _ in range(loop_state["draws"]):
            _draw_int64()


def _available(name: str) -> torch.device:
    """The device of that name. Raises `ValueError` if this machine does not have it."""
    device = torch.device(name)
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        usable = ", ".join(kind for kind, there in present.items() if there)
        raise ValueError(f"device {name!r} is not available here; available: {usable}")
    return device

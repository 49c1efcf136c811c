"""Training into a lake: `train` from the beginning, `trace` from any step, both resumable bit for bit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.config import RunConfig, load_config
from ..engine.evaluation import Metrics
from ..engine.symbolic_kv import Benchmark, generate_benchmark
from ..engine.training import StepMetrics, TrainingLoop
from ..lake import Lake, Unit
from ..lake.datasets import EVALUATION
from ..lake.errors import MissingData
from ..lake.names import canonical_json
from ..lake.steps import StepSyntax
from .progress import Progress, Silent
from .recorder import ANCHOR_EVERY, Recorder
from .runs import RecordingError, RunInfo, describe_run, model_parameters, register_run
from .states import StateReader, optimizer_state
from .trace_block import block_rows, state_hash
from .trace_writer import live_state, write_state

ADAPTER = "symbolic_kv"
NOT_HISTORICAL = "the checkpoint holds no batch order, so the order restarts at the seed's first permutation"
HISTORICAL = "exact"


def load(name_or_path: str) -> RunConfig:
    """A run configuration by name or from a TOML file; raises ConfigError."""
    return load_config(name_or_path)


@dataclass(frozen=True)
class TrainingResult:
    """What a training command reached: the run, its last step, the steps taken now, and the last evaluation."""

    run: str
    step: int
    steps_taken: int
    recorded: int
    seconds: float
    metrics: Mapping[str, Metrics]


@dataclass(frozen=True)
class RecordWindow:
    """Which steps are recorded: first < step <= last, and whether anything is."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str, num_steps: int) -> RecordWindow:
        """`all`, `none`, or `A:B` for the moves from step A to step B; raises StepSyntax."""
        if text in ("all", "none"):
            return cls(0, num_steps if text == "all" else 0)
        try:
            first, last = (int(number) for number in text.split(":"))
        except ValueError:
            first, last = 0, -1
        if not 0 <= first < last:
            raise StepSyntax(f"cannot read --record {text!r}: write all, none, or A:B with A < B")
        return cls(first, last)

    def contains_move_from(self, step: int) -> bool:
        """Whether the move from `step` to `step + 1` is recorded."""
        return self.first <= step < self.last


def train(
    lake: Lake,
    run: str,
    config: RunConfig,
    *,
    num_steps: int | None = None,
    record: str = "all",
    store: str = "exact",
    anchor_every: int = ANCHOR_EVERY,
    device: str = "cpu",
    benchmark: Benchmark | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Trains `config` into run `run` up to `num_steps` (default: the config's), from where the run stands.

    A run that was interrupted goes on from its last committed step with the bits of an uninterrupted one. Raises
    InputMismatch if the run was made from another config, and whatever recording raises.
    """
    target = config.num_steps if num_steps is None else num_steps
    if not 0 < target <= config.num_steps:
        raise RecordingError(
            f"num_steps is {target}; it must lie between 1 and the config's num_steps {config.num_steps}"
        )
    window = RecordWindow.parse(record, config.num_steps)
    loop = _loop(config, benchmark, device)
    info = RunInfo(
        source="train",
        adapter=ADAPTER,
        config=config.canonical_json(),
        seed=config.seed,
        historical_replay=HISTORICAL,
        examples=example_rows(loop.benchmark, loop.train_split),
    )
    driver = _Driver(lake, run, loop, info, store, anchor_every)
    reader = StateReader(lake, run)
    if reader.steps:
        _restore(loop, reader, reader.steps[-1])
    return driver.go(target, window, progress or Silent())


def trace(
    lake: Lake,
    run: str,
    from_step: int,
    num_steps: int,
    *,
    into: str | None = None,
    store: str = "exact",
    anchor_every: int = ANCHOR_EVERY,
    device: str = "cpu",
    require_historical_replay: bool = False,
    record_from: int | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Records `num_steps` steps from any step of a run whose configuration the lake holds.

    With `record_from`, the steps before that one are taken and not recorded.

    From the run's last step, when its batch order is known, the run itself goes on; otherwise the steps go into a new run
    (`into`, default RUN@STEP) whose parent is noted. From a recorded step they have the bits of the original; from an
    imported checkpoint the batch order restarts at the seed's first permutation, and `historical_replay` says so.
    """
    reader = StateReader(lake, run)
    reader.require([from_step])
    if reader.info["config"] is None or reader.info["adapter"] != ADAPTER:
        raise RecordingError(
            f"run {run!r} was recorded from a foreign loop: lakebed has no configuration to continue it with; attach a "
            "Recorder to that loop instead"
        )
    if num_steps < 1:
        raise RecordingError(f"num_steps is {num_steps}; it must be at least 1")
    config = RunConfig.from_json(reader.info["config"], f"config of run {run!r}")
    if from_step + num_steps > config.num_steps:
        raise RecordingError(
            f"step {from_step} + {num_steps} exceeds the config's num_steps {config.num_steps} (the schedule ends there)"
        )
    loop = _loop(config, None, device)
    historical = _restore(loop, reader, from_step)
    if require_historical_replay and not historical:
        raise RecordingError(
            f"step {from_step} of run {run!r} is no historical replay: its checkpoint holds no batch order"
        )
    target = into or (run if historical and from_step == reader.steps[-1] else f"{run}@{from_step}")
    own = target == run
    info = RunInfo(
        source=reader.info["source"] if own else "trace",
        adapter=ADAPTER,
        config=reader.info["config"],
        seed=reader.info["seed"],
        parent_run=reader.info["parent_run"] if own else run,
        parent_step=reader.info["parent_step"] if own else from_step,
        historical_replay=reader.info["historical_replay"] if historical else NOT_HISTORICAL,
        examples=example_rows(loop.benchmark, loop.train_split),
    )
    driver = _Driver(lake, target, loop, info, store, anchor_every)
    child = StateReader(lake, target)
    if not own and child.steps:
        _restore(loop, child, child.steps[-1])
    end = from_step + num_steps
    return driver.go(end, RecordWindow(record_from or 0, end), progress or Silent())


class _Driver:
    """Takes a loop to a step, with a recorder attached where steps are recorded and checkpoints elsewhere."""

    def __init__(
        self, lake: Lake, run: str, loop: TrainingLoop, info: RunInfo, store: str, anchor_every: int
    ) -> None:
        self.lake, self.run, self.loop, self.info = lake, run, loop, info
        self.store, self.anchor_every = store, anchor_every
        self.recorder: Recorder | None = None
        described = describe_run(info, loop.optimizer, store, anchor_every)
        group_of = {name: 0 for name, _ in loop.model.named_parameters()}
        register_run(lake, run, described, model_parameters(loop.model, group_of))

    def go(self, target: int, window: RecordWindow, progress: Progress) -> TrainingResult:
        """Steps until `target`."""
        loop, first, started = self.loop, self.loop.step, time.perf_counter()
        if first >= target:
            return TrainingResult(self.run, first, 0, 0, 0.0, stored_metrics(self.lake, self.run))
        progress.start(f"training {self.run}", target, first)
        recorded = 0
        metrics: Mapping[str, Metrics] = stored_metrics(self.lake, self.run)
        self._ensure_state()
        try:
            while loop.step < target:
                recorded += self._attach_if(window.contains_move_from(loop.step))
                step = loop.train_step()
                metrics = self._evaluate_if_due(target) or metrics
                self._keep(step, target, window)
                progress.advance(note=f"loss {step.loss:.3f}")
        finally:
            self._detach()
        return TrainingResult(
            self.run, loop.step, loop.step - first, recorded, time.perf_counter() - started, metrics
        )

    def _attach_if(self, wanted: bool) -> int:
        if wanted and self.recorder is None:
            self._ensure_state()
            self.recorder = Recorder(
                self.lake,
                self.run,
                self.loop.model,
                self.loop.optimizer,
                store=self.store,
                anchor_every=self.anchor_every,
                start_step=self.loop.step,
                info=self.info,
            )
        return int(wanted)

    def _keep(self, step: StepMetrics, target: int, window: RecordWindow) -> None:
        loop = self.loop
        if self.recorder is None:
            if loop.step % loop.config.checkpoint_every_steps == 0 or loop.step == target:
                self._ensure_state(step.learning_rate)
            return
        self.recorder.annotate(
            loss=step.loss,
            token_accuracy=step.token_accuracy,
            grad_clip_norm=loop.config.optimization.grad_clip_norm,
            split=loop.train_split,
            sample_ids=step.sample_ids,
            query_event_count=step.query_event_count,
            loop_state=loop.loop_state(),
        )
        if not window.contains_move_from(loop.step):
            self._detach()

    def _detach(self) -> None:
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.close()

    def _ensure_state(self, learning_rate: float | None = None) -> None:
        """Stores weights, moments and the loop's own state at this step, unless the run has them."""
        loop = self.loop
        stored = self.lake.table("steps", self.run).select("step").collect()["step"]
        if loop.step in stored:
            return
        state = live_state(loop.model, loop.optimizer)
        write_state(
            self.lake,
            self.run,
            loop.step,
            state,
            state_hash(state.weights),
            learning_rate=learning_rate,
            loop_state=canonical_json(loop.loop_state()),
            rng_state=torch.get_rng_state(),
            rows=1 if self.store == "exact" else block_rows(self.anchor_every),
        )

    def _evaluate_if_due(self, target: int) -> Mapping[str, Metrics]:
        loop, config = self.loop, self.loop.config
        scheduled = loop.step % config.eval_every_steps == 0 or loop.step == config.num_steps
        if scheduled:
            metrics = loop.evaluate()
        elif loop.step == target:
            # Not an evaluation the configuration asks for: it must leave no mark on the batches that follow.
            loop_state, rng_state = loop.loop_state(), torch.get_rng_state()
            metrics = loop.evaluate()
            loop.stream.restore(loop_state)
            torch.set_rng_state(rng_state)
        else:
            return {}
        unit = Unit(
            EVALUATION, self.run, f"evaluation-{loop.step:08d}", (loop.step,), inputs={"step": loop.step}
        )
        if self.lake.find_receipt(unit) is None:
            with self.lake.unit(unit) as writer:
                writer.rows("evaluations", evaluation_rows(loop.step, metrics))
        return metrics


def evaluation_rows(step: int, metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics as rows of table evaluations; nested ones are metric[key] or metric[axis=value]."""
    rows: list[dict[str, Any]] = []

    def add(split: str, name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                label = f"{name}[{key}]" if "[" not in name else f"{name[:-1]}={key}]"
                add(split, label, inner)
        elif value is not None:
            rows.append({"step": step, "split": split, "metric": name, "value": float(value)})

    for split, of_split in metrics.items():
        for name, value in of_split.items():
            add(split, name, value)
    return rows


def stored_metrics(lake: Lake, run: str) -> dict[str, dict[str, float]]:
    """Metrics of the last evaluated step, by split."""
    rows = lake.table("evaluations", run).collect()
    found: dict[str, dict[str, float]] = {}
    if len(rows):
        last = rows["step"].max()
        for row in rows.to_dicts():
            if row["step"] == last:
                found.setdefault(row["split"], {})[row["metric"]] = row["value"]
    return found


def example_rows(benchmark: Benchmark, split: str) -> list[dict[str, Any]]:
    """Rows of table examples for one split."""
    return [
        {
            "split": split,
            "sample_id": record["sample_id"],
            "position": position,
            "tokens": record["tokens"],
            "query_keys": [event["key"] for event in record["query_events"]],
            "answer_values": [event["answer_value"] for event in record["query_events"]],
        }
        for position, record in enumerate(benchmark.splits[split])
    ]


# -- states in and out of a loop -----------------------------------------------------------------------------


def _loop(config: RunConfig, benchmark: Benchmark | None, device: str) -> TrainingLoop:
    made = generate_benchmark(config.benchmark) if benchmark is None else benchmark
    try:
        return TrainingLoop(config, made, device)
    except ValueError as error:
        raise RecordingError(str(error)) from error


def _restore(loop: TrainingLoop, reader: StateReader, step: int) -> bool:
    """Puts the loop at a step of a run; says whether its batch order is the run's own."""
    state = reader.read(step)
    if not state.has_moments:
        raise MissingData(
            f"step {step} of run {reader.run!r} has weights but no optimizer state: AdamW cannot go on from it; import "
            "checkpoints that hold optimizer_state"
        )
    loop_state, rng_state = reader.loop_state(step)
    names = [name for name, _ in loop.model.named_parameters()]
    groups = loop.optimizer.state_dict()["param_groups"]
    loop.restore(step, state.weights, optimizer_state(state, names, groups), loop_state, rng_state)
    return loop_state is not None or step == 0

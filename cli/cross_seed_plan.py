"""What `lakebed pipeline cross-seed` is asked for: its options, checked, and everything that follows from them by name.

A plan is plain data: units of work take it as JSON and make it again. Source: definitions 3 §H, the guide's section 12.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import LakebedError
from ..lake.names import spec_id
from ..lake.steps import step_option, summarize_steps

# In the order they run, whatever order they are named in.
STAGES = ("configs", "trace-scan", "scan", "select", "trace-adam", "adam")
LABELS = ("winner", "runner_up", "median", "bottom")
SCAN, ADAM = "bilinear-qk-match-separation", "bilinear-qk-rank-adam-state-attribution"


class WindowOutOfBounds(LakebedError):
    """A window that does not lie between step 0 and the end step, or is empty."""


class NotPositive(LakebedError):
    """A count or interval below 1."""


class DoubledSeed(LakebedError):
    """A seed that is named twice: it would be one run that counts as two."""


class NoSuchHeads(LakebedError):
    """More layers, heads or singular directions than the model has."""


@dataclass(frozen=True)
class CrossSeed:
    """One pipeline over several seeds. `config` is the base configuration as canonical JSON, `model` its model table.

    `context_stage` None: every head is scanned on the stage it reads. Steps: the scan sees 0, `scan_every`, … and
    `end_step`; every step from `adam_start` to `adam_end` is recorded.
    """

    lake: str
    out: str
    config: str
    run_name: str
    seeds: tuple[int, ...]
    end_step: int
    layers: int
    heads: int
    window_start: int
    window_end: int
    adam_start: int
    adam_end: int
    rank: int = 8
    scan_every: int = 250
    probe: str = "probe"
    split: tuple[str, ...] = ()
    context_stage: str | None = None
    score_query_role: str = "prediction"
    support_role: str = "support_value"
    distractor_role: str = "value_distractors"
    layernorm_mode: str = "head_ln1"
    group_by: str = "query_key"
    record_side: str = "clean"
    route_pair_type: str = "support_value"
    route_pair_source_type: tuple[str, ...] = ("support_value",)
    max_route_pairs: int = 64
    min_route_pairs: int = 16
    loss_scope: str = "full_lm"
    candidates: tuple[str, ...] = ("winner",)
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` makes the plan again."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CrossSeed:
        """The plan that `to_json` wrote."""
        given: dict[str, Any] = {
            name: tuple(of) if isinstance(of, list) else of for name, of in values.items()
        }
        return cls(**given)

    def check(self) -> None:
        """Raises WindowOutOfBounds, NotPositive, DoubledSeed or NoSuchHeads."""
        self._check_numbers()
        end = self.end_step
        if not 0 <= self.window_start <= self.window_end <= end:
            raise WindowOutOfBounds(
                f"the window of steps {self.window_start} to {self.window_end} must lie in order between 0 and --end-step "
                f"{end}: give other --window-start and --window-end"
            )
        if not 0 <= self.adam_start < self.adam_end <= end:
            raise WindowOutOfBounds(
                f"the recorded steps {self.adam_start} to {self.adam_end} must lie in order between 0 and --end-step {end}, "
                "at least one step apart: give other --adam-start-step and --adam-end-step"
            )
        inside = [step for step in self.scan_steps if self.window_start <= step <= self.window_end]
        if len(inside) < 2:
            raise WindowOutOfBounds(
                f"growth lies between two scanned steps, and of {summarize_steps(self.scan_steps)} the window "
                f"{self.window_start} to {self.window_end} holds {summarize_steps(inside)}: widen it, or lower "
                "--scan-checkpoint-every"
            )

    def _check_numbers(self) -> None:
        counts = {
            "--end-step": self.end_step,
            "--layers": self.layers,
            "--heads": self.heads,
            "--rank": self.rank,
            "--scan-checkpoint-every": self.scan_every,
            "--max-route-pairs-per-type": self.max_route_pairs,
            "--min-route-pairs-per-type": self.min_route_pairs,
        }
        for option, value in counts.items():
            if value < 1:
                raise NotPositive(f"{option} is {value}; it must be at least 1")
        doubled = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if doubled or not self.seeds:
            what = f"--seed {doubled[0]} is named twice" if doubled else "no --seed is named"
            raise DoubledSeed(f"{what}: every seed is a run of its own, named once")
        model = self.model
        for option, value, held in (
            ("--layers", self.layers, model["n_layers"]),
            ("--heads", self.heads, model["n_heads"]),
            ("--rank", self.rank, model["d_model"] // model["n_heads"]),
        ):
            if value > held:
                raise NoSuchHeads(
                    f"{option} is {value}; the model has {model['n_layers']} layers of {model['n_heads']} heads, each of "
                    f"{model['d_model'] // model['n_heads']} singular directions"
                )

    # -- what follows from it ----------------------------------------------------------------------------------

    @property
    def model(self) -> dict[str, Any]:
        """The model's table of the configuration."""
        held: dict[str, Any] = json.loads(self.config)["model"]
        return held

    def seed_config(self, seed: int) -> dict[str, Any]:
        """The configuration of a seed's run, as JSON holds it: the base with other seed, name, end and checkpoints."""
        changed = {
            "seed": seed,
            "run_name": self.run(seed),
            "num_steps": self.end_step,
            "checkpoint_every_steps": self.scan_every,
        }
        return {**json.loads(self.config), **changed}

    def run(self, seed: int) -> str:
        """The run of a seed."""
        return f"{self.run_name}_seed_{seed:04d}"

    def traced_run(self, seed: int) -> str:
        """The run that holds the recorded steps of a seed: it continues the seed's own from a checkpoint."""
        return f"{self.run(seed)}@{self.adam_start}"

    @property
    def scan_steps(self) -> list[int]:
        """0, n, 2n, … and the end."""
        return sorted({*range(0, self.end_step, self.scan_every), self.end_step})

    @property
    def trace_from(self) -> int:
        """The checkpoint that the recorded steps are reached from."""
        return max(step for step in self.scan_steps if step <= self.adam_start)

    @property
    def all_heads(self) -> list[tuple[int, int]]:
        """(layer, head), scanned heads in order."""
        return [(layer, head) for layer in range(self.layers) for head in range(self.heads)]

    def stage_of(self, layer: int) -> str:
        """The stage a layer's heads are scored on."""
        read = "embedding" if layer == 0 else f"layer_{layer - 1}_post_mlp"
        return self.context_stage or read

    def scan_report(self, seed: int, layer: int, head: int) -> dict[str, Any]:
        """Options of a head's scan."""
        return {
            "run": self.run(seed),
            "steps": step_option(self.scan_steps),
            "probe": self.probe,
            "split": self.split,
            "head_layer": layer,
            "head": head,
            "context_stage": (self.stage_of(layer),),
            "rank": (self.rank,),
            "score_query_role": self.score_query_role,
            "support_role": self.support_role,
            "distractor_role": self.distractor_role,
            "layernorm_mode": self.layernorm_mode,
            "group_by": self.group_by,
            "window_start": self.window_start,
            "window_end": self.window_end,
        }

    def adam_report(self, seed: int, layer: int, head: int) -> dict[str, Any]:
        """Options of a candidate's attribution to the terms of the updates."""
        return {
            "run": self.traced_run(seed),
            "steps": step_option(range(self.adam_start, self.adam_end + 1)),
            "probe": self.probe,
            "head_layer": layer,
            "head": head,
            "context_stage": self.stage_of(layer),
            "rank": (self.rank,),
            "score_query_role": self.score_query_role,
            "support_key_role": self.support_role,
            "distractor_key_role": self.distractor_role,
            "layernorm_mode": self.layernorm_mode,
            "record_side": (self.record_side,),
            "route_pair_type": self.route_pair_type,
            "route_pair_source_type": self.route_pair_source_type,
            "max_route_pairs_per_type": self.max_route_pairs,
            "min_route_pairs_per_type": self.min_route_pairs,
            "loss_scope": self.loss_scope,
        }

    def scan_parameters(self) -> dict[str, Any]:
        """What all seeds' scans have in common: parameters of dataset cross_seed."""
        options = self.scan_report(self.seeds[0], 0, 0)
        of_heads = ("run", "head_layer", "head", "context_stage")
        shared = {name: value for name, value in options.items() if name not in of_heads}
        return {
            **{name: list(of) if isinstance(of, tuple) else of for name, of in shared.items()},
            "context_stage": self.context_stage or "read by the head",
            "layers": self.layers,
            "heads": self.heads,
        }

    def adam_parameters(self) -> dict[str, Any]:
        """The same of the attributions: parameters of dataset cross_seed_updates, with the head they are about."""
        options = self.adam_report(self.seeds[0], 0, 0)
        of_heads = ("run", "head_layer", "head", "context_stage")
        shared = {name: value for name, value in options.items() if name not in of_heads}
        return {
            **{name: list(of) if isinstance(of, tuple) else of for name, of in shared.items()},
            "scan": spec_id(self.scan_parameters()),
        }

    # -- where things lie --------------------------------------------------------------------------------------

    def relative(self, path: Path) -> str:
        """A path below the output folder as files in it name it, so that the folder may be moved."""
        return path.relative_to(self.out).as_posix()

    @property
    def manifest(self) -> Path:
        """Which seeds there are, and of which configuration."""
        return Path(self.out) / "cross_seed_manifest.json"

    @property
    def winners(self) -> Path:
        """The winner of every seed; a CSV beside it."""
        return Path(self.out) / "cross_seed_winners.json"

    @property
    def logs(self) -> Path:
        """Logs of units that failed."""
        return Path(self.out) / "logs"

    def seed_folder(self, seed: int) -> Path:
        """Everything of one seed."""
        return Path(self.out) / f"seed_{seed:04d}"

    def selection(self, seed: int) -> Path:
        """The heads of a seed, in order of growth."""
        return self.seed_folder(seed) / "analysis" / "cross_seed_head_selection.json"

    def scan_folder(self, seed: int, layer: int, head: int) -> Path:
        """The scan report of a head."""
        name = f"l{layer}h{head}_{self.support_role}_scan_000000_{self.end_step:06d}"
        return self.seed_folder(seed) / "analysis" / SCAN.replace("-", "_") / name

    def adam_folder(self, seed: int, layer: int, head: int, label: str) -> Path:
        """The attribution report of a candidate."""
        prefix = "" if label == "winner" else f"{label}_"
        steps = f"{self.adam_start:06d}_{self.adam_end:06d}_stepwise"
        name = f"{prefix}l{layer}h{head}_rank{self.rank}_{self.support_role}_{steps}"
        return self.seed_folder(seed) / "analysis" / ADAM.replace("-", "_") / name

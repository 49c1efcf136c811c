"""The stages of `lakebed pipeline cross-seed`, in their order, over an executor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import LakebedError
from ..extractors.executor import Executor, Work
from ..extractors.progress import Progress
from ..lake import Lake
from ..lake.names import content_hash, spec_id
from ..queries.output import OutputExists
from .cross_seed_plan import SCAN, CrossSeed
from .cross_seed_select import choose, merged, read_scans, write_output, write_selection
from .cross_seed_units import (
    attribute_head,
    is_attributed,
    is_scanned,
    is_trained,
    require_trace,
    scan_head,
    unrecorded,
    window_of_seed,
)

# Label, layer, head.
Candidate = tuple[str, int, int]


class NotConfigured(LakebedError):
    """A stage before stage configs, or for another configuration than it wrote."""


class Pipeline:
    """Runs stages of a plan. Each does what is missing; what another plan left in the same place is an error.

    Units that train and extract go to `executor`, which may be on other machines; those that write reports below `out` go to
    `reporter`, on this one.
    """

    def __init__(
        self,
        plan: CrossSeed,
        executor: Executor,
        progress: Progress,
        overwrite: bool,
        reporter: Executor | None = None,
    ) -> None:
        self.plan, self.executor, self.progress, self.overwrite = plan, executor, progress, overwrite
        self.reporter = reporter or executor
        self._json = plan.to_json()

    def run(self, stages: Sequence[str], cleanup: bool = False) -> dict[str, Any]:
        """Runs `stages` in their order; returns what the command prints."""
        shown: dict[str, Any] = {
            "lake": self.plan.lake,
            "runs": [self.plan.run(of) for of in self.plan.seeds],
        }
        if "configs" in stages:
            self.write_configs()
        self.require_configs()
        shown["manifest"] = str(self.plan.manifest)
        if "trace-scan" in stages:
            self.train()
        if "scan" in stages:
            self.scan()
        if {"select", "adam"} & set(stages) or cleanup:
            chosen = self.select()
            shown |= {
                "spec": spec_id(self.plan.scan_parameters()),
                "winners": str(self.plan.winners),
                "winners_csv": str(self.plan.winners.with_suffix(".csv")),
                "selections": [str(self.plan.selection(seed)) for seed in self.plan.seeds],
                "winner": {str(seed): f"L{of[0][1]}H{of[0][2]}" for seed, of in chosen.items()},
            }
        else:
            chosen = {seed: [] for seed in self.plan.seeds}
        if {"trace-adam", "adam"} & set(stages) or cleanup:
            shown["freed_bytes"] = self.attribute(stages, chosen, cleanup)
            shown["adam_reports"] = self._adam_folders(chosen) if "adam" in stages else []
        return shown

    # -- configs -----------------------------------------------------------------------------------------------

    def write_configs(self) -> None:
        """A configuration per seed, and the manifest of all; paths in it are relative to its own folder."""
        from ..extractors.seeds import read_config

        plan = self.plan
        rows = {str(seed): self._manifest_row(seed) for seed in plan.seeds}
        every = merged(plan.manifest, "seeds", rows, self.overwrite)
        for seed in plan.seeds:
            read_config(plan.seed_config(seed))
            text = json.dumps(plan.seed_config(seed), indent=2, sort_keys=True) + "\n"
            write_output(plan.seed_folder(seed) / "run_config.json", text, self.overwrite)
        manifest = {"base_config": json.loads(plan.config), "seeds": list(every.values())}
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        write_output(plan.manifest, text, True)

    def _manifest_row(self, seed: int) -> dict[str, Any]:
        plan = self.plan
        config = plan.seed_config(seed)
        return {
            "seed": seed,
            "run": plan.run(seed),
            "end_step": plan.end_step,
            "config": plan.relative(plan.seed_folder(seed) / "run_config.json"),
            "config_sha256": content_hash(config),
        }

    def require_configs(self) -> None:
        """Raises NotConfigured unless stage configs wrote these very configurations."""
        plan = self.plan
        if not plan.manifest.is_file():
            raise NotConfigured(
                f"no {plan.manifest}: add --stage configs, or name the --out that an earlier stage was given"
            )
        rows = {str(seed): self._manifest_row(seed) for seed in plan.seeds}
        try:
            held = merged(plan.manifest, "seeds", rows, False)
            before = merged(plan.manifest, "seeds", {}, False)
        except OutputExists as error:
            raise NotConfigured(
                f"{plan.manifest} was written for other configurations: give the options it was written with, or "
                "--stage configs --overwrite"
            ) from error
        absent = [seed for seed in held if seed not in before]
        if absent:
            raise NotConfigured(f"{plan.manifest} knows no seed {', '.join(absent)}: add --stage configs")

    # -- the scan ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Stage trace-scan: every seed's run, to its end."""
        from ..extractors.seeds import train_seed

        plan = self.plan
        # Made here, so that of several workers none finds it half made.
        with Lake.open_or_create(plan.lake) as lake:
            missing = [seed for seed in plan.seeds if not is_trained(lake, plan, seed)]
        units = [
            Work.of(
                f"training seed {seed}",
                train_seed,
                plan.end_step,
                lake=plan.lake,
                run=plan.run(seed),
                config=plan.seed_config(seed),
                probe=plan.probe,
                device=plan.device,
            )
            for seed in missing
        ]
        self._run("training", units)

    def scan(self) -> None:
        """Stage scan: what the reports of all heads read, in one pass per seed; then a report per head."""
        from ..extractors.seeds import extract_needs, plain_needs
        from ..queries.registry import load_report

        plan = self.plan
        with Lake.open(plan.lake) as lake:
            missing = [
                (seed, layer, head)
                for seed in plan.seeds
                for layer, head in plan.all_heads
                if not self._is_scanned(lake, seed, layer, head)
            ]
        needs: dict[int, list[Any]] = {}
        for seed, layer, head in missing:
            report = load_report(SCAN).parse(plan.scan_report(seed, layer, head))
            needs.setdefault(seed, []).extend(report.needs())
        steps = plan.scan_report(plan.seeds[0], 0, 0)["steps"]
        self._run(
            "scanning",
            [
                Work.of(
                    f"scanning seed {seed}",
                    extract_needs,
                    len(plan.scan_steps),
                    lake=plan.lake,
                    run=plan.run(seed),
                    needs=plain_needs(of),
                    steps=steps,
                    device=plan.device,
                )
                for seed, of in needs.items()
            ],
        )
        self._report(
            "scan reports",
            [
                Work.of(
                    f"scan of L{layer}H{head} of seed {seed}",
                    scan_head,
                    plan=self._json,
                    seed=seed,
                    layer=layer,
                    head=head,
                    overwrite=self.overwrite,
                )
                for seed, layer, head in missing
            ],
        )

    def _is_scanned(self, lake: Lake, seed: int, layer: int, head: int) -> bool:
        """Raises OutputExists here already, rather than after the extraction."""
        folder = self.plan.scan_folder(seed, layer, head)
        made = is_scanned(lake, self.plan, seed, layer, head)
        if not made and folder.exists() and not self.overwrite:
            raise OutputExists(
                f"Output directory already exists and is non-empty: {folder}, made otherwise than asked for now; add "
                "--overwrite or name another --out"
            )
        return made

    def select(self) -> dict[int, list[Candidate]]:
        """Stage select: heads in order of growth; (label, layer, head) of the candidates of every seed."""
        with Lake.open(self.plan.lake) as lake:
            found = {seed: read_scans(lake, self.plan, seed) for seed in self.plan.seeds}
            write_selection(lake, self.plan, found, self.overwrite)
        return {seed: choose(of, self.plan.candidates) for seed, of in found.items()}

    # -- the recorded window -----------------------------------------------------------------------------------

    def attribute(self, stages: Sequence[str], chosen: Mapping[int, list[Candidate]], cleanup: bool) -> int:
        """Stages trace-adam and adam; the bytes that a cleanup freed.

        With a cleanup, as many seeds go through at a time as the executor has workers, and so many traces exist at once.
        """
        due = [seed for seed in chosen if self._is_due(stages, seed, chosen[seed], cleanup)]
        at_once = max(1, self.executor.workers if cleanup else len(due))
        freed = 0
        for start in range(0, len(due), at_once):
            batch = {seed: chosen[seed] for seed in due[start : start + at_once]}
            self._attribute_batch(stages, batch)
            freed += sum(self._drop(seed, of) for seed, of in batch.items() if cleanup)
        return freed

    def _attribute_batch(self, stages: Sequence[str], batch: Mapping[int, list[Candidate]]) -> None:
        plan = self.plan
        with Lake.open(plan.lake) as lake:
            missing = {
                seed: [of for of in candidates if not is_attributed(lake, plan, seed, *of)]
                for seed, candidates in batch.items()
            }
        asked = [stage for stage in ("trace-adam", "adam") if stage in stages]
        self._run(
            "attributing" if "adam" in stages else "recording",
            [
                Work.of(
                    f"steps {plan.adam_start} to {plan.adam_end} of seed {seed}",
                    window_of_seed,
                    plan.adam_end - plan.trace_from,
                    plan=self._json,
                    seed=seed,
                    candidates=[list(of) for of in left],
                    stages=asked,
                )
                for seed, left in missing.items()
                if asked and (left or "adam" not in stages)
            ],
        )
        if "adam" in stages:
            self._report(
                "attribution reports",
                [
                    Work.of(
                        f"attribution of L{layer}H{head} of seed {seed}",
                        attribute_head,
                        plan=self._json,
                        seed=seed,
                        label=label,
                        layer=layer,
                        head=head,
                        overwrite=self.overwrite,
                    )
                    for seed, left in missing.items()
                    for label, layer, head in left
                ],
            )

    def _is_due(self, stages: Sequence[str], seed: int, candidates: list[Candidate], cleanup: bool) -> bool:
        """Whether there is something to do for a seed. Raises TraceNotFound for adam without its trace."""
        with Lake.open(self.plan.lake) as lake:
            recorded = not unrecorded(lake, self.plan, seed)
            done = self._is_attributed(lake, seed, candidates)
            if "adam" not in stages:
                return not recorded if "trace-adam" in stages else done and recorded
            if not done and "trace-adam" not in stages:
                require_trace(lake, self.plan, seed)
            return not done or (cleanup and recorded)

    def _is_attributed(self, lake: Lake, seed: int, candidates: list[Candidate]) -> bool:
        return bool(candidates) and all(is_attributed(lake, self.plan, seed, *of) for of in candidates)

    def _drop(self, seed: int, candidates: list[Candidate]) -> int:
        """Drops the recorded steps of a seed whose candidates all have their reports; the bytes that it frees."""
        from ..extractors.seeds import drop_trace

        with Lake.open(self.plan.lake) as lake:
            if not self._is_attributed(lake, seed, candidates):
                return 0
            return drop_trace(lake, self.plan.traced_run(seed))

    def _adam_folders(self, chosen: Mapping[int, list[Candidate]]) -> list[str]:
        return [
            str(self.plan.adam_folder(seed, layer, head, label))
            for seed, of in chosen.items()
            for label, layer, head in of
        ]

    def _run(self, label: str, units: list[Work]) -> None:
        _do(self.executor, self.progress, label, units)

    def _report(self, label: str, units: list[Work]) -> None:
        _do(self.reporter, self.progress, label, units)


def _do(executor: Executor, progress: Progress, label: str, units: list[Work]) -> None:
    if units:
        progress.start(label, sum(work.parts for work in units))
        executor.run(units, progress)

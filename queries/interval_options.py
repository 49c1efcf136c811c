"""`--start-step`, `--end-step`, `--checkpoint-stride`: which one-step intervals of a recorded run a report is about."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, PositiveInt, model_validator

from ..lake.datasets import MOMENTS, TRACE, WEIGHTS, Need
from ..lake.errors import MissingData
from ..lake.steps import select_steps, step_option, summarize_steps
from .needs import held_steps
from .report import InvalidOption, Report, ReportFailed

if TYPE_CHECKING:
    from ..lake import Lake


class IntervalOptions(Report):
    """Intervals t → t+1 with the gradient that was recorded, weights at both ends and Adam's moments at the first."""

    start_step: int | None = Field(
        None, ge=0, description="first step of the window; default the first of --steps"
    )
    end_step: int | None = Field(None, ge=0, description="its last step; default the last of --steps")
    checkpoint_stride: PositiveInt = Field(
        1, description="take the interval from every so manyth step on, counted from the first"
    )

    @model_validator(mode="after")
    def _is_window(self) -> Self:
        if None not in (self.start_step, self.end_step) and self.start_step >= self.end_step:  # type: ignore[operator]
            raise ValueError(f"--start-step {self.start_step} does not lie before --end-step {self.end_step}")
        return self

    def needs(self) -> tuple[Need, ...]:
        """The trace, weights at both ends of an interval, and moments at its first."""
        return (Need(TRACE, steps="any"), Need(WEIGHTS), Need(MOMENTS, steps="any"))

    def require(self, lake: Lake, run: str) -> None:
        """Raises what `sources` raises; a run that was not recorded is left to `resolve_steps`, which says so."""
        if lake.dataset_steps(run, TRACE):
            self.require_adam(lake, run)
            self.sources(lake, run)

    def require_adam(self, lake: Lake, run: str) -> None:
        """Raises ReportFailed for an optimizer without Adam's moments."""
        found = lake.session.execute(
            "SELECT t.optimizer_groups, r.optimizer FROM training_steps AS t LEFT JOIN runs AS r ON r.run = t.run "
            "WHERE t.run = ? AND t.optimizer_groups IS NOT NULL ORDER BY t.step LIMIT 1",
            [run],
            tables={"training_steps", "runs"},
        ).fetchone()
        if found is None or not all("beta2" in group for group in json.loads(found[0])):
            kind = json.loads(found[1]).get("class") if found is not None and found[1] else None
            raise ReportFailed(
                f"{self.report_name()} is about Adam and AdamW; run {run!r} was recorded with "
                f"{kind or 'an optimizer it does not name'}, which has no moments to decompose"
            )

    def sources(self, lake: Lake, run: str) -> list[int]:
        """The source steps t, ascending.

        A window that was asked for must be there whole. Without one: every interval that is there, since anchors hold
        weights and moments of steps that have no neighbour.
        """
        recorded = set(lake.dataset_steps(run, TRACE))
        weights, moments = (set(held_steps(lake, run, Need(name))) for name in (WEIGHTS, MOMENTS))
        if self.steps is None and self.start_step is None and self.end_step is None:
            found = [t for t in sorted(weights & moments) if t + 1 in weights and t + 1 in recorded]
            if found:
                return [t for t in found if (t - found[0]) % self.checkpoint_stride == 0]
            first = min(recorded) - 1
            some = [step for step in range(first, first + 5) if step == first or step in recorded]
            raise MissingData(
                f"{self.report_name()} needs neighbouring steps: run {run!r} has weights at {summarize_steps(weights)} and "
                f"moments at {summarize_steps(moments)}. Run: {self._extract(lake, run, some)}"
            )
        sources = self._asked(recorded)
        unrecorded = [t + 1 for t in sources if t + 1 not in recorded]
        if unrecorded:
            raise MissingData(
                f"{self.report_name()} needs trace for run {run!r} at step {summarize_steps(unrecorded)}: recorded are "
                f"steps {summarize_steps(recorded)}, and a gradient is never computed afterwards. Record more with: "
                f"lakebed trace --lake {shlex.quote(lake.uri)} --run {run} --from-step {unrecorded[0] - 1} --num-steps "
                f"{len(unrecorded)}"
            )
        both = {step for t in sources for step in (t, t + 1)}
        absent = sorted((both - weights) | (set(sources) - moments))
        if absent:
            raise MissingData(
                f"{self.report_name()} needs weights and moments for run {run!r} at step {summarize_steps(absent)}. Run: "
                f"{self._extract(lake, run, absent)}"
            )
        return sources

    def _asked(self, recorded: set[int]) -> list[int]:
        """Source steps of the window that was asked for; raises InvalidOption when its steps are not neighbours."""
        low = -1 if self.start_step is None else self.start_step
        high = float("inf") if self.end_step is None else self.end_step
        states = sorted(recorded | {step - 1 for step in recorded})
        asked = [step for step in select_steps(self.steps, states) if low <= step <= high]
        window = " ".join(
            f"{name} {value}"
            for name, value in (
                ("--steps", self.steps),
                ("--start-step", self.start_step),
                ("--end-step", self.end_step),
            )
            if value is not None
        )
        if len(asked) < 2:
            raise InvalidOption(
                f"{self.report_name()}: {window} selects {summarize_steps(asked)} of the recorded steps "
                f"{summarize_steps(states)}; an interval takes a step and the next one"
            )
        # What ends the window may be the target of its last interval, never a source.
        sources = list(range(asked[0], asked[-1], self.checkpoint_stride))
        gaps = sorted({step for t in sources for step in (t, t + 1)} - set(asked))
        if gaps and not set(gaps) - set(states):
            raise InvalidOption(
                f"{self.report_name()}: the steps of {window} are not neighbours, {summarize_steps(gaps)} lie between "
                f"them; between them only the total update is known. Write --steps {asked[0]}:{asked[-1]}, and "
                "--checkpoint-stride N for every Nth interval"
            )
        return sources

    def _extract(self, lake: Lake, run: str, steps: Sequence[int]) -> str:
        words = ["lakebed", "extract", "--for", self.report_name(), "--lake", lake.uri, "--run", run]
        return shlex.join([*words, "--steps", step_option(steps), *self.arguments()])


__all__ = ["IntervalOptions"]

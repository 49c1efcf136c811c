"""`--behavior-rows`: how well the model answers at each step, for reports that set it beside their numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..lake.imports import leave_pandas_alone
from .report import InvalidOption, Report

if TYPE_CHECKING:
    from .results import Results

_SECTIONS = """\
-- The model's own answers over the same events.
-- view: readout_behavior
SELECT
    r.step, avg(r.value_margin::DOUBLE ORDER BY r.event) AS answer_margin,
    avg(r.correct::INTEGER ORDER BY r.event) AS answer_accuracy
FROM readouts AS r
JOIN chosen_events AS e ON e.event = r.event
WHERE r.run = $run AND r.probe = $probe AND r.stage = 'logits' AND list_contains($steps, r.step)
GROUP BY r.step
ORDER BY r.step

-- arrays: behavior_file

-- view: behavior
SELECT step, answer_margin, answer_accuracy FROM readout_behavior WHERE $behavior_rows IS NULL
UNION ALL
SELECT step, answer_margin, answer_accuracy FROM behavior_file WHERE $behavior_rows IS NOT NULL
ORDER BY step

"""


class BehaviorOptions(Report):
    """View `behavior` (step, answer_margin, answer_accuracy): from table readouts, or from a JSONL file if one is named.

    The file's rows are those of `split` = `--behavior-split`. Raises InvalidOption, naming the line or step.
    """

    behavior_rows: str | None = Field(
        None,
        description="JSONL file with the answers' margin per step; default the readouts of the same events",
    )
    behavior_split: str = Field("__all__", description="split of the rows in --behavior-rows that are used")
    behavior_margin_field: str = Field("baseline_margin_mean", description="field of --behavior-rows: margin")
    behavior_accuracy_field: str = Field(
        "baseline_accuracy", description="field of --behavior-rows: accuracy; rows may lack it"
    )

    @classmethod
    def sql_text(cls) -> str:
        """The views of behaviour, then the report's own sections."""
        return _SECTIONS + super().sql_text()

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Section `behavior_file`: one row per selected step; without a file, none."""
        if name != "behavior_file":
            return super().arrays(name, results)
        import pyarrow as pa

        leave_pandas_alone()
        rows = self._read(results.steps) if self.behavior_rows is not None else []
        margins, accuracies = [row[0] for row in rows], [row[1] for row in rows]
        return {
            "step": pa.array(results.steps if rows else [], pa.int64()),
            "answer_margin": pa.array(margins, pa.float64()),
            "answer_accuracy": pa.array(accuracies, pa.float64()),
        }

    def _read(self, steps: list[int]) -> list[tuple[float, float | None]]:
        path = Path(self.behavior_rows or "")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(f"--behavior-rows {path} cannot be read: {error}") from error
        found: dict[int, tuple[float, float | None]] = {}
        for number, line in enumerate(lines, 1):
            row = self._row(f"--behavior-rows {path}, line {number}", line)
            if row is None:
                continue
            step, margin, accuracy = row
            if step in found:
                raise InvalidOption(f"--behavior-rows {path}, line {number}: step {step} stands twice")
            found[step] = (margin, accuracy)
        absent = [step for step in steps if step not in found]
        if absent:
            raise InvalidOption(
                f"--behavior-rows {path} has no row of split {self.behavior_split!r} for "
                f"{'step' if len(absent) == 1 else 'steps'} {', '.join(map(str, absent))}"
            )
        return [found[step] for step in steps]

    def _row(self, where: str, line: str) -> tuple[int, float, float | None] | None:
        """(step, margin, accuracy) of a line; None for a row of another split."""
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidOption(
                f"{where}: {'blank' if not line.strip() else f'no JSON ({error})'}"
            ) from error
        if not isinstance(row, dict):
            raise InvalidOption(f"{where}: no JSON object")
        if row.get("split") != self.behavior_split:
            return None
        step = _number(where, row, "step")
        margin = _number(where, row, self.behavior_margin_field)
        accuracy = None
        if row.get(self.behavior_accuracy_field) is not None:
            accuracy = _number(where, row, self.behavior_accuracy_field)
        if step != int(step):
            raise InvalidOption(f"{where}: 'step' is no whole number: {step!r}")
        return int(step), margin, accuracy


def _number(where: str, row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if value is None:
        raise InvalidOption(f"{where}: no {name!r}; the row has {', '.join(sorted(row))}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidOption(f"{where}: {name!r} is no finite number: {value!r}")
    return float(value)

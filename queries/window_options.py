"""`--window-start` and `--window-end`: a range of steps that a report sums up on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from .report import Report

if TYPE_CHECKING:
    from .results import Results

_KEYS = ("context_stage", "projection")


class WindowOptions(Report):
    """A window of steps, both ends included; they come together or not at all."""

    window_start: int | None = Field(
        None, ge=0, description="first step of a window that is summed up on its own"
    )
    window_end: int | None = Field(None, ge=0, description="its last step")

    @model_validator(mode="after")
    def _is_window(self) -> Self:
        if (self.window_start is None) != (self.window_end is None):
            raise ValueError("--window-start and --window-end come together")
        if (
            self.window_start is not None
            and self.window_end is not None
            and self.window_start > self.window_end
        ):
            raise ValueError(f"--window-start {self.window_start} lies after --window-end {self.window_end}")
        return self

    def window_warnings(self, results: Results) -> list[str]:
        """That view `spans` found no window to sum up."""
        if self.window_start is None or results.value("SELECT count(*) FROM spans WHERE span = 'window'"):
            return []
        return [f"Fewer than two checkpoints lie in the window {self.window_start} to {self.window_end}."]

    def summary_with_windows(self, results: Results, left_out: str = "span") -> list[dict[str, Any]]:
        """Rows of view `summary`, each with the fields of its window's row in `spans`; `left_out` names those without."""
        windows = {
            tuple(row[key] for key in _KEYS): row
            for row in results.rows(f"SELECT * EXCLUDE ({left_out}) FROM spans WHERE span = 'window'")
        }
        found = []
        for row in results.rows("FROM summary"):
            window = windows.get(tuple(row[key] for key in _KEYS))
            found.append({**row, **(_window_fields(window) if window else {})})
        return found


def _window_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a window's summary row, as the contract names them."""
    fields = {f"window_{key}": value for key, value in row.items() if key not in _KEYS}
    return {**fields, "window_start": row["start_step"], "window_end": row["end_step"]}

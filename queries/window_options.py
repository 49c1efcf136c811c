"""`--window-start` and `--window-end`: a range of steps that a report sums up on its own."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from .report import Report


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

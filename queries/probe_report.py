"""What reports over a probe share: `--probe`, `--split`, and, for those about one head, `--head` and its checks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from ..lake.datasets import DEFAULT_PROBE, PROBE
from ..lake.errors import MissingData, UnknownName
from .report import Report

if TYPE_CHECKING:
    from ..lake import Lake

_PRELUDE = """\
-- The events the report is about.
-- view: chosen_events
SELECT * EXCLUDE (run)
FROM events
WHERE run = $run AND probe = $probe AND ($all_splits OR list_contains($split, split))
ORDER BY event

"""


class ProbeReport(Report):
    """Base of reports over the events of a probe. Its SQL begins with view `chosen_events`: those of `--split`."""

    probe: str = Field(DEFAULT_PROBE, description="probe whose events are measured")
    split: tuple[str, ...] = Field((), description="split of the probe; default all of them")

    @classmethod
    def sql_text(cls) -> str:
        """The report's own sections, after the shared view."""
        return _PRELUDE + super().sql_text()

    def parameters(self) -> dict[str, Any]:
        """Adds `all_splits`."""
        return {**super().parameters(), "split": list(self.split) or [""], "all_splits": not self.split}

    def require(self, lake: Lake, run: str) -> None:
        """The probe and its splits must be there."""
        super().require(lake, run)
        require_probe(lake, run, self.probe, self.split)


def require_probe(lake: Lake, run: str, probe: str, splits: tuple[str, ...] = ()) -> None:
    """Raises MissingData or UnknownName, naming the probes or splits there are."""
    rows = lake.session.execute(
        "SELECT probe, splits FROM probes WHERE run = ? ORDER BY probe", [run], tables={"probes"}
    ).fetchall()
    held = dict(rows)
    if probe not in held:
        there = f"it has {', '.join(held)}" if held else "it has none yet"
        raise MissingData(
            f"Probe-set not found: run {run!r} has no {PROBE} {probe!r}; {there}. Run: lakebed probe build "
            f"--lake {lake.uri} --run {run} --probe {probe}"
        )
    for split in splits:
        if split not in held[probe]:
            raise UnknownName(f"probe {probe!r} has no split {split!r}; it has {', '.join(held[probe])}")


class HeadReport(ProbeReport):
    """Base of reports about one attention head: `--head-layer 2 --head 1`, or `--head L2H1`."""

    head_layer: int | None = Field(
        None, ge=0, description="layer of the head, from 0; not needed with --head L2H1"
    )
    head: int = Field(
        ..., ge=0, description="head, from 0, or both as L2H1", json_schema_extra={"typed_as": "text"}
    )

    @model_validator(mode="before")
    @classmethod
    def _read_label(cls, values: Any) -> Any:
        match = re.fullmatch(r"L(\d+)H(\d+)", str(values.get("head")).strip())
        if match is None:
            return values
        layer, head = int(match[1]), int(match[2])
        if values.get("head_layer") not in (None, layer, str(layer)):
            raise ValueError(f"--head {values['head']} and --head-layer {values['head_layer']} disagree")
        return {**values, "head_layer": layer, "head": head}

    @field_validator("head", mode="before")
    @classmethod
    def _is_head(cls, value: Any) -> Any:
        if not re.fullmatch(r"\d+", str(value)):
            raise ValueError("should be a number, with --head-layer, or a label such as L2H1")
        return int(value)

    @model_validator(mode="after")
    def _has_layer(self) -> HeadReport:
        if self.head_layer is None:
            raise ValueError("--head-layer is required, or --head as a label such as L2H1")
        return self

    @property
    def head_label(self) -> str:
        """L2H1."""
        return f"L{self.head_layer}H{self.head}"

    def parameters(self) -> dict[str, Any]:
        """Adds `head_label`."""
        return {**super().parameters(), "head_label": self.head_label}

    def require(self, lake: Lake, run: str) -> None:
        """The head must be one of the model's."""
        super().require(lake, run)
        require_head(lake, run, self.head_layer or 0, self.head)


def require_head(lake: Lake, run: str, layer: int, head: int) -> None:
    """Raises UnknownName, naming the layers and heads there are."""
    layers, heads = lake.session.execute(
        "SELECT max(layer), max(head) FROM slices WHERE run = ? AND slice_kind = 'head'",
        [run],
        tables={"slices"},
    ).fetchall()[0]
    if layers is not None and (layer > layers or head > heads):
        raise UnknownName(f"no head L{layer}H{head}; run {run!r} has layers 0–{layers}, heads 0–{heads}")


def require_stages(lake: Lake, run: str, *stages: str) -> None:
    """Raises UnknownName, naming the residual stages there are."""
    rows = lake.session.execute(
        "SELECT stage FROM stages WHERE run = ? ORDER BY position", [run], tables={"stages"}
    ).fetchall()
    held = [stage for (stage,) in rows]
    for stage in stages:
        if held and stage not in held:
            raise UnknownName(f"no stage {stage!r}; run {run!r} has {', '.join(held)}")


def require_roles(lake: Lake, run: str, probe: str, *roles: str) -> None:
    """Raises UnknownName, naming the roles the probe's events have."""
    rows = lake.session.execute(
        "SELECT DISTINCT role FROM positions WHERE run = ? AND probe = ? AND kind = 'role' ORDER BY role",
        [run, probe],
        tables={"positions"},
    ).fetchall()
    held = [*(role for (role,) in rows), "causal_prefix"]
    for role in roles:
        if role not in held:
            raise UnknownName(f"no role {role!r}; the events of probe {probe!r} have {', '.join(held)}")

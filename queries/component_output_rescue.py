"""component-output-rescue: which clean downstream write makes up for a component that is gone (definitions: part 4, J)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from ..lake.interventions import restore
from .chart import Grid
from .component_options import (
    component_order,
    read_components,
    require_ablatable,
    require_components,
    require_downstream,
)
from .markdown import number, percent
from .report import InvalidOption, RowFile
from .rescue import (
    ABOUT_FRACTIONS,
    TRAJECTORY,
    Patch,
    RescueReport,
    listed,
    summary_table,
    without,
    written_stage,
)
from .results import Results

if TYPE_CHECKING:
    from ..lake import Lake

_STEM = "component_output_rescue"
# A smaller share than this of what is lost is hardly anything.
_SOME = 0.05


class NothingPutBack(InvalidOption):
    """Neither a component nor a group that is put back."""


class EmptyGroup(InvalidOption):
    """A group without components, or with an empty label."""


class ComponentOutputRescue(RescueReport):
    """Whose clean write, put back alone or in a group, makes up for a component taken away upstream?"""

    patch_component: tuple[str, ...] = Field(
        (), description="head (L1H0) or MLP (L0MLP) downstream whose clean write is put back, one at a time"
    )
    patch_group: tuple[str, ...] = Field(
        (), description="heads and MLPs put back together, in the order of the model: L0MLP,L1H0"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "rescue_rows": RowFile(f"{_STEM}_rows", "rescue_rows"),
        "summary_rows": RowFile(f"{_STEM}_summary_rows", "summary_rows"),
        "pair_rows": RowFile(f"{_STEM}_pairs", "pair_rows"),
    }
    tables = (
        summary_table(
            "patch_component",
            "put back",
            "Means over pairs and steps; the charts' end of the interval first, most regained first.",
        ),
    )
    charts = (
        Grid(
            "rescue_fraction",
            "fraction_cells",
            "Whose clean write makes up for what is gone",
            about="mean rescue over mean drop; cells of sources that cost next to nothing are left out",
            value="value",
            value_title="rescue fraction",
            domain=(-1, 1),
        ),
        TRAJECTORY,
    )
    how_to_read = (
        "The source's output is 0 in every patched run; the patched component writes what it writes in the untouched run, "
        "whatever it reads now; everything later is recomputed. So the fraction says how much of what the source's absence "
        "costs goes through that component's write. The source's own path to the logits stays cut.",
        "A group is put back in the order of the model, each write onto the partly repaired stream. Fractions of single "
        "components need not add up to the group's: paths overlap, and run through each other.",
        "With every component downstream put back, what is missing is the source's own write, its direct path.",
        *ABOUT_FRACTIONS,
    )
    next_queries = (
        (
            "How often does the model still answer correctly, run by run?",
            "SELECT step, intervention, avg(correct::INTEGER) AS accuracy, avg(value_margin) AS margin FROM "
            "intervention_runs WHERE run = $run AND intervention LIKE 'without %' GROUP BY ALL ORDER BY step DESC, margin",
        ),
    )
    place: ClassVar[tuple[int, int]] = (11, 5)
    example: ClassVar[str] = (
        "lakebed query component-output-rescue --lake demo.lake --run demo --steps 0:1300:130,last --source-component L0H0 "
        "--patch-component L1H0 --patch-component L1H1 --patch-group L0MLP,L1H1 --pair-type support_value --out write-rescue"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "source_component": ("L0H0", "L0H1"),
        "patch_component": ("L0MLP", "L1H0", "L1H1", "L1MLP"),
        "patch_group": ("L0MLP,L1H0,L1H1,L1MLP",),
        "pair_type": ("support_value",),
        "max_pairs_per_type": 32,
    }

    @field_validator("patch_component")
    @classmethod
    def _are_writes(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        found = read_components(labels)
        require_ablatable("--patch-component", found)
        return found

    @field_validator("patch_group")
    @classmethod
    def _are_groups(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(",".join(_read_group(text)) for text in texts))

    @model_validator(mode="after")
    def _are_downstream(self) -> ComponentOutputRescue:
        if not self.groups:
            raise NothingPutBack(
                f"{self.report_name()}: name what is put back: --patch-component L0MLP, or --patch-group L0MLP,L1H0"
            )
        put_back = dict.fromkeys(label for group in self.groups for label in group)
        require_downstream(self.report_name(), self.source_component, list(put_back))
        return self

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """What is put back together: single components, then groups; each once."""
        single = [(label,) for label in self.patch_component]
        return list(dict.fromkeys([*single, *(tuple(text.split(",")) for text in self.patch_group)]))

    def restorations(self, source: str) -> list[Patch]:
        """Every group, in the order of the model whatever the order in which it is written."""
        made = []
        for group in self.groups:
            in_order = sorted(group, key=lambda label: (component_order(label), label))
            made.append(
                Patch(
                    source,
                    "+".join(group),
                    "+".join(sorted({written_stage(label) for label in group})),
                    tuple(restore(label) for label in in_order),
                    f"{without(source)}, clean {'+'.join(in_order)}",
                )
            )
        return made

    def require(self, lake: Lake, run: str) -> None:
        """What is put back must be there."""
        super().require(lake, run)
        require_components(lake, run, (label for group in self.groups for label in group))

    def findings(self, results: Results) -> list[str]:
        """What each source costs, and whose write gives back how much of it."""
        lines = []
        for source in self.source_component:
            cost, rows = self.cost(results, source)
            lines.append(cost)
            rows.sort(key=lambda row: (-row["mean_rescue_fraction_from_means"], row["place"]))
            single = [row for row in rows if "+" not in row["patch"]]
            groups = [row for row in rows if "+" in row["patch"]]
            if single:
                lines.append(_alone(single))
            if groups:
                lines.append(f"Together: {listed(groups)}.")
        return lines


def _alone(rows: list[dict[str, Any]]) -> str:
    """What single writes give back, most first."""
    best, others = rows[0], rows[1:]
    fraction = best["mean_rescue_fraction_from_means"]
    then = f"; then {listed(others)}." if others else "."
    if fraction < _SOME:
        return f"No clean write alone gives back {percent(_SOME)} of that: {best['patch']} {percent(fraction)}{then}"
    return (
        f"Alone, the clean write of **{best['patch']}** gives back most of that, **{percent(fraction)}** "
        f"({number(best['mean_rescue'], 3)}; nearer to the clean run in {percent(best['improved_fraction'])} of the "
        f"records){then}"
    )


def _read_group(text: str) -> tuple[str, ...]:
    """L0MLP,L1H0 as labels. Raises EmptyGroup, UnknownComponent or NotAblatable."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        what = "is empty" if not any(parts) else "has an empty label"
        raise EmptyGroup(f"--patch-group {text!r} {what}: write heads and MLPs with commas, as L0MLP,L1H0")
    found = read_components(parts)
    require_ablatable("--patch-group", found)
    return found

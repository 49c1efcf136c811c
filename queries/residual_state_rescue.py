"""residual-state-rescue: from which stage on a clean residual stream makes up for a component that is gone (4 §I)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from ..lake.interventions import edit_stage
from .chart import Grid
from .markdown import number, percent
from .probe_report import require_roles, require_stages
from .report import RowFile
from .rescue import ABOUT_FRACTIONS, TRAJECTORY, Patch, RescueReport, summary_table, without
from .results import Results

if TYPE_CHECKING:
    from ..lake import Lake

_STEM = "residual_state_rescue"


class ResidualStateRescue(RescueReport):
    """From which stage, and at which positions, does the clean residual stream make up for a component taken away?"""

    patch_stage: tuple[str, ...] = Field(
        ..., min_length=1, description="residual stage that is put back from the untouched run"
    )
    position_role: tuple[str, ...] = Field(
        (), description="put back at the positions of this role alone; default at all positions"
    )
    plot_top_k_rows: PositiveInt = Field(48, description="most rows of a chart")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "rescue_rows": RowFile(f"{_STEM}_rows", "rescue_rows"),
        "summary_rows": RowFile(f"{_STEM}_summary_rows", "summary_rows"),
        "pair_rows": RowFile(f"{_STEM}_pairs", "pair_rows"),
    }
    tables = (
        summary_table(
            "patch",
            "put back",
            "Means over pairs and steps, in model order; the charts' end of the interval first.",
        ),
    )
    charts = (
        Grid(
            "rescue_fraction",
            "fraction_cells",
            "From which stage the clean stream makes up for what is gone",
            about="mean rescue over mean drop; cells of sources that cost next to nothing are left out",
            value="value",
            value_title="rescue fraction",
            domain=(-1, 1),
        ),
        Grid(
            "unrecovered",
            "unrecovered_cells",
            "What is still missing after the patch",
            about="mean |clean − patched|, logits or nats",
            value="value",
            value_title="mean |unrecovered|",
        ),
        TRAJECTORY,
    )
    how_to_read = (
        "Without `--position-role` the whole stream is put back at all positions. Everything later is then the untouched "
        "run, so a patch at or after the source's stage gives back all, and one before it nothing: a test that patching "
        "works, not a finding about the model.",
        "With `--position-role` the stream is put back at that role's positions alone: how much comes back says where, at "
        "that stage, what the source had written stands. Positions that no later layer reads for the prediction give back "
        "nothing.",
        "component-output-rescue puts back what one component writes, and leaves the rest damaged.",
        *ABOUT_FRACTIONS,
    )
    next_queries = (
        (
            "What does each run answer at the last step?",
            "SELECT intervention, count(*) AS events, avg(value_margin) AS margin, avg(correct::INTEGER) AS accuracy FROM "
            "intervention_runs WHERE run = $run AND step = (SELECT max(step) FROM intervention_runs WHERE run = $run) GROUP "
            "BY ALL ORDER BY margin",
        ),
    )
    place: ClassVar[tuple[int, int]] = (11, 4)
    example: ClassVar[str] = (
        "lakebed query residual-state-rescue --lake demo.lake --run demo --steps 0:1300:130,last --source-component L0H0 "
        "--patch-stage layer_0_post_mlp --patch-stage layer_1_post_attn --position-role support_value --position-role "
        "prediction --pair-type support_value --out state-rescue"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "source_component": ("L0H0", "L0H1"),
        "patch_stage": ("layer_0_post_mlp",),
        "position_role": ("prediction", "support_key", "support_value"),
        "pair_type": ("support_value",),
        "max_pairs_per_type": 32,
    }

    @field_validator("patch_stage", "position_role")
    @classmethod
    def _each_place_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def restorations(self, source: str) -> list[Patch]:
        """Every stage at every role's positions."""
        return [
            Patch(
                source,
                stage if role is None else f"{stage} · {role}",
                stage,
                (edit_stage(stage, "patch", position_role=role),),
                f"{without(source)}, clean {stage}" + ("" if role is None else f" at {role}"),
                role,
            )
            for role in self.position_role or (None,)
            for stage in self.patch_stage
        ]

    def require(self, lake: Lake, run: str) -> None:
        """Stages and roles must be there."""
        super().require(lake, run)
        require_stages(lake, run, *self.patch_stage)
        require_roles(lake, run, self.probe, *self.position_role)

    def warnings(self, results: Results) -> list[str]:
        """That a whole stream did not come back, or came back before it was damaged."""
        if self.position_role:
            return []
        worst = self._plumbing(results)
        if max(worst["before"], worst["after"]) <= self.scalar_value_tolerance:
            return []
        return [
            "A whole clean stream must give back all or nothing, and it does not: up to "
            f"{number(worst['after'], 3)} is missing at or after the source, up to {number(worst['before'], 3)} comes back "
            "before it."
        ]

    def findings(self, results: Results) -> list[str]:
        """What each source costs, and where it comes back."""
        lines = []
        for source in self.source_component:
            cost, rows = self.cost(results, source)
            lines.append(cost)
            if self.position_role and rows:
                lines.append(self._where(results, source))
        if not self.position_role:
            worst = self._plumbing(results)
            lines.append(
                f"Whole clean streams leave at most {number(worst['after'], 2)} missing at and after the source, and give "
                f"back at most {number(worst['before'], 2)} before it: 0 is what both must be, by construction. "
                "`--position-role` asks where the information stands."
            )
        return lines

    def _where(self, results: Results, source: str) -> str:
        """The places that give back most: before the last attention if there are any, since after it only one is read."""
        rows = results.rows(
            "FROM places WHERE source_component = $source ORDER BY fraction DESC, place", source=source
        )
        shown = "; ".join(f"{row['patch']} {percent(row['fraction'])}" for row in rows[:3])
        more = f"; the other {len(rows) - 3} give back less" if len(rows) > 3 else ""
        when = " before the last attention" if any(row["is_before_last_attention"] for row in rows) else ""
        return f"Of that the clean stream{when} gives back, at one role's positions alone: **{shown}**{more}."

    def _plumbing(self, results: Results) -> dict[str, Any]:
        return results.first("FROM plumbing") or {}

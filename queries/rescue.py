"""What reports on rescue share: a component is taken away, something clean is put back downstream, and what the answer lost
comes back or does not (definitions 4 §I, §J).

A report names its `patches`; after the views of `EndpointReport` its SQL has `listed_pairs`, `patches`, `rescues` (a row per
endpoint, scalar and patch) and `rescue_statistics` (over all steps, where `step` is null, and by step).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from ..lake.interventions import Edit, intervention, zero
from .attribution_sql import LISTED_PAIRS
from .chart import Trajectory
from .component_options import component_order, read_components, require_ablatable, require_components
from .markdown import number, percent
from .report import ReportFailed, TextTable
from .results import Results
from .scalar_pairs import EndpointReport, ScalarName

if TYPE_CHECKING:
    from ..lake import Lake

# A mean drop below this share of the mean |drop| is the difference of drops and gains.
_OF_SIZE = 0.25
# And one below this share of the mean |scalar| is next to nothing.
_OF_SCALAR = 0.01

_PRELUDE = f"""\
{LISTED_PAIRS}
-- What is taken away, and what is put back then.
-- view: patches
SELECT unnest($patches, recursive := true)

-- view: rescues
SELECT
  p.source_step, p.target_step, p.endpoint_kind, p.step, p.pair_id, p.margin_side, p.pair_type, p.split, p.scalar_name,
  x.place, x.source_component, x.patch, c.value AS clean_scalar, a.value AS source_ablated_scalar, p.value AS patched_scalar,
  clean_scalar - source_ablated_scalar AS total_drop,
  patched_scalar - source_ablated_scalar AS rescue,
  clean_scalar - patched_scalar AS unrecovered,
  abs(unrecovered) AS absolute_unrecovered,
  absolute_unrecovered < abs(total_drop) AS improved_by_patch
FROM endpoint_values AS p
JOIN patches AS x ON x.patched_run = p.intervention
JOIN endpoint_values AS a USING (source_step, target_step, endpoint_kind, pair_id, margin_side, scalar_name)
JOIN endpoint_values AS c USING (source_step, target_step, endpoint_kind, pair_id, margin_side, scalar_name)
WHERE a.intervention = x.ablated_run AND c.intervention = 'clean'

-- Over all steps, and by step.
-- view: rescue_statistics
SELECT
  scalar_name, endpoint_kind, place, step,
  count(*) AS num_observations,
  favg(clean_scalar) AS mean_clean_scalar,
  favg(source_ablated_scalar) AS mean_source_ablated_scalar,
  favg(patched_scalar) AS mean_patched_scalar,
  favg(total_drop) AS mean_total_drop,
  favg(abs(total_drop)) AS mean_abs_total_drop,
  favg(rescue) AS mean_rescue,
  favg(abs(rescue)) AS mean_abs_rescue,
  favg(unrecovered) AS mean_unrecovered,
  favg(absolute_unrecovered) AS mean_abs_unrecovered,
  CASE WHEN abs(mean_total_drop) > $denominator_threshold THEN mean_rescue / mean_total_drop END
    AS mean_rescue_fraction_from_means,
  count(*) FILTER (abs(total_drop) > $denominator_threshold) AS num_recovery_fraction_rows,
  favg(rescue / total_drop) FILTER (abs(total_drop) > $denominator_threshold) AS mean_recovery_fraction_per_row,
  favg(improved_by_patch::INTEGER) AS improved_fraction,
  r_squared(total_drop, rescue) AS rescue_vs_drop_r_squared,
  pearson(total_drop, rescue) AS rescue_vs_drop_correlation,
  favg((total_drop > 0)::INTEGER) AS dropped_fraction,
  mean_rescue_fraction_from_means IS NOT NULL
    AND abs(mean_total_drop) >= {_OF_SIZE} * mean_abs_total_drop
    AND abs(mean_total_drop) >= {_OF_SCALAR} * favg(abs(clean_scalar)) AS has_something_to_rescue
FROM rescues
GROUP BY GROUPING SETS ((scalar_name, endpoint_kind, place), (scalar_name, endpoint_kind, place, step))

-- The scalar of the findings, at the charts' end of the interval, step by step.
-- view: headline
SELECT s.*, x.source_component, x.patch
FROM rescue_statistics AS s
JOIN patches AS x USING (place)
WHERE s.scalar_name = $headline_scalar AND s.endpoint_kind = $chart_endpoint AND s.step IS NOT NULL
ORDER BY s.step, s.place

-- What taking a source away costs, and what of it each patch gives back.
-- view: trajectory
WITH titled AS (
  SELECT
    *, 'without ' || source_component || if(scalar_name = 'negative_answer_loss', ', nats', ', logits') AS panel,
    row_number() OVER (PARTITION BY step, source_component ORDER BY place) = 1 AS is_first
  FROM headline
)
SELECT step, panel, 'lost' AS series, mean_total_drop AS value, 0 AS within, place FROM titled WHERE is_first
UNION ALL
SELECT step, panel, patch, mean_rescue, 1, place FROM titled
ORDER BY place, within, step

-- Cells of charts: over all steps.
-- view: cells
SELECT
  s.*, x.source_component, x.patch,
  x.source_component || ' · ' || s.scalar_name AS row_label,
  row_number() OVER (PARTITION BY s.scalar_name, x.source_component ORDER BY s.place) AS column_place,
  dense_rank() OVER (ORDER BY list_position($source_component, x.source_component), list_position($scalar, s.scalar_name))
    AS row_place
FROM rescue_statistics AS s
JOIN patches AS x USING (place)
WHERE s.endpoint_kind = $chart_endpoint AND s.step IS NULL
ORDER BY row_place, s.place

"""
TRAJECTORY = Trajectory(
    "rescue_trajectory",
    "trajectory",
    "What taking a component away costs, and what comes back",
    about="the findings' scalar, mean over pairs: lost without the component, and what of it each patch gives back",
    y_title="change of the scalar",
    series="series",
    panel="panel",
    rank_by="last_abs",
)
ABOUT_FRACTIONS = (
    "`mean_rescue_fraction_from_means` is mean rescue over mean drop: 0 is the run without the source, 1 the clean run; it "
    "may lie beyond both. `mean_recovery_fraction_per_row` is the mean of ratios, over rows with |drop| > "
    "`--denominator-threshold`, and rows with hardly a drop dominate it: read the first.",
    f"`has_something_to_rescue` is false where the mean drop is below {percent(_OF_SIZE)} of the mean |drop| (drops and "
    f"gains cancel) or below {percent(_OF_SCALAR)} of the mean |scalar|: a fraction of that is noise, and charts leave it "
    "out.",
    "An ablated head's output is times 0 before W_O, so that the output bias stays; an ablated MLP's whole output is 0, its "
    "bias too. Competitors are those of the clean record at the ends of the interval, in edited runs as well.",
    "`rescue_vs_drop_r_squared` takes the rescue for a prediction of the drop, row by row, without a fit.",
    "An inner step is the target of one interval and the source of the next, so that it stands in both endpoint kinds.",
)


class IncompleteRuns(ReportFailed):
    """Runs of some pair are missing, or there is none at all."""


@dataclass(frozen=True)
class Patch:
    """A component taken away, and what is put back then."""

    source: str
    label: str
    """How rows name what is put back."""
    stage: str
    edits: tuple[Edit, ...]
    run: str
    """Name of the intervention: the same for the same edits."""
    role: str | None = None


class RescueReport(EndpointReport):
    """Base of reports on rescue: options, and what all of them say."""

    scalar: tuple[ScalarName, ...] = Field(
        ("correct_value_logit", "fixed_source_competitor_margin", "fixed_target_competitor_margin"),
        min_length=1,
        description="scalar of the answer; default the answer's logit and the two margins against a fixed competitor",
    )
    source_component: tuple[str, ...] = Field(
        ..., min_length=1, description="head (L0H1) or MLP (L0MLP) that is taken away, one at a time"
    )
    denominator_threshold: float = Field(
        1e-6, ge=0, description="a drop of at most this size has no rescue fraction"
    )
    markdown_top_k_rows: PositiveInt = Field(120, description="most rows of the table in the Markdown")

    calculation: ClassVar[dict[str, str]] = {
        "total_drop": "clean_scalar - source_ablated_scalar",
        "rescue": "patched_scalar - source_ablated_scalar",
        "unrecovered": "clean_scalar - patched_scalar",
        "improved_by_patch": "|unrecovered| < |total_drop|",
        "mean_rescue_fraction_from_means": "mean rescue / mean total_drop, null up to denominator_threshold",
        "mean_recovery_fraction_per_row": "mean of rescue / total_drop over rows with |total_drop| > denominator_threshold",
    }

    @field_validator("source_component")
    @classmethod
    def _are_ablatable(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        found = read_components(labels)
        require_ablatable("--source-component", found)
        return found

    def restorations(self, source: str) -> list[Patch]:
        """What is put back when a source is taken away, in order."""
        raise NotImplementedError

    @cached_property
    def patches(self) -> list[Patch]:
        """Every source with everything that is put back."""
        return [patch for source in self.source_component for patch in self.restorations(source)]

    @property
    def headline_scalar(self) -> ScalarName:
        """That of findings and trajectory: the margin against the target's competitor, or the first that is asked for."""
        margin: ScalarName = "fixed_target_competitor_margin"
        return margin if margin in self.scalar else self.scalar[0]

    @property
    def chart_endpoint(self) -> str:
        """The end of the interval that charts and findings are of."""
        return "target" if "target" in self.endpoint_role else "source"

    def interventions(self) -> list[dict[str, Any]]:
        """Each source taken away, alone and with everything that is put back."""
        made = {
            without(source): intervention(without(source), [zero(source)]) for source in self.source_component
        }
        for patch in self.patches:
            made[patch.run] = intervention(patch.run, [zero(patch.source), *patch.edits])
        return list(made.values())

    def parameters(self) -> dict[str, Any]:
        """Adds `patches` and what the charts are of."""
        patches = [
            {
                "place": place,
                "source_component": of.source,
                "patch": of.label,
                "patch_at": of.stage,
                "written_at": written_stage(of.source),
                "role": of.role or "",
                "ablated_run": without(of.source),
                "patched_run": of.run,
            }
            for place, of in enumerate(self.patches, 1)
        ]
        return {
            **super().parameters(),
            "patches": patches,
            "headline_scalar": self.headline_scalar,
            "chart_endpoint": self.chart_endpoint,
        }

    @classmethod
    def more_views(cls) -> str:
        """Adds the rescues."""
        return super().more_views() + _PRELUDE

    def require(self, lake: Lake, run: str) -> None:
        """The sources must be there."""
        super().require(lake, run)
        require_components(lake, run, self.source_component)

    def check(self, results: Results) -> None:
        """Every pair must have every run. Raises IncompleteRuns."""
        super().check(results)
        found = results.first(
            "SELECT (SELECT count(*) FROM rescues) AS found, (SELECT count(*) FROM pair_sides) * (SELECT count(*) FROM "
            "intervals) * len($endpoint_role) * len($scalar) * (SELECT count(*) FROM patches) AS wanted",
            endpoint_role=list(self.endpoint_role),
            scalar=list(self.scalar),
        )
        assert found is not None
        if not found["wanted"] or found["found"] != found["wanted"]:
            raise IncompleteRuns(
                f"{self.report_name()}: there are {found['found']:,} rows of {found['wanted']:,}: some pair lacks runs. "
                "lakebed extract makes all of them or none, so these were written by something else: extract into another "
                "lake"
            )

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's keys."""
        return {
            **super().facts(lake, results),
            "pair_types": list(self.pair_type),
            "scalar_names": list(self.scalar),
            "margin_sides": list(self.margin_side),
            "endpoint_roles": list(self.endpoint_role),
            "source_components": list(self.source_component),
            "checkpoint_paths_by_step": {
                str(step): f"{lake.uri}#{results.run}/{step}" for step in results.steps
            },
            "calculation": self.calculation,
            "summary_rows": results.rows("FROM summary_rows"),
        }

    def cost(self, results: Results, source: str) -> tuple[str, list[dict[str, Any]]]:
        """What taking a source away does at the last step, in words, and the rows of its patches there.

        The rows are empty where there is nothing to rescue.
        """
        rows = results.rows(
            "FROM headline WHERE source_component = $source AND step = (SELECT max(step) FROM headline) ORDER BY place",
            source=source,
        )
        first = rows[0]
        drop = first["mean_total_drop"]
        does = (
            f"At step {first['step']} taking {source} away {'lowers' if drop >= 0 else 'raises'} "
            f"`{self.headline_scalar}` by **{number(abs(drop), 3)}** ({number(first['mean_clean_scalar'], 3)} → "
            f"{number(first['mean_source_ablated_scalar'], 3)}, mean of {first['num_observations']} records)"
        )
        if not first["has_something_to_rescue"]:
            return (
                f"{does}: next to nothing beside its size or its spread over records, so there is nothing to rescue and "
                "the fractions mean nothing there.",
                [],
            )
        return f"{does}{self._since(results, source, drop)}.", rows

    def _since(self, results: Results, source: str, drop: float) -> str:
        """From which step on at least half of the last step's drop is there."""
        steps = results.rows(
            "SELECT DISTINCT step, mean_total_drop / $drop AS share FROM headline WHERE source_component = $source "
            "ORDER BY step DESC",
            source=source,
            drop=drop,
        )
        since = None
        for row in steps:
            if row["share"] < 0.5:
                break
            since = row["step"]
        if since is None or since == steps[0]["step"]:
            return "; half of that is there at no earlier step" if len(steps) > 1 else ""
        return f"; at least half of that from step {since} on"


def summary_table(patch: str, heading: str, about: str) -> TextTable:
    """The Markdown's table over view `top_summary`, whose column `patch` says what is put back."""
    columns = {
        "source": "source_component",
        heading: patch,
        "scalar": "scalar_name",
        "endpoint": "endpoint_kind",
        "rows": "num_observations",
        "clean": "mean_clean_scalar",
        "without": "mean_source_ablated_scalar",
        "patched": "mean_patched_scalar",
        "drop": "mean_total_drop",
        "rescue": "mean_rescue",
        "fraction": "mean_rescue_fraction_from_means",
        "improved": "improved_fraction",
        "R²": "rescue_vs_drop_r_squared",
    }
    return TextTable("top_summary", "What is lost, and what comes back", columns, about)


def without(source: str) -> str:
    """Name of the run in which a source is taken away."""
    return f"without {source}"


def written_stage(component: str) -> str:
    """The residual stage that a head or an MLP writes."""
    layer, is_mlp = divmod(component_order(component), 2)
    return f"layer_{layer}_post_{'mlp' if is_mlp else 'attn'}"


def listed(rows: Sequence[dict[str, Any]], names: int = 4) -> str:
    """Patches and the share that each gives back."""
    shown = ", ".join(
        f"{row['patch']} {percent(row['mean_rescue_fraction_from_means'])}" for row in rows[:names]
    )
    return f"{shown} and {len(rows) - names} more with less" if len(rows) > names else shown

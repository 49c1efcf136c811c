"""route-to-scalar-closure: which routes' scores moved along with each scalar of the answer? (definitions 4 §D2)"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from ..lake.imports import leave_pandas_alone
from .chart import Bars
from .closure_rows import ClosureOrigin
from .markdown import number
from .probe_report import ProbeReport
from .report import ReportFailed, RowFile, TextTable
from .route_closure import NOT_A_CAUSE, ROUTE_VALUES, accounted, doubtful
from .route_options import ROUTE_LABELS
from .route_to_margin_closure import RouteToMarginClosure as _MarginClosure
from .scalar_closure import ScalarClosureReport

if TYPE_CHECKING:
    from ..lake import Lake
    from ..lake.datasets import Need
    from .results import Results

_STEM = "route_to_scalar_closure"


class NoClosureOfPair(ReportFailed):
    """A pair over an interval whose scalar is known and whose route scores are not."""


class DisagreeingDuplicates(ReportFailed):
    """Two closure rows of one pair and interval that say different things of the routes."""


class RouteToScalarClosure(ClosureOrigin, ScalarClosureReport):
    """Which scalar of the answer changes along with routes' scores: its own logit, its competitor's, a margin?

    One least-squares fit per scalar and switch bucket, over all intervals and pairs. Route scores are rows of
    route-to-margin-closure, or --route straight from the lake.
    """

    route_label: tuple[str, ...] = Field((), description="route to fit with; default all of them")
    duplicate_tolerance: float = Field(
        1e-6, ge=0, description="how far rows of a file may differ that are of one pair and interval"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "closure_rows": RowFile(f"{_STEM}_rows", "closure_rows"),
        "coefficient_rows": RowFile(f"{_STEM}_coefficients", "coefficient_rows"),
    }
    tables = (
        TextTable(
            "scalar_bucket_summaries",
            "How close the fits come",
            {
                "scalar": "scalar_name",
                "bucket": "switch_bucket",
                "rows": "num_observations",
                "switch": "competitor_switch_fraction",
                "R²": "r_squared",
                "mean change": "mean_actual_scalar_delta",
                "predicted": "mean_predicted_scalar_delta",
                "mean |residual|": "mean_abs_residual",
                "condition": "condition_number",
            },
            about="A fit each, best first. `condition` is that of the routes' columns at unit length: beyond 30 "
            "coefficients trade off against each other.",
        ),
        TextTable(
            "route_contributions",
            "Which routes carry the mean change",
            {
                "scalar": "scalar_name",
                "bucket": "switch_bucket",
                "route": "route_label",
                "coefficient": "coefficient",
                "mean change of the score": "mean_route_score_delta",
                "mean contribution": "mean_contribution",
            },
            about="Contribution is coefficient times mean change.",
        ),
    )
    charts = (
        Bars(
            "r_squared",
            "r_squared_chart",
            "Which scalar of the answer moves along with the routes?",
            about="R² of one least-squares fit per scalar; below 0 the mean does better",
            value="r_squared",
            value_title="R²",
            label="scalar",
        ),
        Bars(
            "abs_residual",
            "abs_residual_chart",
            "How far off is each fit?",
            about="log-probabilities in nats, all others in logits",
            value="mean_abs_residual",
            value_title="mean |actual − predicted| change of the scalar",
            label="scalar",
        ),
    )
    how_to_read = (
        NOT_A_CAUSE,
        "A scalar's change is that of the untouched record named by `--margin-side`; several sides are fitted together. A "
        "moving margin takes the best wrong token of either step, a fixed one that of the source, or of the target, at "
        "both.",
        "Route scores are of a pair, not of a record: the same change explains the scalars of both.",
        "Bucket `same_competitor` has the pairs whose best wrong token is the same at both ends, `competitor_switch` the "
        "others, `all` both; `closure_rows` repeats a pair in each bucket it is in. Over pairs that keep theirs, the three "
        "margins are one.",
        "R² is about the mean, with or without `--fit-intercept`, and may be negative.",
    )
    next_queries = (
        (
            "How do the two logits of a margin move, interval by interval?",
            "SELECT probe, step, avg(answer_logit) AS answer, avg(best_wrong_logit) AS best_wrong, avg(value_margin) AS "
            "margin FROM intervention_runs WHERE run = $run AND intervention = 'clean' GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (10, 4)
    example: ClassVar[str] = (
        "lakebed query route-to-scalar-closure --lake demo.lake --run demo --steps 0:1300:130 --pair-type query_key "
        "--pair-type support_value --route-closure-rows margin-closure/route_to_margin_closure_rows.jsonl --scalar "
        "correct_value_logit --scalar source_best_wrong_logit --switch-bucket all --out scalar-closure"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        name: _MarginClosure.demo_options[name] for name in ("route", "pair_type")
    }

    @field_validator("route_label")
    @classmethod
    def _each_route_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def needs(self) -> tuple[Need, ...]:
        """The answers, and without a file the routes' scores."""
        return (*super().needs(), *self.route_needs())

    def parameters(self) -> dict[str, Any]:
        """Routes by name."""
        return {
            **super().parameters(),
            # `route_label` is what view `labels` reads.
            "route_label_wanted": list(self.route_label) or [""],
            "all_labels": not self.route_label,
        }

    @classmethod
    def sql_text(cls) -> str:
        """The routes' views between those of the scalars and the report's own."""
        own = super(ProbeReport, cls).sql_text()
        return "\n".join([super().sql_text().removesuffix(own), ROUTE_LABELS, ROUTE_VALUES, own])

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Sections `closures` and `fits`."""
        if name == "closures":
            return self._closures(results)
        from .arrays.closures import fit_columns

        return fit_columns(self._fits(results))

    def _closures(self, results: Results) -> dict[str, Any]:
        """Changes of the routes' scores, one row per interval and pair."""
        if self.from_file:
            return _columns(self._without_duplicates(self.file_rows(results)))
        held = results.arrow(
            "SELECT row_number() OVER (ORDER BY source_step, pair_id) - 1 AS closure, source_step, target_step, pair_id, "
            "list(route_label ORDER BY route_label) AS labels, "
            "list(target_route_score - source_route_score ORDER BY route_label) AS deltas "
            "FROM route_values GROUP BY source_step, target_step, pair_id"
        )
        return dict(zip(held.column_names, held.columns, strict=True))

    def _without_duplicates(self, rows: list[dict[str, Any]]) -> dict[tuple[int, int, str], dict[str, float]]:
        found: dict[tuple[int, int, str], dict[str, float]] = {}
        for row in rows:
            key = (row["source_step"], row["target_step"], row["pair_id"])
            deltas = row["route_score_deltas"]
            first = found.setdefault(key, deltas)
            where = f"pair {key[2]} from step {key[0]} to {key[1]}"
            if first.keys() != deltas.keys():
                raise DisagreeingDuplicates(
                    f"{self.report_name()}: two rows of {where} have other routes: {', '.join(sorted(first))} and "
                    f"{', '.join(sorted(deltas))}"
                )
            apart = {label: abs(deltas[label] - value) for label, value in first.items()}
            worst = max(apart, key=lambda label: apart[label])
            if apart[worst] > self.duplicate_tolerance:
                raise DisagreeingDuplicates(
                    f"{self.report_name()}: two rows of {where} disagree: {worst!r} changed by {first[worst]:.6g} in one "
                    f"and {deltas[worst]:.6g} in the other; --duplicate-tolerance is {self.duplicate_tolerance:g}"
                )
        return found

    def _fits(self, results: Results) -> Iterator[tuple[dict[str, Any], Any, Any]]:
        """Key, fit and observations of each. Raises EmptyBucket, Underdetermined, NoClosureOfPair, UnknownRouteLabel."""
        import numpy as np

        from .arrays.closures import read_design

        held = results.arrow(
            "SELECT c.*, c.target_scalar - c.source_scalar AS delta, k.closure FROM changes AS c "
            "LEFT JOIN closures AS k USING (source_step, target_step, pair_id) ORDER BY c.observation"
        )
        self._require_closures(results)
        labels = {
            row["label"] for row in results.rows("SELECT DISTINCT unnest(labels) AS label FROM closures")
        }
        self.require_labels(self.route_label, labels, "--route-label")
        features = results.arrow("FROM features")
        closures = results.value("SELECT count(*) FROM closures")
        design = read_design(features, closures, self.report_name())
        return self.bucket_fits(held, design, held["closure"].to_numpy().astype(np.int64))

    def _require_closures(self, results: Results) -> None:
        lost = results.first(
            "SELECT count(*) OVER () AS count, source_step, target_step, pair_id FROM ("
            "SELECT DISTINCT source_step, target_step, pair_id FROM changes "
            "EXCEPT SELECT source_step, target_step, pair_id FROM closures) ORDER BY source_step, pair_id LIMIT 1"
        )
        if lost:
            raise NoClosureOfPair(
                f"{self.report_name()}: {lost['count']} pairs over an interval have no closure row, the first is "
                f"{lost['pair_id']} from step {lost['source_step']} to {lost['target_step']}: name the --steps, --pair-type "
                "and --split that the rows are of"
            )

    def warnings(self, results: Results) -> list[str]:
        """Buckets that were left out; coefficients that are not determined, or trade off."""
        fitted = {row["switch_bucket"] for row in results.rows("SELECT DISTINCT switch_bucket FROM fits")}
        left = [
            f"Bucket {bucket} is left out: it has too few changes to fit all routes."
            for bucket in self.buckets
            if bucket not in fitted
        ]
        # The routes are the same for every scalar: what is doubtful of one fit of a bucket is so of all.
        first = results.rows(
            "SELECT 'Bucket ' || switch_bucket AS name, * FROM fits WHERE scalar_name = $scalar ORDER BY "
            "list_position($buckets, switch_bucket)",
            scalar=self.scalar[0],
            buckets=list(self.buckets),
        )
        return [*left, *doubtful(first)]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        fits = {
            (row["scalar_name"], row["switch_bucket"]): json.loads(row["fit"])
            for row in results.rows("SELECT scalar_name, switch_bucket, fit FROM fits")
        }
        rows = results.rows("FROM scalar_bucket_summaries")
        for row in rows:
            row["fit"] = fits[row["scalar_name"], row["switch_bucket"]]
        return {
            **super().facts(lake, results),
            "switch_buckets": list(self.buckets),
            "scalar_bucket_summaries": rows,
            "summary": {
                "num_observations": results.value("SELECT count(*) FROM closure_rows"),
                "num_fits": len(rows),
                "scalar_bucket_summaries": rows,
                "ranked_by_mean_abs_residual": sorted(rows, key=lambda row: row["mean_abs_residual"]),
                "route_contributions": results.rows("FROM coefficient_rows"),
            },
            "calculation": {
                "route_score_delta": "route_score(target; source basis) - route_score(source; source basis)",
                "actual_scalar_delta": "scalar(target) - scalar(source) of the untouched run",
                "fit": "least squares of actual_scalar_delta on the route_score_deltas, all intervals and pairs of a bucket",
                "mean_contribution": "coefficient times mean route_score_delta",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Which scalar the routes account for best and worst, and what carries the best."""
        bucket = self.buckets[0]
        rows = results.rows(
            "FROM scalar_bucket_summaries WHERE switch_bucket = $bucket ORDER BY r_squared DESC NULLS LAST",
            bucket=bucket,
        )
        best, worst = rows[0], rows[-1]
        count = best["num_parameters"] - self.fit_intercept
        who = "Changes of one route's score" if count == 1 else f"Changes of {count} routes' scores"
        what = f"`{best['scalar_name']}`"
        where = "" if bucket == "all" else f" in bucket {bucket}"
        actual, predicted, residual = (
            number(best[name], 3)
            for name in ("mean_actual_scalar_delta", "mean_predicted_scalar_delta", "mean_abs_residual")
        )
        lines = [
            f"{accounted(who, 2, best['r_squared'], what)} from step {results.steps[0]} to {results.steps[-1]}{where}: "
            f"{best['num_observations']:,} changes of a pair over an interval, {actual} in the mean, predicted {predicted}, "
            f"mean |residual| {residual}. It is a fit, not a cause."
        ]
        if len(rows) > 1:
            lines.append(
                f"Of {len(rows)} scalars that is the one they meet best; worst is `{worst['scalar_name']}` (R² "
                f"{number(worst['r_squared'], 3)})."
            )
        carried = results.rows(
            "FROM route_contributions WHERE scalar_name = $scalar", scalar=best["scalar_name"]
        )
        listed = ", ".join(
            f"`{row['route_label']}` {number(row['mean_contribution'], 3)} (coefficient {number(row['coefficient'], 3)})"
            for row in carried[:4]
        )
        return [*lines, f"Of the mean change of `{best['scalar_name']}` they carry: {listed}."]


def _columns(found: Mapping[tuple[int, int, str], Mapping[str, float]]) -> dict[str, Any]:
    import pyarrow as pa

    leave_pandas_alone()
    keys = list(found)
    return {
        "closure": pa.array(range(len(keys)), pa.int64()),
        "source_step": pa.array([key[0] for key in keys], pa.int64()),
        "target_step": pa.array([key[1] for key in keys], pa.int64()),
        "pair_id": pa.array([key[2] for key in keys], pa.string()),
        "labels": pa.array([sorted(found[key]) for key in keys], pa.list_(pa.string())),
        "deltas": pa.array(
            [[value for _, value in sorted(found[key].items())] for key in keys], pa.list_(pa.float64())
        ),
    }

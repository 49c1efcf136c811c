"""weight-svd-patterns: births, stabilization and coordinated growth of directions (definitions: part 1, I)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from ..lake import Lake
from ..lake.datasets import SVD, Need
from .chart import Heatmap, StackedBars, Trajectory
from .markdown import number
from .report import Report, ReportFailed, RowFile, TextTable
from .results import Results
from .svd_options import Matrix


class WeightSVDPatterns(Report):
    """Which weight directions were born, when they stopped turning, and which matrices grew together."""

    max_vector_rank: PositiveInt = Field(1, description="follow singular vectors of the ranks up to this one")
    final_alignment_threshold: float = Field(
        0.95,
        ge=0,
        le=1,
        description="a direction is aligned while its |cos| with its last self is at least this",
    )
    adjacent_stability_threshold: float = Field(
        0.99,
        ge=0,
        le=1,
        description="a direction is stable while |cos| of neighbouring steps is at least this",
    )
    stability_patience: PositiveInt = Field(3, description="stable steps that must remain, this one included")
    markdown_top_k: PositiveInt = Field(16, description="length of the top lists in Markdown and JSON")
    matrix: tuple[Matrix, ...] = Field(
        ("W_QK", "W_OV", "W_in", "W_out"), min_length=1, description="matrix to report on"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "matrix_summary": RowFile("weight_svd_matrix_summary", "matrix_summary_rows", "matrix_summary_csv"),
        "vector_alignment": RowFile("weight_svd_vector_alignment", "vector_alignment_rows"),
        "direction_birth": RowFile("weight_svd_direction_births", "direction_birth_rows"),
        "interval_event": RowFile("weight_svd_interval_events", "interval_event_rows"),
        "coordination_window": RowFile("weight_svd_coordination_windows", "coordination_window_rows"),
    }
    tables = (
        TextTable(
            "top_rank1_growth",
            "Largest growth of σ₁",
            {
                "matrix": "matrix_label",
                "σ₁ at start": "start_singular_value_rank1",
                "at end": "end_singular_value_rank1",
                "Δσ₁": "singular_value_rank1_delta",
                "Δ effective rank": "effective_rank_delta",
                "Δ top-3 mass": "spectral_mass_top3_delta",
            },
        ),
        TextTable(
            "top_selective_concentration",
            "Growth into few directions",
            {
                "matrix": "matrix_label",
                "score": "selective_concentration_score",
                "Δσ₁": "singular_value_rank1_delta",
                "Δ top-3 mass": "spectral_mass_top3_delta",
            },
            "The score is Δσ₁ · max(0, Δ top-3 mass), from the first step to the last.",
        ),
        TextTable(
            "top_direction_birth_candidates",
            "Directions that turned most",
            {
                "matrix": "matrix_label",
                "rank": "singular_value_rank",
                "side": "vector_side",
                "rotation to final": "total_rotation_to_final",
                "largest turn, from step": "min_adjacent_interval_start",
                "to step": "min_adjacent_interval_end",
                "|cos| over it": "min_adjacent_abs_cosine",
                "aligned from step": "first_final_alignment_step",
                "stable from step": "first_adjacent_stable_step",
                "rank swaps": "rank_swaps",
            },
        ),
        TextTable(
            "top_coordinated_growth_windows",
            "Intervals in which most grew together",
            {
                "from step": "interval_start_step",
                "to step": "interval_end_step",
                "growing": "num_positive_growth_matrices",
                "of": "num_matrices",
                "Σ positive Δσ₁": "total_positive_singular_value_rank1_delta",
                "mean rotation": "mean_rank1_adjacent_rotation",
            },
            "Ranked by the sum of positive Δσ₁, which is not divided by the length of the interval.",
        ),
    )
    charts = (
        Trajectory(
            "growth",
            "growth_chart",
            "Largest singular value of each matrix",
            y="sigma1",
            y_title="largest singular value",
            series="matrix_label",
        ),
        Trajectory(
            "stabilization",
            "stabilization_chart",
            "When each first direction reaches its final orientation",
            about="|cos| of the rank-1 vector with its last self, mean of left and right",
            y="final_abs_cosine",
            y_title="|cos| with the final direction",
            series="matrix_label",
            y_domain=(0, 1),
            rank_by="range",
        ),
        Heatmap(
            "rotation",
            "rotation_chart",
            "How far each first direction turned in each interval",
            about="1 − |cos| of the rank-1 vector at both ends of the interval, mean of left and right",
            value="rotation",
            value_title="rotation 1 − |cos|",
            series="matrix_label",
            domain=(0, 1),
        ),
        StackedBars(
            "coordination",
            "window_chart",
            "When matrices grew together",
            about="rises of the largest singular value, summed over the matrices of each kind",
            y="growth",
            y_title="growth per 100 steps",
        ),
    )
    how_to_read = (
        "Growth and concentration compare the first step with the last; a rise and fall in between does not show there, "
        "but in the interval rows it does.",
        "A direction is *aligned from* the first step after which |cos| with its last self never falls below "
        "`final_alignment_threshold`, and *stable from* the first step after which neighbouring steps never fall below "
        "`adjacent_stability_threshold`, with at least `stability_patience` such steps left. Patience is a minimum "
        "length of the tail, not a length of run.",
        "Vectors are matched by rank. Where two ranks swap places, each seems to turn by 90°: "
        "`adjacent_best_rank` and `adjacent_best_abs_cosine` name the rank of the step before that is nearest (among "
        "ranks up to `max_vector_rank`), and *rank swaps* counts the steps at which it is another one.",
        "“Final” is the last selected step, so every direction ends aligned with itself: choose `--steps` to end where "
        "training has settled.",
        "W_QK and W_OV have at most head-width singular values; the surplus of a d×d decomposition is rounding noise "
        "and is not there. Without `--matrix` the report covers W_QK, W_OV, W_in and W_out.",
    )
    next_queries = (
        (
            "In which step range did a matrix grow fastest?",
            "SELECT step, singular_value - lag(singular_value) OVER (ORDER BY step) AS growth FROM singular_values WHERE "
            "run = $run AND matrix = 'W_QK' AND layer = 0 AND head = 0 AND rank = 1 ORDER BY growth DESC LIMIT 5",
        ),
        (
            "Do two heads of one layer end with the same key direction?",
            "SELECT a.head, b.head, abs_cosine(a.values, b.values) AS overlap FROM singular_vectors a JOIN "
            "singular_vectors b USING (run, step, matrix, layer, rank, side) WHERE run = $run AND matrix = 'W_QK' AND "
            "side = 'right' AND rank = 1 AND a.head < b.head AND step = (SELECT max(step) FROM singular_values) "
            "ORDER BY overlap DESC",
        ),
    )
    place: ClassVar[tuple[int, int]] = (3, 2)
    example: ClassVar[str] = (
        "lakebed query weight-svd-patterns --lake demo.lake --run demo --steps 250:5500 --max-vector-rank 16 "
        "--markdown-top-k 24 --out patterns"
    )

    def needs(self) -> tuple[Need, ...]:
        """The SVD of every selected step."""
        return (Need(SVD),)

    def check(self, results: Results) -> None:
        """Needs two steps, rank-1 rows and vectors of length other than zero."""
        name, run, matrices = self.report_name(), results.run, ", ".join(self.matrix)
        if not results.value("SELECT count(*) FROM spectra"):
            raise ReportFailed(f"{name}: run {run!r} has no rank-1 singular values of {matrices}")
        if len(results.steps) < 2:
            raise ReportFailed(
                f"{name}: one step ({results.steps[0]}) has no growth and no rotation; select at least two"
            )
        if not results.value("SELECT count(*) FROM vectors WHERE singular_value_rank = 1"):
            raise ReportFailed(f"{name}: run {run!r} has no rank-1 singular vectors of {matrices}")
        zero = results.first(
            "SELECT matrix_label, singular_value_rank, vector_side, step FROM vectors "
            "WHERE squared_norm(vector) = 0 ORDER BY step, matrix_label, singular_value_rank, vector_side"
        )
        if zero is not None:
            raise ReportFailed(
                f"{name}: the {zero['vector_side']} vector of {zero['matrix_label']} rank {zero['singular_value_rank']} at "
                f"step {zero['step']} is zero and has no direction; leave out that step, matrix or rank"
            )

    def findings(self, results: Results) -> list[str]:
        """What grew most, what turned and settled, and when most grew together."""
        return [
            line for line in (_growth(results), _birth(results), _settled(results), _window(results)) if line
        ]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """How many series there are."""
        return {
            "num_matrices": int(results.value("SELECT count(*) FROM matrix_summary")),
            "num_vector_series": int(results.value("SELECT count(*) FROM direction_birth")),
        }


def _growth(results: Results) -> str:
    top = results.first(
        "FROM matrix_summary WHERE NOT isnan(singular_value_rank1_delta) ORDER BY singular_value_rank1_delta DESC, "
        "matrix_label"
    )
    if top is None:
        return ""
    fastest = results.first(
        "SELECT interval_start_step AS a, interval_end_step AS b, singular_value_rank1_delta AS delta FROM interval_event "
        "WHERE matrix_label = $label AND NOT isnan(singular_value_rank1_delta) "
        "ORDER BY delta / (b - a) DESC, a",
        label=top["matrix_label"],
    )
    when = (
        f"; fastest between steps {fastest['a']} and {fastest['b']} ({fastest['delta']:+.3g})"
        if fastest and fastest["delta"] > 0
        else ""
    )
    return (
        f"**{top['matrix_label']}** grew most: σ₁ from {number(top['start_singular_value_rank1'])} at step "
        f"{top['start_step']} to {number(top['end_singular_value_rank1'])} at step {top['end_step']}{when}."
    )


def _birth(results: Results) -> str:
    born = results.first(
        "FROM direction_birth WHERE NOT isnan(total_rotation_to_final) ORDER BY total_rotation_to_final DESC, matrix_label, "
        "singular_value_rank, vector_side"
    )
    if born is None:
        return ""
    swaps = f" ({born['rank_swaps']} of the steps are rank swaps)" if born["rank_swaps"] else ""
    return (
        f"The direction that turned most is the {born['vector_side']} vector of **{born['matrix_label']}** rank "
        f"{born['singular_value_rank']}: |cos| {number(born['start_final_abs_cosine'])} with its final self at the start, "
        f"at least {number(results.parameters['final_alignment_threshold'])} from step {born['first_final_alignment_step']} "
        f"on{swaps}."
    )


def _settled(results: Results) -> str:
    found = results.first(
        "SELECT count(*) AS directions, count(first_adjacent_stable_step) AS stable, "
        "min(first_adjacent_stable_step) AS first_step, max(first_adjacent_stable_step) AS last_step, "
        "arg_min(matrix_label, (first_adjacent_stable_step, matrix_label)) AS first_label, "
        "median(first_final_alignment_step)::BIGINT AS middle FROM direction_birth"
    )
    if found is None or not found["directions"]:
        return ""
    text = f"{found['stable']} of {found['directions']} directions settled"
    if found["stable"]:
        text += (
            f", {found['first_label']} first (stable from step {found['first_step']}), the last from step "
            f"{found['last_step']}"
        )
    return f"{text}; half were aligned with their final orientation by step {found['middle']}."


def _window(results: Results) -> str:
    best = results.first("FROM top_coordinated_growth_windows")
    if best is None or not best["total_positive_singular_value_rank1_delta"]:
        return "No matrix grew in any interval."
    leaders = ", ".join(item["matrix_label"] for item in best["top_growth_matrices"][:3])
    return (
        f"Most grew together between steps {best['interval_start_step']} and {best['interval_end_step']}: "
        f"{best['num_positive_growth_matrices']} of {best['num_matrices']} matrices, "
        f"Σ positive Δσ₁ {number(best['total_positive_singular_value_rank1_delta'])}, led by {leaders}."
    )

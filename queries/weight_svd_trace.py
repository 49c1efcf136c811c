"""weight-svd-trace: singular values and vectors of the weights, step by step (definitions: part 1, H)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from ..lake import Lake
from ..lake.datasets import SVD, Need
from .chart import Trajectory
from .markdown import number, percent
from .report import Report, ReportFailed, RowFile, TextTable
from .results import Results
from .svd_options import ALL_MATRICES, Matrix


class WeightSVDTrace(Report):
    """Singular values and vectors of W_QK, W_OV, W_Q, W_K, W_V, W_O, W_in and W_out over training."""

    max_singular_values: PositiveInt | None = Field(
        None, description="write this many singular values per matrix; default all"
    )
    top_vector_ranks: PositiveInt = Field(1, description="write singular vectors of the ranks up to this one")
    matrix: tuple[Matrix, ...] = Field(ALL_MATRICES, min_length=1, description="matrix to report on")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "singular_value_rows": RowFile(
            "weight_svd_singular_values", "singular_values_jsonl", "singular_values_csv"
        ),
        "top_vector_rows": RowFile("weight_svd_top_singular_vectors", "top_singular_vectors_jsonl"),
    }
    tables = (
        TextTable(
            "top_growth",
            "Largest growth of σ₁",
            {
                "matrix": "matrix_label",
                "σ₁ at start": "start_sigma1",
                "σ₁ at end": "end_sigma1",
                "Δσ₁": "delta_sigma1",
                "effective rank at start": "start_effective_rank",
                "at end": "end_effective_rank",
                "top-3 mass at start": "start_top3",
                "at end ": "end_top3",
                "singular values": "singular_value_count",
            },
        ),
    )
    charts = (
        Trajectory(
            "sigma1",
            "trajectories",
            "Largest singular value of each weight matrix",
            y="sigma1",
            y_title="largest singular value",
            series="matrix_label",
        ),
        Trajectory(
            "effective_rank",
            "trajectories",
            "Effective rank of each weight matrix",
            about="participation ratio of its singular values: (sum)² / sum of squares",
            y="effective_rank",
            y_title="effective rank (directions)",
            series="matrix_label",
        ),
        Trajectory(
            "spectral_mass_top3",
            "trajectories",
            "Share of the spectrum in the three largest singular values",
            y="spectral_mass_top3",
            y_title="share of the sum of singular values",
            series="matrix_label",
        ),
    )
    how_to_read = (
        "Raw stored weights: no biases, no LayerNorm gain folded in, no 1/√d_head. "
        "The bias-free, unscaled attention score is x_qᵀ W_QK x_k; a head writes xᵀ W_OV.",
        "Effective rank is the participation ratio (Σσ)² / Σσ², not the entropy of the spectrum. It, the sums and the "
        "top-3 mass use the full spectrum, however many singular values are written.",
        "W_QK and W_OV are products of two projections of head width d_head, so they have at most d_head singular "
        "values, and `singular_value_count` says so. Tools that decompose the full d×d product report d of them; the "
        "surplus is rounding noise with arbitrary vectors.",
        "W_Q, W_K, W_V (d_head×d) and W_O (d×d_head) are a head's slices as stored.",
        "The sign of a singular vector is arbitrary (left and right share it): compare |cos|.",
    )
    next_queries = (
        (
            "How the spectrum of one matrix changes at every rank:",
            "SELECT step, rank, singular_value FROM singular_values WHERE run = $run AND matrix = 'W_QK' AND layer = 0 "
            "AND head = 0 ORDER BY step, rank",
        ),
        (
            "Its first left direction at every step, as a list of numbers:",
            "SELECT step, values FROM singular_vectors WHERE run = $run AND matrix = 'W_QK' AND layer = 0 AND head = 0 "
            "AND rank = 1 AND side = 'left' ORDER BY step",
        ),
    )
    place: ClassVar[tuple[int, int]] = (3, 1)
    example: ClassVar[str] = (
        "lakebed query weight-svd-trace --lake demo.lake --run demo --steps 250:5500 --max-singular-values 16 "
        "--top-vector-ranks 16 --out svd"
    )

    def needs(self) -> tuple[Need, ...]:
        """The SVD of every selected step."""
        return (Need(SVD),)

    def check(self, results: Results) -> None:
        """Every matrix asked for must be there."""
        if not results.value("SELECT count(*) FROM spectrum_statistics"):
            raise ReportFailed(
                f"weight-svd-trace: run {results.run!r} has no singular values of {', '.join(self.matrix)}"
            )

    def warnings(self, results: Results) -> list[str]:
        """Zero matrices have no effective rank."""
        zero = results.rows(
            "SELECT matrix_label, step FROM spectrum_statistics WHERE singular_value_sum = 0 ORDER BY step, 1"
        )
        if not zero:
            return []
        return [
            f"{len(zero)} spectra are zero (first: {zero[0]['matrix_label']} at step {zero[0]['step']}); their effective "
            "rank and top-3 mass are null."
        ]

    def findings(self, results: Results) -> list[str]:
        """What grew, what concentrated, and how much of the whole that is."""
        top = results.first("FROM growth WHERE delta_sigma1 IS NOT NULL AND NOT isnan(delta_sigma1)")
        if top is None or len(results.steps) < 2:
            largest = results.first(
                "SELECT matrix_label, sigma[1] AS sigma1, effective_rank, step FROM spectrum_statistics "
                "ORDER BY sigma1 DESC, matrix_label"
            )
            assert largest is not None
            return [
                f"At step {largest['step']} the largest singular value is {number(largest['sigma1'])}, of "
                f"**{largest['matrix_label']}** (effective rank {number(largest['effective_rank'])}); growth needs "
                "at least two steps."
            ]
        narrowed = results.first(
            "FROM growth WHERE NOT isnan(delta_effective_rank) "
            "ORDER BY delta_effective_rank / start_effective_rank, matrix_label"
        )
        counts = results.first(
            "SELECT count(*) AS matrices, count(*) FILTER (delta_sigma1 > 0) AS grew, "
            "count(*) FILTER (delta_effective_rank < 0) AS narrowed FROM growth"
        )
        assert counts is not None
        lines = [
            f"**{top['matrix_label']}** grew most: σ₁ from {number(top['start_sigma1'])} at step {top['start_step']} to "
            f"{number(top['end_sigma1'])} at step {top['end_step']}{_times(top)}."
        ]
        if narrowed is not None and narrowed["delta_effective_rank"] < 0:
            lines.append(
                f"**{narrowed['matrix_label']}** concentrated most: effective rank from "
                f"{number(narrowed['start_effective_rank'])} to {number(narrowed['end_effective_rank'])}, top-3 mass "
                f"from {percent(narrowed['start_top3'])} to {percent(narrowed['end_top3'])}."
            )
        lines.append(
            f"σ₁ grew in {counts['grew']} of {counts['matrices']} matrices; effective rank fell in {counts['narrowed']}."
        )
        return lines

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """Notes a machine reader needs beside the rows."""
        return {
            "effective_rank": "(sum of singular values)^2 / sum of squares",
            "singular_value_count": "at most the head width for W_QK and W_OV",
        }


def _times(row: dict[str, Any]) -> str:
    return f" ({row['end_sigma1'] / row['start_sigma1']:.3g}×)" if row["start_sigma1"] > 0 else ""

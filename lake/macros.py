"""Arithmetic that several reports share, as SQL macros; they are in every session and in `views.sql`."""

from __future__ import annotations

from .datasets import SVD_MATRICES, VECTOR_LABELS

_LABELS = " ".join(
    f"WHEN '{matrix}' THEN CASE side WHEN 'left' THEN '{left}' WHEN 'right' THEN '{right}' END"
    for matrix, (left, right) in VECTOR_LABELS.items()
)

MACROS: dict[str, tuple[str, str]] = {
    "squared_norm(v)": (
        "sum of squares of a list, in double precision",
        "list_dot_product(v::DOUBLE[], v::DOUBLE[])",
    ),
    "abs_cosine(a, b)": (
        "|cos| of two lists, at most 1; null when either is zero, NaN when either holds NaN",
        # least() skips nulls and NaN, and would make |cos| of such vectors 1.
        "CASE WHEN squared_norm(a) = 0 OR squared_norm(b) = 0 OR a IS NULL OR b IS NULL THEN NULL "
        "WHEN isfinite(squared_norm(a)) AND isfinite(squared_norm(b)) THEN least(1.0, "
        "abs(list_dot_product(a::DOUBLE[], b::DOUBLE[])) / (sqrt(squared_norm(a)) * sqrt(squared_norm(b)))) "
        "ELSE 'NaN'::DOUBLE END",
    ),
    "pearson(x, y)": (
        "aggregate: Pearson's correlation over rows where both are there; null for fewer than two or when either does "
        "not vary, NaN when one is not finite",
        # DuckDB's corr gives NaN for all of these.
        "CASE WHEN regr_count(y::DOUBLE, x::DOUBLE) > 1 AND regr_sxx(y::DOUBLE, x::DOUBLE) > 0 "
        "AND regr_syy(y::DOUBLE, x::DOUBLE) > 0 THEN corr(y::DOUBLE, x::DOUBLE) END",
    ),
    "population_std(x)": (
        "aggregate: standard deviation, divided by n, not n - 1; 0 for one value, null for none, NaN when one is not finite",
        "stddev_pop(x::DOUBLE)",
    ),
    "r_squared(actual, predicted)": (
        "aggregate: 1 - Σ(actual - predicted)² / Σ(actual - mean)², nothing fitted, so it may be negative; null when the "
        "actual ones do not vary (at most 1e-12), NaN when one is not finite",
        "CASE WHEN count(*) FILTER (NOT isfinite(actual) OR NOT isfinite(predicted)) > 0 THEN 'NaN'::DOUBLE "
        "WHEN var_pop(actual::DOUBLE) FILTER (isfinite(actual)) * count(actual) > 1e-12 THEN "
        "1 - sum((actual::DOUBLE - predicted::DOUBLE)^2) FILTER (actual IS NOT NULL) "
        "/ (var_pop(actual::DOUBLE) FILTER (isfinite(actual)) * count(actual)) END",
    ),
    "split_number(sample_id, query_index)": (
        "a number from 0 to 1 that depends on nothing but the event: the first 8 bytes of SHA-256 of sample_id:query_index, "
        "over 2^64 - 1",
        "('0x' || left(sha256(sample_id || ':' || query_index), 16))::UBIGINT::DOUBLE / 18446744073709551615.0",
    ),
    "positive_part(x)": (
        "max(0, x); null stays null",
        "CASE WHEN x IS NOT NULL THEN greatest(0, x) END",
    ),
    "effective_rank(total, total_of_squares)": (
        "participation ratio of a spectrum, (Σσ)² / Σσ²; not the entropy one",
        "total * total / nullif(total_of_squares, 0)",
    ),
    "matrix_label(layer, head, matrix)": (
        "L2H1 W_QK, or L0 W_in for a matrix without heads",
        "format('L{}{} {}', layer, coalesce(format('H{}', head), ''), matrix)",
    ),
    "matrix_position(matrix)": (
        "report order of the matrices of dataset svd, from 1",
        f"list_position([{', '.join(repr(matrix) for matrix in SVD_MATRICES)}], matrix)",
    ),
    "vector_label(matrix, side)": (
        "what a left or right singular vector of a matrix is a direction of",
        f"CASE matrix {_LABELS} END",
    ),
}


def create_macros() -> list[str]:
    """The CREATE MACRO statements."""
    return [f"CREATE OR REPLACE TEMP MACRO {signature} AS {body}" for signature, (_, body) in MACROS.items()]

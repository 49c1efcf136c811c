import json
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake.datasets import SVD_MATRICES
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report
from lakebed.queries.svd_options import ALL_MATRICES

from .conftest import assert_same, make_svd_lake

VALUE_COLUMNS = (
    "checkpoint,checkpoint_name,step,layer,head,component_type,matrix_name,matrix_rows,matrix_cols,singular_value_rank,"
    "singular_value,singular_value_count,singular_value_sum,singular_value_sq_sum,effective_rank,spectral_mass_top3"
)


def report(**options):
    return load_report("weight-svd-trace").parse(options)


def written(made, tmp_path, **options):
    printed = run_report(made.lake, report(**options), tmp_path / "out", chart_formats=[])
    return printed, {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("singular_values_jsonl", "top_singular_vectors_jsonl")
    }


def expected_rows(made, max_singular_values=None):
    """The definition, with loops: (step, layer, head, matrix, rank) -> row."""
    for i, step in enumerate(made.steps):
        for layer in range(2):
            keys = [
                (head, name)
                for head in range(2)
                for name in SVD_MATRICES
                if not name.startswith(("W_i", "W_out"))
            ]
            for head, name in [*keys, (None, "W_in"), (None, "W_out")]:
                matrix = (
                    made.matrices[name][i, layer] if head is None else made.matrices[name][i, layer, head]
                )
                sigma = np.linalg.svd(matrix, compute_uv=False)[: len(made.svd[name][0][0, 0].T)]
                total, squares = 0.0, 0.0
                for value in sigma:
                    total, squares = total + value, squares + value * value
                for rank, value in enumerate(sigma[:max_singular_values], 1):
                    yield {
                        "checkpoint": f"{made.lake.uri}#ref/{step}",
                        "checkpoint_name": f"step_{step:06d}",
                        "step": step,
                        "layer": layer,
                        "head": head,
                        "component_type": "mlp" if head is None else "attention_head",
                        "matrix_name": name,
                        "matrix_rows": matrix.shape[0],
                        "matrix_cols": matrix.shape[1],
                        "singular_value_rank": rank,
                        "singular_value": value,
                        "singular_value_count": len(sigma),
                        "singular_value_sum": total,
                        "singular_value_sq_sum": squares,
                        "effective_rank": total**2 / squares,
                        "spectral_mass_top3": sum(sigma[:3]) / total,
                    }


@pytest.mark.parametrize("limit", [None, 2])
def test_singular_value_rows_are_the_definition(svd, tmp_path, limit):
    _, rows = written(svd, tmp_path, **({"max_singular_values": limit} if limit else {}))
    expected = list(expected_rows(svd, limit))
    assert len(rows["singular_values_jsonl"]) == len(expected)
    for row, wanted in zip(rows["singular_values_jsonl"], expected, strict=True):
        assert_same(row, wanted, rel=1e-12, near=0)
        assert row.keys() == wanted.keys()


def test_sums_are_the_stored_values_added_in_order(svd, tmp_path):
    _, rows = written(svd, tmp_path, matrix=["W_in"])
    sigma = svd.svd["W_in"][0][0, 0]
    total = 0.0
    for value in sigma:
        total += float(value)
    row = rows["singular_values_jsonl"][0]
    assert row["singular_value_sum"] == total
    assert row["singular_value"] == sigma[0]


def test_csv_header_is_in_the_contracts_order(svd, tmp_path):
    printed, _ = written(svd, tmp_path)
    assert Path(printed["singular_values_csv"]).read_text().splitlines()[0].strip() == VALUE_COLUMNS
    assert [key for key in printed if not key.endswith("parquet")] == [
        "report", "markdown", "singular_values_jsonl", "singular_values_csv", "top_singular_vectors_jsonl", "plots",
    ]  # fmt: skip


def test_vectors_left_then_right_with_labels(svd, tmp_path):
    _, rows = written(svd, tmp_path, top_vector_ranks=2, steps="500", matrix=["W_QK", "W_in"])
    vectors = rows["top_singular_vectors_jsonl"]
    order = [
        (r["layer"], r["head"], r["matrix_name"], r["singular_value_rank"], r["vector_side"]) for r in vectors
    ]
    assert order == [
        (layer, head, name, rank, side)
        for layer in (0, 1)
        for head, name in ((0, "W_QK"), (1, "W_QK"), (None, "W_in"))
        for rank in (1, 2)
        for side in ("left", "right")
    ]
    labels = {(r["matrix_name"], r["vector_side"]): r["vector_label"] for r in vectors}
    assert labels == {
        ("W_QK", "left"): "query_residual_direction",
        ("W_QK", "right"): "key_residual_direction",
        ("W_in", "left"): "mlp_hidden_direction",
        ("W_in", "right"): "input_residual_direction",
    }
    for row in vectors:
        sigma, *sides = svd.svd[row["matrix_name"]]
        at = (
            1,
            row["layer"],
            *([] if row["head"] is None else [row["head"]]),
            row["singular_value_rank"] - 1,
        )
        stored = sides[row["vector_side"] == "right"][at]
        assert row["vector_dim"] == len(stored)
        assert row["vector"] == stored.tolist()
        assert row["singular_value"] == sigma[at]


def test_all_eight_matrices_by_default(svd, tmp_path):
    assert ALL_MATRICES == SVD_MATRICES
    _, rows = written(svd, tmp_path)
    assert {row["matrix_name"] for row in rows["singular_values_jsonl"]} == set(SVD_MATRICES)


def test_markdown_leads_with_growth(svd, tmp_path):
    printed, _ = written(svd, tmp_path)
    text = Path(printed["markdown"]).read_text()
    growth = {}
    for name, (sigma, *_) in svd.svd.items():
        for index in np.ndindex(sigma.shape[1:-1]):
            label = f"L{index[0]}" + (f"H{index[1]}" if len(index) > 1 else "")
            growth[f"{label} {name}"] = sigma[(-1, *index, 0)] - sigma[(0, *index, 0)]
    assert f"- **{max(growth, key=growth.get)}** grew most: σ₁ from" in text
    assert "at most d_head singular values" in text


def test_a_single_step_is_a_report_without_growth(svd, tmp_path):
    printed, _ = written(svd, tmp_path, steps="last")
    assert "growth needs at least two steps" in Path(printed["markdown"]).read_text()


def test_a_zero_spectrum_is_null_and_said(tmp_path):
    def zero(decomposed):
        decomposed["W_O"][0][1, 0, 1] = 0

    made = make_svd_lake(tmp_path / "l", [1, 2], change=zero)
    printed, rows = written(made, tmp_path)
    found = [row for row in rows["singular_values_jsonl"] if row["singular_value_sum"] == 0]
    assert {(r["effective_rank"], r["spectral_mass_top3"]) for r in found} == {(None, None)}
    warnings = json.loads(Path(printed["report"]).read_text())["warnings"]
    assert warnings == [
        "1 spectra are zero (first: L0H1 W_O at step 2); their effective rank and top-3 mass are null."
    ]
    made.lake.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_singular_values": 0}, "--max-singular-values should be greater than 0, not 0"),
        ({"top_vector_ranks": -1}, "--top-vector-ranks should be greater than 0, not -1"),
        ({"matrix": ["W_X"]}, "--matrix should be 'W_QK'"),
        ({"rank": 3}, "no option --rank; it has --run, --steps, --max-singular-values"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InvalidOption) as error:
        report(**options)
    assert str(error.value).startswith(f"weight-svd-trace: {message}")
    assert "\n" not in str(error.value)


def test_matrices_the_run_does_not_have(tmp_path):
    made = make_svd_lake(tmp_path / "l", [1, 2], change=lambda decomposed: decomposed.pop("W_Q"))
    with pytest.raises(ReportFailed, match="run 'ref' has no singular values of W_Q"):
        run_report(made.lake, report(matrix=["W_Q"]), tmp_path / "o")
    made.lake.close()

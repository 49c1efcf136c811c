import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from .conftest import assert_same, make_svd_lake

SETS = {
    "matrix_summary": "matrix_summary_rows",
    "vector_alignment": "vector_alignment_rows",
    "direction_birth": "direction_birth_rows",
    "interval_event": "interval_event_rows",
    "coordination_window": "coordination_window_rows",
}


def report(**options):
    return load_report("weight-svd-patterns").parse(options)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return abs(sum(x * y for x, y in zip(a, b, strict=True))) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5)


def series_of(made, matrices):
    """(layer, head, matrix) in report order with its σ and vectors, Float[step, rank(, dim)]."""
    for layer in range(2):
        for head in (0, 1, None):
            for name in matrices:
                if (head is None) == (name in ("W_in", "W_out")):
                    at = (slice(None), layer) if head is None else (slice(None), layer, head)
                    yield layer, head, name, *(part[at] for part in made.svd[name])


def by_definition(
    made, ranks, final=0.95, adjacent=0.99, patience=3, matrices=("W_QK", "W_OV", "W_in", "W_out")
):
    """Every row set as part I of the definitions says it, with loops."""
    steps, out = made.steps, {name: [] for name in SETS}
    rotations, deltas = {}, {}
    for layer, head, name, sigma, left, right in series_of(made, matrices):
        label = f"L{layer}{'' if head is None else f'H{head}'} {name}"
        base = {
            "layer": layer, "head": head, "component_type": "mlp" if head is None else "attention_head",
            "matrix_name": name, "matrix_label": label,
        }  # fmt: skip
        effective = [s.sum() ** 2 / (s * s).sum() for s in sigma]
        mass = [s[:3].sum() / s.sum() for s in sigma]
        first = sigma[:, 0]
        out["matrix_summary"].append(
            base
            | {
                "start_step": steps[0], "end_step": steps[-1],
                "start_singular_value_rank1": first[0], "end_singular_value_rank1": first[-1],
                "singular_value_rank1_delta": first[-1] - first[0],
                "singular_value_rank1_relative_delta": (first[-1] - first[0]) / first[0],
                "start_effective_rank": effective[0], "end_effective_rank": effective[-1],
                "effective_rank_delta": effective[-1] - effective[0],
                "start_spectral_mass_top3": mass[0], "end_spectral_mass_top3": mass[-1],
                "spectral_mass_top3_delta": mass[-1] - mass[0],
                "selective_concentration_score": (first[-1] - first[0]) * max(0, mass[-1] - mass[0]),
                "singular_value_count": sigma.shape[1],
            }
        )  # fmt: skip
        for rank in range(min(ranks, sigma.shape[1])):
            for side, vectors in (("left", left), ("right", right)):
                out["direction_birth"].append(
                    base | birth(steps, vectors, rank, final, adjacent, patience) | {"vector_side": side}
                )
                for i, step in enumerate(steps):
                    row = base | {"step": step, "singular_value_rank": rank + 1, "vector_side": side}
                    row["singular_value"] = sigma[i, rank]
                    row["final_abs_cosine"] = cosine(vectors[i, rank], vectors[-1, rank])
                    row["adjacent_abs_cosine"] = row["adjacent_best_rank"] = None
                    if i:
                        against = [cosine(vectors[i, rank], v) for v in vectors[i - 1, :ranks]]
                        row["adjacent_abs_cosine"] = against[rank]
                        row["adjacent_best_rank"] = int(np.argmax(against)) + 1
                        row["adjacent_best_abs_cosine"] = max(against)
                        rotations[label, i, rank, side] = 1 - against[rank]
                    out["vector_alignment"].append(row)
        for i in range(1, len(steps)):
            delta = first[i] - first[i - 1]
            turned = (rotations[label, i, 0, "left"] + rotations[label, i, 0, "right"]) / 2
            deltas[i, label] = (delta, mass[i] - mass[i - 1], turned)
            out["interval_event"].append(
                base
                | {
                    "interval_start_step": steps[i - 1], "interval_end_step": steps[i],
                    "singular_value_rank1_delta": delta, "effective_rank_delta": effective[i] - effective[i - 1],
                    "spectral_mass_top3_delta": mass[i] - mass[i - 1],
                    "rank1_mean_adjacent_rotation": turned, "rank1_mean_adjacent_abs_cosine": 1 - turned,
                    "positive_concentration_delta": delta * max(0, mass[i] - mass[i - 1]),
                }
            )  # fmt: skip
    for i in range(1, len(steps)):
        events = {label: values for (at, label), values in deltas.items() if at == i}
        grown = sorted(events, key=lambda label: (-events[label][0], label))[:8]
        turned = sorted(events, key=lambda label: (-events[label][2], label))[:8]
        out["coordination_window"].append(
            {
                "interval_start_step": steps[i - 1], "interval_end_step": steps[i], "num_matrices": len(events),
                "num_positive_growth_matrices": sum(d > 0 for d, _, _ in events.values()),
                "num_positive_mass_matrices": sum(m > 0 for _, m, _ in events.values()),
                "total_positive_singular_value_rank1_delta": sum(max(0, d) for d, _, _ in events.values()),
                "total_abs_singular_value_rank1_delta": sum(abs(d) for d, _, _ in events.values()),
                "total_positive_spectral_mass_top3_delta": sum(max(0, m) for _, m, _ in events.values()),
                "mean_rank1_adjacent_rotation": sum(r for _, _, r in events.values()) / len(events),
                "top_growth_matrices": grown,
                "top_rotation_matrices": turned,
            }
        )  # fmt: skip
    return out


def birth(steps, vectors, rank, final, adjacent, patience):
    f = [cosine(v[rank], vectors[-1, rank]) for v in vectors[:-1]] + [1.0]
    a = [None] + [cosine(vectors[i, rank], vectors[i - 1, rank]) for i in range(1, len(steps))]
    aligned = next(steps[i] for i in range(len(steps)) if all(min(1.0, x) >= final for x in f[i:]))
    stable = [
        steps[i]
        for i in range(1, len(steps))
        if all(min(1.0, x) >= adjacent for x in a[i:]) and len(steps) - i >= patience
    ]
    least = min(range(1, len(steps)), key=lambda i: a[i])
    return {
        "singular_value_rank": rank + 1, "start_step": steps[0], "end_step": steps[-1],
        "start_final_abs_cosine": f[0], "total_rotation_to_final": 1 - f[0],
        "max_final_abs_cosine_before_end": max(f[:-1]), "min_adjacent_abs_cosine": a[least],
        "min_adjacent_interval_start": steps[least - 1], "min_adjacent_interval_end": steps[least],
        "first_final_alignment_step": aligned, "first_adjacent_stable_step": stable[0] if stable else None,
    }  # fmt: skip


ORDER = {
    "matrix_summary": lambda r: -r["singular_value_rank1_delta"],
    "direction_birth": lambda r: -r["total_rotation_to_final"],
    "interval_event": lambda r: (
        r["interval_start_step"],
        -r["singular_value_rank1_delta"],
        r["matrix_label"],
    ),
}


def check(row, wanted):
    tops = {key: [item["matrix_label"] for item in row[key]] for key in row if key.startswith("top_")}
    assert_same({**row, **tops}, wanted)


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_row_set_is_the_definition(svd, tmp_path, ranks):
    options = {"final_alignment_threshold": 0.8, "adjacent_stability_threshold": 0.7, "stability_patience": 2}
    printed = run_report(svd.lake, report(max_vector_rank=ranks, **options), tmp_path / "o", chart_formats=[])
    expected = by_definition(svd, ranks, 0.8, 0.7, 2)
    for name, key in SETS.items():
        rows = [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        wanted = sorted(expected[name], key=ORDER[name]) if name in ORDER else expected[name]
        assert len(rows) == len(wanted), name
        for row, values in zip(rows, wanted, strict=True):
            check(row, values)


def test_first_step_has_no_neighbour(svd, tmp_path):
    printed = run_report(svd.lake, report(), tmp_path / "o", chart_formats=[])
    rows = [json.loads(line) for line in Path(printed["vector_alignment_rows"]).read_text().splitlines()]
    at_start = [row for row in rows if row["step"] == 250]
    assert at_start
    for row in at_start:
        empty = ("previous_step", "adjacent_abs_cosine", "adjacent_rotation", "adjacent_best_rank")
        assert [row[key] for key in empty] == [None] * 4


def test_a_rank_swap_is_told_from_a_rotation(tmp_path):
    def swap(decomposed):
        for part in decomposed["W_QK"][1:]:
            part[:] = part[:1]  # nothing turns …
            part[2:, 0, 0, [0, 1]] = part[
                2:, 0, 0, [1, 0]
            ]  # … but from the third step on ranks 1 and 2 change places

    made = make_svd_lake(tmp_path / "l", [1, 2, 3, 4], change=swap)
    with Results(made.lake, report(max_vector_rank=2, matrix=["W_QK"])) as results:
        rows = results.rows(
            "SELECT step, adjacent_rotation, adjacent_best_rank, adjacent_best_abs_cosine FROM vector_alignment "
            "WHERE layer = 0 AND head = 0 AND singular_value_rank = 1 AND vector_side = 'left' ORDER BY step"
        )
        swaps = results.rows("SELECT rank_swaps FROM direction_birth WHERE layer = 0 AND head = 0")
    assert [row["adjacent_best_rank"] for row in rows] == [None, 1, 2, 1]
    assert rows[2]["adjacent_rotation"] == pytest.approx(1, abs=1e-6)
    assert rows[2]["adjacent_best_abs_cosine"] == pytest.approx(1)
    assert [row["rank_swaps"] for row in swaps] == [1] * 4
    made.lake.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.floats(0, 6.28), min_size=2, max_size=7),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(1, 6),
)
def test_alignment_and_stability_against_brute_force(tmp_path_factory, angles, final, adjacent, patience):
    steps = list(range(10, 10 * len(angles) + 1, 10))

    def turn(decomposed):
        for part in decomposed["W_in"][1:]:
            part[:, 0, 0] = 0
            part[:, 0, 0, :2] = np.stack([np.cos(angles), np.sin(angles)], 1)

    made = make_svd_lake(tmp_path_factory.mktemp("l") / "l", steps, d_model=4, d_ff=4, change=turn)
    options = {
        "final_alignment_threshold": final,
        "adjacent_stability_threshold": adjacent,
        "stability_patience": patience,
        "matrix": ["W_in"],
    }
    with Results(made.lake, report(**options)) as results:
        (row,) = results.rows("FROM direction_birth WHERE layer = 0 AND vector_side = 'left'")
    made.lake.close()
    vectors = made.svd["W_in"][1][:, 0]
    wanted = birth(steps, vectors, 0, final, adjacent, patience)
    f = [cosine(v[0], vectors[-1, 0]) for v in vectors]
    a = [cosine(vectors[i, 0], vectors[i - 1, 0]) for i in range(1, len(steps))]
    # Where a cosine lies on a threshold to the last digit, the order of a sum decides: nothing to compare there.
    if final == 0 or all(abs(min(1, x) - final) > 1e-9 for x in f[:-1]):
        assert row["first_final_alignment_step"] == wanted["first_final_alignment_step"]
    if all(abs(min(1, x) - adjacent) > 1e-9 for x in a) or adjacent == 0:
        assert row["first_adjacent_stable_step"] == wanted["first_adjacent_stable_step"]
    assert row["total_rotation_to_final"] == pytest.approx(1 - min(1, f[0]), abs=1e-12)
    assert row["end_final_abs_cosine"] == 1


def test_a_vector_with_nan_is_neither_aligned_nor_hidden(tmp_path):
    def spoil(decomposed):
        decomposed["W_QK"][1][1, 0, 0, 0, 3] = np.nan

    made = make_svd_lake(tmp_path / "l", [1, 2, 3], change=spoil)
    options = {"final_alignment_threshold": 0, "adjacent_stability_threshold": 0, "stability_patience": 1}
    printed = run_report(made.lake, report(matrix=["W_QK"], **options), tmp_path / "o", chart_formats=[])
    content = json.loads(Path(printed["report"]).read_text())
    assert content["nonfinite_values"]["vector_alignment"]["final_abs_cosine"] == 1
    with Results(made.lake, report(matrix=["W_QK"], **options)) as results:
        spoiled, clean = results.rows(
            "FROM direction_birth WHERE layer = 0 AND head = 0 ORDER BY vector_side = 'right'"
        )
    assert (spoiled["first_final_alignment_step"], spoiled["first_adjacent_stable_step"]) == (3, None)
    assert (clean["first_final_alignment_step"], clean["first_adjacent_stable_step"]) == (1, 2)
    made.lake.close()


def test_all_eight_matrices_on_request(svd, tmp_path):
    names = ["W_QK", "W_OV", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"]
    printed = run_report(svd.lake, report(matrix=names), tmp_path / "o", chart_formats=[])
    windows = [
        json.loads(line) for line in Path(printed["coordination_window_rows"]).read_text().splitlines()
    ]
    assert {row["num_matrices"] for row in windows} == {2 * 2 * 6 + 2 * 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"final_alignment_threshold": 1.5},
            "--final-alignment-threshold should be less than or equal to 1, not 1.5",
        ),
        (
            {"adjacent_stability_threshold": -0.1},
            "--adjacent-stability-threshold should be greater than or equal to 0",
        ),
        ({"stability_patience": 0}, "--stability-patience should be greater than 0, not 0"),
        ({"max_vector_rank": 0}, "--max-vector-rank should be greater than 0, not 0"),
        ({"final_alignment_threshold": "high"}, "--final-alignment-threshold should be a valid number"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InvalidOption) as error:
        report(**options)
    assert str(error.value).startswith(f"weight-svd-patterns: {message}")


def test_data_that_cannot_carry_the_report(tmp_path):
    def zero(decomposed):
        decomposed["W_OV"][2][1, 0, 1, 0] = 0

    made = make_svd_lake(tmp_path / "l", [5, 6], change=zero)
    cases = [
        ({"steps": "last"}, r"one step \(6\) has no growth and no rotation; select at least two"),
        ({}, "the right vector of L0H1 W_OV rank 1 at step 6 is zero and has no direction"),
    ]
    for options, message in cases:
        with pytest.raises(ReportFailed, match=message):
            run_report(made.lake, report(**options), tmp_path / "o")
    run_report(made.lake, report(matrix=["W_QK"]), tmp_path / "o", chart_formats=[])
    made.lake.close()


def test_no_rank_one_rows(tmp_path):
    made = make_svd_lake(tmp_path / "l", [5, 6], change=lambda decomposed: decomposed.pop("W_QK"))
    with pytest.raises(ReportFailed, match="run 'ref' has no rank-1 singular values of W_QK"):
        run_report(made.lake, report(matrix=["W_QK"]), tmp_path / "o")
    made.lake.close()

"""The closure fit against exact fractions by normal equations, and its identities over drawn designs (definitions 4 §0.13, §K)."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lakebed.queries.arrays.least_squares import (
    ClosureFit,
    Underdetermined,
    Unfittable,
    fit_closure,
)


def eliminate(matrix, right):
    """Solves a square system in fractions by Gauss-Jordan; None if it is singular."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for at in range(len(rows)):
        pivot = next((row for row in range(at, len(rows)) if rows[row][at]), None)
        if pivot is None:
            return None
        rows[at], rows[pivot] = rows[pivot], rows[at]
        rows[at] = [value / rows[at][at] for value in rows[at]]
        for other in range(len(rows)):
            if other != at:
                factor = rows[other][at]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[at], strict=True)]
    return [row[-1] for row in rows]


def normal_equations(columns, response):
    """Coefficients in fractions; None where the columns depend on each other."""
    gram = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in columns] for x in columns]
    right = [sum(a * b for a, b in zip(x, response, strict=True)) for x in columns]
    return eliminate(gram, right)


@st.composite
def designs(draw, largest=5):
    """(features by label, response, whether there is an intercept), of small integers, at least as many rows as columns."""
    labels = draw(st.lists(st.sampled_from("abcdxyz"), min_size=1, max_size=3, unique=True))
    intercept = draw(st.booleans())
    rows = draw(st.integers(len(labels) + intercept, 9))
    column = st.lists(st.integers(-largest, largest), min_size=rows, max_size=rows)
    return {label: draw(column) for label in labels}, draw(column), intercept


def test_the_worked_example():
    fit = fit_closure({"a": [1, 0, 2, 1], "b": [0, 1, 1, -1]}, [3, -2, 4, 5])
    assert dict(zip(fit.labels, fit.coefficients, strict=True)) == pytest.approx({"a": 3, "b": -2})
    assert fit.r_squared == pytest.approx(1)
    assert fit.matrix_rank == fit.num_parameters == 2
    assert not fit.rank_deficient
    assert np.abs(fit.residual).max() < 1e-12


@settings(max_examples=200, deadline=None)
@given(designs())
def test_a_full_rank_fit_is_the_normal_equations(drawn):
    features, response, intercept = drawn
    labels = sorted(features)
    columns = [
        *([[Fraction(1)] * len(response)] if intercept else []),
        *([Fraction(value) for value in features[label]] for label in labels),
    ]
    exact = normal_equations(columns, [Fraction(value) for value in response])
    assume(exact is not None)
    fit = fit_closure(features, response, fit_intercept=intercept)
    found = [*([fit.intercept] if intercept else []), *fit.coefficients]
    assert found == pytest.approx([float(value) for value in exact], rel=1e-8, abs=1e-8)
    predicted = [
        sum(c * column[row] for c, column in zip(exact, columns, strict=True)) for row in range(len(response))
    ]
    sse = sum((y - p) ** 2 for y, p in zip(response, predicted, strict=True))
    mean = Fraction(sum(response), len(response))
    sst = sum((y - mean) ** 2 for y in response)
    assert fit.sse == pytest.approx(float(sse), abs=1e-8)
    assert fit.sst == pytest.approx(float(sst), abs=1e-8)
    if sst:
        assert fit.r_squared == pytest.approx(float(1 - sse / sst), abs=1e-8)
    else:
        assert fit.r_squared is None
    assert not fit.rank_deficient
    assert fit.condition_number >= 1


@settings(max_examples=200, deadline=None)
@given(designs())
def test_identities_hold_whatever_the_rank(drawn):
    features, response, intercept = drawn
    fit = fit_closure(features, response, fit_intercept=intercept)
    of = {label: np.array(features[label], float) for label in fit.labels}
    assert fit.labels == tuple(sorted(features))
    for column in of.values():
        assert column @ fit.residual == pytest.approx(0, abs=1e-9)
    if intercept:
        assert fit.residual.sum() == pytest.approx(0, abs=1e-9)
        assert fit.sse <= fit.sst + 1e-9
    else:
        assert fit.intercept == 0
    by_hand = fit.intercept + sum(
        c * of[label] for label, c in zip(fit.labels, fit.coefficients, strict=True)
    )
    assert fit.predicted == pytest.approx(by_hand, abs=1e-9)
    assert fit.intercept + fit.contributions.sum() == pytest.approx(fit.predicted.mean(), abs=1e-9)
    assert fit.matrix_rank <= fit.num_parameters
    assert fit.rank_deficient == (fit.condition_number == np.inf)


@settings(max_examples=100, deadline=None)
@given(designs(), st.randoms(use_true_random=False))
def test_the_order_of_features_and_observations_does_not_matter(drawn, random):
    features, response, intercept = drawn
    order = list(range(len(response)))
    random.shuffle(order)
    names = list(features)
    random.shuffle(names)
    fit = fit_closure(features, response, fit_intercept=intercept)
    same = fit_closure({name: features[name] for name in names}, response, fit_intercept=intercept)
    assert (same.coefficients == fit.coefficients).all()
    shuffled = fit_closure(
        {name: [features[name][at] for at in order] for name in names},
        [response[at] for at in order],
        fit_intercept=intercept,
    )
    assert shuffled.coefficients == pytest.approx(fit.coefficients, rel=1e-7, abs=1e-9)
    assert shuffled.predicted == pytest.approx(fit.predicted[order], rel=1e-7, abs=1e-9)
    assert shuffled.matrix_rank == fit.matrix_rank


def test_of_equal_features_each_takes_half():
    """Minimum norm: any split of 2 fits as well, and halves are the smallest."""
    fit = fit_closure({"one": [1, 2, 3], "other": [1, 2, 3], "zero": [0, 0, 0]}, [2, 4, 6])
    assert fit.coefficients == pytest.approx([1, 1, 0])
    assert (fit.matrix_rank, fit.num_parameters, fit.rank_deficient) == (1, 3, True)
    assert fit.condition_number == np.inf


def test_the_condition_number_is_that_of_unit_columns():
    """Two unit columns of cosine c have singular values √(1 ± c); their lengths do not matter."""
    for length in (1, 1e-6):
        fit = fit_closure({"a": [1, 0], "b": [0.6 * length, 0.8 * length]}, [1, 2])
        assert fit.condition_number == pytest.approx(np.sqrt(1.6 / 0.4))


def test_r_squared_is_null_without_variation_and_negative_where_a_missing_intercept_hurts():
    assert fit_closure({"a": [1.0, 2.0]}, [5.0, 5.0]).r_squared is None
    assert fit_closure({"a": [1.0, 2.0]}, [5.0, 5.0 + 1e-7]).r_squared is None
    fit = fit_closure({"a": [1.0, -1.0, 1.0, -1.0]}, [10.0, 10.0, 11.0, 11.0])
    assert fit.r_squared < -100


def test_the_summary_is_the_contract():
    fit = fit_closure({"b": [1, 0, 1], "a": [0, 1, 1]}, [1, 2, 4], fit_intercept=True)
    found = fit.summary()
    assert list(found) == [
        "route_labels",
        "fit_intercept",
        "intercept",
        "coefficients",
        "num_observations",
        "num_parameters",
        "matrix_rank",
        "rank_deficient",
        "condition_number",
        "sse",
        "sst",
        "r_squared",
        "mean_actual_margin_delta",
        "mean_predicted_margin_delta",
        "mean_residual",
        "mean_abs_residual",
    ]
    assert found["route_labels"] == ["a", "b"]
    assert found["coefficients"] == pytest.approx({"a": 3, "b": 2})
    assert found["intercept"] == pytest.approx(-1)
    assert found["mean_actual_margin_delta"] == pytest.approx(7 / 3)
    assert (found["num_observations"], found["num_parameters"], found["fit_intercept"]) == (3, 3, True)
    assert isinstance(fit, ClosureFit)


@pytest.mark.parametrize(
    ("features", "response", "intercept", "error", "message"),
    [
        ({}, [1.0], False, Unfittable, "the closure has no features to fit with"),
        ({"a": []}, [], False, Unfittable, "the closure has no observations"),
        ({"a": [1.0, 2.0]}, [1.0], False, Unfittable, "has 2 values of 'a' for 1 observations"),
        ({"a": [1.0], "b": [2.0]}, [1.0], False, Underdetermined, "is underdetermined: 1 observations for 2 parameters; take"),
        ({"a": [1.0]}, [1.0], True, Underdetermined, "1 observations for 2 parameters, the intercept among them; take fewer"),
        ({"a": [1.0, float("nan")]}, [1.0, 2.0], False, Unfittable, "has 1 values of 'a' that are NaN, infinite or missing"),
        ({"a": [1.0, 2.0]}, [1.0, float("inf")], False, Unfittable, "has 1 values of the response that are NaN"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(features, response, intercept, error, message):
    with pytest.raises(error, match=message) as caught:
        fit_closure(features, response, fit_intercept=intercept, what="the closure")
    assert "\n" not in str(caught.value)

import math

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lakebed.lake.macros import create_macros


@pytest.fixture(scope="module")
def connection():
    with duckdb.connect() as made:
        for statement in create_macros():
            made.execute(statement)
        yield made


def aggregates(connection, points, kind="DOUBLE"):
    """(pearson, population_std of x) of a list of (x, y)."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE points (x {kind}, y {kind})")
    if points:
        connection.executemany("INSERT INTO points VALUES (?, ?)", points)
    return connection.execute("SELECT pearson(x, y), population_std(x) FROM points").fetchone()


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=6))
def test_pearson_and_population_std_are_those_of_numpy(connection, points):
    x, y = np.array(points).T
    correlation, deviation = aggregates(connection, points)
    assert deviation == pytest.approx(x.std(), abs=1e-9)
    if min(np.ptp(x), np.ptp(y)) > 1e-3:
        assert correlation == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1.0, 2.0)],
        [(1.0, 2.0), (1.0, 3.0)],
        [(0.1, 0.3), (0.2, 0.3)],
        [(1.0, 2.0), (None, 3.0), (3.0, None)],
    ],
)
def test_pearson_is_null_where_it_is_not_defined(connection, points):
    assert aggregates(connection, points)[0] is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_nan_and_no_error(connection, bad):
    correlation, deviation = aggregates(connection, [(1.0, 2.0), (bad, 3.0), (2.0, 5.0)])
    assert math.isnan(correlation)
    assert math.isnan(deviation)


def test_a_pair_with_a_missing_half_is_left_out(connection):
    points = [(1.0, 2.0), (None, 9.0), (2.0, 5.0), (4.0, None), (3.0, 1.0)]
    assert aggregates(connection, points)[0] == pytest.approx(np.corrcoef([1, 2, 3], [2, 5, 1])[0, 1])


def test_the_standard_deviation_of_one_value_is_zero_and_of_none_null(connection):
    assert aggregates(connection, [(4.0, 1.0)])[1] == 0
    assert aggregates(connection, [])[1] is None


def test_single_precision_is_summed_in_double(connection):
    points = [(16777216.0, 1.0), (16777217.0, 2.0), (16777219.0, 4.0)]
    assert aggregates(connection, points, kind="FLOAT")[1] == pytest.approx(
        np.array([16777216, 16777216, 16777220], dtype=np.float64).std(), rel=1e-9
    )


def r_squared(connection, points):
    connection.execute("CREATE OR REPLACE TEMP TABLE points (x FLOAT, y DOUBLE)")
    connection.executemany("INSERT INTO points VALUES (?, ?)", points)
    return connection.execute("SELECT r_squared(x, y) FROM points").fetchone()[0]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3)), min_size=2, max_size=6))
def test_r_squared_compares_without_a_fit(connection, points):
    actual, predicted = np.array(points).T
    spread = np.square(actual - actual.mean()).sum()
    if spread > 1e-3:
        wanted = 1 - np.square(actual - predicted).sum() / spread
        assert r_squared(connection, points) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_r_squared_of_what_does_not_vary_is_null_and_of_what_is_not_finite_nan(connection):
    assert r_squared(connection, [(2.0, 1.0), (2.0, 3.0)]) is None
    assert math.isnan(r_squared(connection, [(2.0, 1.0), (3.0, math.inf)]))
    assert r_squared(connection, [(2.0, 2.0), (3.0, 3.0), (None, None)]) == 1.0

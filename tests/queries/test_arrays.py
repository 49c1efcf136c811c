"""Each number against loops over vectors in float64, or exact fractions where ties count; identities over drawn arrays."""

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.queries import arrays
from lakebed.queries.report import ReportFailed


def exact_squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def exact_mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def exact_separation(rows, tokens):
    """Definitions 1 §J.1 in fractions: (within, between, accuracy, margin), brute force."""
    groups = {
        token: [row for row, t in zip(rows, tokens, strict=True) if t == token]
        for token in sorted(set(tokens))
    }
    means = {token: exact_mean(held) for token, held in groups.items()}
    middle, total = exact_mean(rows), len(rows)
    within = sum(exact_squared(row, means[t]) for row, t in zip(rows, tokens, strict=True)) / Fraction(total)
    between = sum(len(groups[t]) * exact_squared(means[t], middle) for t in groups) / Fraction(total)
    right, margins = 0, []
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        rest = [other for j, other in enumerate(rows) if j != i and tokens[j] == token]
        centroids = {**means, token: exact_mean(rest)}
        distances = {t: exact_squared(row, centroid) for t, centroid in centroids.items()}
        right += min(distances, key=lambda t: (distances[t], t)) == token
        margins.append(min(d for t, d in distances.items() if t != token) - distances[token])
    return within, between, Fraction(right, total), sum(margins) / Fraction(total)


@st.composite
def grouped_integers(draw):
    """Small integers, so that distances tie often; every group has two rows or more."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=2, max_size=4))
    width = draw(st.integers(1, 3))
    tokens = [7 * token + 3 for token, size in enumerate(sizes) for _ in range(size)]
    order = draw(st.permutations(range(len(tokens))))
    rows = draw(
        st.lists(
            st.lists(st.integers(-2, 2), min_size=width, max_size=width),
            min_size=len(tokens),
            max_size=len(tokens),
        )
    )
    return rows, [tokens[i] for i in order]


@settings(max_examples=200, deadline=None)
@given(grouped_integers())
def test_separation_is_brute_force_with_ties_to_the_smaller_id(drawn):
    rows, tokens = drawn
    found = arrays.separation(np.array(rows, float), arrays.group_by_token(tokens))
    within, between, accuracy, margin = exact_separation([[Fraction(x) for x in row] for row in rows], tokens)
    assert found.within == pytest.approx(float(within), abs=1e-12)
    assert found.between == pytest.approx(float(between), abs=1e-12)
    assert found.nearest_accuracy == pytest.approx(float(accuracy), abs=1e-12)
    assert found.nearest_margin == pytest.approx(float(margin), abs=1e-10)
    if within:
        assert found.ratio == pytest.approx(float(between / within), abs=1e-12)
    else:
        assert np.isnan(found.ratio)
    total = np.square(np.array(rows) - np.mean(rows, 0)).sum(1).mean()
    assert found.within + found.between == pytest.approx(total, abs=1e-12)


def drawn_vectors(seed=0, n=60, d=9, tokens=(3, 8, 11, 40)):
    rng = np.random.default_rng(seed)
    ids = rng.choice(tokens, n)
    return rng.normal(size=(n, d)) + 0.7 * np.eye(d)[np.searchsorted(tokens, ids)] + 0.5, ids


def test_separation_by_group():
    vectors, ids = drawn_vectors()
    groups = arrays.group_by_token(ids)
    found = arrays.separation(vectors, groups)
    assert groups.tokens.tolist() == [3, 8, 11, 40]
    norms = []
    for place, token in enumerate(groups.tokens):
        rows = [vector for vector, t in zip(vectors, ids, strict=True) if t == token]
        mean = sum(rows) / len(rows)
        assert groups.counts[place] == len(rows)
        assert found.group_within[place] == pytest.approx(
            sum((row - mean) @ (row - mean) for row in rows) / len(rows)
        )
        away = mean - vectors.mean(0)
        assert found.group_distance[place] == pytest.approx(away @ away)
        assert found.group_norm[place] == pytest.approx(np.sqrt(mean @ mean))
        norms += [np.sqrt(mean @ mean)] * len(rows)
    assert found.mean_centroid_norm == pytest.approx(np.mean(norms))


def test_identical_float32_vectors_have_no_ratio():
    ids = np.repeat([1, 2], 3)
    vectors = np.array([[0.1, 0.7], [0.3, -1.9]], np.float32).astype(float)[np.repeat([0, 1], 3)]
    assert np.isnan(arrays.separation(vectors, arrays.group_by_token(ids)).ratio)


def slow_subspace(vectors, ids, rank):
    """Mean direction and projectors by eigenvectors of scatter matrices summed row by row."""
    means = [
        np.mean([v for v, t in zip(vectors, ids, strict=True) if t == token], 0) for token in sorted(set(ids))
    ]
    projectors, values = [], []
    for rows in (means, list(vectors)):
        middle = sum(rows) / len(rows)
        scatter = sum(np.outer(row - middle, row - middle) for row in rows)
        squares, directions = np.linalg.eigh(scatter)
        top = directions[:, ::-1][:, :rank]
        projectors.append(top @ top.T)
        values.append(np.sqrt(squares[::-1][:rank]))
    middle = sum(vectors) / len(vectors)
    return middle / np.sqrt(middle @ middle), projectors, values


@pytest.mark.parametrize("n", [7, 60])
def test_identity_subspace(n):
    vectors, ids = drawn_vectors(n=n, d=12, tokens=(3, 8, 11, 40, 41))
    found = arrays.identity_subspace(vectors, arrays.group_by_token(ids), 2, "role")
    mean, projectors, values = slow_subspace(vectors, ids, 2)
    np.testing.assert_allclose(found.mean_direction, mean, rtol=1e-12)
    line = np.random.default_rng(1).normal(size=(3, 12))
    for part, projector, singular in zip(
        (found.identity, found.all_vectors), projectors, values, strict=True
    ):
        np.testing.assert_allclose(part.basis @ part.basis.T, projector, atol=1e-12)
        np.testing.assert_allclose(part.singular_values, singular, rtol=1e-10)
        wanted = [np.sqrt(u @ projector @ u) for u in line]
        np.testing.assert_allclose(arrays.overlap(line, part.basis), wanted, rtol=1e-12)
    assert found.identity.centered_rank == len(set(ids)) - 1
    assert found.all_vectors.centered_rank == min(n - 1, 12)


def test_rank_counts_what_float32_can_hold():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 10))
    rounded = flat.astype(np.float32).astype(float)
    assert np.linalg.matrix_rank(rounded - rounded.mean(0)) == 10
    assert arrays.principal_directions(rounded, 3, "vectors").centered_rank == 3
    with pytest.raises(
        ReportFailed, match=r"PCA rank 4 exceeds the numerical rank 3 of the centred vectors; take at most 3"
    ):
        arrays.principal_directions(rounded, 4, "vectors")


@pytest.mark.parametrize("shape", [(12, 20), (20, 20), (40, 20)])
@pytest.mark.parametrize("smallest", [0.5, 1e-2, 1e-4])
def test_principal_directions_are_those_of_the_svd(shape, smallest):
    """Where the last direction asked for is small beside the first, too."""
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.normal(size=(size, 6)))[0] for size in shape)
    vectors = (left * np.geomspace(1, smallest, 6)) @ right.T + rng.normal(size=shape[1])
    _, values, rows = np.linalg.svd(vectors - vectors.mean(0))
    found = arrays.principal_directions(vectors, 5, "vectors")
    np.testing.assert_allclose(found.singular_values, values[:5], rtol=1e-10)
    np.testing.assert_allclose(found.basis @ found.basis.T, rows[:5].T @ rows[:5], atol=1e-9)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(5), atol=1e-11)
    assert found.variance_share == pytest.approx(
        np.square(values[:5]).sum() / np.square(values).sum(), rel=1e-12
    )
    assert found.centered_rank == 6


def test_subspace_errors_name_the_limit():
    vectors, ids = drawn_vectors()
    groups = arrays.group_by_token(ids)
    with pytest.raises(
        ReportFailed, match="PCA rank 4 needs at least 5 token means of role x, there are 4; take at most 3"
    ):
        arrays.identity_subspace(vectors, groups, 4, "role x")
    with pytest.raises(ReportFailed, match="at least 1, not 0"):
        arrays.principal_directions(vectors, 0, "rows")
    with pytest.raises(ReportFailed, match=r"numerical rank 0 .* nothing to decompose"):
        arrays.principal_directions(np.ones((5, 3)), 1, "rows")
    with pytest.raises(ReportFailed, match="zero vector"):
        arrays.mean_direction(np.array([[1.0, 2], [-1, -2]]), "rows")


def test_qk_bases():
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(10, 3)))[0].T for _ in range(2))
    bases = arrays.qk_bases(left, right)
    np.testing.assert_array_equal(bases["qk_left"], left.T)
    np.testing.assert_array_equal(bases["qk_right"], right.T)
    both = bases["qk_both"]
    assert both.shape == (10, 6)
    np.testing.assert_allclose(both.T @ both, np.eye(6), atol=1e-12)
    stacked = np.concatenate([left, right]).T
    np.testing.assert_allclose(both @ both.T, stacked @ np.linalg.pinv(stacked), atol=1e-12)
    shared = arrays.qk_bases(left, np.concatenate([left[:2], right[:1]]))["qk_both"]
    assert shared.shape == (10, 4)
    rounded = left.astype(np.float32).astype(float)
    assert arrays.qk_bases(left, rounded)["qk_both"].shape == (10, 3)


def test_match_directions_sees_through_swaps_and_signs():
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(10, 4)))[0].T for _ in range(2))
    order, signs = [1, 0, 3, 2], np.array([1, -1, -1, 1])[:, None]
    index, alike = arrays.match_directions((left, right), (left[order] * signs, right[order]))
    assert index.tolist() == order
    np.testing.assert_allclose(alike, 1, rtol=1e-12)
    index, alike = arrays.match_directions((left[:1], right[:1]), (left, right))
    assert index.tolist() == [0, -1, -1, -1]
    assert np.isnan(alike[1:]).all()
    # A direction shared on one side only is not the same one.
    index, alike = arrays.match_directions((left[:2], right[:2]), (left[:2], right[[1, 0]]))
    np.testing.assert_allclose(alike, 0, atol=1e-12)


@pytest.mark.parametrize("width", [2, 9])
def test_permuted_separation_is_separation_of_permuted_labels(width):
    vectors, ids = drawn_vectors()
    groups = arrays.group_by_token(ids)
    shuffled = arrays.permuted_labels(groups.labels, 25, 4)
    ratios, accuracies = arrays.permuted_separation(vectors[:, :width], groups, shuffled)
    assert len({tuple(row) for row in shuffled}) == 25
    for row, ratio, accuracy in zip(shuffled, ratios, accuracies, strict=True):
        assert sorted(row) == sorted(groups.labels)
        alone = arrays.separation(vectors[:, :width], arrays.group_by_token(groups.tokens[row]))
        assert ratio == pytest.approx(alone.ratio, rel=1e-9)
        assert accuracy == alone.nearest_accuracy


def test_permuted_overlaps_are_overlaps_of_permuted_labels(monkeypatch):
    vectors, ids = drawn_vectors(d=12, tokens=(3, 8, 11, 40, 41))
    groups = arrays.group_by_token(ids)
    shuffled = arrays.permuted_labels(groups.labels, 20, 0)
    lines = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 3)))[0].T
    monkeypatch.setattr("lakebed.queries.arrays.permutations._CHUNK", 3000)
    found = arrays.permuted_overlaps(vectors, groups, shuffled, lines, 3)
    assert found.shape == (20, 3)
    for row, overlaps in zip(shuffled, found, strict=True):
        basis = arrays.identity_subspace(vectors, arrays.group_by_token(row), 3, "x").identity.basis
        np.testing.assert_allclose(overlaps, arrays.overlap(lines, basis), rtol=1e-9)


def test_chance_is_exact_on_average():
    """With labels drawn by lot, E[between] = total·(g − 1)/(n − 1): the level the report names."""
    vectors, ids = drawn_vectors(n=40)
    groups = arrays.group_by_token(ids)
    ratios, _ = arrays.permuted_separation(vectors, groups, arrays.permuted_labels(groups.labels, 4000, 1))
    share = ratios / (1 + ratios)
    assert share.mean() == pytest.approx(3 / 39, abs=4 * share.std() / 4000**0.5)


def test_permutations_are_seeded():
    labels = np.arange(30) % 3
    assert (arrays.permuted_labels(labels, 5, 1) == arrays.permuted_labels(labels, 5, 1)).all()
    assert (arrays.permuted_labels(labels, 5, 1) != arrays.permuted_labels(labels, 5, 2)).any()


def test_against_chance():
    sampled = np.array([0.1, 0.5, 0.5 + 1e-16, 0.9])
    found = arrays.against_chance(0.5, sampled)
    assert found.p_value == (1 + 3) / (1 + 4)
    assert found.mean == pytest.approx(0.5)
    assert found.std == pytest.approx(np.sqrt(0.08))
    assert found.percentile_95 == pytest.approx(0.5 + 0.85 * 0.4)
    assert arrays.chance_columns("x", 0.5, sampled)["x_permuted_p_value"] == 0.8
    assert set(arrays.chance_columns("x", 0.5, None).values()) == {None}


def slow_cosines(vectors, ids):
    """Leave-one-out classification, a vector at a time: (scored, prediction, own cosine, best other)."""
    for i, (vector, token) in enumerate(zip(vectors, ids, strict=True)):
        if list(ids).count(token) == 1:
            yield False, -1, None, None
            continue
        cosines = {}
        for other in sorted(set(ids)):
            rows = [v for j, (v, t) in enumerate(zip(vectors, ids, strict=True)) if t == other and j != i]
            mean = sum(rows) / len(rows)
            cosines[other] = vector @ mean / np.sqrt(vector @ vector) / np.sqrt(mean @ mean)
        wrong = max(value for other, value in cosines.items() if other != token)
        yield True, max(cosines, key=lambda t: (cosines[t], -t)), cosines[token], wrong


@pytest.mark.parametrize("longer", [1, 30])
def test_leave_one_out_cosines(longer):
    vectors, ids = drawn_vectors(n=30)
    ids[4] = 99
    vectors[[0, 1, 7]] *= longer  # a vector that is almost all of its group's sum
    found = arrays.leave_one_out_cosines(vectors, arrays.group_by_token(ids), "role")
    for i, (scored, prediction, own, wrong) in enumerate(slow_cosines(vectors, ids)):
        assert found.scored[i] == scored
        assert found.prediction[i] == prediction
        assert found.correct[i] == (scored and prediction == ids[i])
        if scored:
            assert found.true_cosine[i] == pytest.approx(own, rel=1e-12)
            assert found.best_wrong_cosine[i] == pytest.approx(wrong, rel=1e-12)
            assert found.margin[i] == pytest.approx(own - wrong, abs=1e-12)
        else:
            assert np.isnan([found.true_cosine[i], found.best_wrong_cosine[i], found.margin[i]]).all()
    assert not found.scored[4]


def test_cosine_to_centroids_made_elsewhere():
    centroids = np.array([[1.0, 0], [0, 2], [3, 0]])
    found = arrays.cosine_to_centroids(
        np.array([[1.0, 1e-3], [0, 5], [1, 0], [1, 1]]),
        np.array([9, 4, 2, 100]),
        np.array([2, 4, 9]),
        centroids,
        "codes",
    )
    # Tokens 2 and 9 have the same direction: the smaller wins, and the margin is 0.
    assert found.prediction.tolist() == [2, 4, 2, -1]
    assert found.correct.tolist() == [False, True, True, False]
    assert found.scored.tolist() == [True, True, True, False]
    np.testing.assert_allclose(found.margin[:3], [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        ([[1.0, 0], [0, 1]], [1, 1], "need at least two tokens, there are 1"),
        ([[1.0, 0], [0, 0], [0, 1]], [1, 1, 2], "a vector of x is the zero vector"),
        ([[1.0, 0], [-1, 0], [0, 1]], [1, 1, 2], "a token mean of x is the zero vector"),
        (
            [[3.0, 0], [1, 1], [-1, -1], [0, 1]],
            [1, 1, 1, 2],
            "mean of x, one vector left out, is the zero vector",
        ),
    ],
)
def test_cosine_errors(vectors, ids, message):
    with pytest.raises(ReportFailed, match=message):
        arrays.leave_one_out_cosines(np.array(vectors), arrays.group_by_token(ids), "x")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from([pa.list_, pa.large_list]))
def test_matrix_reads_list_columns(rows, width, kind):
    values = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    whole = pa.array(values.tolist(), kind(pa.float32()))
    for column in (whole, pa.chunked_array([whole[: rows // 2], whole[rows // 2 :]])):
        found = arrays.matrix(column)
        assert found.dtype == np.float64
        assert found.tolist() == values.tolist()
    if rows > 1:
        assert arrays.matrix(whole[1:]).tolist() == values[1:].tolist()


def test_matrix_refuses_ragged_and_null_rows():
    with pytest.raises(ValueError, match="between 1 and 2 numbers"):
        arrays.matrix(pa.array([[1.0], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="1 of 2 rows of a vector column are null"):
        arrays.matrix(pa.array([[1.0], None]))


def test_stack_by_keeps_order():
    found = arrays.stack_by(["b", "a", "b"], np.array([1, 2, 3]), np.array([[1], [2], [3]]))
    assert list(found) == ["b", "a"]
    assert found["b"][0].tolist() == [1, 3]
    assert found["b"][1].tolist() == [[1], [3]]

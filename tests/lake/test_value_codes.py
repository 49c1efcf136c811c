import hashlib

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lakebed.lake.macros import create_macros
from lakebed.lake.names import spec_id
from lakebed.lake.value_codes import eval_kinds, value_code_rescue_parameters

ENDS = {
    "source_stage": "a", "target_stage": "b", "source_position_role": "c", "target_position_role": "d",
    "group_by": "answer_value", "basis_rank": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def connection():
    with duckdb.connect() as made:
        for statement in create_macros():
            made.execute(statement)
        yield made


def number(connection, sample_id, query_index):
    return connection.execute("SELECT split_number(?, ?)", [sample_id, query_index]).fetchone()[0]


def test_split_numbers_are_those_of_the_definitions(connection):
    found = [number(connection, *of) for of in (("s1", 0), ("s1", 1), ("s2", 0))]
    assert found == pytest.approx([0.0971603268, 0.9152328687, 0.8199388834], abs=5e-11)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.integers(0, 2**31 - 1))
def test_a_split_number_is_the_hash_of_the_event(connection, sample_id, query_index):
    digest = hashlib.sha256(f"{sample_id}:{query_index}".encode()).digest()
    wanted = int.from_bytes(digest[:8], "big") / (2**64 - 1)
    assert number(connection, sample_id, query_index) == pytest.approx(wanted, abs=1e-15)


def spec(**changed):
    return spec_id(value_code_rescue_parameters(**{**ENDS, **changed}))


def test_parameters_that_mean_the_same_are_the_same_spec():
    assert spec(split=("x", "y")) == spec(split=("y", "x", "x"))
    both = ("random_subspace", "key_identity")
    assert spec(controls=both) == spec(controls=both[::-1])
    assert spec(ridge_lambda=1) == spec(ridge_lambda=1.0)
    # Nothing is drawn without the random control.
    assert spec(random_seed=3) == spec()
    assert spec(random_seed=3, controls=both) != spec(controls=both)


@pytest.mark.parametrize(
    "changed",
    [
        {"basis_rank": 5}, {"controls": ("key_identity",)}, {"fit_fraction": 0.5}, {"ridge_lambda": 1},
        {"context": ("a", "d", 4)}, {"probe": "p"}, {"split": ("x",)}, {"max_records": 3}, {"group_by": "support_key"},
    ],
)  # fmt: skip
def test_whatever_changes_the_reruns_changes_the_spec(changed):
    assert spec(**changed) != spec()


def test_kinds_without_and_with_context():
    controls = ("key_identity", "random_subspace")
    alone = ["oracle_actual_projected", "true_transfer", *controls]
    assert eval_kinds(controls, False) == alone
    assert eval_kinds(controls, True) == [
        *alone,
        "context_only",
        "source_plus_context",
        "source_plus_context_random_subspace",
        "source_plus_context_random_subspace_not_refit",
    ]

"""How interventions are read, and that a report's dictionary and the extractor's are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lakebed.engine.interventions import InterventionError, read_interventions
from lakebed.extractors.interventions import build
from lakebed.lake import interventions as plain
from lakebed.lake.errors import UnknownName

_COMPONENTS = st.sampled_from(["L0H1", "L3MLP", "L12N345"])
_EDITS = st.one_of(
    st.builds(plain.zero, _COMPONENTS),
    st.builds(plain.restore, _COMPONENTS),
    st.builds(plain.attend, st.just("L1H0"), st.just("support_value")),
    st.builds(plain.shuffle_values, st.just("L1H0"), st.just("support_value")),
    st.builds(
        plain.edit_stage,
        st.just("embedding"),
        st.just("remove"),
        subspace=st.just("embedding_key_identity"),
        rank=st.integers(1, 5),
        position_role=st.sampled_from([None, "prediction"]),
    ),
    st.builds(
        plain.edit_stage,
        st.just("layer_0_post_mlp"),
        st.just("patch"),
        position_role=st.sampled_from([None, "prediction"]),
    ),
    st.builds(
        plain.edit_stage,
        st.just("layer_0_post_mlp"),
        st.just("keep"),
        subspace=st.just("random"),
        rank=st.integers(1, 5),
        seed=st.sampled_from([None, 3]),
    ),
)


@given(st.lists(st.lists(_EDITS, min_size=1, max_size=3), max_size=4), st.booleans(), st.randoms())
def test_what_a_report_asks_for_is_what_the_extractor_says_it_made(edits, components, random):
    named = [plain.intervention(f"i{number}", of) for number, of in enumerate(edits)]
    random.shuffle(named)
    asked = plain.intervention_parameters(
        named, pair_type=("recency", "distractor"), components=components, max_pairs_per_type=7
    )
    assert build(**asked).parameters() == asked
    everything = plain.intervention_parameters(plain.ZERO_EACH, probe="other")
    assert build(**everything).parameters() == everything


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "x"}, "it takes name and edits .* one of them is missing"),
        ({"name": "x", "edits": []}, "'x' edits nothing"),
        ({"name": "clean", "edits": [{"zero": "L0H0"}]}, "that is the name of the untouched run"),
        ({"name": "x", "edit": [], "edits": []}, "unknown key 'edit'"),
        (
            {"name": "x", "edits": [{"zap": "L0H0"}]},
            "exactly one of zero, restore, stage, attend, shuffle_values",
        ),
        ({"name": "x", "edits": [{"zero": "L0H0", "restore": "L0H0"}]}, "exactly one of"),
        ({"name": "x", "edits": [{"zero": "L0H0", "row": 1}]}, "edit zero: unknown key 'row'; it takes zero"),
        ({"name": "x", "edits": [{"stage": "embedding"}]}, "edit stage: operation field required"),
        (
            {"name": "x", "edits": [{"stage": "e", "operation": "drop"}]},
            "operation Input should be 'remove', 'keep' or",
        ),
        ({"name": "x", "edits": [{"stage": "e", "operation": "keep"}]}, "keep needs a subspace"),
        (
            {"name": "x", "edits": [{"stage": "e", "operation": "keep", "subspace": "zz", "rank": 1}]},
            "no subspace 'zz'",
        ),
        (
            {"name": "x", "edits": [{"stage": "e", "operation": "keep", "subspace": "random"}]},
            "subspace random needs a rank of at least 1",
        ),
        (
            {
                "name": "x",
                "edits": [
                    {"stage": "e", "operation": "keep", "subspace": "random", "rank": 1, "source": "clean"}
                ],
            },
            "keep has no source",
        ),
        ({"name": "x", "edits": [{"attend": "L0H0"}]}, "edit attend: role field required"),
        ("x", "an intervention has a name and edits"),
    ],
)
def test_an_intervention_that_cannot_be_read_says_why(value, message):
    with pytest.raises(InterventionError, match=f"(?i){message}"):
        read_interventions([value])


def test_labels_and_names_are_checked():
    from lakebed.engine.interventions.spec import component_of

    assert component_of("L0H1").kind == "head"
    for label in ("embedding", "L0", "H1", "L0H", "L0MLP1"):
        with pytest.raises(InterventionError, match="write a head as L0H1, an MLP as L0MLP"):
            component_of(label)
    twice = [plain.intervention("x", [plain.zero("L0H0")])] * 2
    with pytest.raises(InterventionError, match="two interventions are named 'x'"):
        read_interventions(twice)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"record_side": "z"}, UnknownName, "no record_side 'z'; there are clean, corrupted"),
        ({"query_mode": "z"}, UnknownName, "no query_mode 'z'; there are single_query, batch_union"),
        ({"interventions": "z"}, UnknownName, "no interventions 'z': name zero_each, or a list"),
        (
            {
                "interventions": [
                    plain.intervention("x", [plain.edit_stage("embedding", "patch", source="counterpart")])
                ]
            },
            InterventionError,
            "from the clean into the corrupted record of a causal patch pair",
        ),
    ],
)
def test_the_datasets_own_parameters_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)

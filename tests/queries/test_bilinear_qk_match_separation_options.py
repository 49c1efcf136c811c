"""Options of bilinear-qk-match-separation, scores counted by hand, what is refused, and the published numbers."""

import numpy as np
import pytest
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.report import InvalidOption, ReportFailed

from tests import formation_lake
from tests.trained_probe_lake import HEAD, RUN, STEPS

from . import bilinear_lake
from .bilinear_lake import STAGES, hand_lake
from .float64_decoder import load_events


def report(**options):
    return bilinear_lake.report(**{"context_stage": STAGES[:1], **options})


def written(lake, out, **options):
    return bilinear_lake.written(lake, out, **{"context_stage": STAGES[:1], **options})


@pytest.fixture(scope="module")
def lake(probe_lake_path):
    """The trained run as it is."""
    with Lake.open(probe_lake_path) as opened:
        yield opened


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group_by", ["position_token", "query_key", "support_key", "support_value", "answer_value"]
)
def test_events_are_grouped_by_the_token_asked_for(lake, tmp_path, group_by):
    options = {"score_mode": (), "rank": (2,), "steps": "last"}
    _, rows, _ = written(lake, tmp_path / "out", group_by=group_by, **options)
    events = load_events(lake, RUN, "probe")
    for row, event in zip(rows["event_rows"], events, strict=True):
        role = {"position_token": "prediction", "answer_value": "support_value"}.get(group_by, group_by)
        at = event.roles[role][0]
        assert (row["group_by"], row["group_token_id"], row["group_token"]) == (
            group_by, event.tokens[at], event.texts[at],
        )  # fmt: skip
    assert sum(row["num_events"] for row in rows["group_rows"]) == len(events)


def test_projections_are_modes_as_given_then_ranks_ascending():
    asked = report(score_mode=("weight_full", "full_with_bias", "weight_full"), rank=(8, 2, 8))
    assert list(asked.projections()) == ["weight_full", "full_with_bias", "rank_2", "rank_8"]
    assert report(context_stage=("embedding", "embedding")).context_stage == ("embedding",)


def test_a_split_is_all_that_is_counted(lake, tmp_path):
    _, rows, content = written(lake, tmp_path / "out", split=("heldout_pairs",))
    assert {row["split"] for row in rows["event_rows"]} == {"heldout_pairs"}
    assert rows["metric_rows"][0]["num_events"] * len(STEPS) * 5 == len(rows["event_rows"])
    keys = [
        row["num_support_positions"] / (row["num_support_positions"] + row["num_distractor_positions"])
        for row in rows["event_rows"][: rows["metric_rows"][0]["num_events"]]
    ]
    assert content["chance_win_rate"] == pytest.approx(np.mean(keys))


def test_the_queries_to_go_on_with_find_something(lake):
    for _, sql in report().next_queries:
        assert lake.sql(sql.replace("$run", f"'{RUN}'")).fetchall()


def test_needs_are_coordinates_of_each_stage():
    asked = [(need.dataset, dict(need.parameters)) for need in report(context_stage=STAGES).needs()]
    form = {"probe": "probe", "head": HEAD, "layernorm_mode": "head_ln1"}
    assert asked == [
        *(("qk_coordinates", {**form, "stage": stage}) for stage in STAGES),
        ("svd", {}),
        ("readouts", {"probe": "probe"}),
    ]


# -- a lake small enough to count by hand ----------------------------------------------------------------------------


def by_hand(tmp_path, **options):
    lake_options = {
        key: options.pop(key) for key in ("sigma", "distractors", "query", "support") if key in options
    }
    asked = {
        "head": "L0H0",
        "context_stage": ("embedding",),
        "support_role": "good",
        "distractor_role": "bad",
    }
    asked |= {"score_mode": (), "rank": (1, 2), "score_query_role": "asked"}
    with hand_lake(tmp_path / "hand.lake", **lake_options) as lake:
        return written(lake, tmp_path / "out", **{**asked, **options})


def test_scores_counted_by_hand(tmp_path):
    _, rows, _ = by_hand(tmp_path, score_mode=("full_with_bias",))
    # Σ σ q k: 2·1·p for rank 1, and 1·2·1 more for rank 2; position 5 comes after the query.
    root = np.sqrt(2)
    wanted = {"full_with_bias": (6 + 10 + 200, 4 + 10 + 100), "rank_1": (4, 2), "rank_2": (6, 4)}
    for row in rows["event_rows"]:
        support, distractor = wanted[row["projection"]]
        assert row["support_score_mean"] == pytest.approx(support / root)
        assert row["distractor_score_max"] == pytest.approx(distractor / root)
        assert row["distractor_positions"] == [1]
        assert (row["answer_token"], row["answer_margin"], row["group_token"]) == ("yes", 0.5, "t3")


def test_a_tie_is_no_win(tmp_path):
    _, rows, _ = by_hand(tmp_path, distractors=(2,), support=(2,))
    assert [row["support_beats_all_distractors"] for row in rows["event_rows"]] == [False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": (3,)}, "--rank 3 is above the head's width: W_QK of L0H0 has 2 singular directions"),
        ({"sigma": (0.0, 0.0)}, "W_QK of L0H0 is zero at step 4"),
        (
            {"query": (2, 3)},
            "the query must be exactly one position, and role 'asked' is not in 1 of 1 events",
        ),
        (
            {"query": (4,)},
            "Intervention positions must be in the causal prefix, and role 'asked' lies after the prediction in 1 of 1",
        ),
        ({"distractors": (4, 5)}, "distractor role 'bad' has no position up to the query in 1 of 1 events"),
        (
            {"support": (5,)},
            "support role 'good' has no position up to the query in 1 of 1 events (such as one query 0)",
        ),
        ({"distractors": (0, 1)}, "2 of 6 scores have no coordinates"),
        ({"query": (2,), "support": (2,), "group_by": "support_key"}, "no role 'support_key'"),
    ],
)
def test_what_cannot_be_scored_is_refused(tmp_path, options, message):
    with pytest.raises((ReportFailed, UnknownName)) as error:
        by_hand(tmp_path, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_mode": (), "rank": ()}, "no score to form: give --rank, or --score-mode full_with_bias"),
        ({"rank": (0,)}, "--rank should be greater than 0, not 0"),
        ({"score_mode": ("full",)}, "--score-mode should be 'full_with_bias' or 'weight_full', not 'full'"),
        ({"layernorm_mode": "ln"}, "--layernorm-mode should be 'head_ln1' or 'none', not 'ln'"),
        ({"group_by": "length"}, "--group-by should be 'position_token'"),
        (
            {"support_role": "value_distractors"},
            "--support-role and --distractor-role are both value_distractors",
        ),
        ({"context_stage": ()}, "--context-stage"),
        ({"window_start": 3}, "--window-start and --window-end come together"),
        ({"window_start": 3, "window_end": 2}, "--window-start 3 lies after --window-end 2"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InvalidOption) as error:
        report(**options)
    assert str(error.value).startswith(f"bilinear-qk-match-separation: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "L5H0"}, UnknownName, "no head L5H0; run 'r' has layers 0–1, heads 0–3"),
        (
            {"context_stage": ("layer_7",)},
            UnknownName,
            "no stage 'layer_7'; run 'r' has embedding, layer_0_post_attn",
        ),
        (
            {"support_role": "friend"},
            UnknownName,
            "no role 'friend'; the events of probe 'probe' have all_query_relation",
        ),
        ({"split": ("train",)}, UnknownName, "probe 'probe' has no split 'train'; it has validation_iid"),
        ({"probe": "other"}, MissingData, "Probe-set not found: run 'r' has no probe 'other'"),
        ({"head": "L0H2"}, MissingData, "bilinear-qk-match-separation needs qk_coordinates for run 'r'"),
        ({"score_query_role": "all_query_relation"}, ReportFailed, "the query must be exactly one position"),
        ({"support_role": "causal_prefix"}, ReportFailed, "not every position of causal_prefix"),
    ],
)
def test_what_the_run_does_not_have(lake, tmp_path, options, error, message):
    with pytest.raises(error) as raised:
        written(lake, tmp_path / "out", **options)
    assert message in str(raised.value)


def test_what_is_missing_is_named_with_the_command_that_makes_it(lake, tmp_path):
    with pytest.raises(MissingData) as error:
        written(lake, tmp_path / "out", head="L0H2", context_stage=("embedding",), rank=(2,), score_mode=())
    assert (
        "(probe probe, head L0H2, stage embedding, layernorm_mode head_ln1). Run: lakebed extract --for "
        "bilinear-qk-match-separation"
    ) in str(error.value)
    assert "--head-layer 0 --head 2" in str(error.value)


# -- the published numbers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(formation_lake_path, tmp_path_factory):
    """Metric rows of the formation run before its first step."""
    with Lake.open(formation_lake_path) as lake:
        _, rows, _ = written(
            lake,
            tmp_path_factory.mktemp("published") / "out",
            head=formation_lake.HEAD,
            context_stage=(formation_lake.STAGE,),
            score_mode=("full_with_bias", "weight_full"),
            rank=(8,),
            split=("validation_iid",),
        )
    return rows["metric_rows"]


@pytest.mark.parametrize(
    ("place", "projection", "separation", "margin", "rate"),
    [
        (0, "full_with_bias", 0.015545, -0.430508, 0.117647),
        (1, "weight_full", 0.025893, -0.420299, 0.143791),
        (2, "rank_8", 0.021410, -0.242839, 0.169935),
    ],
)
def test_published_numbers_before_training(published, place, projection, separation, margin, rate):
    """Source: definitions, part 1, K."""
    row = published[place]
    assert (row["projection"], row["num_events"], row["answer_accuracy"]) == (projection, 153, 0)
    assert row["qk_match_separation_mean"] == pytest.approx(separation, abs=1e-6)
    assert row["qk_match_max_margin_mean"] == pytest.approx(margin, abs=1e-6)
    assert row["support_beats_all_rate"] == pytest.approx(rate, abs=1e-6)
    assert row["answer_margin_mean"] == pytest.approx(-31.0178, abs=1e-4)

"""Dataset write_conditions: its real rows are those of other datasets, its partners the pairs before, and what is refused."""

import shutil

import polars as pl
import pytest
import torch
from lakebed.engine.capture import CaptureError
from lakebed.engine.pre_norm import PreNormModel
from lakebed.engine.scalars import ScalarError
from lakebed.extractors.plan import extract
from lakebed.extractors.write_conditions import NothingToShuffle
from lakebed.lake import Lake
from lakebed.lake.datasets import ATTENTION, HEAD_WRITES, READOUTS, Need
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.names import spec_id
from lakebed.lake.write_conditions import CONDITIONS, WRITE_CONDITIONS, write_condition_parameters

from tests.queries.chain_reference import SIDES, chosen_pairs
from tests.queries.write_reference import partners
from tests.trained_probe_lake import RUN, STEPS

TYPES, MOST = ("distractor", "support_value"), 4
ROLES = {
    "score_query_role": "prediction",
    "support_key_role": "support_value",
    "distractor_key_role": "value_distractors",
}


def need(side="clean", roles=(), **changed):
    asked = {"pair_type": TYPES, "max_pairs_per_type": MOST, **changed}
    return Need(WRITE_CONDITIONS, write_condition_parameters({**ROLES, **dict(roles)}, side, **asked))


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("conditions") / "c.lake"
    shutil.copytree(probe_lake_path, path)
    torch.set_num_threads(1)
    with Lake.open(path) as opened:
        extract(opened, RUN, [need(side) for side in SIDES], ",".join(map(str, STEPS)))
        others = [Need(ATTENTION, {"probe": "probe.corrupted", "query_role": "prediction"})]
        for probe in SIDES.values():
            others += [
                Need(HEAD_WRITES, {"probe": probe, "query_role": "prediction"}),
                Need(READOUTS, {"probe": probe}),
            ]
        extract(opened, RUN, others, ",".join(map(str, STEPS)))
        yield opened


# The event of a pair on a side.
EVENTS = """WITH sides AS (
  SELECT run, pair_id, 'clean' AS record_side, probe, clean_event AS event FROM pairs WHERE probe = 'probe'
  UNION ALL SELECT run, pair_id, 'corrupted', probe || '.corrupted', corrupted_event FROM pairs WHERE probe = 'probe'
)"""


def test_every_head_of_every_pair_is_there_under_every_condition(lake):
    count = len(STEPS) * 2 * 8
    assert lake.sql("SELECT count(*) FROM write_answers").fetchall() == [(count,)]
    assert lake.sql("SELECT count(*) FROM write_attention").fetchall() == [(count * 8,)]
    assert lake.sql(
        "SELECT condition, count(*) FROM write_conditions GROUP BY ALL ORDER BY ALL"
    ).fetchall() == [(condition, count * 8) for condition in sorted(CONDITIONS)]
    assert {spec for (spec,) in lake.sql("SELECT DISTINCT spec FROM write_conditions").fetchall()} == {
        spec_id(need(side).parameters) for side in SIDES
    }


def test_the_real_conditions_are_the_head_writes_of_the_probe(lake):
    rows = lake.sql(
        f"{EVENTS} SELECT count(*) AS n, max(abs(c.head_value_margin_dla - w.value_margin)) AS margin, "
        "max(abs(c.head_answer_logit_dla - w.answer_logit)) AS logit, max(abs(c.head_margin_dla - w.margin_dla)) AS dla, "
        "count(*) FILTER (c.head_best_wrong_token <> w.best_wrong_token) AS switched "
        "FROM write_conditions c JOIN sides USING (run, pair_id, record_side) JOIN head_writes w ON w.run = c.run AND "
        "w.probe = sides.probe AND w.event = sides.event AND w.step = c.step AND w.layer = c.layer AND w.head = c.head AND "
        "w.role = CASE c.condition WHEN 'real_attention_real_values' THEN 'write' ELSE 'support_value' END "
        "WHERE c.condition IN ('real_attention_real_values', 'correct_support_attention_real_values')"
    ).pl().to_dicts()[0]  # fmt: skip
    assert rows["n"] == len(STEPS) * 2 * 8 * 8 * 2
    assert rows["switched"] == 0
    assert max(rows[name] for name in ("margin", "logit", "dla")) < 5e-6


def test_scores_and_attention_are_those_of_the_probe(lake):
    rows = lake.sql(
        f"{EVENTS} SELECT count(*) AS n, "
        "max(abs(c.support_score - a.scores[s.positions[1] + 1])) AS score, "
        "max(abs(c.support_mass - a.probabilities[s.positions[1] + 1])) AS mass, "
        "max(abs(c.support_mass - c.support_attention)) AS mean, "
        "max(abs(c.distractor_mass - list_sum(list_select(a.probabilities, list_transform(list_filter(d.positions, "
        "lambda p: p <= a.query_position), lambda p: p + 1))))) AS others "
        "FROM write_attention c JOIN sides USING (run, pair_id, record_side) JOIN attention_patterns a ON a.run = c.run AND "
        "a.probe = sides.probe AND a.event = sides.event AND a.step = c.step AND a.layer = c.layer AND a.head = c.head "
        "JOIN event_roles s ON s.run = c.run AND s.probe = a.probe AND s.event = a.event AND s.role = 'support_value' "
        "JOIN event_roles d ON d.run = c.run AND d.probe = a.probe AND d.event = a.event AND d.role = 'value_distractors'"
    ).pl().to_dicts()[0]  # fmt: skip
    assert rows["n"] == len(STEPS) * 2 * 8 * 8
    assert max(rows[name] for name in ("score", "mass", "mean", "others")) < 5e-6


def test_answers_are_the_readouts_of_the_probe(lake):
    rows = lake.sql(
        f"{EVENTS} SELECT c.*, e.competitors, e.answer_token AS asked, r.answer_logit AS logit, r.best_wrong_token AS wrong, "
        "r.best_wrong_logit AS wrong_logit, r.answer_log_prob AS log_prob, r.best_token AS best, r.correct AS right "
        "FROM write_answers c JOIN sides USING (run, pair_id, record_side) JOIN events e ON e.run = c.run AND e.probe = "
        "sides.probe AND e.event = sides.event JOIN readouts r ON r.run = c.run AND r.probe = e.probe AND r.event = e.event "
        "AND r.step = c.step AND r.stage = 'logits'"
    ).pl().to_dicts()  # fmt: skip
    assert len(rows) == len(STEPS) * 2 * 8
    for row in rows:
        assert (row["answer_token"], row["best_wrong_token"], row["best_token"], row["correct"]) == (
            row["asked"], row["wrong"], row["best"], row["right"],
        )  # fmt: skip
        assert row["answer_logit"] == pytest.approx(row["logit"], abs=1e-5)
        assert row["answer_log_prob"] == pytest.approx(row["log_prob"], abs=1e-5)
        assert len(row["competitor_logits"]) == len(row["competitors"])
        best = max(row["competitor_logits"])
        assert best == pytest.approx(row["wrong_logit"], abs=1e-5)
        assert row["competitors"][row["competitor_logits"].index(best)] == row["wrong"]


def test_values_are_shuffled_from_the_pair_before_of_the_type(lake):
    pairs = chosen_pairs(lake, TYPES, MOST)
    wanted = {pair_id: pair[4] for pair_id, pair in partners(pairs).items()}
    for side in SIDES:
        rows = lake.sql(
            "SELECT DISTINCT pair_id, shuffled_pair_id FROM write_answers WHERE record_side = ?", [side]
        ).fetchall()
        assert dict(rows) == wanted
    # What a pair would write from its partner's values is what the partner writes from its own, but for the reader.
    logits = lake.sql(
        "SELECT a.pair_id, c.head_answer_logit_dla AS taken, own.head_answer_logit_dla AS theirs FROM write_answers a "
        "JOIN write_answers o ON o.spec = a.spec AND o.step = a.step AND o.pair_id = a.shuffled_pair_id "
        "JOIN write_conditions c ON c.spec = a.spec AND c.step = a.step AND c.pair_id = a.pair_id "
        "JOIN write_conditions own ON own.spec = a.spec AND own.step = a.step AND own.pair_id = o.pair_id AND own.layer = "
        "c.layer AND own.head = c.head WHERE a.answer_token = o.answer_token AND c.condition = ? AND own.condition = ?",
        [CONDITIONS[3], CONDITIONS[1]],
    ).pl()  # fmt: skip
    assert len(logits)
    assert (logits["taken"] - logits["theirs"]).abs().max() < 1e-5


def test_other_types_change_nothing_about_a_type(probe_lake_path, lake, tmp_path):
    path = tmp_path / "one.lake"
    shutil.copytree(probe_lake_path, path)
    query = "SELECT * EXCLUDE (spec) FROM write_conditions WHERE pair_type = 'distractor' AND step = 150 AND record_side = 'clean' ORDER BY ALL"
    with Lake.open(path) as opened:
        extract(opened, RUN, [need(pair_type=("distractor",))], "150")
        alone = opened.sql(query).pl()
    together = lake.sql(query).pl()
    keys = ["pair_id", "layer", "head", "condition"]
    joined = alone.join(together, on=keys)
    assert len(joined) == len(alone) == len(together)
    for name in ("ov_map_value_margin", "head_value_margin_dla", "head_answer_logit_dla", "head_margin_dla"):
        assert (joined[name] - joined[f"{name}_right"]).abs().max() < 1e-6


def test_a_second_extraction_makes_nothing(lake):
    again = extract(lake, RUN, [need(side) for side in SIDES], ",".join(map(str, STEPS)))
    assert again.made == {WRITE_CONDITIONS: []}
    assert again.standing == {WRITE_CONDITIONS: 2 * len(STEPS)}


def test_the_schema_says_what_is_written(lake):
    for name in ("write_answers", "write_attention", "write_conditions"):
        frame = lake.sql(f"FROM {name} LIMIT 1").pl()
        assert frame.null_count().sum_horizontal()[0] == 0
        assert isinstance(frame, pl.DataFrame)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (need(max_pairs_per_type=1), NothingToShuffle, "of type distractor there is one: raise --max-pairs-per-type"),
        (need(side="both"), UnknownName, "no record side 'both'; there are clean, corrupted"),
        (
            need(roles={"distractor_key_role": "support_value"}),
            ScalarError,
            "support and distractor role are both 'support_value'",
        ),
        (need(roles={"support_key_role": "friend"}), ScalarError, "no role 'friend'; these pairs have"),
        (need(roles={"score_query_role": "support_write"}), ScalarError, "a query is exactly one"),
        (need(roles={"score_query_role": "support_key"}), ScalarError, "'support_value' has no position up to the query"),
        (need(pair_type=()), UnknownName, "name a type, of query_key"),
        (need(split=("train",)), MissingData, "has no causal patch pairs of type distractor, support_value in split train"),
        (need(side="corrupted", max_pairs_per_type=64), MissingData, "keeps no corrupted record for"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line(lake, asked, error, message):
    with pytest.raises(error) as caught:
        extract(lake, RUN, [asked], "150")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_whose_margin_is_not_its_own_is_refused(lake, monkeypatch):
    monkeypatch.setattr(
        PreNormModel,
        "final_norm_parameters",
        lambda self: (self._weights.final_norm[0] * 1.01, self._weights.final_norm[1]),
    )
    with pytest.raises(
        CaptureError, match="step 150 of run 'r': the value margin read off the last residual stage"
    ):
        extract(lake, RUN, [need(max_pairs_per_type=3)], "150")

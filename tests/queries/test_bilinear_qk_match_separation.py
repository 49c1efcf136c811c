"""Every number of bilinear-qk-match-separation against a float64 forward pass with a dense, truncated W_QK."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake

from tests.trained_probe_lake import RUN, STEPS

from .bilinear_lake import STAGES, report, written
from .conftest import assert_same
from .float64_decoder import Decoder, best_wrong, load_events, load_weights

PROJECTIONS = ("weight_full", "full_with_bias", "rank_1", "rank_4", "rank_8")
LAYER, NUMBER, WIDTH = 1, 1, 8
CLOSE = {"rel": 2e-5, "near": 2e-5}  # float32 forward passes


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    """The trained run with the coordinates of both stages, raw and through the head's LayerNorm."""
    path = tmp_path_factory.mktemp("scored") / "scored.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as opened:
        for mode in ("head_ln1", "none"):
            extract(opened, RUN, report(layernorm_mode=mode).needs(), ",".join(map(str, STEPS)))
        yield opened


@pytest.fixture(scope="module")
def passes(lake):
    """(decoder, events, forward passes by record) of each step, in float64."""
    events = load_events(lake, RUN, "probe")
    tokens = {event.example: event.tokens for event in events}
    decoders = {step: Decoder(load_weights(lake, RUN, step), 4) for step in STEPS}
    return {
        step: (decoder, events, {example: decoder.forward(of) for example, of in tokens.items()})
        for step, decoder in decoders.items()
    }


class ScoreForms:
    """Every score form of the head at one checkpoint, with the dense d×d matrix truncated."""

    def __init__(self, decoder):
        self.q, self.k = decoder.slice(LAYER, NUMBER, "q"), decoder.slice(LAYER, NUMBER, "k")
        matrix = self.q[0].T @ self.k[0]
        u, sigma, vt = np.linalg.svd(matrix)
        self.matrices = {f"rank_{r}": (u[:, :r] * sigma[:r]) @ vt[:r] for r in (1, 4, 8)}
        self.matrices["weight_full"] = matrix

    def __call__(self, y_query, y_keys):
        """Scores of some keys by form."""
        scores = {name: y_keys @ (y_query @ matrix) for name, matrix in self.matrices.items()}
        (w_q, b_q), (w_k, b_k) = self.q, self.k
        scores["full_with_bias"] = (y_keys @ w_k.T + b_k) @ (w_q @ y_query + b_q)
        return {name: score / np.sqrt(WIDTH) for name, score in scores.items()}


def expected_events(passes, mode="head_ln1", steps=STEPS):
    """(step, stage, projection, event) -> row, as the definition says."""
    for step in steps:
        decoder, events, forwards = passes[step]
        score = ScoreForms(decoder)
        for stage in STAGES:
            scored = {}
            for event in events:
                forward = forwards[event.example]
                y = forward.stages[stage]
                if mode == "head_ln1":
                    y = decoder.norm(f"blocks.{LAYER}.ln_1", y)
                at = event.prediction
                supports = [p for p in event.roles["support_value"] if p <= at]
                distractors = [p for p in event.roles["value_distractors"] if p <= at]
                scored[event.event] = (
                    supports,
                    distractors,
                    score(y[at], y[supports]),
                    score(y[at], y[distractors]),
                )
            for projection in PROJECTIONS:
                for event in events:
                    supports, distractors, of_supports, of_distractors = scored[event.event]
                    s, d = of_supports[projection], of_distractors[projection]
                    logits = forwards[event.example].logits[event.prediction]
                    wrong = best_wrong(logits, event.answer, event.competitors)
                    yield {
                        "checkpoint_name": f"step_{step:06d}",
                        "checkpoint_step": step,
                        "batch_index": event.example,
                        "sample_id": event.sample_id,
                        "split": event.split,
                        "query_index": event.query_index,
                        "head_layer": LAYER,
                        "head": NUMBER,
                        "context_stage": stage,
                        "layernorm_mode": mode,
                        "score_query_role": "prediction",
                        "support_role": "support_value",
                        "distractor_role": "value_distractors",
                        "projection": projection,
                        "query_position": event.prediction,
                        "support_positions": supports,
                        "distractor_positions": distractors,
                        "num_support_positions": len(supports),
                        "num_distractor_positions": len(distractors),
                        "support_score_mean": np.mean(s),
                        "support_score_max": max(s),
                        "distractor_score_mean": np.mean(d),
                        "distractor_score_max": max(d),
                        "qk_match_separation": np.mean(s) - np.mean(d),
                        "qk_match_max_margin": np.mean(s) - max(d),
                        "support_beats_all_distractors": bool(max(s) > max(d)),
                        "group_by": "query_key",
                        "group_token_id": event.tokens[event.prediction],
                        "group_token": event.texts[event.prediction],
                        "answer_token_id": event.answer,
                        "answer_token": event.texts[event.roles["support_value"][0]],
                        "answer_margin": logits[event.answer] - logits[wrong],
                        "answer_correct": bool(logits.argmax() == event.answer),
                    }


@pytest.fixture(scope="module")
def expected(passes):
    return list(expected_events(passes))


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("report") / "out", window_start=50, window_end=140)


def test_event_rows_are_the_definition(lake, found, expected):
    rows = found[1]["event_rows"]
    assert len(rows) == len(expected) == len(STEPS) * 2 * 5 * 196
    for row, wanted in zip(rows, expected, strict=True):
        assert_same(row, wanted, **CLOSE)
        assert row["checkpoint"] == f"{lake.uri}#{RUN}/{row['checkpoint_step']}"
        assert row.keys() == {*wanted, "checkpoint"}


def test_some_distractors_come_after_the_query_and_are_no_keys(passes):
    _, events, _ = passes[0]
    assert any(p > event.prediction for event in events for p in event.roles["value_distractors"])


def test_raw_residual_streams_without_the_layernorm(lake, passes, tmp_path):
    _, rows, _ = written(lake, tmp_path / "out", layernorm_mode="none", steps="150")
    for row, wanted in zip(
        rows["event_rows"], expected_events(passes, mode="none", steps=[150]), strict=True
    ):
        assert_same(row, wanted, **CLOSE)


def means(rows):
    separations, margins = (
        np.array([row[name] for row in rows]) for name in ("qk_match_separation", "qk_match_max_margin")
    )
    return {
        "num_events": len(rows),
        "qk_match_separation_mean": float(separations.mean()),
        "qk_match_separation_std": float(separations.std()),
        "qk_match_max_margin_mean": float(margins.mean()),
        "support_beats_all_rate": float(np.mean([row["support_beats_all_distractors"] for row in rows])),
    }


def test_metric_rows_are_means_over_events_with_the_spectrum(passes, found, expected):
    rows = iter(found[1]["metric_rows"])
    for step in STEPS:
        (w_q, _), (w_k, _) = (passes[step][0].slice(LAYER, NUMBER, p) for p in "qk")
        sigma = np.linalg.svd(w_q.T @ w_k, compute_uv=False)
        for stage in STAGES:
            for projection in PROJECTIONS:
                of = [
                    row
                    for row in expected
                    if (row["checkpoint_step"], row["context_stage"], row["projection"])
                    == (step, stage, projection)
                ]
                row = next(rows)
                wanted = {
                    **means(of),
                    "qk_match_max_margin_std": float(np.std([row["qk_match_max_margin"] for row in of])),
                    "support_score_mean": float(np.mean([row["support_score_mean"] for row in of])),
                    "distractor_score_mean": float(np.mean([row["distractor_score_mean"] for row in of])),
                    "answer_margin_mean": float(np.mean([row["answer_margin"] for row in of])),
                    "answer_accuracy": float(np.mean([row["answer_correct"] for row in of])),
                    "qk_singular_value_top": float(sigma[0]),
                    "qk_singular_value_sum": float(sigma.sum()),
                    "qk_singular_value_top3_fraction": float(sigma[:3].sum() / sigma.sum()),
                    **{
                        name: of[0][name]
                        for name in (
                            "checkpoint_step", "checkpoint_name", "context_stage", "projection", "head_layer", "head",
                            "score_query_role", "support_role", "distractor_role", "layernorm_mode", "group_by",
                        )
                    },
                }  # fmt: skip
                assert_same(row, wanted, **CLOSE)
                assert row.keys() == {*wanted, "checkpoint"}
    assert next(rows, None) is None


def test_group_rows_are_means_over_the_events_of_a_token(found, expected):
    groups = {}
    for row in expected:
        at = (
            row["checkpoint_step"],
            STAGES.index(row["context_stage"]),
            PROJECTIONS.index(row["projection"]),
        )
        groups.setdefault((*at, row["group_token_id"]), []).append(row)
    rows = found[1]["group_rows"]
    assert len(rows) == len(groups) == len(STEPS) * 2 * 5 * 4
    for row, (at, of) in zip(rows, sorted(groups.items()), strict=True):
        wanted = {
            **means(of),
            **{
                name: of[0][name]
                for name in (
                    "checkpoint_step",
                    "checkpoint_name",
                    "context_stage",
                    "projection",
                    "group_by",
                    "group_token",
                )
            },
            "group_token_id": at[-1],
        }
        assert_same(row, wanted, **CLOSE)
        assert row.keys() == {*wanted, "checkpoint"}


@pytest.mark.parametrize(("window", "steps"), [("", STEPS), ("window_", STEPS[1:3])])
def test_summary_is_first_to_last_and_correlates_over_checkpoints(found, window, steps):
    metrics = found[1]["metric_rows"]
    assert len(found[2]["summary"]) == 10
    assert (found[2]["window_start"], found[2]["window_end"]) == (50, 140)
    for summary in found[2]["summary"]:
        rows = [
            row
            for row in metrics
            if row["checkpoint_step"] in steps
            and (row["context_stage"], row["projection"]) == (summary["context_stage"], summary["projection"])
        ]
        separation, sigma, margin = (
            [row[name] for row in rows]
            for name in ("qk_match_separation_mean", "qk_singular_value_top", "answer_margin_mean")
        )
        wanted = {
            "num_checkpoints": len(steps),
            "start_step": steps[0],
            "end_step": steps[-1],
            "qk_match_separation_vs_qk_singular_value_top": float(np.corrcoef(separation, sigma)[0, 1]),
            "qk_match_separation_vs_answer_margin": float(np.corrcoef(separation, margin)[0, 1]),
        }
        for name, column in (
            ("qk_match_separation", "qk_match_separation_mean"),
            ("qk_match_max_margin", "qk_match_max_margin_mean"),
            ("support_beats_all_rate", "support_beats_all_rate"),
        ):
            first, last = rows[0][column], rows[-1][column]
            wanted |= {f"start_{name}": first, f"end_{name}": last, f"delta_{name}": last - first}
        assert_same(summary, {f"{window}{name}": value for name, value in wanted.items()}, near=1e-9)
        if window:
            assert (summary["window_start"], summary["window_end"]) == (50, 100)


def test_a_window_of_one_checkpoint_has_no_fields_and_is_said(lake, tmp_path):
    _, _, content = written(lake, tmp_path / "out", window_start=40, window_end=60)
    assert not any(name.startswith("window") for row in content["summary"] for name in row)
    assert (content["window_start"], content["window_end"]) == (40, 60)
    assert "Fewer than two checkpoints lie in the window 40 to 60." in content["warnings"]


def test_a_single_checkpoint_has_no_correlation(lake, tmp_path):
    printed, _, content = written(lake, tmp_path / "out", steps="100")
    assert {row["qk_match_separation_vs_answer_margin"] for row in content["summary"]} == {None}
    assert "at step 100**" in Path(printed["markdown"]).read_text()


# -- identities ------------------------------------------------------------------------------------------------------


def test_all_ranks_of_the_head_are_its_whole_form(found):
    rows = {
        (
            row["checkpoint_step"],
            row["context_stage"],
            row["projection"],
            row["sample_id"],
            row["query_index"],
        ): row
        for row in found[1]["event_rows"]
    }
    whole = [at for at in rows if at[2] == f"rank_{WIDTH}"]
    assert whole
    for at in whole:
        same = rows[(*at[:2], "weight_full", *at[3:])]
        assert rows[at]["support_score_mean"] == same["support_score_mean"]
        assert rows[at]["distractor_score_max"] == same["distractor_score_max"]


def test_separations_are_differences_of_the_means_beside_them(found):
    for row in found[1]["event_rows"]:
        assert row["qk_match_separation"] == row["support_score_mean"] - row["distractor_score_mean"]
        assert row["qk_match_max_margin"] == row["support_score_mean"] - row["distractor_score_max"]
        assert row["qk_match_max_margin"] <= row["qk_match_separation"]


def test_full_with_bias_at_the_stage_the_head_reads_is_its_attention_score(lake, found):
    stored = {
        (step, event): scores
        for step, event, scores in lake.sql(
            "SELECT step, event, scores FROM attention_patterns WHERE probe = 'probe' AND layer = 1 AND head = 1"
        ).fetchall()
    }
    events = {
        (sample, query): event
        for event, sample, query in lake.sql(
            "SELECT event, sample_id, query_index FROM events WHERE probe = 'probe'"
        ).fetchall()
    }
    compared = 0
    for row in found[1]["event_rows"]:
        if (row["projection"], row["context_stage"]) != ("full_with_bias", STAGES[0]):
            continue
        scores = stored[row["checkpoint_step"], events[row["sample_id"], row["query_index"]]]
        of_distractors = [scores[p] for p in row["distractor_positions"]]
        assert row["support_score_mean"] == pytest.approx(scores[row["support_positions"][0]], abs=1e-5)
        assert row["distractor_score_mean"] == pytest.approx(np.mean(of_distractors), abs=1e-5)
        assert row["distractor_score_max"] == pytest.approx(max(of_distractors), abs=1e-5)
        compared += 1
    assert compared == len(STEPS) * 196


# -- what is written -----------------------------------------------------------------------------------------------


def test_printed_keys_and_csv_are_the_contracts(found):
    printed = found[0]
    assert [key for key in printed if not key.endswith("parquet")] == [
        "report", "markdown", "event_rows", "metric_rows", "metric_csv", "group_rows", "plots",
    ]  # fmt: skip
    assert Path(printed["metric_csv"]).read_text().splitlines()[0].strip() == (
        "checkpoint_step,checkpoint,checkpoint_name,context_stage,projection,head_layer,head,score_query_role,support_role,"
        "distractor_role,layernorm_mode,group_by,num_events,qk_match_separation_mean,qk_match_separation_std,"
        "qk_match_max_margin_mean,qk_match_max_margin_std,support_score_mean,distractor_score_mean,support_beats_all_rate,"
        "answer_margin_mean,answer_accuracy,qk_singular_value_top,qk_singular_value_sum,qk_singular_value_top3_fraction"
    )


def test_findings_say_when_the_support_began_to_win(found):
    rows = [
        row
        for row in found[1]["metric_rows"]
        if (row["context_stage"], row["projection"]) == (STAGES[0], "weight_full")
    ]
    rates = [row["support_beats_all_rate"] for row in rows]
    text = Path(found[0]["markdown"]).read_text()
    assert f"in {100 * rates[-1]:.3g} % of 196 events at step 150**" in text
    gains = [after - before for before, after in pairwise(rates)]
    at = int(np.argmax(gains))
    assert f"rose fastest between steps {STEPS[at]} and {STEPS[at + 1]} (+{100 * gains[at]:.3g} %)" in text
    assert (
        "L1H1 reads layer_0_post_mlp, not embedding: these scores are not the ones the model forms." in text
    )

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.lake import Lake
from lakebed.lake.errors import UnknownName
from lakebed.queries.arrays.transfer import random_basis, ridge_map
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from . import value_code_reference as reference
from .conftest import assert_same
from .value_code_lake import make_value_code_lake

CONTROLS = ["shuffled_answer_value", "wrong_support_value", "key_identity", "random_subspace"]
KINDS = ["true_transfer", *CONTROLS]
RANKS = [2, 3]
OPTIONS = {
    "source_stage": "layer_0_post_mlp",
    "target_stage": "layer_1_post_mlp",
    "source_position_role": "support_value",
    "target_position_role": "prediction",
    "group_by": "answer_value",
    "basis_rank": RANKS,
    "control": CONTROLS,
}
ENDS = {name: OPTIONS[name] for name in list(OPTIONS)[:4]}
KEYS = ("transfer_rows", "summary_rows", "subspace_rows", "pair_rows")


def report(**options):
    return load_report("value-code-transfer-map-report").parse({**OPTIONS, **options})


def written(lake, out, charts=(), **options):
    printed = run_report(lake, report(**options), out, chart_formats=list(charts))
    rows = {key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in KEYS}
    return printed, rows


@pytest.fixture(scope="module")
def trained(probe_lake_path, tmp_path_factory):
    """The report over a trained run: (facts, printed, rows)."""
    with Lake.open(probe_lake_path) as lake:
        out = tmp_path_factory.mktemp("transfer") / "out"
        splits = _with_distractors(lake)
        printed, rows = written(lake, out, run="r", steps="50,150", split=splits)
        yield reference.facts(lake, "r", splits), printed, rows


def _with_distractors(lake):
    """Splits in which every query comes after a write that is not its support."""
    of = reference.facts(lake, "r")
    without = {event["split"] for event in of.events if not _earlier_distractors(event)}
    kept = sorted({event["split"] for event in of.events} - without)
    assert kept
    return kept


def _earlier_distractors(event):
    return [
        place for place, _ in event["roles"]["value_distractors"] if place <= event["prediction_position"]
    ]


@pytest.fixture
def made(tmp_path):
    invented = make_value_code_lake(tmp_path / "made.lake", records=80)
    yield invented
    invented.lake.close()


def fit_number(sample_id, query_index):
    digest = hashlib.sha256(f"{sample_id}:{query_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / (2**64 - 1)


def fitted(source, target, ridge):
    """The affine ridge as ordinary least squares on rows that pull the weights, not the offset, towards zero."""
    source_mean, target_mean = np.mean(source, axis=0), np.mean(target, axis=0)
    pull = math.sqrt(ridge) * np.eye(source.shape[1])
    design = np.vstack([source - source_mean, pull])
    wanted = np.vstack([target - target_mean, np.zeros((len(pull), target.shape[1]))])
    weights = np.linalg.lstsq(design, wanted, rcond=None)[0]
    return lambda a: target_mean + (a - source_mean) @ weights


def aligned(basis, like):
    """`basis` with the signs of the other, which an eigenvector does not have."""
    return basis * np.sign(np.sum(basis * like, axis=0))


def expected(of, step, rank, fraction=0.75, ridge=1e-4, seed=0):
    """{kind: [row, …]} of the eval examples, by one loop per example."""
    source, target = (
        reference.stored_state(of, step, OPTIONS[f"{end}_stage"]) for end in ("source", "target")
    )

    def all_of(state, role):
        return np.array([state(event, [place for place, _ in event["roles"][role]]) for event in of.events])

    x, t = all_of(source, "support_value"), all_of(target, "prediction")
    keys = all_of(source, "support_key")
    wrong = np.array([source(event, _earlier_distractors(event)) for event in of.events])
    answers = [event["answer_token"] for event in of.events]
    key_tokens = [event["roles"]["support_key"][0][1] for event in of.events]
    fit = [i for i, e in enumerate(of.events) if fit_number(e["sample_id"], e["query_index"]) < fraction]
    judged = [i for i in range(len(of.events)) if i not in set(fit)]

    def basis(vectors, tokens):
        return reference.identity_basis([vectors[i] for i in fit], [tokens[i] for i in fit], rank)[0]

    b_source, b_target, b_key = basis(x, answers), basis(t, answers), basis(keys, key_tokens)
    drawn = np.random.default_rng(seed + 1009 * step + 9176 * rank).standard_normal((x.shape[1], rank))
    b_random = np.linalg.qr(drawn)[0]
    z = t @ b_target
    true_map = fitted((x @ b_source)[fit], z[fit], ridge)
    maps = {
        "true_transfer": (x @ b_source, true_map),
        "shuffled_answer_value": (None, true_map),
        "wrong_support_value": (wrong @ b_source, true_map),
        "key_identity": (keys @ b_key, fitted((keys @ b_key)[fit], z[fit], ridge)),
        "random_subspace": (x @ b_random, fitted((x @ b_random)[fit], z[fit], ridge)),
    }
    centroids = reference.token_means([z[i] for i in fit], [answers[i] for i in fit])
    middle = np.mean([z[i] for i in judged], axis=0)
    rows = {kind: [] for kind in maps}
    for kind, (coordinates, mapping) in maps.items():
        for at, i in enumerate(judged):
            event, following = of.events[i], judged[(at + 1) % len(judged)]
            a = (x @ b_source)[following] if coordinates is None else coordinates[i]
            predicted = mapping(a)
            lens = reference.lens(of, step, OPTIONS["target_stage"], event, b_target @ predicted)
            lens.pop("best_wrong_value_logit")
            found = reference.classified(predicted, answers[i], centroids)
            rows[kind].append(
                {
                    "checkpoint": f"{of.lake.uri}#{of.run}/{step}",
                    "checkpoint_name": f"step_{step:06d}",
                    "checkpoint_step": step,
                    "basis_rank": rank,
                    "eval_kind": kind,
                    "fit_split": "eval",
                    "sample_id": event["sample_id"],
                    "split": event["split"],
                    "query_index": event["query_index"],
                    **ENDS,
                    "group_by": "answer_value",
                    **{
                        f"{end}_token{suffix}": answers[i] if suffix else of.text[answers[i]]
                        for end in ("source_group", "target_group", "answer_value")
                        for suffix in ("", "_id")
                    },
                    "source_coord_norm": float(np.linalg.norm(a)),
                    "target_coord_norm": float(np.linalg.norm(z[i])),
                    "predicted_coord_norm": float(np.linalg.norm(predicted)),
                    "coord_squared_error": float(sum((predicted - z[i]) ** 2)),
                    "coord_target_centered_squared_norm": float(sum((z[i] - middle) ** 2)),
                    "coord_cosine": reference.cosine(predicted, z[i]),
                    "projected_vector_cosine": reference.cosine(b_target @ predicted, b_target @ z[i]),
                    **{f"predicted_stage_lens_{name}": value for name, value in lens.items()},
                    **found,
                    "centroid_prediction_token": of.text[found["centroid_prediction_token_id"]]
                    if found["centroid_scored"]
                    else None,
                    "source_has_same_answer": answers[following] == answers[i]
                    if kind == "shuffled_answer_value"
                    else None,
                }
            )
    return rows


def test_the_split_is_that_of_the_definitions():
    values = [fit_number("s1", 0), fit_number("s1", 1), fit_number("s2", 0)]
    assert values == pytest.approx([0.0971603268, 0.9152328687, 0.8199388834], abs=5e-11)


def test_every_example_is_on_the_side_that_its_hash_says(made, tmp_path):
    _, rows = written(made.lake, tmp_path / "out", fit_fraction=0.6)
    assert len(rows["pair_rows"]) == 3 * len(made.events)
    for row in rows["pair_rows"]:
        fits = fit_number(row["sample_id"], row["query_index"]) < 0.6
        assert row["fit_split"] == ("fit" if fits else "eval")
    judged = {(r["sample_id"], r["query_index"]) for r in rows["pair_rows"] if r["fit_split"] == "eval"}
    assert {(r["sample_id"], r["query_index"]) for r in rows["transfer_rows"]} == judged


def test_every_column_is_the_definition_on_a_trained_run(trained):
    of, _, rows = trained
    found = iter(rows["transfer_rows"])
    summaries = iter(rows["summary_rows"])
    for step in (50, 150):
        for rank in RANKS:
            wanted = expected(of, step, rank)
            for kind in KINDS:
                for want in wanted[kind]:
                    row = next(found)
                    assert_same(row, want, rel=1e-7, near=1e-9)
                    assert row.keys() == want.keys()
                summary = _summary(wanted[kind])
                row = next(summaries)
                assert_same(row, summary, rel=1e-7, near=1e-9)
                assert row.keys() == summary.keys()
    assert next(found, None) is None
    assert next(summaries, None) is None


def _summary(rows):
    def average(name):
        held = [float(row[name]) for row in rows if row[name] is not None]
        return sum(held) / len(held) if held else None

    errors, spread = (
        sum(row[name] for row in rows)
        for name in ("coord_squared_error", "coord_target_centered_squared_norm")
    )
    return {
        **{name: rows[0][name] for name in ("checkpoint_step", "basis_rank", "eval_kind", *ENDS)},
        "num_rows": len(rows),
        "coord_r_squared": 1 - errors / spread,
        "mean_coord_cosine": average("coord_cosine"),
        "mean_projected_vector_cosine": average("projected_vector_cosine"),
        "predicted_stage_lens_value_accuracy": average("predicted_stage_lens_value_accuracy"),
        "mean_predicted_stage_lens_value_margin": average("predicted_stage_lens_value_margin"),
        "centroid_scored_rows": sum(row["centroid_scored"] for row in rows),
        "centroid_accuracy": average("centroid_prediction_correct"),
        "mean_centroid_cosine_margin": average("centroid_cosine_margin"),
        "source_has_same_answer_fraction": average("source_has_same_answer"),
    }


def test_projecting_keeps_cosines_and_controls_are_finite(trained):
    _, _, rows = trained
    for row in rows["transfer_rows"]:
        assert row["projected_vector_cosine"] == pytest.approx(row["coord_cosine"], abs=1e-9)
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert {row["eval_kind"] for row in rows["transfer_rows"]} == set(KINDS)


def test_subspace_rows(trained):
    of, _, rows = trained
    assert len(rows["subspace_rows"]) == 2 * len(RANKS) * 4
    fit = [e for e in of.events if fit_number(e["sample_id"], e["query_index"]) < 0.75]
    ends = {
        "source_value_identity": ("layer_0_post_mlp", "support_value", "answer_value"),
        "target_value_identity": ("layer_1_post_mlp", "prediction", "answer_value"),
        "source_key_identity_control": ("layer_0_post_mlp", "support_key", "support_key"),
    }
    order = [*ends, "random_source_control"]
    assert [row["basis_role"] for row in rows["subspace_rows"]] == order * 2 * len(RANKS)
    for row in rows["subspace_rows"]:
        shared = {"ambient_dim": 32, "pca_rank": row["basis_rank"]}
        if row["basis_role"] == "random_source_control":
            held = {name: value for name, value in row.items() if value is not None}
            assert held.keys() == {
                "checkpoint", "checkpoint_name", "checkpoint_step", "basis_rank", "basis_role", "role", "context_role",
                "group_by", "ambient_dim", "pca_rank",
            }  # fmt: skip
            assert_same(row, {**shared, "group_by": "random_subspace", "context_role": "support_value"})
            continue
        stage, role, group_by = ends[row["basis_role"]]
        state = reference.stored_state(of, row["checkpoint_step"], stage)
        vectors = [state(e, [place for place, _ in e["roles"][role]]) for e in fit]
        tokens = [reference.group_token(e, group_by, role) for e in fit]
        _, values, numerical = reference.identity_basis(vectors, tokens, row["basis_rank"])
        _, whole, whole_numerical = reference.principal(np.array(vectors), row["basis_rank"])
        wanted = {
            **shared,
            "role": f"{stage} {role}",
            "context_role": role,
            "group_by": group_by,
            "num_vectors": len(fit),
            "num_unique_tokens": len(set(tokens)),
            "tokens": sorted(set(tokens)),
            "identity_centered_rank": numerical,
            "identity_singular_values": pytest.approx(values, rel=1e-8),
            "all_vector_centered_rank": whole_numerical,
            "all_vector_singular_values": pytest.approx(whole, rel=1e-8),
        }
        assert_same(row, wanted)


def test_pair_rows(trained):
    of, _, rows = trained
    assert len(rows["pair_rows"]) == 2 * len(of.events)
    for at, row in enumerate(rows["pair_rows"]):
        event, step = of.events[at % len(of.events)], (50, 150)[at // len(of.events)]
        final, answer = of.finals[step, event["event"]], event["answer_token"]
        key = event["roles"]["support_key"][0][1]
        wanted = {
            "checkpoint": f"{of.lake.uri}#r/{step}",
            "checkpoint_name": f"step_{step:06d}",
            "checkpoint_step": step,
            "batch_index": event["example"],
            "sample_id": event["sample_id"],
            "split": event["split"],
            "query_index": event["query_index"],
            **ENDS,
            "context_stage": None,
            "context_position_role": None,
            "context_positions": None,
            "source_positions": [event["roles"]["support_value"][0][0]],
            "target_positions": [event["prediction_position"]],
            "group_by": "answer_value",
            **{
                f"{end}_token{suffix}": token if suffix else of.text[token]
                for end, token in zip(
                    ("source_group", "target_group", "key_group", "answer_value"),
                    (answer, answer, key, answer),
                    strict=True,
                )
                for suffix in ("", "_id")
            },
            "final_value_accuracy": float(final["answer_logit"] > final["best_wrong_logit"]),
            "final_value_margin": final["value_margin"],
            "fit_split": "fit" if fit_number(event["sample_id"], event["query_index"]) < 0.75 else "eval",
            "example_index": at % len(of.events),
        }
        assert_same(row, wanted)
        assert row.keys() == wanted.keys()


def test_position_tokens_group_each_end_by_its_own_token(made, tmp_path):
    _, rows = written(
        made.lake, tmp_path / "out", group_by="position_token", control=[], steps="30", basis_rank=[3]
    )
    tokens = {
        (e["sample_id"], e["query_index"]): (made.examples[e["example"]]["tokens"], e) for e in made.events
    }
    for row in rows["pair_rows"]:
        written_tokens, event = tokens[row["sample_id"], row["query_index"]]
        assert row["target_group_token_id"] == written_tokens[event["prediction_position"]]
        assert row["source_group_token_id"] == written_tokens[row["source_positions"][0]]
    groups = {row["basis_role"]: row["num_unique_tokens"] for row in rows["subspace_rows"]}
    assert groups == {"source_value_identity": 8, "target_value_identity": 5}


def test_files_findings_and_charts(made, tmp_path):
    printed, rows = written(made.lake, tmp_path / "out", ["svg"])
    assert [key for key in printed if not key.endswith("parquet")] == ["report", "markdown", *KEYS, "plots"]
    assert [Path(printed[key]).name for key in ("report", *KEYS)] == [
        "value_code_transfer_map_report.json",
        "value_code_transfer_map_rows.jsonl",
        "value_code_transfer_map_summary_rows.jsonl",
        "value_code_transfer_map_subspaces.jsonl",
        "value_code_transfer_map_pairs.jsonl",
    ]
    assert list(printed["plots"]) == ["coord_r_squared", "centroid_accuracy"]
    text = Path(printed["markdown"]).read_text()
    last = {
        row["eval_kind"]: row
        for row in rows["summary_rows"]
        if row["checkpoint_step"] == 30 and row["basis_rank"] == 3
    }
    ahead = last["true_transfer"]["coord_r_squared"] - max(last[kind]["coord_r_squared"] for kind in CONTROLS)
    assert f"it beats all its controls: R² {ahead:.4g} above the best" in text
    same = (
        sum(row["source_has_same_answer"] or False for row in rows["transfer_rows"] if row["basis_rank"] == 3)
        // 3
    )
    assert f"The shuffle gives {same} of {last['true_transfer']['num_rows']} eval examples" in text
    assert "numpy's default generator" in text


def test_without_controls_nothing_is_claimed_and_nothing_of_theirs_is_needed(tmp_path):
    def change(made):
        made.positions = [p for p in made.positions if p["role"] not in ("value_distractors", "support_key")]

    made = make_value_code_lake(tmp_path / "a.lake", records=80, change=change)
    printed, rows = written(made.lake, tmp_path / "out", control=[])
    assert {row["eval_kind"] for row in rows["summary_rows"]} == {"true_transfer"}
    assert "No --control was asked for" in Path(printed["markdown"]).read_text()
    with pytest.raises(UnknownName, match="no role 'value_distractors'"):
        written(made.lake, tmp_path / "other", control=["wrong_support_value"])
    made.lake.close()


def test_distractors_after_the_prediction_do_not_count(made, tmp_path):
    """The last write stands after the first read of its record; its value is no key of that read."""
    first = [e for e in made.events if e["query_index"] == 0]
    later = [
        p for p in made.positions
        if p["role"] == "value_distractors" and p["event"] == first[0]["event"]
        and p["position"] > first[0]["prediction_position"]
    ]  # fmt: skip
    assert later
    of = reference.facts(made.lake)
    _, rows = written(
        made.lake, tmp_path / "out", steps="30", basis_rank=[2], control=["wrong_support_value"]
    )
    wanted = expected(of, 30, 2)["wrong_support_value"]
    found = [row for row in rows["transfer_rows"] if row["eval_kind"] == "wrong_support_value"]
    for row, want in zip(found, wanted, strict=True):
        assert row["source_coord_norm"] == pytest.approx(want["source_coord_norm"], rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"basis_rank": [8]},
            r"step 10: --basis-rank 8 is above what the source basis allows: layer_0_post_mlp / support_value, grouped by "
            r"answer_value has 8 tokens among the \d+ fit examples, so at most rank 7",
        ),
        (
            {"basis_rank": [5]},
            r"--basis-rank 5 is above what the key_identity basis allows: layer_0_post_mlp / support_key, grouped by "
            r"support_key has 5 tokens among the \d+ fit examples, so at most rank 4",
        ),
        ({"fit_fraction": 1e-6}, "of 160 examples 0 fit and 160 judge the map"),
        ({"fit_fraction": 1 - 1e-6}, "of 160 examples 160 fit and 0 judge the map"),
        (
            {"source_position_role": "value_distractors"},
            "must be in the causal prefix: role 'value_distractors'",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_its_limit(made, tmp_path, options, message):
    with pytest.raises(ReportFailed, match=message) as caught:
        written(made.lake, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_shuffle_needs_two_eval_examples_and_a_basis_two_tokens(made, tmp_path):
    numbers = sorted(fit_number(e["sample_id"], e["query_index"]) for e in made.events)
    with pytest.raises(ReportFailed, match="shuffled_answer_value needs at least two eval examples"):
        written(made.lake, tmp_path / "out", fit_fraction=(numbers[-2] + numbers[-1]) / 2)
    few = (numbers[0] + numbers[1]) / 2
    with pytest.raises(ReportFailed, match="needs at least two tokens among the fit examples, there is one"):
        written(made.lake, tmp_path / "out", fit_fraction=few, control=[])


def test_a_prediction_without_an_earlier_distractor_is_refused(tmp_path):
    def change(made):
        made.positions = [
            p
            for p in made.positions
            if p["role"] != "value_distractors" or p["event"] != 4 or p["position"] > 6
        ]

    made = make_value_code_lake(tmp_path / "a.lake", records=80, change=change)
    with pytest.raises(
        ReportFailed, match=r"'value_distractors' resolves to no position up to the prediction in 1 of 160"
    ):
        written(made.lake, tmp_path / "out")
    made.lake.close()


@pytest.mark.parametrize(
    "options",
    [
        {"basis_rank": [0]}, {"basis_rank": []}, {"fit_fraction": 0}, {"fit_fraction": 1}, {"ridge_lambda": -1},
        {"control": ["chance"]}, {"group_by": None}, {"source_stage": None}, {"max_records": 0}, {"random_seed": -1},
    ],
)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(InvalidOption):
        report(**options)


@pytest.mark.parametrize(
    "name", ["source_stage", "target_stage", "source_position_role", "target_position_role", "group_by"]
)
def test_unknown_names_list_those_there_are(made, tmp_path, name):
    with pytest.raises(UnknownName, match=r"'nothing'.* ha(s|ve) "):
        written(made.lake, tmp_path / "out", **{name: "nothing"})


def test_a_fit_needs_more_examples_than_coordinates():
    with pytest.raises(ReportFailed, match="the map has 3 fit examples for 3 coordinates"):
        ridge_map(np.eye(3), np.eye(3), 1e-4, "the map")
    with pytest.raises(ReportFailed, match="singular with --ridge-lambda 0"):
        ridge_map(np.zeros((5, 2)), np.ones((5, 2)), 0.0, "the map")
    with pytest.raises(ReportFailed, match="--basis-rank 4 exceeds the 3 dimensions"):
        random_basis(3, 4, 0)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1e-6, 1e-4, 1.0, 100.0]))
def test_the_ridge_is_least_squares_with_pulled_weights(seed, width, out, ridge):
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(12, width)), rng.normal(size=(12, out)) + 3
    mapping = ridge_map(source, target, ridge, "it")
    assert mapping(source) == pytest.approx(fitted(source, target, ridge)(source), abs=1e-9)
    # The offset is free: residuals of the fit examples sum to nothing, whatever the penalty.
    assert (mapping(source) - target).sum(0) == pytest.approx(np.zeros(out), abs=1e-9)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_a_random_basis_is_orthonormal(seed, rank):
    basis = random_basis(6, rank, seed)
    assert basis.T @ basis == pytest.approx(np.eye(rank), abs=1e-12)

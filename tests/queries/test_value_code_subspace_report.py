import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from . import value_code_reference as reference
from .conftest import assert_same
from .value_code_lake import make_value_code_lake

STAGES = ["layer_0_post_mlp", "layer_1_post_mlp", "final_norm"]
ROLES = ["prediction", "support_value", "all_query_relation"]
GROUPINGS = ["answer_value", "query_key", "position_token"]
OPTIONS = {"stage": STAGES, "position_role": ROLES, "group_by": GROUPINGS, "pca_rank": 3}
KEYS = ("value_code_rows", "summary_rows", "subspace_rows")


def report(**options):
    return load_report("value-code-subspace-report").parse({**OPTIONS, **options})


def written(lake, out, charts=(), **options):
    printed = run_report(lake, report(**options), out, chart_formats=list(charts))
    rows = {key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in KEYS}
    return printed, rows


@pytest.fixture(scope="module")
def trained(probe_lake_path, tmp_path_factory):
    """The report over a trained run: (facts, printed, rows)."""
    with Lake.open(probe_lake_path) as lake:
        printed, rows = written(lake, tmp_path_factory.mktemp("codes") / "out", run="r", steps="50,150")
        yield reference.facts(lake, "r"), printed, rows


@pytest.fixture
def made(tmp_path):
    invented = make_value_code_lake(tmp_path / "made.lake")
    yield invented
    invented.lake.close()


def expected(of, step, stage, role, group_by, state, rank):
    """(rows, summary, subspace) of one (step, stage, role, grouping)."""
    vectors = [state(event, [position for position, _ in event["roles"][role]]) for event in of.events]
    tokens = [reference.group_token(event, group_by, role) for event in of.events]
    counts = Counter(tokens)
    mean = np.mean(vectors, axis=0)
    basis, values, numerical = reference.identity_basis(vectors, tokens, rank)
    whole, whole_values, whole_numerical = reference.principal(np.array(vectors), rank)
    means = reference.token_means(vectors, tokens)
    rows = []
    for i, (event, x, own) in enumerate(zip(of.events, vectors, tokens, strict=True)):
        left_out = [v for j, v in enumerate(vectors) if tokens[j] == own and j != i]
        centroids = {**means, own: np.mean(left_out, axis=0)} if left_out else {}
        unit = x / math.sqrt(x @ x)
        final = of.finals[step, event["event"]]
        answer = event["answer_token"]
        best = answer if final["answer_logit"] > final["best_wrong_logit"] else final["best_wrong_token"]
        found = reference.classified(x, own, centroids)
        rows.append(
            {
                "checkpoint": f"{of.lake.uri}#{of.run}/{step}",
                "checkpoint_name": f"step_{step:06d}",
                "checkpoint_step": step,
                "batch_index": event["example"],
                "sample_id": event["sample_id"],
                "split": event["split"],
                "query_index": event["query_index"],
                "stage": stage,
                "position_role": role,
                "selected_positions": [position for position, _ in event["roles"][role]],
                "num_positions": len(event["roles"][role]),
                "group_by": group_by,
                "group_token_id": own,
                "group_token": of.text[own],
                "query_key_token_id": event["roles"]["query_key"][0][1],
                "query_key_token": of.text[event["roles"]["query_key"][0][1]],
                "support_value_token_id": event["roles"]["support_value"][0][1],
                "support_value_token": of.text[event["roles"]["support_value"][0][1]],
                "answer_value_token_id": answer,
                "answer_value_token": of.text[answer],
                "vector_norm": math.sqrt(x @ x),
                "final_correct_value_logit": final["answer_logit"],
                "final_best_wrong_value_logit": final["best_wrong_logit"],
                "final_value_margin": final["value_margin"],
                "final_best_value_token_id": best,
                "final_best_value_token": of.text[best],
                "final_value_accuracy": float(best == answer),
                **{f"stage_lens_{k}": v for k, v in reference.lens(of, step, stage, event, x).items()},
                "mean_abs_cosine": abs(reference.cosine(x, mean)),
                "identity_overlap": float(np.linalg.norm(basis @ (basis.T @ unit))),
                "all_vector_overlap": float(np.linalg.norm(whole @ (whole.T @ unit))),
                **found,
                "centroid_prediction_token": None
                if not found["centroid_scored"]
                else of.text[found["centroid_prediction_token_id"]],
            }
        )

    def average(name):
        held = [float(row[name]) for row in rows if row[name] is not None]
        return sum(held) / len(held) if held else None

    lens_margin, final_margin = (
        [row[f"{of}_value_margin"] for row in rows] for of in ("stage_lens", "final")
    )
    summary = {
        "checkpoint_step": step,
        "stage": stage,
        "position_role": role,
        "group_by": group_by,
        "num_rows": len(rows),
        "num_unique_groups": len(counts),
        "min_group_count": min(counts.values()),
        "max_group_count": max(counts.values()),
        "largest_group_share": max(counts.values()) / len(rows),
        "mean_vector_norm": average("vector_norm"),
        "mean_identity_overlap": average("identity_overlap"),
        "mean_all_vector_overlap": average("all_vector_overlap"),
        "mean_mean_abs_cosine": average("mean_abs_cosine"),
        "stage_lens_value_accuracy": average("stage_lens_value_accuracy"),
        "final_value_accuracy": average("final_value_accuracy"),
        "mean_stage_lens_value_margin": average("stage_lens_value_margin"),
        "mean_final_value_margin": average("final_value_margin"),
        "stage_lens_margin_r_squared_vs_final_margin": reference.r_squared(final_margin, lens_margin),
        "identity_overlap_r_squared_vs_stage_lens_margin": reference.r_squared(
            lens_margin, [row["identity_overlap"] for row in rows]
        ),
        "centroid_scored_rows": sum(row["centroid_scored"] for row in rows),
        "leave_one_out_centroid_accuracy": average("centroid_prediction_correct"),
        "mean_centroid_cosine_margin": average("centroid_cosine_margin"),
    }
    subspace = {
        **{name: rows[0][name] for name in ("checkpoint", "checkpoint_name", "checkpoint_step")},
        "stage": stage,
        "position_role": role,
        "group_by": group_by,
        "role": f"{stage} {role}",
        "context_role": role,
        "num_vectors": len(vectors),
        "num_unique_tokens": len(counts),
        "tokens": sorted(counts),
        "ambient_dim": len(vectors[0]),
        "pca_rank": rank,
        "identity_centered_rank": numerical,
        "identity_singular_values": pytest.approx(values, rel=1e-9),
        "identity_variance_share": _share(list(means.values()), values),
        "all_vector_centered_rank": whole_numerical,
        "all_vector_singular_values": pytest.approx(whole_values, rel=1e-9),
        "all_vector_variance_share": _share(vectors, whole_values),
    }
    return rows, summary, subspace


def _share(vectors, values):
    return float(sum(values**2) / np.sum((np.array(vectors) - np.mean(vectors, axis=0)) ** 2))


def cells(steps=(50, 150)):
    return [(step, s, r, g) for step in steps for s in STAGES for r in ROLES for g in GROUPINGS]


def test_every_column_is_the_definition_on_a_trained_run(trained):
    of, _, rows = trained
    count = len(of.events)
    assert len(rows["value_code_rows"]) == count * len(cells())
    states = {
        (step, stage): reference.stored_state(of, step, stage) for step in (50, 150) for stage in STAGES
    }
    for at, (step, stage, role, group_by) in enumerate(cells()):
        wanted = expected(of, step, stage, role, group_by, states[step, stage], 3)
        found = rows["value_code_rows"][at * count : (at + 1) * count]
        for row, want in zip(found, wanted[0], strict=True):
            assert_same(row, want)
            assert row.keys() == want.keys()
        for key, want in (("summary_rows", wanted[1]), ("subspace_rows", wanted[2])):
            assert_same(rows[key][at], want)
            assert rows[key][at].keys() == want.keys()


def test_the_numbers_are_those_of_a_forward_pass_in_float64(trained):
    """The stored activations are float32: what is read off them agrees to their rounding."""
    of, _, rows = trained
    by_cell = {
        (row["checkpoint_step"], row["stage"], row["position_role"], row["group_by"]): row
        for row in rows["summary_rows"]
    }
    for stage in STAGES:
        state = reference.forward_state(of, 150, stage)
        for role in ROLES:
            found = by_cell[150, stage, role, "answer_value"]
            _, want, _ = expected(of, 150, stage, role, "answer_value", state, 3)
            for name in (
                "mean_vector_norm", "mean_identity_overlap", "mean_all_vector_overlap", "mean_mean_abs_cosine",
                "mean_stage_lens_value_margin", "mean_centroid_cosine_margin", "mean_final_value_margin",
            ):  # fmt: skip
                assert found[name] == pytest.approx(want[name], rel=2e-4, abs=2e-5), (stage, role, name)


def test_the_lens_at_the_prediction_is_the_stages_readout(trained):
    of, _, rows = trained
    readouts = {
        (row["step"], row["stage"], row["sample_id"], row["query_index"]): row
        for row in of.lake.sql(
            "SELECT r.*, e.sample_id, e.query_index FROM readouts AS r JOIN events AS e USING (run, probe, event) "
            "WHERE probe = 'probe'"
        )
        .pl()
        .to_dicts()
    }
    compared = 0
    for row in rows["value_code_rows"]:
        if row["position_role"] == "prediction":
            read = readouts[row["checkpoint_step"], row["stage"], row["sample_id"], row["query_index"]]
            assert row["stage_lens_correct_value_logit"] == pytest.approx(
                read["answer_logit"], rel=1e-4, abs=1e-4
            )
            assert row["stage_lens_value_margin"] == pytest.approx(read["value_margin"], rel=1e-4, abs=1e-4)
            compared += 1
    assert compared == len(of.events) * 2 * len(STAGES) * len(GROUPINGS)


def test_what_lies_between_0_and_1_does(trained):
    _, _, rows = trained
    for row in rows["value_code_rows"]:
        for name in ("identity_overlap", "all_vector_overlap", "mean_abs_cosine"):
            assert 0 <= row[name] <= 1
        scored = [row[name] is not None for name in reference.CENTROID[1:]]
        assert scored == [row["centroid_scored"]] * len(scored)
    for row in rows["subspace_rows"]:
        assert 0 < row["identity_variance_share"] <= 1


def test_a_vector_is_left_out_of_its_own_centroid(tmp_path):
    """Two vectors of one token that point apart: each is alone against the other's centroid."""

    def change(made):
        state = made.activations["final_norm"]
        first = [e for e in made.events if e["answer_token"] == made.events[0]["answer_token"]][:2]
        made.events = [e for e in made.events if e["answer_token"] != first[0]["answer_token"]] + first
        for length, event in zip((2, -1), first, strict=True):
            state[:, made.rows[event["example"], event["prediction_position"]]] = length * np.eye(12)[0]

    made = make_value_code_lake(tmp_path / "a.lake", change=change)
    options = {"stage": ["final_norm"], "position_role": ["prediction"], "group_by": ["answer_value"]}
    _, rows = written(made.lake, tmp_path / "out", **options)
    token = made.events[-1]["answer_token"]
    own = [row["centroid_true_cosine"] for row in rows["value_code_rows"] if row["group_token_id"] == token]
    assert own == pytest.approx([-1.0] * 6)
    made.lake.close()


def test_singletons_are_not_scored_and_null_sorts_last(tmp_path):
    def change(made):
        """Every answer a value of its own."""
        made.events = list({e["answer_token"]: e for e in made.events}.values())

    made = make_value_code_lake(tmp_path / "a.lake", change=change)
    options = {
        "position_role": ["prediction"],
        "group_by": ["answer_value", "query_key"],
        "stage": ["final_norm"],
    }
    printed, rows = written(made.lake, tmp_path / "out", **options)
    unscored = [row for row in rows["summary_rows"] if row["group_by"] == "answer_value"]
    assert [row["leave_one_out_centroid_accuracy"] for row in unscored] == [None] * 3
    assert {row["centroid_scored_rows"] for row in unscored} == {0}
    text = Path(printed["markdown"]).read_text()
    table = [line for line in text.splitlines() if "| final_norm |" in line]
    assert [("answer_value" in line) for line in table] == [False] * 3 + [True] * 3
    assert "No group of answer_value at prediction has two vectors" in text
    assert "have no centroid accuracy" in text
    made.lake.close()


def test_max_records_counts_the_records_of_the_split(made, tmp_path):
    _, rows = written(made.lake, tmp_path / "out", split=["validation_iid"], max_records=20)
    of = reference.facts(made.lake, "ref", ["validation_iid"], 20)
    assert len({row["sample_id"] for row in rows["value_code_rows"]}) == 20
    assert {row["sample_id"] for row in rows["value_code_rows"]} == {
        event["sample_id"] for event in of.events
    }
    assert rows["summary_rows"][0]["num_rows"] == len(of.events) == 40


def test_files_findings_and_charts(made, tmp_path):
    printed, _ = written(made.lake, tmp_path / "out", ["svg"], group_by=["answer_value", "support_value"])
    assert [key for key in printed if not key.endswith("parquet")] == ["report", "markdown", *KEYS, "plots"]
    assert [Path(printed[key]).name for key in ("report", "markdown", *KEYS)] == [
        "value_code_subspace_report.json",
        "value_code_subspace_report.md",
        "value_code_subspace_rows.jsonl",
        "value_code_subspace_summary_rows.jsonl",
        "value_code_subspace_subspaces.jsonl",
    ]
    assert list(printed["plots"]) == ["centroid_accuracy", "stage_lens_accuracy"]
    text = Path(printed["markdown"]).read_text()
    assert (
        "The prediction position carries answer_value from step **20** on, first at **layer_1_post_mlp**"
        in text
    )
    assert "answer_value and support_value name the same token in every event" in text
    content = json.loads(Path(printed["report"]).read_text())
    assert content["options"]["pca_rank"] == 3
    assert content["findings"][0] in text


def test_repeated_options_count_once_and_rows_of_the_table_are_limited(made, tmp_path):
    printed, rows = written(
        made.lake,
        tmp_path / "out",
        stage=["final_norm"] * 2,
        group_by=["answer_value"],
        markdown_top_k_rows=2,
    )
    assert len(rows["summary_rows"]) == 3 * len(ROLES)
    assert Path(printed["markdown"]).read_text().count("| final_norm |") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stage": ["layer_7_post_mlp"]},
            "no stage 'layer_7_post_mlp'; run 'ref' has embedding, layer_0_post_attn",
        ),
        (
            {"position_role": ["support"]},
            "no role 'support'; the events of probe 'probe' have all_query_relation, key_distractors",
        ),
        (
            {"group_by": ["answer"]},
            "cannot group by 'answer'; probe 'probe' has position_token, answer_value",
        ),
        ({"split": ["test"]}, "probe 'probe' has no split 'test'; it has heldout_pairs, validation_iid"),
    ],
)
def test_unknown_names_list_those_there_are(made, tmp_path, options, message):
    with pytest.raises(UnknownName, match=message):
        written(made.lake, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"pca_rank": 0}, {"max_records": 0}, {"markdown_top_k_rows": 0}, {"stage": None}, {"group_by": []}],
)
def test_options_that_cannot_be(options):
    with pytest.raises(InvalidOption):
        report(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pca_rank": 8},
            r"PCA rank 8 needs at least 9 token means of .*answer_value, there are 8; take at most 7",
        ),
        (
            {"max_records": 1, "pca_rank": 1, "group_by": ["query_key"]},
            "need at least two tokens, there are 1",
        ),
        (
            {"position_role": ["value_distractors"]},
            "must be in the causal prefix: role 'value_distractors' has positions",
        ),
        ({"probe": "other"}, "Probe-set not found: run 'ref' has no probe 'other'; it has probe"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(tmp_path, options, message):
    made = make_value_code_lake(tmp_path / "a.lake", queries=1 if "max_records" in options else 2)
    with pytest.raises((ReportFailed, MissingData), match=message) as caught:
        written(made.lake, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    made.lake.close()


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "zero vector"), (np.nan, "NaN or infinite values at step 20")]
)
def test_vectors_without_a_direction_are_refused(tmp_path, value, message):
    def change(made):
        made.activations["layer_1_post_mlp"][1, list(made.rows.values())] = value

    made = make_value_code_lake(tmp_path / "a.lake", change=change)
    with pytest.raises(ReportFailed, match=message):
        written(made.lake, tmp_path / "out")
    made.lake.close()


def test_an_event_without_the_role_or_without_competitors_is_refused(tmp_path):
    def lose_role(made):
        made.positions = [p for p in made.positions if p["role"] != "support_value" or p["event"] != 3]

    def lose_competitors(made):
        made.events[2]["competitors"] = []

    lost = make_value_code_lake(tmp_path / "a.lake", change=lose_role)
    with pytest.raises(
        ReportFailed,
        match=r"role 'support_value' resolves to no position in 1 of 80 events \(such as s1 query 1",
    ):
        written(lost.lake, tmp_path / "out")
    readouts = lost.readouts
    lost.lake.close()

    def change(made):
        lose_competitors(made)
        made.readouts = readouts

    alone = make_value_code_lake(tmp_path / "b.lake", change=change)
    with pytest.raises(ReportFailed, match="event s1 query 0 has no competitors"):
        written(alone.lake, tmp_path / "out")
    alone.lake.close()


def test_the_lens_takes_the_runs_own_epsilon(tmp_path):
    """Stages whose variance is as small as epsilon tell one epsilon from another."""

    def change(made):
        made.activations["layer_1_post_mlp"] *= np.float32(1e-3)
        made.layer_norm_eps = {"a": 1e-5, "b": 1e-3, "c": None}[made.name]

    margins = {}
    for name in "abc":
        made = make_value_code_lake(tmp_path / f"{name}.lake", change=change, name=name)
        _, rows = written(
            made.lake, tmp_path / name, stage=["layer_1_post_mlp"], position_role=["prediction"]
        )
        margins[name] = [row["stage_lens_value_margin"] for row in rows["value_code_rows"]]
        made.lake.close()
    assert margins["a"] != pytest.approx(margins["b"], rel=1e-2)
    assert margins["a"] == margins["c"]


def test_a_run_whose_parameters_nobody_knows_is_refused(tmp_path):
    def change(made):
        made.modules = (None, None, None)

    made = make_value_code_lake(tmp_path / "a.lake", change=change)
    with pytest.raises(ReportFailed, match="run 'ref' does not tell which parameters unembed"):
        written(made.lake, tmp_path / "out")
    made.lake.close()


def test_missing_activations_are_named_with_their_command(made, tmp_path):
    with pytest.raises(
        MissingData, match=r"needs activations .*layout all.*lakebed extract --for value-code-subspace"
    ):
        written(made.lake, tmp_path / "out", position_role=["causal_prefix"])

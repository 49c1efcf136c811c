"""contextual-key-separability against loops over vectors in float64 (definitions 1 §J.1)."""

import json
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from .conftest import assert_same
from .contextual_lake import KEYS, SPLITS, group_of, make_contextual_lake, vectors_of

STEPS = [250, 500, 750, 1000, 1500]
STAGE = "layer_0_post_mlp"
METRIC_COLUMNS = (
    "checkpoint,checkpoint_name,checkpoint_step,context_stage,context_role,group_by,head_layer,head,projection,"
    "projection_rank,qk_singular_value_top,qk_singular_value_sum,num_groups,num_vectors,min_group_count,max_group_count,"
    "projected_dim,within_variance,between_variance,separation_ratio,nearest_centroid_accuracy,nearest_centroid_margin,"
    "mean_centroid_norm,answer_margin,answer_accuracy"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    lake = make_contextual_lake(
        tmp_path_factory.mktemp("lake") / "context.lake", STEPS, layouts=("roles", "all")
    )
    yield lake
    lake.lake.close()


def report(**options):
    given = {"head": "L1H0", "context_stage": (STAGE,), **options}
    return load_report("contextual-key-separability").parse(given)


def written(made, tmp_path, **options):
    printed = run_report(made.lake, report(**options), tmp_path / "out", chart_formats=[])
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("metric_rows", "group_rows")
    }
    return printed, rows, json.loads(Path(printed["report"]).read_text())


def projections(made, place, rank, layer=1, head=0):
    """Projectors of the definitions from the matrix itself, for the numbers that do not depend on a basis."""
    left, _, right = np.linalg.svd(made.matrices["W_QK"][place, layer, head])
    left, right = left[:, :rank], right[:rank].T
    both = np.linalg.qr(np.concatenate([left, right], 1))[0]
    return {"qk_left": left, "qk_right": right, "qk_both": both, "full_residual": np.eye(len(left))}


def loops(points, tokens):
    """The definition a vector at a time."""
    names = sorted(set(tokens))
    members = {t: [p for p, other in zip(points, tokens, strict=True) if other == t] for t in names}
    mean = {t: sum(members[t]) / len(members[t]) for t in names}
    middle, total = sum(points) / len(points), len(points)
    within = sum((p - mean[t]) @ (p - mean[t]) for p, t in zip(points, tokens, strict=True)) / total
    between = sum(len(members[t]) * (mean[t] - middle) @ (mean[t] - middle) for t in names) / total
    right, margins = [], []
    for i, (point, token) in enumerate(zip(points, tokens, strict=True)):
        rest = [p for j, (p, t) in enumerate(zip(points, tokens, strict=True)) if t == token and j != i]
        centres = {**mean, token: sum(rest) / len(rest)}
        away = {t: (point - centre) @ (point - centre) for t, centre in centres.items()}
        right.append(min(names, key=lambda t: (away[t], t)) == token)
        margins.append(min(away[t] for t in names if t != token) - away[token])
    return {
        "num_groups": len(names),
        "num_vectors": total,
        "min_group_count": min(map(len, members.values())),
        "max_group_count": max(map(len, members.values())),
        "within_variance": within,
        "between_variance": between,
        "separation_ratio": between / within,
        "nearest_centroid_accuracy": sum(right) / total,
        "nearest_centroid_margin": sum(margins) / total,
        "mean_centroid_norm": sum(len(members[t]) * np.sqrt(mean[t] @ mean[t]) for t in names) / total,
    }


def expected_rows(made, rank=4, role="prediction", group_by="query_key", splits=SPLITS, stages=(STAGE,)):
    for place, step in enumerate(made.steps):
        behaviour = [made.readouts[step, i] for i, e in enumerate(made.events) if e["split"] in splits]
        sigma = np.linalg.svd(made.matrices["W_QK"][place, 1, 0], compute_uv=False)
        for stage in stages:
            found = vectors_of(made, step, stage, role, splits)
            tokens = [group_of(made, number, position, group_by) for number, position, _ in found]
            for name, basis in projections(made, place, rank).items():
                yield {
                    "checkpoint": f"{made.lake.uri}#ref/{step}",
                    "checkpoint_name": f"step_{step:06d}",
                    "checkpoint_step": step,
                    "context_stage": stage,
                    "context_role": role,
                    "group_by": group_by,
                    "head_layer": 1,
                    "head": 0,
                    "projection": name,
                    "projection_rank": rank,
                    "projected_dim": basis.shape[1],
                    "qk_singular_value_top": float(sigma[0]),
                    "qk_singular_value_sum": float(sigma[:rank].sum()),
                    **loops([basis.T @ vector for _, _, vector in found], tokens),
                    "answer_margin": float(np.mean([margin for margin, _ in behaviour])),
                    "answer_accuracy": float(np.mean([correct for _, correct in behaviour])),
                }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection_rank": 6, "stages": ("embedding", "final_norm")},
        {"role": "support_write", "group_by": "position_token", "rank": 2},
        {"role": "support_value", "group_by": "answer_value", "splits": ("validation_iid",)},
        {"role": "causal_prefix", "group_by": "support_key", "rank": 1},
    ],
)
def test_metric_rows(made, tmp_path, options):
    rank = options.get("rank", options.get("projection_rank", 4))
    role, group_by = options.get("role", "prediction"), options.get("group_by", "query_key")
    stages, splits = options.get("stages", (STAGE,)), options.get("splits", SPLITS)
    printed, rows, _ = written(
        made,
        tmp_path,
        projection_rank=rank,
        context_role=role,
        group_by=group_by,
        context_stage=stages,
        split=() if splits == SPLITS else splits,
        include_full_residual=True,
    )
    wanted = list(expected_rows(made, rank, role, group_by, splits, stages))
    assert len(rows["metric_rows"]) == len(wanted) == 4 * len(STEPS) * len(stages)
    for row, expected in zip(rows["metric_rows"], wanted, strict=True):
        assert_same(row, expected, rel=2e-6, near=1e-6)
    header = Path(printed["metric_csv"]).read_text().splitlines()[0]
    assert header.startswith(METRIC_COLUMNS + ",")


def test_full_residual_rows_only_when_asked(made, tmp_path):
    printed, rows, content = written(made, tmp_path)
    assert {row["projection"] for row in rows["metric_rows"]} == {"qk_left", "qk_right", "qk_both"}
    assert {row["projection"] for row in rows["group_rows"]} == {None, "qk_left", "qk_right", "qk_both"}
    # The findings compare with it anyway.
    assert "than the full residual" in content["findings"][0]
    assert set(printed) >= {"report", "markdown", "metric_rows", "metric_csv", "group_rows", "plots"}
    assert Path(printed["report"]).name == "contextual_key_separability_report.json"
    assert Path(printed["group_rows"]).name == "contextual_key_separability_group_rows.jsonl"


def test_group_rows(made, tmp_path):
    _, rows, _ = written(made, tmp_path, include_full_residual=True, steps="500,1500", split=("train",))
    vectors = [row for row in rows["group_rows"] if row["row_kind"] == "vector"]
    wanted = vectors_of(made, 500, STAGE, "prediction", ("train",))
    assert len(vectors) == 2 * len(wanted)
    for row, (number, position, _) in zip(vectors, wanted, strict=False):
        event = made.events[number]
        token = event["tokens"][position]
        expected = {
            "checkpoint_step": 500,
            "stage": STAGE,
            "batch_index": event["example"],
            "sample_id": event["sample_id"],
            "split": "train",
            "query_index": event["query_index"],
            "context_role": "prediction",
            "context_position": position,
            "group_by": "query_key",
            "group_token_id": token,
            "group_token": f"K{token - 5:02d}",
            "position_token_id": token,
            "position_token": f"K{token - 5:02d}",
        }
        assert_same(row, expected)
    groups = [row for row in rows["group_rows"] if row["row_kind"] == "group"]
    tokens = sorted({group_of(made, n, p, "query_key") for n, p, _ in wanted})
    assert len(groups) == 2 * 4 * len(tokens)
    for place, step in ((1, 500), (4, 1500)):
        found = vectors_of(made, step, STAGE, "prediction", ("train",))
        for projection, basis in projections(made, place, 4).items():
            middle = np.mean([basis.T @ vector for _, _, vector in found], 0)
            for token in tokens:
                points = [basis.T @ v for n, p, v in found if group_of(made, n, p, "query_key") == token]
                mean = np.mean(points, 0)
                row = next(
                    row
                    for row in groups
                    if (row["checkpoint_step"], row["projection"], row["group_token_id"])
                    == (step, projection, token)
                )
                expected = {
                    "context_stage": STAGE,
                    "group_count": len(points),
                    "within_variance": float(np.mean([(p - mean) @ (p - mean) for p in points])),
                    "centroid_global_squared_distance": float((mean - middle) @ (mean - middle)),
                    "centroid_norm": float(np.sqrt(mean @ mean)),
                }
                assert_same(row, expected, rel=2e-6, near=1e-7)


def pearson(x, y):
    return float(np.corrcoef(x, y)[0, 1])


def test_summary_and_window(made, tmp_path):
    _, _, content = written(made, tmp_path, include_full_residual=True, window_start=400, window_end=1100)
    rows = list(expected_rows(made))
    assert (content["window_start"], content["window_end"]) == (400, 1100)
    for row in content["summary"]:
        series = [r for r in rows if r["projection"] == row["projection"]]
        for prefix, chosen in (("", series), ("window_", series[1:4])):
            for name in ("separation_ratio", "nearest_centroid_accuracy"):
                values = [r[name] for r in chosen]
                expected = {
                    f"{prefix}start_{name}": values[0],
                    f"{prefix}end_{name}": values[-1],
                    f"{prefix}delta_{name}": values[-1] - values[0],
                }
                for other in ("qk_singular_value_top", "answer_margin"):
                    expected[f"{prefix}{name}_vs_{other}"] = pearson(values, [r[other] for r in chosen])
                assert_same(row, expected, rel=1e-5, near=1e-6)
            assert row[f"{prefix}num_checkpoints"] == len(chosen)
        assert (row["start_step"], row["end_step"]) == (250, 1500)
        assert (row["window_start"], row["window_end"]) == (500, 1000)


def test_a_window_of_one_step_is_left_out(made, tmp_path):
    printed, _, content = written(made, tmp_path, window_start=400, window_end=600)
    assert not [key for row in content["summary"] for key in row if key.startswith("window_")]
    assert "Fewer than two checkpoints lie in the window 400 to 600." in Path(printed["markdown"]).read_text()


def test_permutations(made, tmp_path):
    """The chance columns are those of separations computed anew from shuffled labels."""
    from lakebed.queries import arrays

    _, rows, content = written(made, tmp_path, permutations=30, permutation_seed=3, steps="1000")
    found = vectors_of(made, 1000, STAGE, "prediction")
    tokens = np.array([group_of(made, n, p, "query_key") for n, p, _ in found])
    shuffled = arrays.permuted_labels(np.searchsorted(sorted(set(tokens)), tokens), 30, 3)
    for row in rows["metric_rows"]:
        basis = projections(made, 3, 4)[row["projection"]]
        sampled = [loops([basis.T @ v for _, _, v in found], labels.tolist()) for labels in shuffled]
        for name in ("separation_ratio", "nearest_centroid_accuracy"):
            values = np.array([each[name] for each in sampled])
            expected = {
                f"{name}_permuted_mean": float(values.mean()),
                f"{name}_permuted_std": float(values.std()),
                f"{name}_permuted_percentile_95": float(np.quantile(values, 0.95)),
                f"{name}_permuted_p_value": float((1 + (values >= row[name] - 1e-9).sum()) / 31),
            }
            assert_same(row, expected, rel=1e-5, near=1e-7)
    assert "of 30 shuffles" in " ".join(content["findings"])


def test_chance_without_permutations(made, tmp_path):
    _, rows, _ = written(made, tmp_path)
    for row in rows["metric_rows"]:
        assert row["chance_separation_ratio"] == pytest.approx(
            (row["num_groups"] - 1) / (row["num_vectors"] - row["num_groups"])
        )
        assert row["largest_group_share"] == pytest.approx(row["max_group_count"] / row["num_vectors"])
        assert row["separation_ratio_permuted_mean"] is None


def test_behavior_rows_from_a_file(made, tmp_path):
    file = tmp_path / "behavior.jsonl"
    lines = [{"split": "__all__", "step": step, "baseline_margin_mean": step / 7} for step in reversed(STEPS)]
    lines.insert(2, {"split": "train", "step": 250, "baseline_margin_mean": -1.0})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, rows, content = written(made, tmp_path, behavior_rows=str(file))
    for row in rows["metric_rows"]:
        assert row["answer_margin"] == pytest.approx(row["checkpoint_step"] / 7)
        assert row["answer_accuracy"] is None
    ratios = [row["separation_ratio"] for row in rows["metric_rows"] if row["projection"] == "qk_both"]
    both = next(row for row in content["summary"] if row["projection"] == "qk_both")
    assert both["separation_ratio_vs_answer_margin"] == pytest.approx(pearson(ratios, STEPS))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"step": 250}], "line 1: no 'baseline_margin_mean'; the row has split, step"),
        ([{"step": 250, "baseline_margin_mean": 1}] * 2, "line 2: step 250 stands twice"),
        (
            [{"step": 250, "baseline_margin_mean": 1}],
            "no row of split '__all__' for steps 500, 750, 1000, 1500",
        ),
        ([{"step": 250, "baseline_margin_mean": "1"}], "'baseline_margin_mean' is no finite number: '1'"),
        ([{"step": 250.5, "baseline_margin_mean": 1}], "'step' is no whole number"),
        (["", "{"], "line 1: blank"),
        (["{"], "line 1: no JSON"),
        (["[1]"], "line 1: no JSON object"),
    ],
)
def test_bad_behavior_rows(made, tmp_path, lines, message):
    file = tmp_path / "behavior.jsonl"
    texts = [line if isinstance(line, str) else json.dumps({"split": "__all__", **line}) for line in lines]
    file.write_text("\n".join(texts) + "\n")
    with pytest.raises(InvalidOption, match=r"--behavior-rows .*" + message.replace("[", r"\[")):
        written(made, tmp_path, behavior_rows=str(file))
    assert not (tmp_path / "out").exists()


def test_a_missing_behavior_file(made, tmp_path):
    with pytest.raises(InvalidOption, match="cannot be read"):
        written(made, tmp_path, behavior_rows=str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"context_stage": ("layer_9_post_mlp",)},
            UnknownName,
            "no stage 'layer_9_post_mlp'; .* has embedding, layer_0",
        ),
        (
            {"context_role": "subject"},
            UnknownName,
            "no role 'subject'; .* have all_query_relation, prediction, .*causal_prefix",
        ),
        (
            {"group_by": "subject"},
            UnknownName,
            "cannot group by 'subject'; .* has position_token, answer_value, prediction",
        ),
        (
            {"group_by": "support_write"},
            UnknownName,
            "cannot group by 'support_write'; .*or a role with one position",
        ),
        ({"split": ("test",)}, UnknownName, "no split 'test'; it has validation_iid, train"),
        ({"probe": "other"}, MissingData, "Probe-set not found: run 'ref' has no probe 'other'"),
        ({"head": "L5H0"}, UnknownName, "no head L5H0; run 'ref' has layers 0–1, heads 0–1"),
        (
            {"projection_rank": 7},
            ReportFailed,
            "--projection-rank 7 exceeds the 6 singular directions that W_QK of L1H0 has .*take at most 6",
        ),
        (
            {"context_role": "value_distractors"},
            ReportFailed,
            r"Intervention positions must be in the causal prefix: role 'value_distractors' has positions after the "
            r"prediction in \d+ of 48 events",
        ),
    ],
)
def test_errors_name_what_there_is(made, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        written(made, tmp_path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_start": 5}, "--window-start and --window-end come together"),
        ({"window_end": 5}, "--window-start and --window-end come together"),
        ({"window_start": 6, "window_end": 5}, "--window-start 6 lies after --window-end 5"),
        ({"projection_rank": 0}, "--projection-rank should be greater than 0"),
        ({"context_stage": None}, "--context-stage is required"),
        ({"batch_size": 16}, "no option --batch-size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InvalidOption, match=message):
        report(**options)


def test_one_group_is_refused(tmp_path):
    made = make_contextual_lake(tmp_path / "one.lake", [1, 2], keys=KEYS[:1])
    with pytest.raises(
        ReportFailed, match="separation needs at least two groups, and query_key makes 1 of 48 vectors"
    ):
        written(made, tmp_path)
    made.lake.close()


def test_a_group_of_one_vector_is_named(tmp_path):
    def only_once(events, residuals):
        events[3]["answer"] = 21
        for event in events:
            if event is not events[3] and event["answer"] == 21:
                event["answer"] = 20

    made = make_contextual_lake(tmp_path / "single.lake", [1, 2], change=only_once)
    with pytest.raises(
        ReportFailed, match=r"1 of 3 groups by answer_value .* \(such as 'V001'\).*another --group-by"
    ):
        written(made, tmp_path, group_by="answer_value")
    made.lake.close()


def test_no_variance_within_is_refused(tmp_path):
    def flat(events, residuals):
        for event in events:
            for step in (1, 2):
                residuals[step, STAGE][event["example"], event["prediction"]] = (
                    event["tokens"][event["prediction"]] / 3
                )

    made = make_contextual_lake(tmp_path / "flat.lake", [1, 2], change=flat)
    with pytest.raises(
        ReportFailed,
        match=r"at step 1, layer_0_post_mlp, .* on qk_left: the within-group variance is not above 0",
    ):
        written(made, tmp_path)
    made.lake.close()


def test_missing_activations_name_the_command(tmp_path):
    made = make_contextual_lake(tmp_path / "roles.lake", [1, 2])
    with pytest.raises(
        MissingData,
        match=r"needs activations .*layout all.*lakebed extract --for contextual-key-separability",
    ):
        written(made, tmp_path, context_role="causal_prefix", group_by="position_token")
    made.lake.close()


def test_findings_and_warnings(made, tmp_path):
    printed, _, content = written(made, tmp_path, permutations=20)
    text = Path(printed["markdown"]).read_text()
    assert content["findings"][0].startswith("**L1H0's QK directions separate 4 groups by query_key")
    assert (
        text.index("L1H0's QK directions")
        < text.index("query_key is the very token at prediction")
        < text.index("## How")
    )
    _, _, other = written(
        made, tmp_path / "b", context_role="support_value", group_by="query_key", steps="last"
    )
    assert other["warnings"] == []


def test_no_separation_is_said(tmp_path):
    def unrelated(events, residuals):
        rng = np.random.default_rng(11)
        for vectors in residuals.values():
            vectors[:] = rng.normal(size=vectors.shape)

    made = make_contextual_lake(tmp_path / "noise.lake", [1, 2], change=unrelated)
    _, rows, content = written(made, tmp_path, permutations=50)
    last = [row for row in rows["metric_rows"] if row["checkpoint_step"] == 2]
    best = max(last, key=lambda row: row["separation_ratio"])
    assert best["separation_ratio_permuted_p_value"] > 0.05
    assert "do not separate 4 groups by query_key beyond shuffled labels**" in content["findings"][0]
    made.lake.close()


def test_events_without_the_role_are_counted(tmp_path):
    def lost(events, residuals):
        for event in events[:3]:
            del event["roles"]["support_value"]

    made = make_contextual_lake(tmp_path / "lost.lake", [1, 2], change=lost)
    _, rows, content = written(made, tmp_path, context_role="support_value")
    assert {row["num_vectors"] for row in rows["metric_rows"]} == {45}
    assert content["warnings"] == [
        "3 of 48 events have no support_value: they give no vectors, but count in the answer margin."
    ]
    made.lake.close()


def test_charts(made, tmp_path):
    printed = run_report(made.lake, report(permutations=10), tmp_path / "out", chart_formats=["svg"])
    drawn = Path(printed["plots"]["trajectory"]).read_text()
    assert "95 % of shuffles" in drawn
    assert "full_residual" not in drawn
    one = run_report(made.lake, report(steps="last"), tmp_path / "one", chart_formats=["svg"])
    assert "always the largest group" in Path(one["plots"]["trajectory"]).read_text()

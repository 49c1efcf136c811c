"""contextual-svd-alignment against loops over vectors in float64 (definitions 1 §J.2)."""

import json
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.contextual_svd_alignment import read_role_spec
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from .conftest import assert_same
from .contextual_lake import SPLITS, group_of, make_contextual_lake, vectors_of

STEPS = [250, 500, 750, 1000, 1500]
STAGE = "layer_0_post_mlp"
METRICS = tuple(
    f"{side}_{name}"
    for side in ("left", "right")
    for name in ("mean_cosine", "identity_overlap", "all_vector_overlap")
)
SPECS = {
    "prediction": ("prediction", "position_token"),
    "support_value": ("support_value", "position_token"),
    "writes": ("support_write", "support_value"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    lake = make_contextual_lake(tmp_path_factory.mktemp("lake") / "context.lake", STEPS)
    yield lake
    lake.lake.close()


def report(**options):
    given = {
        "head": "L1H0",
        "context_stage": STAGE,
        "role": ("prediction",),
        "role_spec": (
            "support_value:position_role=support_value",
            "label=writes,context_role=support_write,group_by=support_value",
        ),
        "plot_left_role": "prediction",
        "plot_right_role": "support_value",
        "pca_rank": 2,
        **options,
    }
    return load_report("contextual-svd-alignment").parse(given)


ROW_KEYS = ("alignment_rows", "rank_aggregate_rows", "subspace_rows", "role_vector_rows")


def written(made, tmp_path, **options):
    printed = run_report(made.lake, report(**options), tmp_path / "out", chart_formats=[])
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in ROW_KEYS
    }
    return printed, rows, json.loads(Path(printed["report"]).read_text())


def top_directions(rows, rank):
    """(d × rank, all singular values above rounding) by eigenvectors of the scatter matrix, summed a row at a time."""
    middle = sum(rows) / len(rows)
    squares, directions = np.linalg.eigh(sum(np.outer(row - middle, row - middle) for row in rows))
    values = np.sqrt(np.maximum(squares[::-1], 0))
    return directions[:, ::-1][:, :rank], values[values > 1e-5 * values[0]]


def expected(made, place, label, pca_rank=2, splits=SPLITS):
    """(subspace numbers, per rank the six metrics) of a label at a step."""
    role, group_by = SPECS[label]
    found = vectors_of(made, made.steps[place], STAGE, role, splits)
    tokens = [group_of(made, number, position, group_by) for number, position, _ in found]
    vectors = [vector for _, _, vector in found]
    means = [
        np.mean([v for v, t in zip(vectors, tokens, strict=True) if t == token], 0)
        for token in sorted(set(tokens))
    ]
    identity, identity_values = top_directions(means, pca_rank)
    everything, all_values = top_directions(vectors, pca_rank)
    middle = sum(vectors) / len(vectors)
    middle /= np.sqrt(middle @ middle)
    left, sigma, right = np.linalg.svd(made.matrices["W_QK"][place, 1, 0])
    metrics = []
    for k in range(6):
        row = {"singular_value": float(sigma[k])}
        for side, u in (("left", left[:, k]), ("right", right[k])):
            row[f"{side}_mean_cosine"] = float(abs(u @ middle))
            row[f"{side}_identity_overlap"] = float(np.sqrt(sum((u @ b) ** 2 for b in identity.T)))
            row[f"{side}_all_vector_overlap"] = float(np.sqrt(sum((u @ b) ** 2 for b in everything.T)))
        metrics.append(row)
    space = {
        "num_vectors": len(vectors),
        "num_unique_tokens": len(means),
        "token_ids": sorted(set(tokens)),
        "ambient_dim": 12,
        "pca_rank": pca_rank,
        "identity_centered_rank": len(identity_values),
        "all_vector_centered_rank": len(all_values),
    }
    lists = {
        "identity_singular_values": identity_values[:pca_rank],
        "all_vector_singular_values": all_values[:pca_rank],
    }
    return space, lists, metrics


def behaviour(made, step, splits=SPLITS):
    held = [made.readouts[step, i] for i, e in enumerate(made.events) if e["split"] in splits]
    return {
        "answer_margin": float(np.mean([margin for margin, _ in held])),
        "answer_accuracy": float(np.mean([correct for _, correct in held])),
    }


@pytest.mark.parametrize("splits", [SPLITS, ("validation_iid",)])
def test_alignment_rows(made, tmp_path, splits):
    printed, rows, _ = written(made, tmp_path, split=() if splits == SPLITS else splits)
    found = iter(rows["alignment_rows"])
    for place, step in enumerate(STEPS):
        by_label = {label: expected(made, place, label, splits=splits) for label in SPECS}
        for rank in range(1, 5):
            for label in SPECS:
                space, _, metrics = by_label[label]
                wanted = {
                    "checkpoint": f"{made.lake.uri}#ref/{step}",
                    "checkpoint_name": f"step_{step:06d}",
                    "checkpoint_step": step,
                    "context_stage": STAGE,
                    "head_layer": 1,
                    "head": 0,
                    "singular_rank": rank,
                    "role": label,
                    "role_num_vectors": space["num_vectors"],
                    "role_num_unique_tokens": space["num_unique_tokens"],
                    **metrics[rank - 1],
                    **behaviour(made, step, splits),
                }
                assert_same(next(found), wanted, rel=1e-5, near=1e-6)
    assert next(found, None) is None
    assert (
        Path(printed["alignment_csv"])
        .read_text()
        .startswith(
            "checkpoint,checkpoint_name,checkpoint_step,context_stage,head_layer,head,singular_rank,singular_value,role,"
            "role_num_vectors,role_num_unique_tokens,left_mean_cosine,left_identity_overlap,left_all_vector_overlap,"
            "right_mean_cosine,right_identity_overlap,right_all_vector_overlap,answer_margin,answer_accuracy,"
        )
    )


def test_rank_aggregate_rows(made, tmp_path):
    _, rows, _ = written(made, tmp_path, top_ranks=3)
    found = iter(rows["rank_aggregate_rows"])
    for place, step in enumerate(STEPS):
        for label in SPECS:
            metrics = expected(made, place, label)[2][:3]
            total = sum(row["singular_value"] for row in metrics)
            wanted = {"role": label, "rank_count": 3, "singular_value_sum": total, **behaviour(made, step)}
            wanted["singular_value_top"] = metrics[0]["singular_value"]
            for name in METRICS:
                wanted[f"{name}_weighted"] = sum(row["singular_value"] * row[name] for row in metrics) / total
                wanted[f"{name}_max"] = max(row[name] for row in metrics)
            assert_same(next(found), wanted, rel=1e-5, near=1e-6)


def test_subspace_rows(made, tmp_path):
    printed, rows, _ = written(made, tmp_path)
    found = iter(rows["subspace_rows"])
    for place, step in enumerate(STEPS):
        for label, (role, group_by) in SPECS.items():
            row = next(found)
            space, lists, _ = expected(made, place, label)
            assert_same(
                row,
                {**space, "role": label, "context_role": role, "group_by": group_by, "checkpoint_step": step},
            )
            for name, values in lists.items():
                assert row[name] == pytest.approx(values.tolist(), rel=1e-9)
            assert len(row["tokens"]) == row["num_unique_tokens"]
    assert rows["subspace_rows"][0]["tokens"] == ["K00", "K01", "K02", "K03"]
    names = {key: Path(printed[key]).name for key in (*ROW_KEYS, "alignment_csv", "rank_aggregate_csv")}
    assert names == {
        "alignment_rows": "contextual_svd_alignment_rows.jsonl",
        "alignment_csv": "contextual_svd_alignment_rows.csv",
        "rank_aggregate_rows": "contextual_svd_rank_aggregate_rows.jsonl",
        "rank_aggregate_csv": "contextual_svd_rank_aggregate_rows.csv",
        "subspace_rows": "contextual_svd_subspace_rows.jsonl",
        "role_vector_rows": "contextual_svd_role_vector_rows.jsonl",
    }


def test_role_vector_rows(made, tmp_path):
    _, rows, _ = written(made, tmp_path, steps="last")
    found = iter(rows["role_vector_rows"])
    for label, (role, group_by) in SPECS.items():
        for number, position, _ in vectors_of(made, 1500, STAGE, role):
            event, row = made.events[number], next(found)
            wanted = {
                "batch_index": event["example"],
                "sample_id": event["sample_id"],
                "split": event["split"],
                "query_index": event["query_index"],
                "role": label,
                "context_role": role,
                "group_by": group_by,
                "position": position,
                "group_token_id": group_of(made, number, position, group_by),
                "position_token_id": event["tokens"][position],
            }
            assert_same(row, wanted)
    assert next(found, None) is None


def pearson(x, y):
    return float(np.corrcoef(x, y)[0, 1])


def test_correlations(made, tmp_path):
    _, rows, content = written(made, tmp_path)
    margins = [behaviour(made, step)["answer_margin"] for step in STEPS]
    rank1, aggregate = content["rank1_correlations"], content["rank_aggregate_correlations"]
    for label in SPECS:
        first = [expected(made, place, label)[2][0] for place in range(len(STEPS))]
        for name in ("left_identity_overlap", "right_mean_cosine"):
            values = [row[name] for row in first]
            sigma = pearson([row["singular_value"] for row in first], values)
            assert rank1[f"{label}.singular_value_vs_{name}"] == pytest.approx(sigma, rel=1e-4, abs=1e-5)
            assert rank1[f"{label}.{name}_vs_answer_margin"] == pytest.approx(
                pearson(margins, values), rel=1e-4, abs=1e-5
            )
        held = [row for row in rows["rank_aggregate_rows"] if row["role"] == label]
        for name in (
            "left_mean_cosine_weighted",
            "right_all_vector_overlap_weighted",
            "left_identity_overlap_max",
        ):
            sigma = pearson([row["singular_value_top"] for row in held], [row[name] for row in held])
            assert aggregate[f"{label}.singular_value_top_vs_{name}"] == pytest.approx(sigma, rel=1e-9)
    assert not [name for name in aggregate if "all_vector_overlap_max" in name]
    assert content["chance_overlap"] == pytest.approx(np.sqrt(2 / 12))


def test_swapped_ranks_are_matched(tmp_path):
    def swap(made_svd):
        _, left, right = made_svd["W_QK"]
        for vectors in (left, right):
            vectors[1] = vectors[0][:, :, [1, 0, 2, 3, 4, 5]] * np.array([1, -1, 1, -1, 1, 1])[:, None]

    made = make_contextual_lake(tmp_path / "swapped.lake", [1, 2], change_svd=swap)
    printed, rows, _ = written(made, tmp_path, top_ranks=3)
    held = [row for row in rows["alignment_rows"] if row["role"] == "prediction"]
    assert [row["matched_rank"] for row in held] == [None] * 3 + [2, 1, 3]
    assert [row["matched_abs_cosine"] for row in held[3:]] == pytest.approx([1, 1, 1], abs=1e-6)
    assert "took another's place at 1 checkpoints (2)" in Path(printed["markdown"]).read_text()
    made.lake.close()


def test_permutations(made, tmp_path):
    """The chance columns are those of subspaces made anew from shuffled labels."""
    from lakebed.queries import arrays

    _, rows, content = written(made, tmp_path, permutations=25, permutation_seed=2, steps="1000", top_ranks=2)
    for label, (role, group_by) in SPECS.items():
        found = vectors_of(made, 1000, STAGE, role)
        vectors = [vector for _, _, vector in found]
        tokens = np.array([group_of(made, n, p, group_by) for n, p, _ in found])
        shuffled = arrays.permuted_labels(np.searchsorted(sorted(set(tokens)), tokens), 25, 2)
        bases = []
        for labels in shuffled:
            means = [
                np.mean([v for v, t in zip(vectors, labels, strict=True) if t == k], 0)
                for k in range(labels.max() + 1)
            ]
            bases.append(top_directions(means, 2)[0])
        left, _, right = np.linalg.svd(made.matrices["W_QK"][3, 1, 0])
        for row in rows["alignment_rows"]:
            if row["role"] == label:
                k = row["singular_rank"] - 1
                for side, u in (("left", left[:, k]), ("right", right[k])):
                    values = np.array([np.linalg.norm(basis.T @ u) for basis in bases])
                    name = f"{side}_identity_overlap"
                    wanted = {
                        f"{name}_permuted_mean": float(values.mean()),
                        f"{name}_permuted_std": float(values.std()),
                        f"{name}_permuted_percentile_95": float(np.quantile(values, 0.95)),
                        f"{name}_permuted_p_value": float((1 + (values >= row[name]).sum()) / 26),
                    }
                    assert_same(row, wanted, rel=1e-4, near=1e-6)
    assert "shuffled labels reach" in " ".join(content["findings"])


def test_one_checkpoint_works_and_draws(made, tmp_path):
    printed = run_report(made.lake, report(steps="750"), tmp_path / "out", chart_formats=["svg"])
    drawn = Path(printed["plots"]["trajectory"]).read_text()
    assert "left on prediction" in drawn
    assert "right on support_value" in drawn
    row = json.loads(Path(printed["alignment_rows"]).read_text().splitlines()[0])
    assert row["matched_rank"] is None
    assert json.loads(Path(printed["report"]).read_text())["rank1_correlations"]


def test_findings_lead(made, tmp_path):
    printed, _, content = written(made, tmp_path)
    assert content["findings"][0].startswith("**The first query-side direction of L1H0 a")
    assert content["findings"][1].startswith("**The first key-side direction of L1H0 a")
    assert Path(printed["markdown"]).read_text().index("query-side") < 400


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("label=a,context_role=b,group_by=c", ("a", "b", "c")),
        ("group_by=c, label=a, context_role=b, note=x", ("a", "b", "c")),
        ("support_value:position_role=support_value", ("support_value", "support_value", "position_token")),
        ("v:position_role=support_value,group_by=query_key", ("v", "support_value", "query_key")),
    ],
)
def test_role_spec_grammars(text, spec):
    found = read_role_spec(text)
    assert (found.label, found.context_role, found.group_by) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label=a,context_role=b", "has no group_by"),
        ("label=a,label=b,context_role=b,group_by=c", "'label' stands twice"),
        ("prediction", "'prediction' is no NAME=VALUE"),
        ("a:group_by=b", "has no context_role"),
        (":position_role=b", "has no label"),
        ("a:position_role=", "is no NAME=VALUE"),
    ],
)
def test_bad_role_specs(text, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        report(role_spec=(text,))
    assert "write label=NAME,context_role=ROLE,group_by=TOKEN or NAME:position_role=ROLE" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": (), "role_spec": ()}, "--role or --role-spec is required"),
        ({"role": ("prediction", "prediction")}, "label 'prediction' stands twice"),
        ({"role": ("prediction", "support_value")}, "label 'support_value' stands twice"),
        (
            {"plot_left_role": "support_write"},
            "--plot-left-role 'support_write' is no label; there are prediction, support_value, writes",
        ),
        ({"plot_right_role": "x"}, "--plot-right-role 'x' is no label"),
        ({"plot_right_role": None}, "--plot-right-role is required"),
        ({"context_stage": None}, "--context-stage is required"),
        ({"batch_size": 16}, "no option --batch-size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InvalidOption, match=message):
        report(**options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"context_stage": "layer_9"}, UnknownName, "no stage 'layer_9'; .* has embedding"),
        (
            {"role_spec": ("support_value:position_role=subject",)},
            UnknownName,
            "no role 'subject'; .*causal_prefix",
        ),
        (
            {"role_spec": ("support_value:position_role=support_value,group_by=x",)},
            UnknownName,
            "cannot group by 'x'",
        ),
        ({"top_ranks": 7}, ReportFailed, "--top-ranks 7 exceeds the 6 singular directions .*take at most 6"),
        (
            {"pca_rank": 3},
            ReportFailed,
            "contextual-svd-alignment: PCA rank 3 needs at least 4 token means of role 'support_value' at step 250, there are 3; "
            "take at most 2",
        ),
        (
            {"role_spec": ("support_value:position_role=value_distractors",)},
            ReportFailed,
            r"Intervention positions must be in the causal prefix: role 'value_distractors' .* of 48 events",
        ),
        ({"split": ("test",)}, UnknownName, "no split 'test'"),
        ({"probe": "other"}, MissingData, "Probe-set not found"),
    ],
)
def test_errors_name_what_there_is(made, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        written(made, tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_a_zero_mean_has_no_direction(tmp_path):
    def balanced(events, residuals):
        for vectors in residuals.values():
            half = len(events) // 4
            for event in events[: 2 * half]:
                other = events[events.index(event) + 2 * half]
                vectors[other["example"], other["prediction"]] = -vectors[
                    event["example"], event["prediction"]
                ]

    made = make_contextual_lake(tmp_path / "zero.lake", [1, 2], change=balanced)
    with pytest.raises(
        ReportFailed, match="the mean of the vectors of role 'prediction' at step 1 is the zero vector"
    ):
        written(made, tmp_path, role_spec=(), plot_right_role="prediction")
    made.lake.close()

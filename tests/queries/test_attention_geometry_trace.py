"""attention-geometry-trace against a float64 decoder that reads the tokens alone, on a trained run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.first_directions import _token_lists
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from .float64_decoder import Decoder, best_wrong, load_events, load_weights
from .imported_lake import make_imported_lake

RUN, HEADS, LAYERS = "r", 4, 2
STEPS = (0, 150)
ROLES = [
    "bos",
    "support_write_op",
    "support_write_key",
    "support_write_value",
    "same_key_stale_write_op",
    "same_key_stale_write_key",
    "same_key_stale_write_value",
    "other_key_write_op",
    "other_key_write_key",
    "other_key_write_value",
    "prior_read_op",
    "prior_read_key",
    "prior_read_answer",
    "current_read_op",
    "current_read_key_self",
    "other",
]


def asked(**options):
    return load_report("attention-geometry-trace").parse({"run": RUN, **options})


@pytest.fixture(scope="module")
def lake(probe_lake_path):
    with Lake.open(probe_lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def found(lake):
    with Results(lake, asked(top_k_tokens=5)) as results:
        report = results.report
        yield SimpleNamespace(
            rows={(row["step"], row["layer"], row["head"]): row for row in results.rows("FROM rows")},
            checkpoints={row["step"]: row for row in results.rows("FROM checkpoint")},
            heads=results.rows("FROM role_attention_chart"),
            summary=results.rows("FROM checkpoint_chart"),
            facts=report.facts(lake, results),
            findings=report.findings(results),
            warnings=report.warnings(results),
        )


def partition(event):
    """Role of each position up to the prediction, one after the other."""
    names = ["bos"]
    support = event.roles["support_op"][0]
    at = 1
    while at <= event.prediction:
        kind, key = event.texts[at], event.texts[at + 1]
        if kind == "W":
            write = "support_write" if at == support else "other_key_write"
            if write == "other_key_write" and key == event.texts[event.prediction]:
                write = "same_key_stale_write"
            names += [f"{write}_{part}" for part in ("op", "key", "value")]
        elif at + 1 == event.prediction:
            names += ["current_read_op", "current_read_key_self"]
        else:
            names += ["prior_read_op", "prior_read_key", "prior_read_answer"]
        at += 3
    return names


def measure(events, decoder):
    """Means of every event column by (layer, head), and of the answers."""
    unembedding = decoder.weights["token_embedding.weight"]
    columns, answers, passes = {}, [], {}
    for event in events:
        forward = passes.setdefault(event.example, None) or decoder.forward(np.array(event.tokens))
        passes[event.example] = forward
        logits = forward.logits[event.prediction]
        wrong = best_wrong(logits, event.answer, event.competitors)
        answers.append((logits.argmax() == event.answer, logits[event.answer] - logits[wrong]))
        names = partition(event)
        assert len(names) == event.prediction + 1
        for layer, head in forward.scores:
            scores = forward.scores[layer, head][event.prediction]
            attention = forward.probabilities[layer, head][event.prediction]
            row = {}
            for part in ("key", "value"):
                at = event.roles[f"support_{part}"][0]
                earlier = [p for p in event.roles[f"{part}_distractors"] if p <= event.prediction]
                strongest = max((attention[p] for p in earlier), default=0.0)
                row[f"support_{part}_attention_mean"] = attention[at]
                row[f"{part}_distractor_attention_max_mean"] = strongest
                row[f"support_{part}_attention_margin_mean"] = attention[at] - strongest
                row[f"support_{part}_qk_margin_mean"] = (
                    scores[at] - max(scores[p] for p in earlier) if earlier else None
                )
            row["support_op_attention_mean"] = attention[event.roles["support_op"][0]]
            seen = attention[: event.prediction + 1]
            row["attention_entropy_mean"] = -sum(a * math.log(a) for a in seen)
            value = event.roles["support_value"][0]
            write = unembedding @ (decoder.head_output(layer, head) @ forward.values[layer, head][value])
            row["ov_value_score_mean"] = write[event.answer]
            row["ov_value_margin_mean"] = (
                write[event.answer] - write[best_wrong(write, event.answer, event.competitors)]
            )
            for name in ("score", "margin"):
                row[f"attended_ov_value_{name}_mean"] = attention[value] * row[f"ov_value_{name}_mean"]
            for role in ROLES:
                row[role] = sum(seen[p] for p, name in enumerate(names) if name == role)
            columns.setdefault((layer, head), []).append(row)
    means = {
        of: {name: np.mean([row[name] for row in rows if row[name] is not None]).item() for name in rows[0]}
        for of, rows in columns.items()
    }
    return means, np.mean([right for right, _ in answers]), np.mean([margin for _, margin in answers])


@pytest.mark.parametrize("step", STEPS)
def test_every_mean_is_that_of_the_float64_decoder(lake, found, step):
    events = load_events(lake, RUN, "probe")
    means, accuracy, margin = measure(events, Decoder(load_weights(lake, RUN, step), HEADS))
    assert len(means) == LAYERS * HEADS
    for (layer, head), wanted in means.items():
        row = found.rows[step, layer, head]
        assert row["head_label"] == f"L{layer}H{head}"
        assert row["num_examples"] == len(events)
        for name, value in wanted.items():
            got = row["role_attention_mean"][name] if name in ROLES else row[name]
            assert got == pytest.approx(value, rel=2e-4, abs=2e-6), (layer, head, name)
    checkpoint = found.checkpoints[step]
    assert checkpoint["num_query_events"] == len(events)
    assert checkpoint["answer_accuracy"] == accuracy
    assert checkpoint["answer_value_margin_mean"] == pytest.approx(margin, rel=1e-4, abs=1e-5)


def identity_projector(embedding):
    """B Bᵀ of the centred rows, at full rank, by a way of its own: the pseudo-inverse."""
    centred = embedding - embedding.mean(0)
    return np.linalg.pinv(centred, rcond=1e-6) @ centred


@pytest.mark.parametrize("step", STEPS)
def test_weight_geometry_is_that_of_the_full_products(lake, found, step):
    decoder = Decoder(load_weights(lake, RUN, step), HEADS)
    embedding = decoder.weights["token_embedding.weight"]
    keys, values, vocabulary = lake.sql(
        "SELECT key_tokens, value_tokens, vocabulary FROM probes WHERE probe = 'probe'"
    ).fetchall()[0]
    assert [vocabulary[token][0] for token in keys] == ["K"] * len(keys)
    projectors = {"key": identity_projector(embedding[keys]), "value": identity_projector(embedding[values])}
    for layer in range(LAYERS):
        for head in range(HEADS):
            (q, _), (k, _), (v, _) = (decoder.slice(layer, head, p) for p in "qkv")
            row = found.rows[step, layer, head]
            for name, product in (("qk", q.T @ k), ("ov", v.T @ decoder.head_output(layer, head).T)):
                left, sigma, right = np.linalg.svd(product)
                assert row["svd"][f"{name}_singular_values"] == pytest.approx(sigma[:5].tolist(), rel=1e-5)
                kind = {"qk": "key", "ov": "value"}[name]
                sides = {"qk": ("query_key", "key_key"), "ov": ("input_value", "output_value")}[name]
                sign = np.sign(left[np.abs(left[:, 0]).argmax(), 0])
                for side, u in zip(sides, (left[:, 0], right[0]), strict=True):
                    alignment = f"{name}_{side}_subspace_alignment"
                    expected = np.linalg.norm(projectors[kind] @ u)
                    assert row[alignment] == pytest.approx(expected, rel=1e-4, abs=1e-5)
                    assert row["svd"]["subspace_alignment"][alignment] == row[alignment]
                    scores = sign * (embedding @ u)
                    top = row["svd"][f"{name}_{side.split('_')[0]}_direction_top_tokens"]
                    assert len(top) == 5
                    for place, token in zip(np.argsort(-np.abs(scores))[:5], top, strict=True):
                        assert token["token"] == vocabulary[token["token_id"]]
                        assert token["token_id"] == place
                        assert token["signed_score"] == pytest.approx(scores[place], rel=1e-4, abs=1e-5)
                        assert token["abs_score"] == abs(token["signed_score"])
    subspaces = found.checkpoints[step]["embedding_subspaces"]
    for kind, of in (("key", keys), ("value", values)):
        subspace = subspaces[f"{kind}_identity_subspace"]
        centred = embedding[of] - embedding[of].mean(0)
        assert subspace["rank"] == len(of) - 1 == len(subspace["singular_values"])
        assert subspace["num_tokens"] == len(of)
        assert subspace["ambient_dim"] == embedding.shape[1]
        expected = np.sqrt(np.linalg.eigvalsh(centred @ centred.T)[::-1][: len(of) - 1])
        assert subspace["singular_values"] == pytest.approx(expected.tolist(), rel=1e-6)


def test_attention_is_shared_out_among_the_roles(found):
    for row in found.rows.values():
        assert list(row["role_attention_mean"]) == ROLES
        assert sum(row["role_attention_mean"].values()) == pytest.approx(1, abs=1e-6)
        assert row["role_attention_mean"]["support_write_value"] == pytest.approx(
            row["support_value_attention_mean"], rel=1e-9
        )


def test_entropy_is_at_most_that_of_even_attention(lake, found):
    even = np.mean([math.log(event.prediction + 1) for event in load_events(lake, RUN, "probe")])
    assert all(0 < row["attention_entropy_mean"] <= even + 1e-6 for row in found.rows.values())


def test_summary_ranks_heads_and_finds_the_first_joint_step(found):
    summary = found.facts["summary"]
    last = max(step for step, _, _ in found.rows)
    assert summary["final_step"] == last
    final = {key[1:]: row for key, row in found.rows.items() if key[0] == last}
    for ranking, column, way in (
        ("by_support_value_attention", "support_value_attention_mean", -1),
        ("by_support_value_qk_margin", "support_value_qk_margin_mean", -1),
        ("by_qk_key_subspace_alignment", "qk_key_key_subspace_alignment", -1),
        ("by_attended_ov_value_margin", "attended_ov_value_margin_mean", -1),
        ("by_ov_output_value_subspace_alignment", "ov_output_value_subspace_alignment", -1),
        ("by_low_entropy", "attention_entropy_mean", 1),
    ):
        wanted = sorted(final.values(), key=lambda row: way * row[column])[:8]
        assert [row["head_label"] for row in summary["top_final_heads"][ranking]] == [
            row["head_label"] for row in wanted
        ]
    for row in summary["first_positive_joint_geometry"]:
        steps = [
            step
            for (step, layer, head), of in found.rows.items()
            if (layer, head) == (row["layer"], row["head"])
            and of["support_value_qk_margin_mean"] > 0
            and of["support_value_attention_margin_mean"] > 0
            and of["attended_ov_value_margin_mean"] > 0
        ]
        assert row["first_step"] == (min(steps) if steps else None)


def test_chart_rows(found):
    last = max(step for step, _, _ in found.rows)
    assert [row["role"] for row in found.heads[:16]] == ROLES
    assert found.heads[3]["attention"] == found.rows[last, 0, 0]["role_attention_mean"]["support_write_value"]
    best = [row["value"] for row in found.summary if row["series"] == "best QK margin"]
    assert best[-1] == max(
        row["support_value_qk_margin_mean"] for key, row in found.rows.items() if key[0] == last
    )


def test_the_finding_names_the_head_that_reads_the_support_value(found):
    last = max(step for step, _, _ in found.rows)
    reader = max(
        (row for key, row in found.rows.items() if key[0] == last),
        key=lambda row: row["support_value_attention_mean"],
    )
    assert found.findings[0].startswith(
        f"At step {last} **{reader['head_label']}** looks at the support value most"
    )
    final = {row["head_label"]: row for key, row in found.rows.items() if key[0] == last}
    sharpest = min(final, key=lambda label: final[label]["attention_entropy_mean"])
    roles = final[sharpest]["role_attention_mean"]
    assert f"sharpest head is **{sharpest}**" in found.findings[1]
    assert f"on `{max(roles, key=roles.get)}`, " in found.findings[1]
    assert found.warnings == []


def test_a_split_is_measured_alone(lake):
    events = [event for event in load_events(lake, RUN, "probe") if event.split == "heldout_pairs"]
    with Results(lake, asked(split=("heldout_pairs",), steps="last")) as results:
        rows = results.rows("FROM rows")
        (checkpoint,) = results.rows("FROM checkpoint")
    means, _, margin = measure(events, Decoder(load_weights(lake, RUN, 150), HEADS))
    assert {row["num_examples"] for row in rows} == {len(events)} == {checkpoint["num_query_events"]}
    assert checkpoint["answer_value_margin_mean"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
    for row in rows:
        wanted = means[row["layer"], row["head"]]["support_value_qk_margin_mean"]
        assert row["support_value_qk_margin_mean"] == pytest.approx(wanted, rel=2e-4, abs=2e-6)


def test_files_and_keys(lake, tmp_path):
    printed = run_report(lake, asked(), tmp_path / "out", chart_formats=["svg"])
    assert set(printed["plots"]) == {
        "checkpoint_summary",
        "support_value_qk_margin",
        "qk_key_subspace_alignment",
        "attended_ov_value_margin",
        "ov_output_value_subspace_alignment",
        "role_attention",
    }
    lines = [json.loads(line) for line in Path(printed["rows"]).read_text().splitlines()]
    assert len(lines) == 4 * LAYERS * HEADS
    assert list(lines[0]) == sorted(lines[0])
    assert set(lines[0]["role_attention_mean"]) == set(ROLES)
    assert len(lines[0]["svd"]["qk_query_direction_top_tokens"]) == 8
    checkpoints = [json.loads(line) for line in Path(printed["checkpoint_rows"]).read_text().splitlines()]
    assert [row["step"] for row in checkpoints] == [0, 50, 100, 150]
    report = json.loads(Path(printed["report"]).read_text())
    assert report["summary"]["top_final_heads"]["by_low_entropy"][0]["place"] == 1
    assert Path(printed["markdown"]).read_text().split("\n- ")[1].startswith("At step 150 **L")


def test_an_imported_probe_has_no_token_classes_and_roles_of_its_own(tmp_path):
    made = make_imported_lake(tmp_path / "imported.lake")
    with Results(made.lake, asked(run=made.run)) as results:
        rows = results.rows("FROM rows")
        warnings = results.report.warnings(results)
        findings = results.report.findings(results)
    assert list(rows[0]["role_attention_mean"]) == ["indirect_object", "other", "subject"]
    assert sum(rows[0]["role_attention_mean"].values()) == pytest.approx(1, abs=1e-6)
    for name in (
        "support_value_attention_mean",
        "support_value_qk_margin_mean",
        "ov_value_margin_mean",
        "qk_key_key_subspace_alignment",
        "ov_output_value_subspace_alignment",
    ):
        assert rows[0][name] is None, name
    assert rows[0]["svd"]["qk_key_direction_top_tokens"][0]["token"] is None
    assert "does not say which tokens are keys or values" in warnings[0]
    assert "No event has the role support_key or support_value or support_op" in warnings[1]
    assert len(findings) == 2
    printed = run_report(made.lake, asked(run=made.run), tmp_path / "out", chart_formats=["svg"])
    assert set(printed["plots"]) == {"checkpoint_summary", "role_attention"}
    made.lake.close()


def test_a_zero_direction_fails(tmp_path):
    def change(decomposed):
        decomposed["W_OV"][1][1, 0, 1, 0] = 0.0

    made = make_imported_lake(tmp_path / "zero.lake", change=change)
    with pytest.raises(
        ReportFailed,
        match=r"first left singular vector of L0H1 W_OV at step 2 is zero .* leave that step out",
    ):
        Results(made.lake, asked(run=made.run))
    Results(made.lake, asked(run=made.run, steps="1")).close()
    made.lake.close()


def test_what_is_missing_or_unknown_is_named(lake, trace):
    with pytest.raises(InvalidOption, match="--top-k-tokens should be greater than 0, not 0"):
        asked(top_k_tokens=0)
    with pytest.raises(InvalidOption, match=r"no option --top-k; it has .*--top-k-plot-heads"):
        asked(top_k=3)
    with pytest.raises(UnknownName, match="probe 'probe' has no split 'train'; it has"):
        Results(lake, asked(split=("train",)))
    with pytest.raises(
        MissingData, match=r"run 'r' has no probe 'ioi'; it has probe, .* lakebed probe build"
    ):
        Results(lake, asked(probe="ioi"))
    with pytest.raises(MissingData, match=r"no step of run 'r' lies in --steps 300:400"):
        Results(lake, asked(steps="300:400"))
    with pytest.raises(
        MissingData,
        match=r"needs attention for run 'r' at step 75 .*lakebed extract --for attention-geometry-trace",
    ):
        Results(lake, asked(steps="75"))
    with pytest.raises(MissingData, match="has no probe 'probe'; it has none yet"):
        Results(trace.lake, asked(run="traced"))


def test_a_top_token_whose_text_the_probe_does_not_know_has_an_id_alone():
    ids, scores = np.array([[1, 30]]), np.array([[2.0, -1.0]])
    (found,) = _token_lists(ids, scores, ["a", "b"]).to_pylist()
    assert [(token["token"], token["token_id"]) for token in found] == [("b", 1), (None, 30)]
    assert [token["token"] for token in _token_lists(ids, scores, None).to_pylist()[0]] == [None, None]

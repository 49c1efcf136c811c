"""The contextual reports on a trained run, against a decoder of their own in float64, and against published numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake import Lake
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report

from tests import trained_probe_lake
from tests.formation_lake import HEAD, STAGE

from .conftest import assert_same
from .float64_decoder import Decoder, load_events, load_weights
from .test_contextual_key_separability import loops
from .test_contextual_svd_alignment import top_directions


def written(lake, name, out, key, **options):
    printed = run_report(lake, load_report(name).parse(options), out, chart_formats=[])
    return [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]


# -- published numbers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def formation(formation_lake_path):
    with Lake.open(formation_lake_path) as lake:
        yield lake


@pytest.mark.parametrize(
    ("place", "projection", "dimensions", "ratio", "accuracy", "margin"),
    [
        (0, "qk_left", 8, 1.079676, 0.797386, 5.004684),
        (1, "qk_right", 8, 1.078736, 0.843137, 7.785824),
        (2, "qk_both", 16, 1.082450, 0.980392, 19.20278),
        (3, "full_residual", 128, 1.043982, 1.0, 210.0136),
    ],
)
def test_published_separability(formation, tmp_path, place, projection, dimensions, ratio, accuracy, margin):
    """Source: definitions, part 1, K; those were computed in float32, hence the tolerance."""
    row = written(
        formation,
        "contextual-key-separability",
        tmp_path / "out",
        "metric_rows",
        head=HEAD,
        context_stage=(STAGE,),
        projection_rank=8,
        split=("validation_iid",),
        include_full_residual=True,
        steps="0",
    )[place]
    assert (row["projection"], row["projected_dim"], row["num_vectors"]) == (projection, dimensions, 153)
    assert row["separation_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert row["nearest_centroid_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert row["nearest_centroid_margin"] == pytest.approx(margin, rel=1e-5)
    assert row["answer_margin"] == pytest.approx(-31.0178, abs=1e-4)
    assert row["answer_accuracy"] == 0


@pytest.mark.parametrize(
    ("role", "side", "mean", "identity", "everything"),
    [
        ("prediction", "left", 0.128728, 0.159893, 0.163121),
        ("prediction", "right", 0.093132, 0.111841, 0.110045),
        ("support_value", "left", 0.008302, 0.103000, 0.104327),
    ],
)
def test_published_alignment(formation, tmp_path, role, side, mean, identity, everything):
    """Source: definitions, part 1, K."""
    rows = written(
        formation,
        "contextual-svd-alignment",
        tmp_path / "out",
        "alignment_rows",
        head=HEAD,
        context_stage=STAGE,
        role=("prediction", "support_value"),
        plot_left_role="prediction",
        plot_right_role="support_value",
        split=("validation_iid",),
        steps="0",
    )
    row = next(row for row in rows if row["singular_rank"] == 1 and row["role"] == role)
    assert row[f"{side}_mean_cosine"] == pytest.approx(mean, abs=2e-6)
    assert row[f"{side}_identity_overlap"] == pytest.approx(identity, abs=2e-6)
    assert row[f"{side}_all_vector_overlap"] == pytest.approx(everything, abs=2e-6)


# -- a trained run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lake(probe_lake_path):
    with Lake.open(probe_lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def computed(lake):
    """By step: the decoder and, per event, the stages of its record."""
    events = load_events(lake, trained_probe_lake.RUN, "probe")
    found = {}
    for step in (0, 150):
        decoder = Decoder(load_weights(lake, trained_probe_lake.RUN, step), heads=4)
        records = {event.example: decoder.forward(np.array(event.tokens)) for event in events}
        found[step] = (decoder, records)
    return events, found


def qk_form(decoder, layer, head):
    """W_QK = W_Qᵀ W_K of a head."""
    return decoder.slice(layer, head, "q")[0].T @ decoder.slice(layer, head, "k")[0]


def close(rows, wanted, rel):
    for row, expected in zip(rows, wanted, strict=True):
        assert_same(row, expected, rel=rel, near=2e-5)


@pytest.mark.parametrize(
    ("role", "group_by"), [("prediction", "query_key"), ("support_value", "support_key")]
)
def test_separability_of_a_trained_run(lake, computed, tmp_path, role, group_by):
    events, found = computed
    rows = written(
        lake,
        "contextual-key-separability",
        tmp_path / "out",
        "metric_rows",
        head="L1H1",
        context_stage=("layer_0_post_mlp", "layer_1_post_attn"),
        context_role=role,
        group_by=group_by,
        projection_rank=3,
        include_full_residual=True,
        steps="0,150",
    )
    wanted = []
    for step, (decoder, records) in found.items():
        left, sigma, right = np.linalg.svd(qk_form(decoder, 1, 1))
        left, right = left[:, :3], right[:3].T
        bases = [left, right, np.linalg.qr(np.concatenate([left, right], 1))[0], np.eye(len(left))]
        margins = [margin(records[event.example].logits[event.prediction], event) for event in events]
        for stage in ("layer_0_post_mlp", "layer_1_post_attn"):
            vectors = [records[event.example].stages[stage][event.roles[role][0]] for event in events]
            tokens = [event.tokens[event.roles[group_by][0]] for event in events]
            for basis in bases:
                wanted.append(
                    {
                        "checkpoint_step": step,
                        "context_stage": stage,
                        "qk_singular_value_top": float(sigma[0]),
                        **loops([basis.T @ vector for vector in vectors], tokens),
                        "answer_margin": float(np.mean(margins)),
                    }
                )
    close(rows, wanted, rel=2e-5)


def margin(logits, event):
    return logits[event.answer] - max(logits[token] for token in event.competitors if token != event.answer)


def test_alignment_of_a_trained_run(lake, computed, tmp_path):
    events, found = computed
    specs = {"prediction": ("prediction", None), "codes": ("support_value", "support_key")}
    rows = written(
        lake,
        "contextual-svd-alignment",
        tmp_path / "out",
        "alignment_rows",
        head="L1H1",
        context_stage="layer_0_post_mlp",
        role=("prediction",),
        role_spec=("codes:position_role=support_value,group_by=support_key",),
        plot_left_role="prediction",
        plot_right_role="codes",
        top_ranks=3,
        pca_rank=3,
        steps="0,150",
    )
    wanted = []
    for step, (decoder, records) in found.items():
        left, sigma, right = np.linalg.svd(qk_form(decoder, 1, 1))
        spaces = {}
        for label, (role, group_by) in specs.items():
            vectors = [records[e.example].stages["layer_0_post_mlp"][e.roles[role][0]] for e in events]
            tokens = [e.tokens[e.roles[group_by or role][0]] for e in events]
            means = [
                np.mean([v for v, t in zip(vectors, tokens, strict=True) if t == token], 0)
                for token in sorted(set(tokens))
            ]
            middle = np.mean(vectors, 0)
            spaces[label] = (
                middle / np.linalg.norm(middle),
                top_directions(means, 3)[0],
                top_directions(vectors, 3)[0],
                len(means),
            )
        for rank in range(3):
            for label, (middle, identity, everything, tokens) in spaces.items():
                row = {
                    "checkpoint_step": step,
                    "singular_rank": rank + 1,
                    "singular_value": float(sigma[rank]),
                    "role": label,
                    "role_num_unique_tokens": tokens,
                }
                for side, u in (("left", left[:, rank]), ("right", right[rank])):
                    row[f"{side}_mean_cosine"] = float(abs(u @ middle))
                    row[f"{side}_identity_overlap"] = float(np.linalg.norm(identity.T @ u))
                    row[f"{side}_all_vector_overlap"] = float(np.linalg.norm(everything.T @ u))
                wanted.append(row)
    close(rows, wanted, rel=1e-4)


def test_every_role_reads_at_every_grouping_of_the_task(lake, tmp_path):
    """The guide's choices all work on the task's own probe, where the groups have two vectors."""
    for number, group_by in enumerate(("position_token", "query_key", "support_key")):
        rows = written(
            lake,
            "contextual-key-separability",
            tmp_path / str(number),
            "metric_rows",
            head="L1H1",
            context_stage=("layer_0_post_mlp",),
            group_by=group_by,
            steps="last",
        )
        # The read key, the support's key and the token at the prediction are one token on this task.
        ratios = [row["separation_ratio"] for row in rows]
        if number == 0:
            first = ratios
        assert ratios == first


@pytest.mark.parametrize("name", ["contextual-key-separability", "contextual-svd-alignment"])
def test_the_demo_options_fit_the_demo_task(lake, tmp_path, name):
    printed = run_report(lake, load_report(name).parse(load_report(name).demo_options), tmp_path / "out")
    assert "trajectory" in printed["plots"]
    assert "L1H1" in Path(printed["markdown"]).read_text()

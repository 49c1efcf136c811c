"""geometry-subspace-intervention against a float64 decoder with projections put in, on a trained run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from altair.utils.schemapi import validate_jsonschema
from altair.vegalite.v6.schema.core import load_schema
from lakebed.engine.scalars import ScalarError
from lakebed.engine.subspaces import SubspaceError
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.drawing import specification
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from .float64_decoder import Decoder, best_wrong, load_events, load_weights
from .route_reference import positions, resume, span

RUN, HEADS, STEPS = "r", 4, (50, 150)
SPLITS = ("counterfactual", "heldout_pairs", "structural_ood", "validation_iid")
BASE = {
    "run": RUN,
    "steps": "50,150",
    "stage": "layer_0_post_mlp",
    "subspace": "embedding_value_identity",
    "rank": 5,
    "operation": "remove",
    "position_role": "support_value",
    "query_mode": "single_query",
}
CASES = {
    "removed": {},
    "removed together": {"query_mode": "batch_union"},
    "kept": {"operation": "keep"},
    "kept together": {"operation": "keep", "query_mode": "batch_union", "num_controls": 2},
    "key kept late": {
        "operation": "keep",
        "subspace": "embedding_key_identity",
        "rank": 3,
        "stage": "layer_1_post_mlp",
        "position_role": "prediction",
        "num_controls": 2,
        "control_seed": 5,
    },
    "head's query side": {
        "subspace": "head_qk_query",
        "head": "L1H1",
        "rank": 4,
        "position_role": "query_key",
        "query_mode": "batch_union",
    },
    "head's output": {
        "subspace": "head_ov_output",
        "head": "2",
        "head_layer": 0,
        "rank": 8,
        "stage": "layer_1_post_attn",
        "position_role": "prediction",
    },
    "head's input, prefix": {
        "subspace": "head_ov_input",
        "head": "L0H3",
        "rank": 2,
        "stage": "embedding",
        "position_role": "causal_prefix",
    },
    "at the end": {"stage": "final_norm", "position_role": "prediction", "query_mode": "batch_union"},
    "prefix together": {"position_role": "causal_prefix", "query_mode": "batch_union", "num_controls": 0},
}
NEAR = {"rel": 1e-4, "abs": 3e-5}


def asked(**options):
    return load_report("geometry-subspace-intervention").parse({**BASE, **options})


@pytest.fixture(scope="module")
def lake(probe_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("removed") / "a.lake"
    shutil.copytree(probe_lake_path, path)
    with Lake.open(path) as opened:
        for options in CASES.values():
            extract(opened, RUN, asked(**options).needs(), "50,150")
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    """Events, decoders by step, and ids of key and value tokens."""
    keys, values = lake.sql("SELECT key_tokens, value_tokens FROM probes WHERE probe = 'probe'").fetchall()[0]
    decoders = {step: Decoder(load_weights(lake, RUN, step), HEADS) for step in STEPS}
    events = load_events(lake, RUN, "probe")
    passes = {step: {} for step in STEPS}
    for step, decoder in decoders.items():
        for event in events:
            if event.example not in passes[step]:
                passes[step][event.example] = decoder.forward(np.array(event.tokens))
    return events, decoders, passes, {"key": keys, "value": values}


def random_columns(width, rank, seed):
    """The draw that a seed stands for; its span by Gram-Schmidt."""
    drawn = torch.randn(
        width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).numpy()
    columns = []
    for of in drawn.T:
        for held in columns:
            of = of - held * (held @ of)
        columns.append(of / np.linalg.norm(of))
    return np.array(columns).T


def answer(logits, event):
    wrong = best_wrong(logits, event.answer, event.competitors)
    return logits[event.answer] - logits[wrong], int(logits.argmax() == event.answer)


def intervened(world, report, step, columns):
    """Margin and correctness of every event, with one projection put into its run or its record's."""
    events, decoders, passes, _ = world
    done, found = {}, []
    for event in events:
        own = (
            [event]
            if report.query_mode == "single_query"
            else [e for e in events if e.example == event.example]
        )
        key = event.example, len(own) > 1 or event.query_index
        if key not in done:
            x = passes[step][event.example].stages[report.stage].copy()
            at = sorted({place for of in own for place in positions(of, report.position_role)})
            inside = x[at] @ columns @ columns.T
            x[at] = inside if report.operation == "keep" else x[at] - inside
            done[key] = resume(decoders[step], report.stage, x)
        found.append(answer(done[key][event.prediction], event))
    return np.array(found)


def expected(world, report, step):
    """Untouched, with the subspace changed, and with each control: `Float64[event, (margin, correct)]`."""
    events, decoders, passes, tokens = world
    untouched = np.array([answer(passes[step][e.example].logits[e.prediction], e) for e in events])
    head = report._route().head_label
    columns = span(
        decoders[step], report.subspace, report.rank, head and (int(head[1]), int(head[3])), tokens
    )
    width = decoders[step].weights["token_embedding.weight"].shape[1]
    controls = [
        intervened(world, report, step, random_columns(width, report.rank, report.control_seed + number))
        for number in range(report.num_controls)
    ]
    return untouched, intervened(world, report, step, columns), controls


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_a_float64_decoder_with_a_projection_put_in(lake, world, case):
    report, events = asked(**CASES[case]), world[0]
    with Results(lake, report) as results:
        report.check(results)
        query_rows = results.rows("FROM query_rows")
        aggregates = {(row["step"], row["split"]): row for row in results.rows("FROM aggregate_rows")}
        controls = {
            (row["step"], row["split"], row["control_seed"]): row for row in results.rows("FROM control_rows")
        }
    assert len(query_rows) == len(STEPS) * len(events)
    assert len(controls) == len(STEPS) * (1 + len(SPLITS)) * report.num_controls
    rows = iter(query_rows)
    for step in STEPS:
        untouched, changed, drawn = expected(world, report, step)
        drop = untouched - changed
        assert np.abs(drop[:, 0]).max() > 0.01
        for number, event in enumerate(events):
            row = next(rows)
            assert (row["step"], row["split"], row["sample_id"]) == (step, event.split, event.sample_id)
            assert row["query_id"] == f"{event.split}:{event.sample_id}:{event.query_index}"
            assert row["baseline_margin"] == pytest.approx(untouched[number, 0], **NEAR)
            assert row["intervened_margin"] == pytest.approx(changed[number, 0], **NEAR)
            assert row["margin_drop"] == pytest.approx(drop[number, 0], rel=1e-4, abs=1e-4)
            assert row["accuracy_drop_indicator"] == drop[number, 1]
            assert (row["baseline_correct"], row["intervened_correct"]) == (
                untouched[number, 1],
                changed[number, 1],
            )
            assert row["patched_positions"] == positions(event, report.position_role)
            assert row["patched_position_count"] == len(row["patched_positions"])
            assert row["query_key"] == event.texts[event.prediction]
            assert row["answer_value"] == event.texts[event.prediction + 1]
            assert row["answer_pair_type"] == ("heldout" if event.split == "heldout_pairs" else "seen")
            if drawn:
                mean = np.mean([untouched[number] - of[number] for of in drawn], 0)
                assert row["random_margin_drop_mean"] == pytest.approx(mean[0], rel=1e-4, abs=1e-4)
                assert row["random_accuracy_drop_mean"] == pytest.approx(mean[1])
        for split in ("__all__", *SPLITS):
            mine = [n for n, event in enumerate(events) if split in ("__all__", event.split)]
            row = aggregates[step, split]
            compare(row, untouched[mine], changed[mine])
            for seed, of in enumerate(drawn, report.control_seed):
                compare(controls[step, split, seed], untouched[mine], of[mine])
            if drawn:
                random = np.array([(untouched[mine] - of[mine]).mean(0) for of in drawn])
                assert row["random_margin_drop_mean"] == pytest.approx(
                    random[:, 0].mean(), rel=1e-4, abs=1e-4
                )
                assert row["random_margin_drop_std"] == pytest.approx(random[:, 0].std(), rel=1e-3, abs=1e-4)
                assert row["random_accuracy_drop"] == pytest.approx(random[:, 1].mean())
                excess = (untouched[mine] - changed[mine])[:, 0].mean() - random[:, 0].mean()
                assert row["excess_margin_drop_mean"] == pytest.approx(excess, rel=1e-4, abs=1e-4)
            else:
                assert row["random_margin_drop_mean"] is None


def compare(row, before, after):
    drop = before - after
    near = (np.abs(drop[:, 0]) < 1e-4).mean() + 1e-9
    wanted = {
        "baseline_margin_mean": before[:, 0].mean(),
        "intervened_margin_mean": after[:, 0].mean(),
        "margin_drop_mean": drop[:, 0].mean(),
        "margin_drop_abs_mean": np.abs(drop[:, 0]).mean(),
        "baseline_accuracy": before[:, 1].mean(),
        "intervened_accuracy": after[:, 1].mean(),
        "accuracy_drop": drop[:, 1].mean(),
    }
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert row["margin_drop_positive_fraction"] == pytest.approx((drop[:, 0] > 0).mean(), abs=near)
    assert row["margin_drop_negative_fraction"] == pytest.approx((drop[:, 0] < 0).mean(), abs=near)
    assert row["num_query_events"] == len(before)


def test_files_keys_and_summary(lake, tmp_path):
    report = asked(**CASES["head's output"])
    printed = run_report(lake, report, tmp_path / "out", chart_formats=["svg"])
    assert {"query_rows", "aggregate_rows", "control_rows"} <= printed.keys()
    assert set(printed["plots"]) == {"margin_drop", "accuracy_drop", "query_margin_drop_histogram"}
    rows = [json.loads(line) for line in Path(printed["query_rows"]).read_text().splitlines()]
    content = json.loads(Path(printed["report"]).read_text())
    summary = content["summary"]
    last = [row for row in rows if row["step"] == 150]
    assert summary["final_all"]["step"] == summary["final_step"] == 150
    assert {row["split"] for row in summary["final_by_split"]} == {"__all__", *SPLITS}
    for sign, name in ((1, "positive"), (-1, "negative")):
        top = summary[f"top_final_{name}_margin_drop_queries"]
        drops = sorted(
            (sign * row["margin_drop"] for row in last if sign * row["margin_drop"] > 0), reverse=True
        )
        assert [sign * row["margin_drop"] for row in top] == drops[:16]
    assert "without" in Path(printed["markdown"]).read_text().lower()
    assert f"of {len(last):,} query events" in content["findings"][0]


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("case", ["kept together", "prefix together"])
def test_charts_keep_to_the_schema_and_overlapping_bars_are_both_seen(lake, case, interactive):
    report = asked(**CASES[case])
    with Results(lake, report) as results:
        for chart in report.charts:
            spec = specification(chart, results.frame(chart.view), "about", interactive)
            validate_jsonschema(json.loads(json.dumps(spec)), load_schema())
    assert 0 < spec["mark"]["opacity"] < 1
    assert (spec["encoding"]["color"].get("legend") is not None) == bool(report.num_controls)


def test_the_subspace_is_described(lake, world):
    _, decoders, _, tokens = world
    for case, more in {
        "removed": {"subspace_type": "embedding_identity", "token_class": "value", "num_tokens": 16},
        "head's output": {
            "subspace_type": "head_singular_vectors",
            "matrix": "OV",
            "side": "output",
            "head_layer": 0,
            "head": 2,
            "head_label": "L0H2",
            "head_dim": 8,
        },
    }.items():
        report = asked(**CASES[case])
        with Results(lake, report) as results:
            found = report.facts(lake, results)["subspace"]
        decoder = decoders[150]
        if report.subspace == "embedding_value_identity":
            matrix = decoder.weights["token_embedding.weight"][tokens["value"]]
            matrix = matrix - matrix.mean(0)
            available = 15
        else:
            matrix, available = decoder.slice(0, 2, "v")[0].T @ decoder.head_output(0, 2).T, 8
        sigma = np.linalg.svd(matrix)[1][: report.rank]
        assert found.pop("singular_values") == pytest.approx(sigma.tolist(), rel=1e-6)
        assert found == {
            "subspace_name": report.subspace,
            "selected_rank": report.rank,
            "available_rank": available,
            "ambient_dim": 32,
            "basis_svd_device": "cpu",
            **more,
        }


def test_forty_bins_hold_every_query_of_the_last_step(lake, world):
    for case in ("kept together", "prefix together"):
        report = asked(**CASES[case])
        with Results(lake, report) as results:
            bins = results.rows("FROM histogram")
            drops = np.array([row["margin_drop"] for row in results.rows("FROM query_rows WHERE step = 150")])
            span_of = results.rows(
                "SELECT min(margin_drop) AS low, max(margin_drop) AS high FROM outcomes WHERE step = 150"
            )
        counts, edges = np.histogram(drops, 40, (span_of[0]["low"], span_of[0]["high"]))
        mine = [row for row in bins if row["series"] == report.subspace]
        assert [row["queries"] for row in mine] == counts[counts > 0].tolist()
        assert [row["start"] for row in mine] == pytest.approx(edges[:-1][counts > 0].tolist())
        random = sum(row["queries"] for row in bins if row["series"] != report.subspace)
        assert random == pytest.approx(len(drops) if report.num_controls else 0)


def test_one_split_is_that_split_of_all_of_them(lake):
    whole, part = asked(), asked(split=("heldout_pairs",))
    with Results(lake, whole) as results:
        wanted = results.rows("SELECT * EXCLUDE (split) FROM aggregate_rows WHERE split = 'heldout_pairs'")
    with Results(lake, part) as results:
        assert results.rows("SELECT * EXCLUDE (split) FROM aggregate_rows WHERE split = '__all__'") == wanted
        assert {row["series"] for row in results.rows("FROM drop_chart")} == {
            "heldout_pairs",
            "random subspace",
        }
    assert whole.needs() == part.needs()


def test_findings_compare_with_the_control_and_warn_without_one(lake):
    report = asked(**CASES["key kept late"])
    with Results(lake, report) as results:
        found, last = report.findings(results), results.first("FROM final_all")
    assert "With nothing but rank 3 of **embedding_key_identity** at `layer_1_post_mlp`" in found[0]
    assert "over 2 seeds" in found[1]
    assert ("more" if last["excess_margin_drop_mean"] > 0 else "less") in found[1]
    without = asked(**CASES["prefix together"])
    with Results(lake, without) as results:
        assert any("nobody knows" in line for line in without.warnings(results))
        assert not any("random" in line for line in without.findings(results))
    untrained = asked(steps="50")
    with Results(lake, untrained) as results:
        assert any("there is no answer yet" in line for line in untrained.warnings(results))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"subspace": "full_residual"},
            "--operation remove needs a subspace: full_residual is the whole vector",
        ),
        ({"subspace": "head_qk_query"}, "head_qk_query is of a head: it needs head_layer and head"),
        ({"subspace": "head_qk_query", "head": "1"}, "head_qk_query is of a head"),
        ({"head": "L0H1"}, "embedding_value_identity is of no head: it takes no head_layer and head"),
        (
            {"subspace": "head_qk_query", "head": "L1H1", "head_layer": 0},
            "head L1H1 and head_layer 0 disagree",
        ),
        ({"subspace": "z"}, "--subspace"),
        ({"operation": "patch"}, "--operation should be 'remove' or 'keep'"),
        ({"query_mode": "all"}, "--query-mode should be 'single_query' or 'batch_union'"),
        ({"rank": 0}, "--rank should be greater than 0"),
        ({"rank": None}, "--rank is required"),
        ({"num_controls": -1}, "--num-controls should be greater than or equal to 0"),
        ({"control_seed": -1}, "--control-seed should be greater than or equal to 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        asked(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"rank": 16},
            InvalidOption,
            "--rank 16 exceeds that of embedding_value_identity, which is at most 15: 16 tokens",
        ),
        (
            {"subspace": "embedding_key_identity"},
            InvalidOption,
            "--rank 5 exceeds that of embedding_key_identity",
        ),
        (
            {"subspace": "head_ov_input", "head": "L0H1", "rank": 9},
            InvalidOption,
            "--rank 9 exceeds the width of a head, 8",
        ),
        ({"subspace": "head_ov_input", "head": "L2H1"}, UnknownName, "no head L2H1"),
        ({"stage": "layer_2_post_mlp"}, UnknownName, "no stage 'layer_2_post_mlp'"),
        ({"position_role": "z"}, UnknownName, "no role 'z'"),
        ({"split": ("train",)}, UnknownName, "no split 'train'"),
        ({"probe": "z"}, MissingData, "no probe 'z'"),
        (
            {"position_role": "value_distractors"},
            InvalidOption,
            "Intervention positions must be in the causal prefix: role 'value_distractors' lies after the prediction in",
        ),
        (
            {"rank": 4},
            MissingData,
            r"needs interventions for run 'r' .*lakebed extract --for geometry-subspace-intervention .*--rank 4",
        ),
    ],
)
def test_what_a_run_does_not_have_is_named(lake, options, error, message):
    with pytest.raises(error, match=message):
        Results(lake, asked(**options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"position_role": "value_distractors"},
            ScalarError,
            r"Intervention positions must be in the causal prefix: .* of \d+ query events",
        ),
        (
            {"rank": 16},
            SubspaceError,
            "rank 16 exceeds that of subspace embedding_value_identity, which is 15",
        ),
        ({"probe": "z"}, MissingData, "no probe 'z'"),
    ],
)
def test_extraction_refuses_the_same(lake, options, error, message):
    with pytest.raises(error, match=message):
        extract(lake, RUN, asked(**options).needs(), "150")

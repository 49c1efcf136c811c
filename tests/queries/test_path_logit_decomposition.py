"""path-logit-decomposition against a float64 decoder that reads the tokens alone, on a trained run."""

import json
from pathlib import Path

import numpy as np
import pytest
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from .float64_decoder import Decoder, best_wrong, load_events, load_weights
from .imported_lake import make_imported_lake

RUN, HEADS, LAYERS, STEP = "r", 4, 2, 150
STAGES = (
    "embedding",
    "layer_0_post_attn",
    "layer_0_post_mlp",
    "layer_1_post_attn",
    "layer_1_post_mlp",
    "final_norm",
)
NEAR = {"rel": 2e-4, "abs": 2e-6}


def asked(**options):
    return load_report("path-logit-decomposition").parse({"run": RUN, **options})


@pytest.fixture(scope="module")
def lake(probe_lake_path):
    with Lake.open(probe_lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def found(lake):
    with Results(lake, asked(ablation_step=(50, STEP), ablation_top_k=2)) as results:
        report = results.report
        views = (
            "checkpoint",
            "stage",
            "component",
            "ablation",
            "closure",
            "ablation_agreement",
            "ablation_chart",
        )
        views += ("top_positive_components", "top_negative_components", "final_ablation", "component_chart")
        yield {
            **{view: results.rows(f"FROM {view}") for view in views},
            "facts": report.facts(lake, results),
            "findings": report.findings(results),
            "warnings": report.warnings(results),
        }


@pytest.fixture(scope="module")
def events(lake):
    return load_events(lake, RUN, "probe")


@pytest.fixture(scope="module")
def weights(lake):
    return load_weights(lake, RUN, STEP)


def run_all(decoder, events):
    """Forward pass of every event's record, one pass per record."""
    passes = {}
    for event in events:
        if event.example not in passes:
            passes[event.example] = decoder.forward(np.array(event.tokens))
    return [passes[event.example] for event in events]


def answers(decoder, events):
    """Margin and correctness of every event."""
    found = []
    for event, forward in zip(events, run_all(decoder, events), strict=True):
        logits = forward.logits[event.prediction]
        wrong = best_wrong(logits, event.answer, event.competitors)
        found.append((logits[event.answer] - logits[wrong], float(logits.argmax() == event.answer)))
    return np.array(found)


def writes_of(decoder, forward, at):
    """What each additive part of the last residual stage writes at one position."""
    parts = {"embedding": forward.stages["embedding"][at]}
    for layer in range(LAYERS):
        for head in range(HEADS):
            mixed = forward.probabilities[layer, head][at] @ forward.values[layer, head]
            parts[f"L{layer}H{head}"] = decoder.head_output(layer, head) @ mixed
        parts[f"L{layer}.attention_bias"] = decoder.weights[f"blocks.{layer}.attn.out_proj.bias"]
        before, after = (forward.stages[f"layer_{layer}_post_{part}"][at] for part in ("attn", "mlp"))
        parts[f"L{layer}MLP"] = after - before
    return parts


def differentiate(function, at, size=1e-6):
    """Gradient by central differences, a way the extractor does not take."""
    moves = np.eye(len(at)) * size
    return np.array([(function(at + move) - function(at - move)) / (2 * size) for move in moves])


@pytest.fixture(scope="module")
def contributions(weights, events):
    """Per event: differentiated and frozen contribution of every component."""
    decoder = Decoder(weights, HEADS)
    unembedding, gain, bias = (
        weights[f"{name}"] for name in ("token_embedding.weight", "final_norm.weight", "final_norm.bias")
    )
    rows = []
    for event, forward in zip(events, run_all(decoder, events), strict=True):
        logits = forward.logits[event.prediction]
        wrong = best_wrong(logits, event.answer, event.competitors)
        direction = unembedding[event.answer] - unembedding[wrong]
        residual = forward.stages["layer_1_post_mlp"][event.prediction]
        gradient = differentiate(lambda x, of=direction: decoder.norm("final_norm", x) @ of, residual)
        scale = np.sqrt(residual.var() + 1e-5)
        row = {"final_norm_bias": (0.0, bias @ direction)}
        for name, write in writes_of(decoder, forward, event.prediction).items():
            row[name] = (write @ gradient, ((write - write.mean()) / scale * gain) @ direction)
        rows.append(row)
    return rows


def test_components_are_those_of_the_float64_decoder(found, events, contributions, weights):
    baseline = answers(Decoder(weights, HEADS), events)
    for split in ("__all__", *sorted({event.split for event in events})):
        chosen = [i for i, event in enumerate(events) if split in ("__all__", event.split)]
        rows = [row for row in found["component"] if row["step"] == STEP and row["split"] == split]
        assert {row["component_id"] for row in rows} == set(contributions[0])
        for row in rows:
            values = np.array([contributions[i][row["component_id"]] for i in chosen])
            for place, name in enumerate(("direct", "frozen")):
                column = f"{name}_margin_contribution"
                assert row[f"{column}_mean"] == pytest.approx(values[:, place].mean(), **NEAR), row
                assert row[f"{column}_abs_mean"] == pytest.approx(np.abs(values[:, place]).mean(), **NEAR)
                # A contribution within rounding of zero may fall on either side.
                unsure = (np.abs(values[:, place]) < 1e-5).mean() * (row["component_id"] != "final_norm_bias")
                for sign, fraction in ((1, "positive_fraction"), (-1, "negative_fraction")):
                    wanted = (sign * values[:, place] > 0).mean()
                    assert row[f"{column}_{fraction}"] == pytest.approx(wanted, abs=unsure + 1e-9)
            assert row["num_query_events"] == len(chosen)
            assert row["baseline_margin_mean"] == pytest.approx(baseline[chosen, 0].mean(), **NEAR)
            assert row["baseline_accuracy"] == pytest.approx(baseline[chosen, 1].mean())


def test_the_frozen_column_sums_to_the_margin_and_the_differentiated_one_to_nearly_nothing(found):
    for checkpoint in found["checkpoint"]:
        parts = [
            row
            for row in found["component"]
            if (row["step"], row["split"]) == (checkpoint["step"], checkpoint["split"])
        ]
        assert len(parts) == 2 + LAYERS * (HEADS + 2)
        frozen = sum(row["frozen_margin_contribution_mean"] for row in parts)
        assert frozen == pytest.approx(checkpoint["baseline_margin_mean"], abs=1e-5)
        direct = sum(row["direct_margin_contribution_mean"] for row in parts)
        size = sum(row["direct_margin_contribution_abs_mean"] for row in parts)
        assert abs(direct) < 0.02 * size
    assert 0 <= found["facts"]["frozen_sum_largest_difference"] < 1e-4


def test_stages_are_read_with_their_own_best_wrong_token(found, events, weights):
    decoder = Decoder(weights, HEADS)
    passes = run_all(decoder, events)
    unembedding = weights["token_embedding.weight"]
    rows = [row for row in found["stage"] if row["step"] == STEP and row["split"] == "__all__"]
    assert tuple(row["stage"] for row in rows) == STAGES
    for row in rows:
        margins, right = [], []
        for event, forward in zip(events, passes, strict=True):
            x = forward.stages[row["stage"]][event.prediction]
            logits = unembedding @ (x if row["stage"] == "final_norm" else decoder.norm("final_norm", x))
            wrong = best_wrong(logits, event.answer, event.competitors)
            margins.append(logits[event.answer] - logits[wrong])
            right.append(logits.argmax() == event.answer)
        assert row["readout_margin_mean"] == pytest.approx(np.mean(margins), **NEAR)
        assert row["readout_accuracy"] == pytest.approx(np.mean(right))
        assert row["num_query_events"] == len(events)


def without(weights, component):
    """The weights of a model that lacks a component: its columns of W_O, or the MLP's output and bias, are zero."""
    changed = {name: array.copy() for name, array in weights.items()}
    layer = int(component[1])
    if component.endswith("MLP"):
        changed[f"blocks.{layer}.ff.fc_out.weight"][:] = 0
        changed[f"blocks.{layer}.ff.fc_out.bias"][:] = 0
    else:
        width = weights["token_embedding.weight"].shape[1] // HEADS
        start = int(component[3]) * width
        changed[f"blocks.{layer}.attn.out_proj.weight"][:, start : start + width] = 0
    return Decoder(changed, HEADS)


def test_ablated_rows_are_those_of_a_model_without_the_component(found, events, weights):
    ranked = sorted(
        (
            row
            for row in found["component"]
            if row["step"] == STEP
            and row["split"] == "__all__"
            and row["component_type"] in ("attention_head", "mlp_block")
        ),
        key=lambda row: row["direct_margin_contribution_mean"],
    )
    chosen = {row["component_id"] for row in (*ranked[:2], *ranked[-2:])}
    rows = [row for row in found["ablation"] if row["step"] == STEP]
    assert {row["component_id"] for row in rows} == chosen
    baseline = answers(Decoder(weights, HEADS), events)
    splits = sorted({event.split for event in events})
    assert {row["split"] for row in rows} == {"__all__", *splits}
    components = {
        (row["split"], row["component_id"]): row for row in found["component"] if row["step"] == STEP
    }
    for component in chosen:
        ablated = answers(without(weights, component), events)
        for row in (row for row in rows if row["component_id"] == component):
            of = [i for i, event in enumerate(events) if row["split"] in ("__all__", event.split)]
            drop = baseline[of].mean(0) - ablated[of].mean(0)
            assert row["ablated_margin_mean"] == pytest.approx(ablated[of, 0].mean(), **NEAR)
            assert row["margin_drop"] == pytest.approx(drop[0], rel=1e-3, abs=1e-5)
            assert row["ablated_accuracy"] == pytest.approx(ablated[of, 1].mean())
            assert row["accuracy_drop"] == pytest.approx(drop[1])
            own, everywhere = components[row["split"], component], components["__all__", component]
            assert row["direct_margin_contribution_mean"] == own["direct_margin_contribution_mean"]
            assert (
                row["direct_margin_contribution_mean_all_splits"]
                == everywhere["direct_margin_contribution_mean"]
            )


def test_top_lists_hold_heads_and_mlps_by_strict_sign(found):
    positive, negative = found["top_positive_components"], found["top_negative_components"]
    assert all(row["direct_margin_contribution_mean"] > 0 for row in positive)
    assert all(row["direct_margin_contribution_mean"] < 0 for row in negative)
    assert {row["component_type"] for row in (*positive, *negative)} <= {"attention_head", "mlp_block"}
    assert len(positive) + len(negative) == LAYERS * (HEADS + 1)
    assert {row["component_type"] for row in found["component_chart"]} == {"attention_head", "mlp_block"}


def test_both_ablated_steps_are_drawn_and_agreement_is_of_the_last(found):
    assert {row["step"] for row in found["ablation_chart"]} == {50, STEP}
    (agreement,) = found["ablation_agreement"]
    last = found["final_ablation"]
    x, y = np.array([(row["direct_margin_contribution_mean"], row["margin_drop"]) for row in last]).T
    assert agreement["components"] == len(last) == 4
    assert agreement["same_sign"] == (x * y > 0).sum()
    assert agreement["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert [row["margin_drop"] for row in last] == sorted(y, reverse=True)
    assert found["warnings"] == []


def test_findings_name_the_carrier_and_the_costliest_ablation(found):
    parts = [
        row
        for row in found["component"]
        if row["step"] == STEP
        and row["split"] == "__all__"
        and row["component_type"] in ("attention_head", "mlp_block")
    ]
    carrier = max(parts, key=lambda row: row["frozen_margin_contribution_mean"])
    assert f"**{carrier['component_id']}** gives most" in found["findings"][0]
    assert (
        f"Zeroing **{found['final_ablation'][0]['component_id']}** at step {STEP} costs most"
        in found["findings"][-1]
    )


def test_files_and_keys(lake, tmp_path):
    printed = run_report(lake, asked(), tmp_path / "out", chart_formats=["svg"])
    assert {"component_trajectory", "stage_readout", "ablation_vs_dla"} <= set(printed["plots"])
    for key, count in (("component_rows", 4 * 5 * 14), ("stage_rows", 4 * 5 * 6), ("checkpoint_rows", 4 * 5)):
        assert len(Path(printed[key]).read_text().splitlines()) == count, key
    ablation = [json.loads(line) for line in Path(printed["ablation_rows"]).read_text().splitlines()]
    assert {row["step"] for row in ablation} == {STEP}
    assert len({row["component_id"] for row in ablation}) == 6
    markdown = Path(printed["markdown"]).read_text()
    assert "never to the margin" in markdown
    assert "adds up to the margin" in markdown


def test_without_ablation_there_is_nothing_to_zero_and_no_such_chart(lake, tmp_path):
    assert [need.dataset for need in asked(ablation_top_k=0).needs()] == ["readouts", "component_logits"]
    printed = run_report(lake, asked(ablation_top_k=0), tmp_path / "out", chart_formats=["svg"])
    assert "ablation_vs_dla" not in printed["plots"]
    assert Path(printed["ablation_rows"]).read_text() == ""
    assert "Nothing was zeroed" in Path(printed["markdown"]).read_text()


def test_parts_that_do_not_add_up_fail(tmp_path):
    made = make_imported_lake(tmp_path / "sound.lake")
    run_report(made.lake, asked(run=made.run, ablation_top_k=0), tmp_path / "sound", chart_formats=[])
    made.lake.close()
    broken = make_imported_lake(tmp_path / "broken.lake", off_by=0.01)
    with pytest.raises(
        ReportFailed, match=r"do not add up to its margin \(off by 0\.01.*from the same weights"
    ):
        run_report(broken.lake, asked(run=broken.run, ablation_top_k=0), tmp_path / "out", chart_formats=[])
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        MissingData, match=r"needs interventions for run 'ref' at step 1 .*--steps 1 --ablation-step 1"
    ):
        Results(broken.lake, asked(run=broken.run, ablation_step=(1,)))
    broken.lake.close()


def test_what_is_missing_or_unknown_is_named(lake, tmp_path):
    with pytest.raises(InvalidOption, match="--ablation-top-k should be greater than or equal to 0, not -1"):
        asked(ablation_top_k=-1)
    with pytest.raises(UnknownName, match="no split 'train'"):
        Results(lake, asked(split=("train",)))
    with pytest.raises(
        InvalidOption,
        match=r"--ablation-step 75 is not among .* 0:150:50; .*lakebed extract --for .* --steps 75",
    ):
        run_report(lake, asked(ablation_step=(75,)), tmp_path / "out")
    with pytest.raises(InvalidOption, match=r"--ablation-step 150 is not among the selected steps 0, 50"):
        run_report(lake, asked(steps="0,50", ablation_step=(150,)), tmp_path / "out")
    with pytest.raises(MissingData, match=r"needs readouts for run 'r' at step 75 .*lakebed extract --for"):
        Results(lake, asked(steps="75"))

"""What rows of attribution reports must hold, from values, gradients and updates in float64 (definitions 2 §E, 3 §B)."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import google_crc32c
import numpy as np
import polars as pl
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.queries.registry import load_report
from lakebed.queries.results import Results

from tests.attribution_lake import HEADS, RUN

from .separation_reference import (
    gradient,
    inner,
    keys_of,
    norm,
    qk_basis,
    rank_scores,
    separation,
)

TIED = "token_embedding.weight"


def run_report(lake, name, steps, check=True, make=True, **options):
    """Extracts what a report needs, and gives its row sets, findings, warnings and facts."""
    report = load_report(name).parse({"run": RUN, "steps": steps, **options})
    if make:
        extract(lake, RUN, report.needs(), steps)
    with Results(lake, report) as results:
        if check:
            report.check(results)
        return SimpleNamespace(
            **{row_set: results.rows(f"FROM {row_set}") for row_set in results.row_sets()},
            findings=report.findings(results),
            facts=report.facts(lake, results),
            sections={section.name: results.rows(f"FROM {section.name}") for section in results.sections},
        )


def tamper(path, change):
    """Changes a column of what training logged, and has the receipt say that it is so."""
    with Lake.open(path) as lake:
        lake.receipts.refresh(RUN)
        (receipt,) = [of for of in lake.receipts.all(RUN) if of.dataset == "trace" and 3 in of.steps]
    (entry,) = [of for of in receipt.files if of.path.startswith("tables/training_steps/")]
    file = path / entry.path
    pl.read_parquet(file).with_columns(change).write_parquet(file)
    data = file.read_bytes()
    true = replace(entry, bytes=len(data), crc32c=google_crc32c.value(data))
    entries = tuple(true if of is entry else of for of in receipt.files)
    (path / receipt.key).write_bytes(replace(receipt, files=entries).to_parquet())


def groups(w, heads):
    """Group id to its parts, as (parameter, index)."""
    whole = (slice(None),)
    found = {"global:all_named_parameters": [(name, whole) for name in w]}

    def add(group, name, index=whole):
        found.setdefault(group, []).append((name, index))

    for name, of in w.items():
        add(f"parameter:{name}", name)
        parts = name.split(".")
        if parts[0] != "blocks":
            add(f"module:{parts[0]}", name)
            continue
        layer, kind = f"L{parts[1]}", parts[2]
        add(f"module:{layer}.{ {'attn': 'attention', 'ff': 'mlp'}.get(kind, kind) }", name)
        if kind == "attn":
            projection, leaf = parts[3:]
            add(f"attention_projection:{layer}.{projection}", name)
            width = w[TIED].shape[1] // heads
            for head in range(heads):
                rows = slice(head * width, (head + 1) * width)
                if projection == "out_proj" and leaf == "bias":
                    continue
                index = (slice(None), rows) if projection == "out_proj" else (rows,)
                add(f"attention_head_projection:{layer}H{head}.{projection}", name, index)
                add(f"attention_head:{layer}H{head}.qkvo", name, index)
        elif kind == "ff" and parts[3:] != ["fc_out", "bias"]:
            for neuron in range(of.shape[1] if parts[3] == "fc_out" else of.shape[0]):
                index = (slice(None), neuron) if parts[3] == "fc_out" else (neuron,)
                add(f"mlp_neuron:{layer}N{neuron}", name, index)
    return found


def restricted(fields, parts):
    """Entries of a group, flat by part."""
    return {str(at): fields[name][index].reshape(-1) for at, (name, index) in enumerate(parts)}


def check_metric(row, before, after, gradient, update, w, prefix="score_gradient", eps=1e-9):
    """Every shared column of a metric row. `before` and `after` are values by pair."""
    before, after = np.array(before), np.array(after)
    delta = after - before
    near = {"rel": 2e-3, "abs": 2e-5}
    predicted = inner(gradient, update)
    assert row["num_pairs"] == len(before)
    for name, value in {
        "source_value": before.mean(),
        "target_value": after.mean(),
        "actual_delta": delta.mean(),
        "predicted_delta": predicted,
        "parameter_delta_l2_norm": norm(update),
        f"{prefix}_l2_norm": norm(gradient),
    }.items():
        assert row[name] == pytest.approx(float(value), **near), name
    for name, value in {
        "actual_delta_abs_mean": abs(delta).mean(),
        "actual_delta_std": delta.std(),
        "predicted_delta_counting_aliases": predicted + float((gradient[TIED] * update[TIED]).sum()),
    }.items():
        assert row[name] == pytest.approx(float(value), **near), name
    cosine = predicted / norm(gradient) / norm(update)
    assert row[f"update_{prefix}_cosine"] == pytest.approx(cosine, abs=1e-4)
    check_errors(row, eps)
    assert row["num_parameters"] == sum(of.numel() for of in w.values())
    unreached = [name for name in w if not gradient[name].any()]
    named = row[f"zero_{prefix}_parameter_names"]
    assert set(named) == set(unreached)
    assert row[f"zero_{prefix}_parameter_count"] == len(named)


def check_errors(row, eps=1e-9):
    """Columns that follow from the actual and the predicted change."""
    actual, predicted = row["actual_delta"], row["predicted_delta"]
    residual = actual - predicted
    assert row["residual"] == pytest.approx(residual, rel=1e-9, abs=1e-15)
    assert row["absolute_error"] == pytest.approx(abs(residual), rel=1e-9, abs=1e-15)
    for prefix, of in (("", actual), ("predicted_", predicted)):
        denominator = max(abs(of), eps)
        assert row[f"{prefix}relative_error_denominator"] == denominator
        assert row[f"{prefix}relative_error"] == pytest.approx(abs(residual) / denominator, rel=1e-9)
    assert row["sign_match"] == (actual * predicted > 0 or actual == predicted == 0)


def check_decomposition(rows, gradient, update, w, heads, prefix="score_gradient"):
    """Every group of one cell: its contribution, its norms, its size; and that groups of a kind add up to their whole."""
    wanted = groups(w, heads)
    found = {row["group_id"]: row for row in rows}
    assert found.keys() == wanted.keys()
    for group, row in found.items():
        g, d = restricted(gradient, wanted[group]), restricted(update, wanted[group])
        contribution = inner(g, d)
        assert row["predicted_delta_contribution"] == pytest.approx(contribution, rel=5e-3, abs=5e-6), group
        assert row["parameter_delta_l2_norm"] == pytest.approx(norm(d), rel=1e-4, abs=1e-9)
        assert row[f"{prefix}_l2_norm"] == pytest.approx(norm(g), rel=2e-3, abs=1e-6)
        size = sum(of.numel() for of in g.values())
        assert row["num_selected_parameters"] == size
        assert row["selection_count"] == len(wanted[group])
        assert row["contribution_per_parameter"] == row["predicted_delta_contribution"] / size
        product = row["parameter_delta_l2_norm"] * row[f"{prefix}_l2_norm"]
        cosine = row["predicted_delta_contribution"] / product if product else None
        key = f"update_{prefix}_cosine"
        assert row[key] == (None if cosine is None else pytest.approx(cosine, rel=1e-6))
        kind = "global_all" if group.startswith("global:") else row["partition_name"][:-1]
        assert row["group_kind"] == kind
        assert row["group_kind"] in (group.split(":")[0], "global_all", "module_block", "parameter_tensor")
        assert ("counts once" in (row["notes"] or "")) == any(name == TIED for name, _ in wanted[group])
    check_sums({group: row["predicted_delta_contribution"] for group, row in found.items()})


def check_sums(by_group):
    """Modules are the whole; heads and the output bias an attention block; neurons and the output bias an MLP."""

    def total(prefix):
        return math.fsum(value for group, value in by_group.items() if group.startswith(prefix))

    near = {"rel": 1e-6, "abs": 1e-9}
    assert total("module:") == pytest.approx(by_group["global:all_named_parameters"], **near)
    assert total("parameter:") == pytest.approx(by_group["global:all_named_parameters"], **near)
    for layer in (0, 1):
        attention = by_group[f"module:L{layer}.attention"]
        bias = by_group[f"parameter:blocks.{layer}.attn.out_proj.bias"]
        assert total(f"attention_projection:L{layer}.") == pytest.approx(attention, **near)
        assert total(f"attention_head:L{layer}H") + bias == pytest.approx(attention, **near)
        assert total(f"attention_head_projection:L{layer}H") + bias == pytest.approx(attention, **near)
        bias = by_group[f"parameter:blocks.{layer}.ff.fc_out.bias"]
        assert total(f"mlp_neuron:L{layer}N") + bias == pytest.approx(
            by_group[f"module:L{layer}.mlp"], **near
        )


def rank_interval(weights, pairs, source, rank, head, roles, stage):
    """One step of the rank-r QK separation of the clean records: both ends in the source's basis, gradient and update."""
    before, after = weights[source], weights[source + 1]
    basis = qk_basis(before, HEADS, head, rank)

    def scores(w):
        for pair in pairs:
            event = pair.sides["clean"]
            yield rank_scores(w, HEADS, head, event, roles, basis, stage), *keys_of(event, roles)[1:]

    def mean(w):
        return sum(separation(*of) for of in scores(w)) / len(pairs)

    value = mean(before)
    return SimpleNamespace(
        source=float(value.detach()),
        target=float(mean(after).detach()),
        gradient=gradient(value, before),
        update={name: (after[name] - before[name]).detach() for name in before},
        spectrum=basis[2].tolist(),
        scores=scores,
    )


def check_spectrum(row, spectrum, rank):
    """Columns on the singular values that the basis was cut from."""
    for name, value in {
        "top": spectrum[0],
        "sum": sum(spectrum),
        "rank_sum": sum(spectrum[:rank]),
        "rank_fraction": sum(spectrum[:rank]) / sum(spectrum),
        "min_gap": min(a - b for a, b in pairwise(spectrum)),
    }.items():
        assert row[f"qk_singular_value_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def check_qk_place(row, source, target, rank, side, roles, stage):
    """Columns that say which interval, head and form a row is about."""
    assert [row[key] for key in ("source_step", "target_step", "step_gap")] == [
        source,
        target,
        target - source,
    ]
    assert row["source_checkpoint"] == f"step_{source:06d}"
    assert row["target_checkpoint"] == f"step_{target:06d}"
    assert [row[key] for key in ("head_layer", "head", "head_label")] == [1, 1, "L1H1"]
    assert tuple(row[f"{of}_role"] for of in ("score_query", "support_key", "distractor_key")) == roles
    assert [row[key] for key in ("rank", "record_side")] == [rank, side]
    assert [row[key] for key in ("context_stage", "layernorm_mode")] == [stage, "head_ln1"]

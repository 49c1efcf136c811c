"""Every column against float64 route scores and finite differences, the sums that must agree, and what is refused."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from lakebed.engine import subspaces
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.subspaces import SUBSPACES
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.run import run_report

from tests.route_lake import HEADS, RUN

from .conftest import assert_same
from .float64_decoder import Decoder, load_weights
from .route_reference import gradient_along, load_pairs, route, span

STEPS = (36, 38, 40)
TYPES = ("query_key", "support_value")
OPTIONS = {
    "run": RUN,
    "steps": ",".join(map(str, STEPS)),
    "stage": "layer_0_post_mlp",
    "subspace": "head_qk_key",
    "rank": 3,
    "head": "L1H2",
    "position_role": "support_value",
    "pair_type": TYPES,
    "max_pairs_per_type": 4,
}
CLOSE = {"rel": 5e-4, "near": 1e-5}


def report(**options):
    given = {**OPTIONS, **options}
    return load_report("checkpoint-update-attribution").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def written(lake, out, **options):
    printed = run_report(lake, report(**options), out, chart_formats=[], overwrite=True)
    keys = ("metric_rows", "decomposition_rows", "group_rows", "pair_rows")
    rows = {key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in keys}
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


@pytest.fixture(scope="module")
def lake(route_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("routed") / "routed.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as opened:
        extract(opened, RUN, report(integrate=6).needs(), OPTIONS["steps"])
        extract(opened, RUN, report(subspace="full_residual", rank=None, head=None).needs(), OPTIONS["steps"])
        yield opened


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("report") / "out", integrate=6)


@pytest.fixture(scope="module")
def weights(lake):
    return {step: load_weights(lake, RUN, step) for step in STEPS}


@pytest.fixture(scope="module")
def pairs(lake):
    return load_pairs(lake, RUN, "probe", TYPES, 4)


def scores(weights, columns, pairs):
    """(route score, margins) of each pair."""
    decoder = Decoder(weights, HEADS)
    return [route(decoder, columns, OPTIONS["stage"], OPTIONS["position_role"], pair) for pair in pairs]


def columns_at(weights):
    return span(Decoder(weights, HEADS), OPTIONS["subspace"], OPTIONS["rank"], (1, 2))


def cells(pairs):
    """(split, type) to the numbers of its pairs, in report order."""
    made = {}
    for at, pair in enumerate(pairs):
        for split in ("__all__", pair.split):
            for kind in ("__all__", pair.pair_type):
                made.setdefault((split, kind), []).append(at)
    return dict(sorted(made.items()))


def test_metric_rows_are_the_definition(found, weights, pairs):
    rows = iter(found[0]["metric_rows"])
    for source, target in pairwise(STEPS):
        columns = columns_at(weights[source])
        before, after = scores(weights[source], columns, pairs), scores(weights[target], columns, pairs)
        update = {name: weights[target][name] - of for name, of in weights[source].items()}
        for (split, kind), held in cells(pairs).items():
            row = next(rows)
            ends = {"source": [before[at] for at in held], "target": [after[at] for at in held]}
            deltas = [b[0] - a[0] for a, b in zip(*ends.values(), strict=True)]
            actual = fmean(deltas)
            wanted = {
                "source_step": source,
                "target_step": target,
                "step_gap": target - source,
                "source_checkpoint": f"step_{source:06d}",
                "target_checkpoint": f"step_{target:06d}",
                "split": split,
                "pair_type": kind,
                "stage": OPTIONS["stage"],
                "subspace_name": "head_qk_key",
                "subspace_type": "head_singular_vectors",
                "head_label": "L1H2",
                "rank": 3,
                "position_role": "support_value",
                "num_pairs": len(held),
                "actual_delta": actual,
                "actual_delta_abs_mean": fmean(map(abs, deltas)),
                "actual_delta_std": float(np.std(deltas)),
                "parameter_delta_l2_norm": math.sqrt(sum((of**2).sum() for of in update.values())),
                "num_parameters": sum(of.size for of in update.values()),
                "zero_route_gradient_parameter_names": ["final_norm.bias"],
                "zero_route_gradient_parameter_count": 1,
            }
            for end, of in ends.items():
                wanted[f"{end}_route_score"] = fmean(score for score, _ in of)
                wanted[f"{end}_route_delta_abs_mean"] = fmean(abs(score) for score, _ in of)
                wanted[f"{end}_route_delta_positive_fraction"] = fmean(score > 0 for score, _ in of)
                for run in ("clean", "corrupted", "patched"):
                    wanted[f"{end}_transfer_margin_{run}_mean"] = fmean(margins[run] for _, margins in of)
            assert_same(row, wanted, **CLOSE)
            predicted = gradient_along(
                lambda decoder, held=held, columns=columns: fmean(
                    route(decoder, columns, OPTIONS["stage"], OPTIONS["position_role"], pairs[at])[0]
                    for at in held
                ),
                weights[source],
                update,
                1e-4,
            )
            residual = row["actual_delta"] - row["predicted_delta"]
            assert_same(
                row,
                {
                    "predicted_delta": predicted,
                    "residual": residual,
                    "absolute_error": abs(residual),
                    "relative_error": abs(residual) / abs(row["actual_delta"]),
                    "relative_error_denominator": abs(row["actual_delta"]),
                    "predicted_relative_error": abs(residual) / abs(row["predicted_delta"]),
                    "predicted_relative_error_denominator": abs(row["predicted_delta"]),
                    "sign_match": row["actual_delta"] * row["predicted_delta"] > 0,
                    "update_route_gradient_cosine": row["predicted_delta"]
                    / row["route_gradient_l2_norm"]
                    / row["parameter_delta_l2_norm"],
                },
                rel=2e-3,
                near=2e-5,
            )
            # Along the path it is the whole change.
            assert row["integrated_delta"] == pytest.approx(actual, rel=2e-2, abs=2e-4)
    assert next(rows, None) is None


def test_the_gradient_is_that_of_finite_differences_entry_by_entry(found, weights, pairs):
    """Of one vector."""
    name, source, columns = "blocks.1.ln_1.weight", STEPS[0], columns_at(weights[STEPS[0]])

    def mean(decoder):
        return fmean(
            route(decoder, columns, OPTIONS["stage"], OPTIONS["position_role"], pair)[0] for pair in pairs[:8]
        )

    gradient = [gradient_along(mean, weights[source], {name: of}) for of in np.eye(32)]
    row = next(
        row
        for row in found[0]["decomposition_rows"]
        if (row["group_id"], row["source_step"], row["split"], row["pair_type"])
        == (f"parameter:{name}", source, "__all__", "__all__")
    )
    update = weights[STEPS[1]][name] - weights[source][name]
    assert row["route_gradient_l2_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
    assert row["predicted_delta_contribution"] == pytest.approx(update @ gradient, rel=1e-3, abs=1e-6)
    assert row["parameter_delta_l2_norm"] == pytest.approx(np.linalg.norm(update), rel=1e-5)
    assert row["contribution_per_parameter"] == pytest.approx(row["predicted_delta_contribution"] / 32)


@pytest.mark.parametrize(
    ("group", "parts"),
    [
        ("module:L1.mlp", {"blocks.1.ff.": (slice(None), slice(None))}),
        ("mlp_neuron:L0N5", {"blocks.0.ff.fc_in": (5, slice(None)), "blocks.0.ff.fc_out.weight": (slice(None), 5)}),
        ("attention_head_projection:L0H3.q_proj", {"blocks.0.attn.q_proj": (slice(24, 32), slice(None))}),
        ("attention_head_projection:L1H2.out_proj", {"blocks.1.attn.out_proj.weight": (slice(None), slice(16, 24))}),
    ],
)  # fmt: skip
def test_a_group_is_the_derivative_along_its_part_of_the_update(found, weights, pairs, group, parts):
    source, target = STEPS[:2]
    columns, direction = columns_at(weights[source]), {}
    for name, before in weights[source].items():
        for start, index in parts.items():
            if name.startswith(start):
                direction[name] = np.zeros_like(before)
                place = index if before.ndim > 1 else index[:1]
                direction[name][place] = (weights[target][name] - before)[place]
    wanted = gradient_along(
        lambda decoder: fmean(
            route(decoder, columns, OPTIONS["stage"], OPTIONS["position_role"], pair)[0] for pair in pairs
        ),
        weights[source],
        direction,
        1e-4,
    )
    row = next(
        row
        for row in found[0]["decomposition_rows"]
        if (row["group_id"], row["source_step"], row["split"], row["pair_type"])
        == (group, source, "__all__", "__all__")
    )
    assert row["predicted_delta_contribution"] == pytest.approx(wanted, rel=2e-3, abs=2e-6)


def test_groups_add_up(found):
    """Modules to everything; heads and the output bias to an attention block; neurons and theirs to an MLP."""
    for split, kind, source in {
        (r["split"], r["pair_type"], r["source_step"]) for r in found[0]["metric_rows"]
    }:
        of = {
            row["group_id"]: row["predicted_delta_contribution"]
            for row in found[0]["decomposition_rows"]
            if (row["split"], row["pair_type"], row["source_step"]) == (split, kind, source)
        }

        def total(start, of=of):
            return math.fsum(value for name, value in of.items() if name.startswith(start))

        close = {"rel": 1e-9, "abs": 1e-9}
        assert total("module:") == pytest.approx(of["global:all_named_parameters"], **close)
        assert total("parameter:") == pytest.approx(of["global:all_named_parameters"], **close)
        for layer in (0, 1):
            block = f"parameter:blocks.{layer}"
            heads = total(f"attention_head:L{layer}") + of[f"{block}.attn.out_proj.bias"]
            assert heads == pytest.approx(of[f"module:L{layer}.attention"], **close)
            assert total(f"attention_projection:L{layer}") == pytest.approx(
                of[f"module:L{layer}.attention"], **close
            )
            neurons = total(f"mlp_neuron:L{layer}") + of[f"{block}.ff.fc_out.bias"]
            assert neurons == pytest.approx(of[f"module:L{layer}.mlp"], **close)


def test_rows_repeat_what_they_are_of(found, pairs):
    rows, content, markdown = found
    metrics = {(row["source_step"], row["split"], row["pair_type"]): row for row in rows["metric_rows"]}
    groups = {row["group_id"]: row for row in rows["group_rows"]}
    assert len(rows["decomposition_rows"]) == len(metrics) * len(groups)
    for row in rows["decomposition_rows"]:
        of = metrics[row["source_step"], row["split"], row["pair_type"]]
        group = groups[row["group_id"]]
        for name in (
            "num_pairs",
            "source_route_score",
            "target_route_score",
            "actual_delta",
            "rank",
            "stage",
        ):
            assert row[name] == of[name]
        assert row["global_predicted_delta"] == of["predicted_delta"]
        assert row["global_residual"] == of["residual"]
        assert row["global_relative_error"] == of["relative_error"]
        assert row["num_selected_parameters"] == group["num_selected_parameters"]
        assert row["group_neuron"] == group["neuron"]
    assert [row["pair_id"] for row in rows["pair_rows"]] == [pair.pair_id for pair in pairs]
    assert markdown.split("- ")[1].startswith("**What passes through rank 3 of head_qk_key of L1H2")
    assert content["summary"]["intervals"] == ["36->38", "38->40"]
    final = content["summary"]["final_all"]
    assert final == metrics[38, "__all__", "__all__"]


def test_the_basis_is_summarised(found, weights):
    matrix = Decoder(weights[38], HEADS)
    spectrum = np.linalg.svd(matrix.slice(1, 2, "q")[0].T @ matrix.slice(1, 2, "k")[0], compute_uv=False)
    held = found[1]["subspace"]
    assert held.pop("singular_values") == pytest.approx(spectrum[:3], rel=1e-6)
    assert held == {
        "label": "rank 3 of head_qk_key",
        "domain": "eval",
        "subspace_name": "head_qk_key",
        "subspace_type": "head_singular_vectors",
        "selected_rank": 3,
        "available_rank": 8,
        "ambient_dim": 32,
        "basis_svd_device": "cpu",
        "matrix": "QK",
        "side": "key",
        "head_layer": 1,
        "head": 2,
        "head_label": "L1H2",
        "head_dim": 8,
    }


def test_a_full_residual_has_no_basis(lake, tmp_path):
    rows, content, _ = written(
        lake, tmp_path / "out", subspace="full_residual", rank=None, head=None, decompose=("module_blocks",)
    )
    assert content["subspace"] == {"subspace_name": "full_residual", "subspace_type": "full_residual"}
    assert {row["group_kind"] for row in rows["group_rows"]} == {"global_all", "module_block"}
    assert {row["integrated_delta"] for row in rows["metric_rows"]} == {None}


def test_reports_and_scalars_know_the_same_subspaces():
    assert set(SUBSPACES) == set(subspaces.SUBSPACES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subspace": "head_qk"}, "--subspace should be 'embedding_key_identity', "),
        ({"rank": None}, "head_qk_key needs a rank of at least 1"),
        ({"rank": 0}, "--rank should be greater than or equal to 1"),
        ({"head": None}, "head_qk_key is of a head: it needs head_layer and head"),
        ({"head": "second"}, "head 'second' is no whole number"),
        ({"head": "L1H2", "head_layer": 0}, "head L1H2 and head_layer 0 disagree"),
        ({"subspace": "full_residual"}, "full_residual is of no head"),
        ({"subspace": "full_residual", "head": None}, "full_residual is the whole residual vector"),
        ({"subspace": "embedding_key_identity"}, "embedding_key_identity is of no head"),
        ({"stage": None}, "--stage is required"),
        ({"pair_type": None}, "--pair-type is required"),
        ({"decompose": ("layers",)}, "--decompose should be 'parameter_tensors'"),
        ({"top_k_groups": 0}, "--top-k-groups should be greater than or equal to 1"),
        ({"min_error_denominator": 0}, "--min-error-denominator should be greater than 0"),
        ({"record_side": ("clean",)}, "--record-side: a route puts the clean record's state"),
        ({"min_pairs_per_type": 9}, "--min-pairs-per-type 9 exceeds --max-pairs-per-type 4"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        report(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 9}, InvalidOption, "--rank 9 exceeds the width of a head, 8"),
        ({"head": "L2H0"}, UnknownName, "no head L2H0; run 'r' has layers 0–1, heads 0–3"),
        ({"stage": "layer_7_post_mlp"}, UnknownName, "no stage 'layer_7_post_mlp'; run 'r' has embedding"),
        ({"position_role": "nobody"}, UnknownName, "no role 'nobody'; the events of probe 'probe' have"),
        ({"steps": "36"}, MissingData, "an update lies between two steps, and --steps 36 leaves 36"),
        ({"rank": 2}, MissingData, "Run: lakebed extract --for checkpoint-update-attribution"),
        (
            {"max_pairs_per_type": 30},
            MissingData,
            "keeps the corrupted records of 8 pairs per type and split",
        ),
    ],
)
def test_what_the_lake_lacks_is_named(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run_report(lake, report(integrate=6, **options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()

"""Every column against float64: route scores, derivatives along the recorded gradient, the batch's own loss; refusals."""

import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
from lakebed.extractors.plan import extract
from lakebed.lake import Lake
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption, ReportFailed
from lakebed.queries.run import run_report

from tests.route_lake import HEADS, RUN

from .conftest import assert_same
from .float64_decoder import Decoder, load_weights
from .route_reference import gradient_along, lm_loss, load_pairs, route, span

STEPS = range(36, 40)
ROUTES = {
    "query": {
        "stage": "layer_0_post_mlp",
        "subspace": "head_qk_query",
        "rank": 3,
        "head": "L1H2",
        "position_role": "query_key",
    },
    "values": {
        "stage": "embedding",
        "subspace": "embedding_value_identity",
        "rank": 5,
        "position_role": "support_value",
    },
}
OPTIONS = {
    "run": RUN,
    "steps": "36:39",
    "route": tuple(
        ", ".join(f"{key} = {value}" for key, value in {"label": label, **of}.items())
        for label, of in ROUTES.items()
    ),
    "pair_type": ("query_key", "support_value"),
    "route_pair_type": "support_value",
    "max_pairs_per_type": 4,
}
CLOSE = {"rel": 1e-3, "near": 2e-6}


def report(**options):
    given = {**OPTIONS, **options}
    return load_report("actual-batch-route-attribution").parse(
        {name: value for name, value in given.items() if value is not None}
    )


def written(lake, out, **options):
    printed = run_report(lake, report(**options), out, chart_formats=[], overwrite=True)
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("rows", "pair_rows")
    }
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


@pytest.fixture(scope="module")
def lake(route_lake_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "batches.lake"
    shutil.copytree(route_lake_path, path)
    with Lake.open(path) as opened:
        extract(opened, RUN, report().needs(), "36:39")
        extract(opened, RUN, report().needs(), "36,38")
        yield opened


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def world(lake):
    (vocabulary,) = lake.sql("SELECT vocabulary FROM probes WHERE probe = 'probe'").fetchall()[0]
    texts = dict(lake.sql("SELECT sample_id, tokens FROM examples WHERE split = 'train'").fetchall())
    batches = dict(lake.sql("SELECT step, sample_ids FROM training_batches").fetchall())
    return SimpleNamespace(
        weights={step: load_weights(lake, RUN, step) for step in STEPS},
        gradients={
            step: {
                name: lake.tensor("gradients", name, RUN).read(step).astype(np.float64)
                for name in lake.axes.names(RUN, "gradients")
            }
            for step in STEPS
        },
        pairs=load_pairs(lake, RUN, "probe", ("support_value",), 4),
        values={"value": [token for token, text in enumerate(vocabulary) if text[0] == "V"]},
        batch=lambda step: [
            SimpleNamespace(tokens=[vocabulary.index(text) for text in texts[name]]) for name in batches[step]
        ],
        events=lambda step: sum(text == "R" for name in batches[step] for text in texts[name]),
    )


def test_rows_are_the_definition(found, world):
    rows = iter(found[0]["rows"])
    for source in STEPS[:-1]:
        before, after, gradient = (
            world.weights[source],
            world.weights[source + 1],
            world.gradients[source + 1],
        )
        update = {name: after[name] - of for name, of in before.items()}
        loss_norm, step_norm = (
            math.sqrt(sum((of**2).sum() for of in field.values())) for field in (gradient, update)
        )
        reduction = -sum((gradient[name] * of).sum() for name, of in update.items())
        total, tokens = lm_loss(Decoder(before, HEADS), world.batch(source + 1))
        for label, of in ROUTES.items():
            row = next(rows)
            head = (1, 2) if "head" in of else None
            columns = span(Decoder(before, HEADS), of["subspace"], of["rank"], head, world.values)

            def score(decoder, of=of, columns=columns):
                return fmean(
                    route(decoder, columns, of["stage"], of["position_role"], pair)[0] for pair in world.pairs
                )

            ends = [score(Decoder(weights, HEADS)) for weights in (before, after)]
            support = gradient_along(score, before, {name: -g for name, g in gradient.items()}, 1e-3)
            predicted = gradient_along(score, before, update, 1e-3)
            rate = row["learning_rate"]
            assert_same(
                row,
                {
                    "source_step": source,
                    "target_step": source + 1,
                    "step_gap": 1,
                    "source_checkpoint": f"step_{source:06d}",
                    "target_checkpoint": f"step_{source + 1:06d}",
                    "route_label": label,
                    "route_split": "__all__",
                    "route_pair_type": "support_value",
                    "stage": of["stage"],
                    "subspace_name": of["subspace"],
                    "subspace_type": "head_singular_vectors" if head else "embedding_identity",
                    "head_label": of.get("head"),
                    "head_layer": head and head[0],
                    "head": head and head[1],
                    "rank": of["rank"],
                    "position_role": of["position_role"],
                    "num_pairs": 4,
                    "data_group_id": "actual_batch",
                    "data_group_values": {"optimizer_trace_step": source + 1},
                    "loss_side": "actual_batch",
                    "loss": total / tokens,
                    "loss_num_records": 12,
                    "loss_num_tokens": tokens,
                    "source_route_score": ends[0],
                    "target_route_score": ends[1],
                    "actual_update_predicted_route_delta": predicted,
                    "loss_gradient_l2_norm": loss_norm,
                    "parameter_delta_l2_norm": step_norm,
                    "loss_dot_route_gradient": -support,
                    "negative_loss_dot_route_gradient": support,
                    "local_sgd_route_delta_linearized": rate * support,
                    "loss_dot_actual_update": -reduction,
                    "negative_loss_dot_actual_update": reduction,
                    "loss_delta_under_actual_update_linearized": -reduction,
                    "loss_reduction_under_actual_update_linearized": reduction,
                    "loss_negative_actual_update_cosine": reduction / loss_norm / step_norm,
                    "loss_actual_update_cosine": -reduction / loss_norm / step_norm,
                    "optimizer_trace_batch_step": source + 1,
                    "optimizer_trace_loss": total / tokens,
                    "optimizer_trace_parameter_delta_l2": step_norm,
                    "optimizer_trace_pre_clip_grad_norm": loss_norm,
                    "loss_delta_vs_optimizer_trace": None,
                    "actual_batch_sample_count": 12,
                    "actual_batch_unique_sample_count": 12,
                    "actual_batch_query_event_count": world.events(source + 1),
                },
                **CLOSE,
            )
            assert row["actual_route_delta"] == pytest.approx(ends[1] - ends[0], rel=1e-3, abs=2e-5)
            residual = row["actual_route_delta"] - row["actual_update_predicted_route_delta"]
            cosine = support / loss_norm / row["route_gradient_l2_norm"]
            assert_same(
                row,
                {
                    "actual_update_route_residual": residual,
                    "actual_update_route_relative_error": abs(residual / row["actual_route_delta"]),
                    "actual_update_route_sign_match": row["actual_route_delta"]
                    * row["actual_update_predicted_route_delta"]
                    > 0,
                    "loss_negative_route_gradient_cosine": cosine,
                    "loss_route_gradient_cosine": -cosine,
                },
                **CLOSE,
            )
    assert next(rows, None) is None


def test_sums_are_over_the_window(found):
    rows, content, markdown = found
    for of in content["summary"]["by_route"]:
        mine = [row for row in rows["rows"] if row["route_label"] == of["label"]]
        assert_same(
            of,
            {
                "num_intervals": 3,
                "sum_support": math.fsum(row["negative_loss_dot_route_gradient"] for row in mine),
                "supporting_intervals": sum(row["negative_loss_dot_route_gradient"] > 0 for row in mine),
                "sum_sgd_equivalent": math.fsum(row["local_sgd_route_delta_linearized"] for row in mine),
                "sum_actual_delta": math.fsum(row["actual_route_delta"] for row in mine),
                "sum_predicted_delta": math.fsum(row["actual_update_predicted_route_delta"] for row in mine),
                "sum_residual": math.fsum(row["actual_update_route_residual"] for row in mine),
                "sum_loss_reduction": math.fsum(row["negative_loss_dot_actual_update"] for row in mine),
                "mean_loss": fmean(row["loss"] for row in mine),
                "sign_match_fraction": fmean(row["actual_update_route_sign_match"] for row in mine),
                "max_abs_loss_mismatch": None,
            },
            rel=1e-9,
        )
    assert [of["label"] for of in content["subspaces"]] == list(ROUTES)
    assert [of["available_rank"] for of in content["subspaces"]] == [8, 32]
    assert "**The batches of steps 36 to 39 asked for query" in markdown


def test_pair_rows_are_those_that_are_scored(found, world):
    assert [row["pair_id"] for row in found[0]["pair_rows"]] == [pair.pair_id for pair in world.pairs]


GOOD = "label=a,stage=embedding,subspace=full_residual,position_role=query_key"


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (" ", "a route is empty; it is label=…"),
        ("label=a,stage", "'stage' has no '='; an item is key=value"),
        (f"{GOOD},", "'' has no '='; an item is key=value"),
        (f"{GOOD},depth=3", "no key 'depth'; there are label, stage, subspace, position_role, rank, head_layer, head"),
        (f"{GOOD},label=b", "key 'label' stands twice"),
        ("label=,stage=embedding", "key 'label' has no value"),
        ("label=a,stage=embedding,subspace=full_residual", "key 'position_role' is missing"),
        (f"{GOOD},rank=two", "rank 'two' is no whole number"),
        (f"{GOOD},rank=1.5", "rank '1.5' is no whole number"),
        (f"{GOOD},rank=2", "full_residual is the whole residual vector: it takes no rank"),
        (f"{GOOD},head=1", "full_residual is of no head"),
        (GOOD.replace("full_residual", "everything"), "no subspace 'everything'; there are embedding_key_identity"),
        (GOOD.replace("full_residual", "head_qk_key,rank=2,head=1"), "it needs head_layer and head"),
        (GOOD.replace("full_residual", "head_qk_key,head_layer=0,head=1"), "needs a rank of at least 1"),
        (GOOD.replace("full_residual", "head_qk_key,rank=-2,head=L0H1"), "needs a rank of at least 1"),
    ],
)  # fmt: skip
def test_a_malformed_route_is_refused(route, message):
    with pytest.raises(InvalidOption) as caught:
        report(route=(route,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_none_and_null_mean_not_given():
    found = report(route=(f"{GOOD}, rank = none ,head_layer=null,head=none",)).routes[0]
    assert (found.rank, found.head_layer, found.head) == (None, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": (GOOD, GOOD)}, "label 'a' stands for two routes"),
        ({"route": (GOOD, GOOD.replace("label=a", "label=b"))}, "routes 'a' and 'b' are the same"),
        ({"route": None}, "--route is required"),
        ({"route_pair_type": None}, "--route-pair-type is required"),
        ({"pair_type": None}, "is required: a type of causal patch pair"),
        ({"loss_scope": "answer"}, "--loss-scope should be 'full_lm'"),
        ({"record_side": ("corrupted",)}, "--record-side: a route puts the clean record's state"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        report(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "36,38"}, ReportFailed, "from step 36 to 38 of run 'r' was not recorded as one step"),
        ({"route_pair_type": "recency"}, ReportFailed, "no pair is of split __all__ and type recency"),
        ({"route": (GOOD,)}, MissingData, "Run: lakebed extract --for actual-batch-route-attribution"),
        ({"route": (GOOD.replace("embedding", "nowhere"),)}, UnknownName, "no stage 'nowhere'"),
        ({"route": (GOOD.replace("query_key", "nobody"),)}, UnknownName, "no role 'nobody'"),
        (
            {"route": (GOOD.replace("full_residual", "head_qk_key,rank=9,head=L0H1"),)},
            InvalidOption,
            "--rank 9 exceeds the width of a head, 8",
        ),
        (
            {"route": (GOOD.replace("full_residual", "head_qk_key,rank=2,head=L0H7"),)},
            UnknownName,
            "no head L0H7",
        ),
    ],
)
def test_what_the_lake_lacks_is_named(lake, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        run_report(lake, report(**options), tmp_path / "out", chart_formats=[])
    assert "\n" not in str(caught.value)

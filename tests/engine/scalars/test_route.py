"""Route scores and language-model losses on trained weights: values and gradients against float64, identities, refusals."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.engine.adapters import load_adapter
from lakebed.engine.scalars import Basis, Pairs, ScalarError, build_scalar
from lakebed.engine.scalars.measure import Frozen, PairBatch, Task, measure
from lakebed.extractors.dataset import Context
from lakebed.extractors.forward import probe_of
from lakebed.extractors.pair_sets import PairSelection, load_pairs
from lakebed.lake import Lake

from tests import route_lake
from tests.queries import route_reference
from tests.queries.float64_decoder import Decoder, load_weights

SOURCE, TARGET = 38, 40
HEAD = {"head": "L1H2", "rank": 3}
ROUTES = {
    "qk_query": {"stage": "layer_0_post_mlp", "subspace": "head_qk_query", "position_role": "query_key", **HEAD},
    "qk_key": {"stage": "layer_0_post_mlp", "subspace": "head_qk_key", "position_role": "support_value", **HEAD},
    "ov_input": {"stage": "embedding", "subspace": "head_ov_input", "position_role": "support_write", **HEAD},
    "ov_output": {"stage": "layer_1_post_attn", "subspace": "head_ov_output", "position_role": "prediction", **HEAD},
    "keys": {
        "stage": "embedding",
        "subspace": "embedding_key_identity",
        "position_role": "causal_prefix",
        "rank": 2,
    },
    "values": {
        "stage": "layer_0_post_attn",
        "subspace": "embedding_value_identity",
        "position_role": "all_query_relation",
        "rank": 3,
    },
    "full": {"stage": "layer_1_post_mlp", "subspace": "full_residual", "position_role": "prediction"},
    "final": {"stage": "final_norm", "subspace": "full_residual", "position_role": "prediction"},
}  # fmt: skip
TYPES = ("query_key", "support_value", "distractor")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(route_lake_path):
    with Lake.open(route_lake_path) as lake:
        context = Context(lake, route_lake.RUN)
        found = load_pairs(context, PairSelection("probe", TYPES, (), 3), ("clean", "corrupted"))
        probes = {"clean": probe_of(context, "probe"), "corrupted": probe_of(context, "probe.corrupted")}
        pairs = {
            pair.pair_id: pair for pair in route_reference.load_pairs(lake, route_lake.RUN, "probe", TYPES, 3)
        }
        return SimpleNamespace(
            weights={step: load_weights(lake, route_lake.RUN, step) for step in (SOURCE, TARGET)},
            batches=found.batches(probes, "cpu"),
            pairs=[pairs[pair_id] for pair_id in found.pair_id],
            tokens={name: of.tolist() for name, of in found.token_classes.items()},
            adapter=load_adapter("symbolic_kv", route_lake.config().canonical_json()),
        )


def measured(world, step, scalars, frozen=None, batches=None):
    """Tasks by name; gradients of one cell where nothing was frozen before."""
    leaves = {name: torch.from_numpy(of).float().requires_grad_() for name, of in world.weights[step].items()}
    tasks = {name: Task(of, frozen[name]) if frozen else Task(of, cells=1) for name, of in scalars.items()}
    batches = [PairBatch(batch.pairs, 0) for batch in batches or world.batches]
    measure(world.adapter.load_model(leaves), leaves, batches, list(tasks.values()))
    return tasks


def routes(**only):
    return {name: build_scalar("route_score", of) for name, of in (only or ROUTES).items()}


@pytest.fixture(scope="module")
def at_source(world):
    return measured(world, SOURCE, routes())


def columns_of(world, decoder, of):
    head = tuple(int(digit) for digit in of["head"][1:].split("H")) if "head" in of else None
    return route_reference.span(decoder, of["subspace"], of.get("rank"), head, world.tokens)


@pytest.mark.parametrize("name", ROUTES)
def test_values_and_margins_are_the_definition_at_both_ends(world, at_source, name):
    of = ROUTES[name]
    columns = columns_of(world, Decoder(world.weights[SOURCE], route_lake.HEADS), of)
    at_target = measured(world, TARGET, routes(**{name: of}), {name: at_source[name].frozen})
    for step, tasks in ((SOURCE, at_source), (TARGET, at_target)):
        decoder = Decoder(world.weights[step], route_lake.HEADS)
        for at, pair in enumerate(world.pairs):
            score, margins = route_reference.route(decoder, columns, of["stage"], of["position_role"], pair)
            assert tasks[name].value[at].item() == pytest.approx(score, rel=2e-5, abs=2e-5)
            for run, margin in margins.items():
                held = tasks[name].quantities[f"transfer_margin_{run}"][at].item()
                assert held == pytest.approx(margin, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", ROUTES)
def test_gradients_are_those_of_the_definition(world, at_source, name):
    """Central differences in float64, the basis held fixed, along the gradient and along a random direction."""
    of, task = ROUTES[name], at_source[name]
    weights = world.weights[SOURCE]
    columns = columns_of(world, Decoder(weights, route_lake.HEADS), of)
    rng = np.random.default_rng(7)
    gradient = {key: value[0].double().numpy() for key, value in task.gradients.items()}
    length = np.sqrt(sum((value**2).sum() for value in gradient.values()))
    noise = {key: rng.normal(size=value.shape) for key, value in weights.items()}
    size = np.sqrt(sum((value**2).sum() for value in noise.values()))

    def total(decoder):
        return sum(
            route_reference.route(decoder, columns, of["stage"], of["position_role"], pair)[0]
            for pair in world.pairs
        )

    for direction in (
        {key: value / length for key, value in gradient.items()},
        {key: value / size for key, value in noise.items()},
    ):
        mine = sum((gradient[key] * direction[key]).sum() for key in gradient if key in direction)
        wanted = route_reference.gradient_along(total, weights, direction)
        assert mine == pytest.approx(wanted, rel=1e-3, abs=1e-3 * length)


def test_the_loss_is_that_of_whole_records_weighted_by_tokens(world):
    sides = ("clean", "corrupted", "both")
    tasks = measured(world, SOURCE, {side: build_scalar("lm_loss", {"loss_side": side}) for side in sides})
    decoder = Decoder(world.weights[SOURCE], route_lake.HEADS)
    for side, task in tasks.items():
        for at, pair in enumerate(world.pairs):
            events = [pair.clean, pair.corrupted] if side == "both" else [getattr(pair, side)]
            total, count = route_reference.lm_loss(decoder, events)
            assert task.value[at].item() == pytest.approx(total / count, rel=1e-5)
            assert task.weight[at].item() == task.quantities["num_tokens"][at].item() == count
            assert task.quantities["num_records"][at].item() == len(events)
    # Everything a model has moves its loss, and the mean is over tokens.
    assert tasks["both"].gradients.keys() == world.weights[SOURCE].keys()
    clean, corrupted, both = (tasks[side] for side in sides)
    for name, of in both.gradients.items():
        torch.testing.assert_close(
            of, clean.gradients[name] + corrupted.gradients[name], rtol=1e-3, atol=1e-4
        )


def test_the_gradient_of_the_loss_is_that_of_the_definition(world):
    task = measured(world, SOURCE, {"loss": build_scalar("lm_loss", {})})["loss"]
    gradient = {name: of[0].double().numpy() for name, of in task.gradients.items()}
    length = np.sqrt(sum((of**2).sum() for of in gradient.values()))
    wanted = route_reference.gradient_along(
        lambda decoder: route_reference.lm_loss(decoder, [pair.clean for pair in world.pairs])[0],
        world.weights[SOURCE],
        {name: of / length for name, of in gradient.items()},
    )
    assert length == pytest.approx(wanted, rel=1e-3)


def test_a_patch_that_changes_nothing_scores_exactly_zero(world):
    """The key that is asked for is the same token at the same place in both records of these pairs."""
    at = [at for at, pair in enumerate(world.pairs) if pair.pair_type == "support_value"]
    task = measured(
        world,
        SOURCE,
        routes(x={"stage": "embedding", "subspace": "full_residual", "position_role": "query_key"}),
    )["x"]
    assert at
    assert not task.value[at].any()
    others = [at for at, pair in enumerate(world.pairs) if pair.pair_type == "query_key"]
    assert task.value[others].abs().min() > 0


def test_patching_the_clean_state_into_the_clean_run_scores_exactly_zero(world):
    same = [
        PairBatch(
            replace(batch.pairs, sides=dict.fromkeys(("clean", "corrupted"), batch.pairs.sides["clean"])), 0
        )
        for batch in world.batches
    ]
    for name, task in measured(world, SOURCE, routes(), batches=same).items():
        assert not task.value.any(), name
        assert max(of.abs().max() for of in task.gradients.values()) < 1e-4, name


def test_the_full_residual_at_the_end_carries_everything(world, at_source):
    """Patched at the prediction's last stage, the corrupted run ends as the clean one."""
    for name in ("full", "final"):
        quantities = at_source[name].quantities
        torch.testing.assert_close(
            quantities["transfer_margin_patched"], quantities["transfer_margin_clean"], rtol=1e-5, atol=1e-5
        )


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(["qk_query", "ov_input", "values"]))
def test_a_rotation_inside_the_subspace_changes_nothing(world, at_source, seed, name):
    task = at_source[name]
    columns = task.frozen.basis.tensors["basis"]
    turn, _ = torch.linalg.qr(
        torch.randn(2 * columns.shape[1:], generator=torch.Generator().manual_seed(seed))
    )
    turned = Frozen(Basis({"basis": columns @ turn}))
    again = measured(world, SOURCE, routes(**{name: ROUTES[name]}), {name: turned})[name]
    torch.testing.assert_close(again.value, task.value, rtol=1e-4, atol=1e-5)


def test_first_order_is_exact_on_a_small_step(world, at_source):
    """One per cent of the way from the source to the target."""
    near = {
        name: of + 0.01 * (world.weights[TARGET][name] - of) for name, of in world.weights[SOURCE].items()
    }
    moved = SimpleNamespace(**{**vars(world), "weights": {TARGET: near}})
    frozen = {name: task.frozen for name, task in at_source.items()}
    after = measured(moved, TARGET, routes(), frozen)
    for name, task in at_source.items():
        predicted = sum(
            (of[0].double().numpy() * (near[key] - world.weights[SOURCE][key])).sum()
            for key, of in task.gradients.items()
        )
        actual = float((after[name].value - task.value).sum())
        assert abs(actual - predicted) < 1e-2 * abs(actual) + 1e-4, name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"subspace": "head_qk"}, "no subspace 'head_qk'; there are embedding_key_identity"),
        ({"rank": None}, "head_qk_query needs a rank of at least 1"),
        ({"rank": 0}, "rank input should be greater than or equal to 1"),
        ({"head": None}, "head_qk_query is of a head: name its layer and number"),
        ({"subspace": "full_residual"}, "full_residual is the whole residual vector: it takes no rank"),
        ({"subspace": "full_residual", "rank": None}, "full_residual is of no head"),
        ({"subspace": "embedding_key_identity"}, "embedding_key_identity is of no head"),
    ],
)
def test_a_subspace_without_its_rank_or_head_is_refused(changed, message):
    with pytest.raises(ScalarError, match=message):
        build_scalar("route_score", {**ROUTES["qk_query"], **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 9}, "rank 9 exceeds that of subspace head_qk_query, which is 8"),
        ({"head": "L5H0"}, "no head L5H0; this run has layers 0–1, heads 0–3"),
        ({"stage": "layer_9_post_mlp"}, "no stage 'layer_9_post_mlp'; this run has embedding"),
        ({"position_role": "nobody"}, "no role 'nobody'; these pairs have"),
        ({"position_role": "value_distractors"}, "Intervention positions must be in the causal prefix: role"),
    ],
)
def test_what_the_model_or_the_pairs_lack_is_named(world, changed, message):
    with pytest.raises((ScalarError, ValueError), match=message) as caught:
        measured(world, SOURCE, routes(x={**ROUTES["qk_query"], **changed}))
    assert "\n" not in str(caught.value)


def test_sides_with_different_numbers_of_positions_are_refused(world):
    pairs = world.batches[0].pairs
    roles = {**pairs.sides["clean"].roles}
    roles["query_key"] = roles["query_key"].clone()
    roles["query_key"][0, :2] = True
    lopsided = Pairs(
        {**pairs.sides, "clean": replace(pairs.sides["clean"], roles=roles)},
        pairs.transfer,
        pairs.token_classes,
    )
    with pytest.raises(ScalarError, match=r"has 3 clean and 1 corrupted positions in pair 0 \(in 1 of"):
        measured(world, SOURCE, routes(x=ROUTES["qk_query"]), batches=[PairBatch(lopsided, 0)])


def test_a_task_without_keys_has_no_key_identity(world):
    pairs = Pairs(world.batches[0].pairs.sides, world.batches[0].pairs.transfer)
    with pytest.raises(ValueError, match="needs two key tokens or more, and the probe names 0"):
        measured(world, SOURCE, routes(x=ROUTES["keys"]), batches=[PairBatch(pairs, 0)])

"""Every number against torch's own AdamW in float64 and dense SVDs, on short trainings with and without clipping."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lakebed import LakebedError
from lakebed.engine.adapters import load_adapter
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.extractors.plan import extract
from lakebed.extractors.recorder import Recorder
from lakebed.extractors.runs import RunInfo
from lakebed.extractors.states import StateReader
from lakebed.extractors.training import train
from lakebed.lake import Lake
from lakebed.lake.datasets import MOMENTS, WEIGHTS, Need
from lakebed.queries.registry import load_report
from lakebed.queries.report import InvalidOption
from lakebed.queries.results import Results
from lakebed.queries.run import run_report

from tests.extractors.conftest import small_config

from .conftest import assert_same

LAYERS, HEADS, D, WIDTH, D_FF = 2, 4, 32, 8, 48
STEPS = 7
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
KINDS = load_report("adam-state-geometry-report").model_fields["source_kind"].default
TERMS = KINDS[KINDS.index("raw_sgd") :]
ROW_KEYS = ("metric_rows", "singular_value_rows", "singular_vector_rows", "summary_rows")


def report(**options):
    return load_report("adam-state-geometry-report").parse(options)


def written(lake, tmp_path, **options):
    printed = run_report(lake, report(**options), tmp_path / "out", chart_formats=[])
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()] for key in ROW_KEYS
    }
    return printed, rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs `clipped` and `free` of eight recorded steps, anchors every four, weights and moments of all."""
    path = tmp_path_factory.mktemp("geometry") / "g.lake"
    with Lake.create(path) as lake:
        for run, threshold in (("clipped", 0.05), ("free", 1e6)):
            config = small_config(
                **{
                    "num_steps": STEPS + 1,
                    "eval_every_steps": 100,
                    "checkpoint_every_steps": 100,
                    "optimization.grad_clip_norm": threshold,
                    "optimization.weight_decay": 0.05,
                }
            )
            train(lake, run, config, benchmark=generate_benchmark(config.benchmark), anchor_every=4)
            extract(lake, run, [Need(WEIGHTS), Need(MOMENTS)], f"0:{STEPS}")
    return path


@pytest.fixture
def lake(trained):
    with Lake.open(trained) as opened:
        yield opened


class Reference:
    """Fields and their spectra of one run, with torch's optimizer and dense matrices."""

    def __init__(self, lake, run):
        reader = StateReader(lake, run)
        self.states = {}
        for state in reader.iterate(range(STEPS + 1)):
            held = (state.weights, state.exp_avg, state.exp_avg_sq)
            self.states[state.step] = [{n: t.double().clone() for n, t in of.items()} for of in held]
        self.rows = lake.table("training_steps", run).sort("step").collect().to_dicts()
        self.lake, self.run = lake, run

    def group(self, step):
        return json.loads(
            next(r["optimizer_groups"] for r in reversed(self.rows[:step]) if r["optimizer_groups"])
        )[0]

    def gradient(self, name, step):
        return torch.from_numpy(self.lake.tensor("gradients", name, self.run).read(step)).double()

    def moved(self, name, step, gradient, momentum=True, decay=True):
        """The update to `step` by torch.optim.AdamW in float64, with or without the momentum carried into it and decay."""
        weights, m, v = (of.get(name) for of in self.states[step - 1])
        group = self.group(step)
        parameter = torch.nn.Parameter(weights.clone())
        optimizer = torch.optim.AdamW(
            [parameter],
            lr=group["learning_rate"],
            betas=(group["beta1"], group["beta2"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"] if decay else 0.0,
        )
        if step > 1:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step - 1)),
                "exp_avg": m.clone() if momentum else torch.zeros_like(m),
                "exp_avg_sq": v.clone(),
            }
        # From zero, or the sum of weight and update would round the update away.
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = gradient.clone()
        optimizer.step()
        return parameter.detach() - (group["learning_rate"] * group["weight_decay"] * weights if decay else 0)

    def fields(self, name, source):
        step = source + 1
        theta, m, v = (of.get(name) for of in self.states[source])
        m, v = (torch.zeros_like(theta) if x is None else x for x in (m, v))
        row, group, g = self.rows[source], self.group(step), self.gradient(name, step)
        clipped = row["clip_coefficient"] * g
        preconditioned = self.moved(name, step, clipped, decay=False)
        current = self.moved(name, step, clipped, momentum=False, decay=False)
        reconstructed = self.moved(name, step, clipped)
        actual = self.states[step][0][name] - theta
        b1, b2, eps, lr = (group[key] for key in ("beta1", "beta2", "eps", "learning_rate"))
        return {
            "weight": theta,
            "exp_avg": m,
            "bias_corrected_exp_avg": m / (1 - b1**source) if source else m,
            "sqrt_exp_avg_sq": v.sqrt(),
            "adam_denominator": (v / (1 - b2**source)).sqrt() + eps if source else v + eps,
            "raw_sgd": -lr * g,
            "clipped_sgd": -lr * clipped,
            "adam_current_gradient": current,
            "adam_historical_momentum": preconditioned - current,
            "adam_preconditioned": preconditioned,
            "weight_decay": reconstructed - preconditioned,
            "reconstructed_adamw_update": reconstructed,
            "actual_parameter_delta": actual,
            "reconstruction_error": reconstructed - actual,
        }

    def cut(self, layer, head, projection, source):
        """The fields of one head's slice, or of the MLP's matrix."""
        if head is None:
            return self.fields(f"blocks.{layer}.ff.{projection}.weight", source)
        of = slice(head * WIDTH, (head + 1) * WIDTH)
        whole = self.fields(f"blocks.{layer}.attn.{projection}.weight", source)
        return {k: f[:, of] if projection == "out_proj" else f[of] for k, f in whole.items()}

    def matrices(self, layer, head, projection, source):
        """Float64 by field; products by forward-mode differentiation of the dense product."""
        if projection not in ("W_QK", "W_OV"):
            return {kind: f.numpy() for kind, f in self.cut(layer, head, projection, source).items()}
        names = ("q_proj", "k_proj") if projection == "W_QK" else ("v_proj", "out_proj")
        first, second = (self.cut(layer, head, name, source) for name in names)

        def product(a, b):
            return a.T @ (b if projection == "W_QK" else b.T)

        at = (first["weight"], second["weight"])
        found = {"weight": product(*at)}
        for kind in KINDS[1:]:
            _, found[kind] = torch.func.jvp(product, at, (first[kind], second[kind]))
        return {kind: f.numpy() for kind, f in found.items()}


def counts(projection, kind):
    if projection not in ("W_QK", "W_OV"):
        return WIDTH if projection in PROJECTIONS else D
    # Decay moves a product along itself.
    return WIDTH if kind in ("weight", "weight_decay") else 2 * WIDTH


def places():
    for layer in range(LAYERS):
        for head in range(HEADS):
            for projection in (*PROJECTIONS, "W_QK", "W_OV"):
                yield f"L{layer}H{head}.{projection}", layer, head, projection
        for projection in ("fc_in", "fc_out"):
            yield f"L{layer}MLP.{projection}", layer, None, projection


@pytest.mark.parametrize("run", ["clipped", "free"])
def test_every_number_is_the_definition(lake, tmp_path, run):
    _, rows = written(lake, tmp_path, run=run, steps="0:4", top_k=40)
    reference = Reference(lake, run)
    metric = {(r["source_step"], r["target"], r["source_kind"]): r for r in rows["metric_rows"]}
    values: dict = {}
    for r in rows["singular_value_rows"]:
        values.setdefault((r["source_step"], r["target"], r["source_kind"]), []).append(r["singular_value"])
    assert len(metric) == len(rows["metric_rows"]) == 4 * LAYERS * (6 * HEADS + 2) * len(KINDS)
    clip = {r["clip_coefficient"] for r in rows["metric_rows"]}
    assert clip == {1.0} if run == "free" else max(clip) < 0.5
    for source in range(4):
        for name, layer, head, projection in places():
            made = reference.matrices(layer, head, projection, source)
            triple = np.linalg.svd(made["actual_parameter_delta"])
            u, v, sigma1 = triple[0][:, 0], triple[2][0], triple[1][0]
            for kind, matrix in made.items():
                row = metric[source, name, kind]
                left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
                count = counts(projection, kind)
                near = 1e-12 * sigma[0] + 1e-30
                # Rounding of float64 in the difference of two float32 tensors stands against a much smaller whole.
                rel = 1e-6 if kind == "reconstruction_error" else 1e-9
                assert row["singular_value_count"] == count
                assert values[source, name, kind] == pytest.approx(sigma[:count], rel=rel, abs=1e3 * near)
                assert sigma[count:] == pytest.approx(0, abs=1e3 * near)
                assert_same(
                    row,
                    {
                        "target_step": source + 1,
                        "step_gap": 1,
                        "layer": layer,
                        "head": head,
                        "projection": projection,
                        "learning_rate": reference.rows[source]["learning_rate"],
                        "matrix_rows": matrix.shape[0],
                        "matrix_cols": matrix.shape[1],
                        "functional_matrix_mode": "parameter_field"
                        if not projection.startswith("W_")
                        else "exact_weight"
                        if kind == "weight"
                        else "first_order_functional_field",
                        "fro_norm": float(np.linalg.norm(matrix)),
                        "max_abs": float(np.abs(matrix).max()),
                        "top_singular_value": float(sigma[0]),
                        "singular_value_sum": float(sigma.sum()),
                        "singular_value_sq_sum": float((sigma**2).sum()),
                    },
                    rel=rel,
                    near=near,
                )
                if not matrix.any():
                    zero = ("effective_rank", "spectral_mass_top3", "top_direction_update_cosine")
                    assert [row[key] for key in zero] == [None] * 3
                    continue
                cosine = float((left[:, 0] @ u) * (right[0] @ v))
                share = float(u @ matrix @ v / sigma1) if kind in TERMS else None
                assert_same(
                    row,
                    {
                        "effective_rank": float(sigma.sum() ** 2 / (sigma**2).sum()),
                        "spectral_mass_top3": float(sigma[:3].sum() / sigma.sum()),
                    },
                    rel=rel,
                )
                assert row["top_direction_update_cosine"] == pytest.approx(cosine, rel=1e-5, abs=1e-7)
                assert row["update_top_direction_share"] == (
                    None if share is None else pytest.approx(share, rel=1e-5, abs=1e-9)
                )


def test_step_zero_has_no_moments(lake, tmp_path):
    printed, rows = written(lake, tmp_path, run="free", steps="0,1")
    for row in rows["metric_rows"]:
        if row["source_kind"] in (
            "exp_avg",
            "bias_corrected_exp_avg",
            "sqrt_exp_avg_sq",
            "adam_historical_momentum",
        ):
            assert (row["fro_norm"], row["effective_rank"], row["update_top_direction_share"] or 0) == (
                0,
                None,
                0,
            )
        if row["source_kind"] == "adam_denominator" and row["functional_matrix_mode"] == "parameter_field":
            assert row["max_abs"] == 1e-8
            assert row["effective_rank"] == pytest.approx(1)
    assert not [r for r in rows["singular_vector_rows"] if r["source_kind"] == "exp_avg"]
    assert "Fields that are zero" in Path(printed["markdown"]).read_text()


def test_vectors_are_singular_and_have_one_sign(lake, tmp_path):
    names = ["L1H2.W_OV", "L0H1.out_proj", "L0MLP.fc_in", "L1H0.k_proj"]
    _, rows = written(lake, tmp_path, run="clipped", steps="3:5", target=names, top_vector_ranks=3)
    reference = Reference(lake, "clipped")
    pairs: dict = {}
    for r in rows["singular_vector_rows"]:
        key = (r["source_step"], r["target"], r["source_kind"], r["singular_value_rank"])
        pairs.setdefault(key, {})[r["vector_side"]] = r
    assert len(pairs) == 2 * 4 * len(KINDS) * 3
    where = {name: at for name, *at in places()}
    for (source, name, kind, rank), sides in pairs.items():
        matrix = reference.matrices(*where[name], source)[kind]
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        u, v = (np.array(sides[side]["vector"]) for side in ("left", "right"))
        assert (
            [len(u), len(v)]
            == list(matrix.shape)
            == [sides[side]["vector_dim"] for side in ("left", "right")]
        )
        assert u[np.abs(u).argmax()] > 0
        gaps = np.abs(np.diff(sigma[: rank + 1])).min() / sigma[0]
        assert abs(u @ left[:, rank - 1]) == pytest.approx(1, abs=1e-6 + 1e-9 / gaps)
        assert abs(v @ right[rank - 1]) == pytest.approx(1, abs=1e-6 + 1e-9 / gaps)
        assert u @ matrix @ v == pytest.approx(sigma[rank - 1], rel=1e-4)
    labels = {(r["target"], r["vector_side"]): r["vector_label"] for r in rows["singular_vector_rows"]}
    assert labels["L1H2.W_OV", "left"] == "input_residual_direction"
    assert labels["L0H1.out_proj", "left"] == "output_residual_direction"


def test_parts_add_up_to_the_top_direction(lake, tmp_path):
    printed, rows = written(lake, tmp_path, run="clipped", steps="2:6")
    shares: dict = {}
    for r in rows["metric_rows"]:
        shares.setdefault((r["source_step"], r["target"]), {})[r["source_kind"]] = r[
            "update_top_direction_share"
        ]
    for of in shares.values():
        parts = of["adam_current_gradient"] + of["adam_historical_momentum"] + of["weight_decay"]
        assert parts - of["reconstruction_error"] == pytest.approx(1, abs=1e-9)
        assert of["actual_parameter_delta"] == pytest.approx(1, abs=1e-12)
    content = json.loads(Path(printed["report"]).read_text())
    assert len(content["top_carriers"]) == min(80, LAYERS * (6 * HEADS + 2))
    for row in content["top_carriers"]:
        assert sum(
            row[key] for key in ("momentum", "current_gradient", "weight_decay", "rounding")
        ) == pytest.approx(1)


def test_summary_is_first_last_and_delta(lake, tmp_path):
    _, rows = written(lake, tmp_path, run="free", steps="1:6", target=["L1H3.W_QK", "L0MLP.fc_out"])
    metric = {(r["source_step"], r["target"], r["source_kind"]): r for r in rows["metric_rows"]}
    assert [(r["target"], r["source_kind"]) for r in rows["summary_rows"]] == [
        (name, kind) for name in ("L0MLP.fc_out", "L1H3.W_QK") for kind in KINDS
    ]
    for row in rows["summary_rows"]:
        key = row["target"], row["source_kind"]
        assert [row[k] for k in ("num_intervals", "first_source_step", "last_source_step")] == [5, 1, 5]
        for name in ("effective_rank", "spectral_mass_top3", "fro_norm", "max_abs", "top_singular_value"):
            first, last = metric[1, *key][name], metric[5, *key][name]
            assert [row[f"{part}_{name}"] for part in ("first", "last")] == [first, last]
            assert row[f"delta_{name}"] == last - first
        mean = np.mean([metric[t, *key]["effective_rank"] for t in range(1, 6)])
        assert row["mean_effective_rank"] == pytest.approx(mean)


def test_windows_and_strides(lake, tmp_path):
    def sources(**options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        _, rows = written(lake, folder, run="free", target=["L0H0.q_proj"], source_kind=["weight"], **options)
        return [r["source_step"] for r in rows["metric_rows"]]

    # Step 8 is an anchor.
    assert sources() == list(range(8))
    assert sources(start_step=2, end_step=5) == [2, 3, 4]
    assert sources(checkpoint_stride=3) == [0, 3, 6]
    assert sources(steps="1:7", checkpoint_stride=2) == [1, 3, 5]
    assert sources(steps="0,1,4,5", checkpoint_stride=4) == [0, 4]
    assert sources(steps="4:6", start_step=5) == [5]


def test_only_what_was_asked_for(lake, tmp_path):
    options = {"target": ["L1H1.W_OV", "L0H2.v_proj"], "source_kind": ["raw_sgd", "weight_decay"], "top_k": 3}
    printed, rows = written(lake, tmp_path, run="free", steps="2:4", top_vector_ranks=0, **options)
    assert [(r["target"], r["source_kind"]) for r in rows["metric_rows"][:4]] == [
        ("L0H2.v_proj", "raw_sgd"),
        ("L0H2.v_proj", "weight_decay"),
        ("L1H1.W_OV", "raw_sgd"),
        ("L1H1.W_OV", "weight_decay"),
    ]
    assert len(rows["singular_value_rows"]) == 3 * len(rows["metric_rows"])
    assert rows["singular_vector_rows"] == []
    whole, _ = written(lake, tmp_path / "all", run="free", steps="2:4")
    held = [json.loads(line) for line in Path(whole["metric_rows"]).read_text().splitlines()]
    for row in rows["metric_rows"]:
        same = next(r for r in held if all(r[k] == row[k] for k in ("source_step", "target", "source_kind")))
        assert_same(same, row, rel=1e-10)
    assert list(printed)[:6] == [
        "report", "markdown", "metric_rows", "metric_parquet", "singular_value_rows", "singular_value_parquet",
    ]  # fmt: skip


def test_markdown_leads_with_the_finding(lake, tmp_path):
    printed, rows = written(lake, tmp_path, run="clipped", steps="1:7")
    text = Path(printed["markdown"]).read_text()
    second = ("sqrt_exp_avg_sq", "adam_denominator")
    multiples = ("clipped_sgd", "bias_corrected_exp_avg", "weight_decay")
    narrow = min(
        (
            r
            for r in rows["summary_rows"]
            if r["head"] is not None and r["source_kind"] not in second + multiples
        ),
        key=lambda r: r["mean_effective_rank"] / r["singular_value_count"],
    )
    assert f"**`{narrow['source_kind']}` of {narrow['target']}**: effective rank" in text
    shares = {
        kind: np.mean(
            [r["update_top_direction_share"] for r in rows["metric_rows"] if r["source_kind"] == kind]
        )
        for kind in ("adam_historical_momentum", "adam_current_gradient")
    }
    assert f"{100 * shares['adam_historical_momentum']:.3g} %" in text
    assert f"{100 * shares['adam_current_gradient']:.3g} %" in text
    assert "arithmetic, not a counterfactual" in text.split("##")[0]
    content = json.loads(Path(printed["report"]).read_text())
    assert content["overview"]["intervals"] == 6
    assert content["largest_relative_reconstruction_error"]["relative_error"] < 1e-3


# -- what cannot be reported on ---------------------------------------------------------------------------------------


def refused(lake, **options):
    with pytest.raises(LakebedError) as error:
        with Results(lake, report(**options)):
            pass
    assert "\n" not in str(error.value)
    return type(error.value).__name__, str(error.value)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Twelve recorded steps, anchors every four, nothing extracted; another run of which steps 5 to 8 are recorded."""
    path = tmp_path_factory.mktemp("bare") / "b.lake"
    config = small_config(num_steps=12, eval_every_steps=100, checkpoint_every_steps=4)
    with Lake.create(path) as lake:
        benchmark = generate_benchmark(config.benchmark)
        train(lake, "r", config, benchmark=benchmark, anchor_every=4)
        train(lake, "part", config, benchmark=benchmark, anchor_every=4, record="4:8")
    return path


@pytest.fixture
def bare_lake(bare):
    with Lake.open(bare) as opened:
        yield opened


def test_what_was_not_extracted_is_named_with_its_command(bare_lake):
    base = f"lakebed extract --for adam-state-geometry-report --lake {bare_lake.uri} --run r"
    kind, message = refused(bare_lake, run="r", steps="5:7", target=["L0H0.W_QK"])
    assert kind == "MissingData"
    assert message == (
        "adam-state-geometry-report needs weights and moments for run 'r' at step 5:7. Run: "
        f"{base} --steps 5:7:1 --target L0H0.W_QK"
    )
    assert refused(bare_lake, run="r", steps="4:5")[1].endswith(f"{base} --steps 5")
    assert (
        "--steps 1,3,6,7 --start-step 0"
        in refused(bare_lake, run="r", start_step=0, end_step=7, checkpoint_stride=3)[1]
    )
    kind, message = refused(bare_lake, run="r")
    assert kind == "MissingData"
    assert "needs neighbouring steps: run 'r' has weights at 0:12:4 and moments at 0:12:4" in message
    assert message.endswith(f"{base} --steps 0:4:1")


def test_a_window_with_a_gap(bare_lake):
    kind, message = refused(bare_lake, run="r", steps="0:12:4")
    assert kind == "InvalidOption"
    assert "the steps of --steps 0:12:4 are not neighbours, 1:3, 5:7, 9:11 lie between them" in message
    assert "Write --steps 0:12, and --checkpoint-stride N" in message
    kind, message = refused(bare_lake, run="r", steps="3")
    assert kind == "InvalidOption"
    assert (
        "--steps 3 selects 3 of the recorded steps 0:12; an interval takes a step and the next one" in message
    )


def test_steps_that_were_not_recorded(bare_lake):
    kind, message = refused(bare_lake, run="r", steps="10,11,12,13,14")
    assert kind == "MissingData"
    assert "needs trace for run 'r' at step 13, 14: recorded are steps 1:12" in message
    assert f"lakebed trace --lake {bare_lake.uri} --run r --from-step 12 --num-steps 2" in message
    kind, message = refused(bare_lake, run="part", steps="2,3,4,5")
    assert kind == "MissingData"
    assert "at step 3, 4: recorded are steps 5:8" in message
    assert "Run: lakebed extract" in refused(bare_lake, run="part", steps="4:8")[1]


def test_a_run_that_was_not_recorded(svd):
    kind, message = refused(svd.lake)
    assert kind == "MissingData"
    assert "needs trace for run 'ref'" in message
    assert "lakebed trace" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": ["L0H0.W_Q"]},
            "--target write L2H1.W_QK (or W_OV, q_proj, k_proj, v_proj, out_proj) or L0MLP.fc_in",
        ),
        ({"target": ["L0MLP.q_proj"]}, "--target write L2H1.W_QK"),
        ({"source_kind": ["momentum"]}, "--source-kind should be 'weight', 'exp_avg'"),
        ({"start_step": 5, "end_step": 5}, "--start-step 5 does not lie before --end-step 5"),
        ({"checkpoint_stride": 0}, "--checkpoint-stride should be greater than 0, not 0"),
        ({"top_k": 0}, "--top-k should be greater than 0, not 0"),
        ({"top_vector_ranks": -1}, "--top-vector-ranks should be greater than or equal to 0, not -1"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InvalidOption) as error:
        report(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_target_the_run_does_not_have(lake):
    kind, message = refused(lake, run="free", target=["L0H1.W_QK", "L2H0.W_QK"])
    assert kind == "UnknownName"
    assert message == (
        "no target 'L2H0.W_QK' in run 'free'; it has layers 0 to 1, heads 0 to 3: L0H0.q_proj … L1MLP.fc_out"
    )


def record(path, run, model, optimizer, steps=4, info=None, loss=None, **options):
    """Trains `model` for some steps, recorded, with weights and moments of all."""
    generator = torch.Generator().manual_seed(0)
    with Recorder(path, run, model, optimizer, info=info, anchor_every=2, **options) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    with Lake.open(path) as opened:
        extract(opened, run, [Need(WEIGHTS), Need(MOMENTS)], f"0:{steps}")
    del recorder


def test_a_run_without_an_adapter_and_one_without_moments(tmp_path):
    model = torch.nn.Linear(4, 3)
    record(tmp_path / "l", "plain", model, torch.optim.AdamW(model.parameters()))
    record(tmp_path / "l", "sgd", model, torch.optim.SGD(model.parameters(), lr=0.1), store="full")
    with Lake.open(tmp_path / "l") as opened:
        kind, message = refused(opened, run="plain")
        assert kind == "ReportFailed"
        assert "recorded without an adapter" in message
        kind, message = refused(opened, run="sgd")
        assert kind == "ReportFailed"
        assert "run 'sgd' was recorded with torch.optim.sgd.SGD, which has no moments" in message


class Named(torch.nn.Module):
    """Parameters of given names and shapes, dots and all."""

    def __init__(self, shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.randn(shape, generator=generator)))


def gpt2(heads):
    config = {
        "model_type": "gpt2",
        "vocab_size": 11,
        "n_positions": 8,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": heads,
    }
    adapter = load_adapter("gpt2", json.dumps(config))
    return adapter, Named(adapter.parameter_shapes()), RunInfo(adapter="gpt2", config=json.dumps(config))


@pytest.mark.parametrize("heads", [1, 3])
def test_gpt2_with_its_joint_and_transposed_weights(tmp_path, heads):
    adapter, model, info = gpt2(heads)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "c_attn" in n], "lr": 0.02},
        {
            "params": [p for n, p in model.named_parameters() if "c_attn" not in n],
            "lr": 0.01,
            "weight_decay": 0.2,
        },
    ]
    record(tmp_path / "l", "r", model, torch.optim.AdamW(groups), info=info)
    names = {
        "W_Q": "q_proj",
        "W_K": "k_proj",
        "W_V": "v_proj",
        "W_O": "out_proj",
        "W_in": "fc_in",
        "W_out": "fc_out",
    }
    with Lake.open(tmp_path / "l") as opened:
        _, rows = written(opened, tmp_path, steps="0:4")
        states = {state.step: dict(state.weights) for state in StateReader(opened, "r").iterate([2])}
        before = adapter.head_weights({n: w.double() for n, w in states[2].items()})
        after = next(StateReader(opened, "r").iterate([3])).weights
        moved = adapter.head_weights({n: after[n].double() - w.double() for n, w in states[2].items()})
    metric = {(r["target"], r["source_kind"]): r for r in rows["metric_rows"] if r["source_step"] == 2}
    assert len(metric) == 2 * (6 * heads + 2) * len(KINDS)
    for layer in range(2):
        for matrix, projection in names.items():
            for at in [None] if matrix in ("W_in", "W_out") else range(heads):
                name = f"L{layer}MLP.{projection}" if at is None else f"L{layer}H{at}.{projection}"
                for kind, of in (("weight", before), ("actual_parameter_delta", moved)):
                    dense = of[matrix][layer] if at is None else of[matrix][layer, at]
                    row = metric[name, kind]
                    assert [row["matrix_rows"], row["matrix_cols"]] == list(dense.shape)
                    assert row["singular_value_sum"] == pytest.approx(
                        float(torch.linalg.svdvals(dense).sum())
                    )
        for at in range(heads):
            q, k, v, o = (before[n][layer, at] for n in ("W_Q", "W_K", "W_V", "W_O"))
            dq, dk, dv, do = (moved[n][layer, at] for n in ("W_Q", "W_K", "W_V", "W_O"))
            dense = {
                ("W_QK", "weight"): q.T @ k,
                ("W_QK", "actual_parameter_delta"): dq.T @ k + q.T @ dk,
                ("W_OV", "weight"): v.T @ o.T,
                ("W_OV", "actual_parameter_delta"): dv.T @ o.T + v.T @ do.T,
                # Decay differs between the two groups: 0.01 and 0.2.
                ("W_OV", "weight_decay"): -(0.02 * 0.01 + 0.01 * 0.2) * v.T @ o.T,
            }
            for (product, kind), of in dense.items():
                row = metric[f"L{layer}H{at}.{product}", kind]
                assert row["singular_value_sum"] == pytest.approx(float(torch.linalg.svdvals(of).sum()))


def test_frozen_skipped_and_not_finite(tmp_path):
    _, model, info = gpt2(3)
    parameters = dict(model.named_parameters())
    parameters["h.0.mlp.c_fc.weight"].requires_grad_(False)
    trained = [p for n, p in parameters.items() if n != "h.0.mlp.c_fc.weight"]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    generator = torch.Generator().manual_seed(0)
    with Recorder(tmp_path / "l", "r", model, optimizer, info=info, anchor_every=8, store="exact"):
        for step in range(1, 5):
            for name, parameter in parameters.items():
                skipped = step == 2 and name == "h.1.attn.c_attn.weight"
                known = parameter.requires_grad and not skipped
                parameter.grad = torch.randn(parameter.shape, generator=generator) if known else None
            if step == 4:
                parameters["h.1.mlp.c_proj.weight"].grad[0, 0] = float("nan")
            optimizer.step()
    with Lake.open(tmp_path / "l") as opened:
        extract(opened, "r", [Need(WEIGHTS), Need(MOMENTS)], "0:4")
        kind, message = refused(opened, steps="0:2", target=["L0MLP.fc_in"])
        assert kind == "ReportFailed"
        assert "L0MLP.fc_in of run 'r' is not in the optimizer" in message
        _, rows = written(opened, tmp_path, steps="0:3")
        assert "L0MLP.fc_in" not in {r["target"] for r in rows["metric_rows"]}
        of = {
            (r["source_step"], r["source_kind"]): r["fro_norm"]
            for r in rows["metric_rows"]
            if r["target"] == "L1H0.q_proj"
        }
        assert all(of[1, kind] == 0 for kind in TERMS)
        assert of[1, "exp_avg"] == of[2, "exp_avg"] > 0
        # One update lies behind it at step 1 and at step 2, so its correction is that of one.
        for source in (1, 2):
            assert of[source, "bias_corrected_exp_avg"] == pytest.approx(of[source, "exp_avg"] / (1 - 0.9))
        assert of[2, "reconstruction_error"] < 1e-5 * of[2, "actual_parameter_delta"]
        kind, message = refused(opened, steps="2:4", target=["L1MLP.fc_out"])
        assert kind == "ReportFailed"
        assert "L1MLP.fc_out holds NaN or infinite entries in the interval from step 3 to 4" in message

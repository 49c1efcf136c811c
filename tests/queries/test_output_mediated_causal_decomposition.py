"""Every row against torch float64 runs without the source; the identities of the decomposition; and what is refused."""

import inspect
from pathlib import Path
from statistics import fmean

import duckdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.lake import Lake
from lakebed.lake.datasets import INTERVENTIONS, READOUTS
from lakebed.lake.errors import MissingData
from lakebed.lake.macros import create_macros
from lakebed.lake.names import spec_id
from lakebed.queries.component_options import (
    NotAblatable,
    NotDownstream,
    OverlappingComponents,
    UnknownComponent,
    component_order,
)
from lakebed.queries.report import InvalidOption
from lakebed.queries.run import run_report
from lakebed.queries.scalar_pairs import ScalarMismatch
from lakebed.queries.sections import parse_sections

from tests.trained_probe_lake import STEPS

from .output_reference import (
    CAUSAL,
    CLOSE,
    COMPONENTS,
    SCALARS,
    Decoder,
    World,
    extracted,
    report,
    rewritten,
    scalar,
    written,
)

NAME = "output-mediated-causal-decomposition"
SOURCES, DOWNSTREAM = ("L0MLP", "L0H1"), ("L1MLP", "L1H0", "L1H3")
KEYS = (
    "scalar_name",
    "source_step",
    "target_step",
    "pair_id",
    "margin_side",
    "endpoint_kind",
    "source_component",
)


def asked(**options):
    return report(NAME, **{"source_component": SOURCES, "downstream_component": DOWNSTREAM, **options})


@pytest.fixture(scope="module")
def lake_path(probe_lake_path, tmp_path_factory):
    return extracted(probe_lake_path, tmp_path_factory.mktemp("mediated"), asked())


@pytest.fixture(scope="module")
def lake(lake_path):
    with Lake.open(lake_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def world(lake):
    return World(lake)


@pytest.fixture(scope="module")
def found(lake, tmp_path_factory):
    return written(lake, asked(scalar=SCALARS), tmp_path_factory.mktemp("report") / "out")


def expected(world):
    return [
        (name, source, target, pair_id, side, kind, zeroed)
        for name in SCALARS
        for source, target, pair_id, side, _ in world.changes(name)
        for kind in ("source", "target")
        for zeroed in SOURCES
    ]


def test_source_rows_are_the_definition(found, world):
    rows = {tuple(row[key] for key in KEYS): row for row in found[0]["source_rows"]}
    wanted = expected(world)
    assert rows.keys() == set(wanted)
    assert len(found[0]["source_rows"]) == len(wanted)
    for name, source, target, pair_id, side, kind, zeroed in wanted:
        row = rows[name, source, target, pair_id, side, kind, zeroed]
        before, parts = world.measure(name, source, target, pair_id, side, kind)
        after, others = world.measure(name, source, target, pair_id, side, kind, zeroed)
        mediated = {of: parts[of] - others[of] for of in DOWNSTREAM}
        both = parts[zeroed] + sum(mediated.values())
        values = {
            "baseline_scalar": before,
            "source_ablated_scalar": after,
            "total_causal_effect": before - after,
            "direct_source_dla": parts[zeroed],
            "mediated_downstream_sum": sum(mediated.values()),
            "direct_plus_mediated": both,
            "mediation_residual": before - after - both,
        }
        assert {key: row[key] for key in values} == pytest.approx(values, **CLOSE)
        assert row["mediated_by_component"] == pytest.approx(mediated, **CLOSE)
        assert list(row["mediated_by_component"]) == sorted(DOWNSTREAM)
        assert row["checkpoint"] == f"step_{source if kind == 'source' else target:06d}"
        assert row["step"] == (source if kind == "source" else target)


def test_downstream_rows_are_the_definition(found, world):
    keys = (*KEYS, "downstream_component")
    rows = {tuple(row[key] for key in keys): row for row in found[0]["downstream_rows"]}
    wanted = [(*of, part) for of in expected(world) for part in DOWNSTREAM]
    assert rows.keys() == set(wanted)
    assert len(found[0]["downstream_rows"]) == len(wanted)
    for *of, zeroed, part in wanted:
        row = rows[*of, zeroed, part]
        ends = [world.measure(*of, *run)[1][part] for run in ((), (zeroed,))]
        assert row["baseline_downstream_dla"] == pytest.approx(ends[0], **CLOSE)
        assert row["ablated_downstream_dla"] == pytest.approx(ends[1], **CLOSE)
        assert row["mediated_effect"] == pytest.approx(ends[0] - ends[1], **CLOSE)


def test_summaries_are_means(found):
    rows, content, _ = found
    groups = {}
    for row in rows["source_rows"]:
        groups.setdefault((row["scalar_name"], row["endpoint_kind"], row["source_component"]), []).append(row)
    assert len(rows["source_summary_rows"]) == len(groups)
    assert content["source_summary_rows"] == rows["source_summary_rows"]
    for row in rows["source_summary_rows"]:
        of = groups[row["scalar_name"], row["endpoint_kind"], row["source_component"]]
        total, both = ([each[key] for each in of] for key in ("total_causal_effect", "direct_plus_mediated"))
        y = np.array(total)
        wanted = {
            "num_observations": len(of),
            "mean_total_causal_effect": fmean(total),
            "mean_abs_total_causal_effect": fmean(map(abs, total)),
            "mean_direct_source_dla": fmean(each["direct_source_dla"] for each in of),
            "mean_mediated_downstream_sum": fmean(each["mediated_downstream_sum"] for each in of),
            "mean_direct_plus_mediated": fmean(both),
            "mean_mediation_residual": fmean(each["mediation_residual"] for each in of),
            "mean_abs_mediation_residual": fmean(abs(each["mediation_residual"]) for each in of),
            "mean_explained_fraction": fmean(both) / fmean(total),
            "sign_match_fraction": fmean(np.sign(total) == np.sign(both)),
            "total_vs_direct_plus_mediated_r_squared": 1
            - ((y - both) ** 2).sum() / ((y - y.mean()) ** 2).sum(),
            "total_vs_direct_plus_mediated_correlation": np.corrcoef(total, both)[0, 1],
        }
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-8, abs=1e-12)
    groups = {}
    for row in rows["downstream_rows"]:
        key = ("scalar_name", "endpoint_kind", "source_component", "downstream_component")
        groups.setdefault(tuple(row[of] for of in key), []).append(row)
    assert len(rows["downstream_summary_rows"]) == len(groups)
    for row in rows["downstream_summary_rows"]:
        of = groups[tuple(row[name] for name in key)]
        for name in ("baseline_downstream_dla", "ablated_downstream_dla", "mediated_effect"):
            assert row[f"mean_{name}"] == pytest.approx(fmean(each[name] for each in of), rel=1e-9, abs=1e-12)
        size = fmean(abs(each["mediated_effect"]) for each in of)
        assert row["mean_abs_mediated_effect"] == pytest.approx(size, rel=1e-9)
        assert row["num_observations"] == len(of)


def test_over_all_parts_mediation_undoes_the_direct_effect(lake, world):
    """Parts sum to nothing in either run, so direct + mediated over *every* part is 0 whatever the total is."""
    lake.refresh()
    rows = lake.sql(
        "SELECT i.step, i.event, a.intervention, "
        "sum(i.log_prob_dla::DOUBLE - a.log_prob_dla::DOUBLE) AS both, max(abs(a.log_prob_dla)) AS size "
        "FROM intervention_components AS i JOIN intervention_components AS a "
        "USING (run, probe, spec, step, event, component) "
        "WHERE i.spec = ? AND i.intervention = 'clean' AND a.intervention <> 'clean' GROUP BY ALL",
        [spec_id(asked().answer_parameters()[0])],
    ).fetchall()
    assert {row[2] for row in rows} == set(SOURCES)
    for *_, both, size in rows:
        assert abs(both) < 1e-4 * (1 + size)
    totals = [
        world.measure("negative_answer_loss", *of, "target")[0]
        - world.measure("negative_answer_loss", *of, "target", "L0MLP")[0]
        for *of, _ in world.changes("")
    ]
    assert max(map(abs, totals)) > 0.1


@pytest.mark.parametrize("source", ["L0H1", "L0MLP"])
def test_where_the_last_layernorm_is_linear_nothing_is_left_over(world, source):
    """A constant direction much longer than everything else fixes the LayerNorm's scale: then total = direct + mediated
    over all that lies after the source, and the residual falls as the direction grows."""
    after = [of for of in COMPONENTS if component_order(of) > component_order(source)]
    pair = next(iter(world.pairs.values())).clean
    residuals = []
    for length in (1e3, 1e5):
        weights = {name: of.numpy().copy() for name, of in world.decoders[STEPS[-1]].w.items()}
        constant = np.zeros(weights["position_embedding.weight"].shape[1])
        constant[:2] = length, -length
        weights["position_embedding.weight"] += constant
        decoder = Decoder(weights)
        ends = []
        for zeroed in (None, source):
            residual, parts = decoder.run(pair.tokens, pair.prediction, zeroed)
            leaf = residual.clone().requires_grad_()
            # In units that do not shrink with the LayerNorm's output.
            value = length * scalar("correct_value_logit", decoder.logits(leaf), pair.answer, 0, 0, "source")
            (gradient,) = torch.autograd.grad(value, leaf)
            ends.append((float(value.detach()), {name: float(of @ gradient) for name, of in parts.items()}))
        total = ends[0][0] - ends[1][0]
        both = ends[0][1][source] + sum(ends[0][1][of] - ends[1][1][of] for of in after)
        residuals.append(abs(total - both) / abs(total))
    assert residuals[0] < 0.1
    assert residuals[1] < 1e-3
    assert residuals[1] < residuals[0] / 20


PAIRS = st.lists(st.tuples(*[st.floats(-8, 8, allow_nan=False, width=32)] * 4), min_size=1, max_size=6)


def own_sections(rows):
    """The report's own SQL over runs of one source A and two components after it: (total, direct, mediated, mediated)."""
    connection = duckdb.connect()
    for statement in create_macros():
        connection.execute(statement)
    key = "0 AS source_step, 1 AS target_step, 'clean' AS margin_side, 'target' AS endpoint_kind, 's' AS scalar_name"
    listed = ", ".join(f"('{at}', {', '.join(repr(float(of)) for of in row)})" for at, row in enumerate(rows))
    given = f"(SELECT * REPLACE (total::DOUBLE AS total), {key}, 1 AS step FROM (VALUES {listed}) AS t(pair_id, total, direct, m1, m2))"
    connection.execute(
        f"CREATE TABLE endpoint_values AS SELECT *, 'q' AS pair_type, 'x' AS split, 7 AS answer_token, 1 AS source_wrong, "
        f"2 AS target_wrong, unnest(['clean', 'A']) AS intervention, unnest([10.0, 10.0 - total]) AS value FROM {given}"
    )
    connection.execute(
        "CREATE TABLE endpoint_dlas AS SELECT *, unnest(['clean', 'clean', 'clean', 'A', 'A', 'A']) AS intervention, "
        "unnest(['A', 'B', 'C', 'A', 'B', 'C']) AS component, "
        f"unnest([direct, 3 + m1, m2, 0, 3, 0]::DOUBLE[]) AS dla FROM {given}"
    )
    parameters = {
        "scalar": ["s"],
        "source_component": ["A"],
        "downstream_component": ["B", "C"],
        "endpoint_kinds": ["target"],
    }
    path = Path(inspect.getfile(type(asked()))).with_suffix(".sql")
    for section in parse_sections(path.read_text(), path.name):
        if section.name in ("downstream_rows", "mediated", "source_rows", "source_summary_rows"):
            mine = {name: parameters[name] for name in section.parameters()}
            connection.execute(f"CREATE TABLE {section.name} AS {section.sql}", mine)
    (summary,) = connection.sql("FROM source_summary_rows").pl().to_dicts()
    return summary, connection.sql("FROM source_rows").pl().to_dicts()


@settings(max_examples=25, deadline=None)
@given(PAIRS)
def test_total_is_direct_and_mediated_and_the_rest(rows):
    summary, held = own_sections(rows)
    for row, (total, direct, first, second) in zip(
        sorted(held, key=lambda row: int(row["pair_id"])), rows, strict=True
    ):
        assert row["total_causal_effect"] == pytest.approx(total, abs=1e-12)
        assert row["mediated_downstream_sum"] == pytest.approx(first + second, abs=1e-12)
        together = row["direct_source_dla"] + sum(value for _, value in _items(row["mediated_by_component"]))
        assert row["direct_source_dla"] == pytest.approx(direct)
        assert row["direct_plus_mediated"] == pytest.approx(together, abs=1e-12)
        assert row["direct_plus_mediated"] + row["mediation_residual"] == pytest.approx(total, abs=1e-12)
    mean = fmean(of[0] for of in rows)
    if abs(summary["mean_total_causal_effect"]) <= 1e-12:
        assert summary["mean_explained_fraction"] is None
    elif abs(mean) > 1e-6:
        explained = fmean(sum(of[1:]) for of in rows) / mean
        assert summary["mean_explained_fraction"] == pytest.approx(explained, rel=1e-6, abs=1e-9)
    spread = sum((of[0] - mean) ** 2 for of in rows)
    if spread > 1e-9:
        error = sum((of[0] - sum(of[1:])) ** 2 for of in rows)
        found = summary["total_vs_direct_plus_mediated_r_squared"]
        assert found == pytest.approx(1 - error / spread, rel=1e-6, abs=1e-6)
    elif spread == 0:
        assert summary["total_vs_direct_plus_mediated_r_squared"] is None


def _items(of):
    return of.items() if isinstance(of, dict) else ((entry["key"], entry["value"]) for entry in of)


def test_the_explained_fraction_of_the_definitions_check():
    """Definitions 4 §K.6."""
    summary, _ = own_sections([(5, 1, 2, 0.5)])
    assert summary["mean_explained_fraction"] == pytest.approx(0.7)
    assert summary["mean_mediation_residual"] == pytest.approx(1.5)
    summary, _ = own_sections([(1, 1, 0, 0), (-1, 1, 0, 0)])
    assert summary["mean_explained_fraction"] is None


def test_the_markdown_leads_with_what_is_explained(found):
    rows, content, markdown = found
    mine = [
        row
        for row in rows["source_summary_rows"]
        if row["scalar_name"] == SCALARS[0] and row["endpoint_kind"] == "target"
    ]
    top = max(mine, key=lambda row: abs(row["mean_total_causal_effect"]))
    first = content["findings"][0]
    assert first.startswith(
        f"Zeroing **{top['source_component']}** takes {top['mean_total_causal_effect']:.3g} from"
    )
    assert f"**{100 * top['mean_explained_fraction']:.3g} % of it**" in first
    assert markdown.index(first) < markdown.index("## ")
    assert "with every part listed, direct + mediated is about 0 whatever the total is" in markdown


def test_charts_are_drawn_and_tables_cut(lake, tmp_path):
    options = {"endpoint_role": ("source",), "markdown_top_k_rows": 2, "plot_top_k_rows": 3}
    printed = run_report(lake, asked(**options), tmp_path / "out", chart_formats=["svg"])
    assert set(printed["plots"]) == {"source_mediation", "downstream_mediation"}
    _, content, markdown = written(lake, asked(**options), tmp_path / "again")
    assert "source ends)" in markdown
    assert len(content["top_sources"]) == len(content["top_downstream"]) == 2
    assert {row["scalar_name"] for row in content["source_summary_rows"]} == set(CAUSAL)


def test_one_unit_has_both_runs_and_their_attributions():
    clean, corrupted, *readouts = asked().needs()
    assert clean.parameters["components"] is corrupted.parameters["components"] is True
    assert [of["name"] for of in clean.parameters["interventions"]] == sorted(SOURCES)
    assert {need.dataset for need in readouts} == {READOUTS}
    assert clean.dataset == INTERVENTIONS


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source_component": None}, InvalidOption, "--source-component is required"),
        ({"downstream_component": None}, InvalidOption, "--downstream-component is required"),
        ({"downstream_component": ("L1H0", "L0MLP")}, OverlappingComponents, "L0MLP stands among the sources and among"),
        ({"source_component": ("embedding",)}, NotAblatable, "--source-component: embedding cannot be zeroed"),
        ({"downstream_component": ("embedding",)}, NotAblatable, "--downstream-component: embedding cannot be zeroed"),
        (
            {"source_component": ("L0H1",), "downstream_component": ("L0H0", "L0MLP")},
            NotDownstream,
            r"L0H0 cannot lie between source L0H1 and the answer; after L0H1 come L0MLP, and the heads and MLPs of layers 1",
        ),
        (
            {"source_component": ("L0H1", "L1MLP"), "downstream_component": ("L1H0", "L2H0")},
            NotDownstream,
            r"L1H0 cannot lie between source L1MLP and the answer; after L1MLP come the heads and MLPs of layers 2 and up",
        ),
        ({"source_component": ("L0N4",)}, UnknownComponent, "cannot read component 'L0N4'"),
        ({"plot_top_k_rows": 0}, InvalidOption, "--plot-top-k-rows should be greater than 0"),
        ({"markdown_top_k_rows": 0}, InvalidOption, "--markdown-top-k-rows should be greater than 0"),
        ({"pair_type": None}, InvalidOption, "--pair-type is required"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        asked(**options)
    assert "\n" not in str(caught.value)


def test_what_the_lake_lacks_is_named(lake, tmp_path):
    with pytest.raises(
        UnknownComponent, match="no component L2MLP; run 'r' has embedding, and in each of layers 0–1"
    ):
        run_report(lake, asked(downstream_component=("L2MLP",)), tmp_path / "out", chart_formats=[])
    with pytest.raises(MissingData, match=r"needs interventions .*--source-component L0H0"):
        run_report(lake, asked(source_component=("L0H0",)), tmp_path / "out", chart_formats=[])
    assert not (tmp_path / "out").exists()


def test_another_untouched_run_is_a_mismatch(lake_path, tmp_path):
    def shifted(name, row):
        if name == "intervention_runs" and row["intervention"] == "clean":
            row["answer_logit"] += 1e-3

    with (
        Lake.open(rewritten(lake_path, tmp_path, asked().answer_parameters()[0], shifted)) as changed,
        pytest.raises(ScalarMismatch, match=r"Scalar recomputation mismatch: .* of the clean record"),
    ):
        run_report(changed, asked(), tmp_path / "out", chart_formats=[])

import pytest
from lakebed.lake import Lake, Unit
from lakebed.lake.datasets import MOMENTS, Need
from lakebed.lake.errors import MissingData, UnknownName
from lakebed.lake.steps import StepSyntax
from lakebed.queries.needs import held_steps, resolve_run, resolve_steps
from lakebed.queries.registry import load_report

from .conftest import make_svd_lake, make_trace_lake


def asked(name="weight-svd-patterns", **options):
    return load_report(name).parse(options)


def test_steps_default_to_all_and_follow_the_grammar(svd):
    assert resolve_steps(svd.lake, asked(), "ref") == [250, 500, 750, 1500, 1750]
    assert resolve_steps(svd.lake, asked(steps="300:1600"), "ref") == [500, 750, 1500]
    assert resolve_steps(svd.lake, asked(steps="first,last"), "ref") == [250, 1750]


def test_missing_steps_come_with_the_command_that_makes_them(svd):
    with pytest.raises(MissingData) as error:
        resolve_steps(svd.lake, asked(steps="250:1250:250", max_vector_rank=4), "ref")
    assert str(error.value) == (
        "weight-svd-patterns needs svd for run 'ref' at steps 1000, 1250. Run: lakebed extract --for "
        f"weight-svd-patterns --lake {svd.lake.uri} --run ref --steps 1000,1250 --max-vector-rank 4"
    )


def test_a_range_without_steps_says_what_is_there(svd):
    with pytest.raises(
        MissingData, match=r"no step of run 'ref' lies in --steps 300:400; svd is there for 250:750:250, 1500"
    ):
        resolve_steps(svd.lake, asked(steps="300:400"), "ref")
    with pytest.raises(StepSyntax, match="cannot read steps '25x'"):
        resolve_steps(svd.lake, asked(steps="25x"), "ref")


def test_a_dataset_that_was_never_made(tmp_path):
    made = make_trace_lake(tmp_path / "lake with space", [1, 2])
    with pytest.raises(MissingData) as error:
        resolve_steps(made.lake, asked(steps="first", matrix=("W_Q", "W_K")), "traced")
    assert str(error.value).startswith("weight-svd-patterns needs svd for run 'traced'. Run: lakebed extract")
    assert str(error.value).endswith(
        f"--lake '{made.lake.uri}' --run traced --steps first --matrix W_Q --matrix W_K"
    )
    made.lake.close()


def test_a_trace_is_recorded_and_cannot_be_extracted(svd, trace):
    with pytest.raises(
        MissingData, match=r"needs trace for run 'ref'\..*lakebed train --lake .*lakebed trace"
    ) as error:
        resolve_steps(svd.lake, asked("optimizer-update-trace"), "ref")
    assert "extract" not in str(error.value)
    with pytest.raises(MissingData, match=r"at step 9\. .*recorded are steps 1:8"):
        resolve_steps(trace.lake, asked("optimizer-update-trace", steps="8,9"), "traced")


def test_runs(svd, tmp_path):
    assert resolve_run(svd.lake, asked()) == "ref"
    with pytest.raises(UnknownName, match=r"no run 'other' in .*; it has ref"):
        resolve_run(svd.lake, asked(run="other"))
    with svd.lake.unit(Unit("run", "second", "run")) as writer:
        writer.rows("runs", [{"source": "import"}])
    with pytest.raises(UnknownName, match=r"which --run\? .* has ref, second"):
        resolve_run(svd.lake, asked())
    with Lake.create(tmp_path / "empty.lake") as empty, pytest.raises(UnknownName, match="no runs yet"):
        resolve_run(empty, asked())


def test_steps_of_two_units_join(tmp_path):
    made = make_svd_lake(tmp_path / "l", [1, 2])
    from .conftest import decompose, matrices_of, random_walk, write_svd

    matrices = matrices_of(random_walk([3]), 2)
    write_svd(made.lake, "ref", [3], decompose(matrices, 2), {n: m.shape[-2:] for n, m in matrices.items()})
    assert resolve_steps(made.lake, asked(), "ref") == [1, 2, 3]
    made.lake.close()


def test_moments_stand_at_anchors_and_before_the_first_update(tmp_path):
    with Lake.create(tmp_path / "l") as lake:
        with lake.unit(Unit("checkpoint", "r", "checkpoint-0", (0, 8))) as writer:
            states = [(0, "stored", True), (4, "replayed", True), (8, "stored", True), (9, "stored", False)]
            writer.rows(
                "steps",
                [{"step": step, "state": state, "has_moments": known} for step, state, known in states],
            )
        assert held_steps(lake, "r", Need(MOMENTS)) == [0, 8]
        with lake.unit(Unit("moments", "r", "moments-4", (4,))):
            pass
        assert held_steps(lake, "r", Need(MOMENTS)) == [0, 4, 8]

"""Steps that overlap: one is computed while the one before it is written and the next is made ready."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from lakebed.engine.capture import Capture, CaptureError
from lakebed.extractors.dataset import Context, build_extractor
from lakebed.extractors.forward import ForwardPasses
from lakebed.extractors.plan import extract
from lakebed.extractors.states import StateReader
from lakebed.lake import Lake
from lakebed.lake.datasets import Need
from lakebed.lake.verify import verify

from tests import trained_probe_lake as trained

PROBE = {"probe": "probe"}


@pytest.fixture
def probed(probe_lake_path, tmp_path):
    """A copy of the trained run and its probe."""
    path = tmp_path / "copy.lake"
    shutil.copytree(probe_lake_path, path)
    for receipt in (path / "tables" / "extractions" / f"run={trained.RUN}").iterdir():
        if not receipt.name.startswith(("run", "checkpoint", "trace", "probe", "evaluation")):
            receipt.unlink()
    with Lake.open(path) as lake:
        lake.refresh()
        yield lake


@pytest.fixture
def two_threads():
    """Batches are computed side by side, while the caller goes on."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_state_is_measured_as_it_was_handed_over(probed, two_threads):
    """A replay changes its tensors in place once the next state is asked for, while batches are still being computed."""
    context, reader = Context(probed, trained.RUN), StateReader(probed, trained.RUN)
    extractor = build_extractor("readouts", PROBE)
    found = {}
    with ForwardPasses(context, [extractor], batch_size=97) as passes:
        for step in (0, 150):
            state = reader.read(step)
            passes.run(
                state, [extractor], lambda _, fill: found.update({fill.keywords["step"]: fill.keywords})
            )
            for weight in state.weights.values():
                weight.zero_()
    assert torch.get_num_threads() == 2
    with ForwardPasses(context, [extractor], batch_size=97) as passes:
        for step in (0, 150):
            expected, _ = passes.capture(reader.read(step), [extractor])
            for name, column in vars(expected.readouts).items():
                assert torch.equal(getattr(found[step]["captured"].readouts, name), column)


@pytest.mark.parametrize(("error", "written"), [(ValueError, [150]), (KeyboardInterrupt, [])])
def test_a_step_that_was_begun_is_written_when_another_cannot_be(
    probed, two_threads, monkeypatch, error, written
):
    """An interrupt ends the batches that are on their way, an error of something else does not."""
    context, reader = Context(probed, trained.RUN), StateReader(probed, trained.RUN)
    extractor, run = build_extractor("readouts", PROBE), Capture.run
    found, going = [], threading.Event()

    def slow(self, batch):
        going.wait(0.05)
        return run(self, batch)

    monkeypatch.setattr(Capture, "run", slow)
    with pytest.raises(error), ForwardPasses(context, [extractor], batch_size=97) as passes:
        passes.run(reader.read(150), [extractor], lambda _, fill: found.append(fill.keywords["step"]))
        raise error
    assert found == written


@pytest.mark.parametrize("batch_size", [97, 100_000])
def test_what_goes_wrong_in_a_pass_is_raised_with_its_step_and_what_was_finished_stays(
    probed, two_threads, monkeypatch, batch_size
):
    run = Capture.run
    first = StateReader(probed, trained.RUN).read(100).weights["token_embedding.weight"]

    def fails(self, batch):
        if torch.equal(self.model.unembedding, first):
            raise CaptureError("no")
        return run(self, batch)

    monkeypatch.setattr(Capture, "run", fails)
    with pytest.raises(CaptureError, match="step 100 of run 'r': no"):
        extract(probed, trained.RUN, [Need("readouts", PROBE)], "0:150:50", batch_size=batch_size)
    assert probed.sql("select distinct step from readouts order by 1").fetchall() == [(0,), (50,)]
    assert verify(probed).ok

"""What tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import trained_probe_lake


@pytest.fixture(scope="session")
def probe_lake_path(tmp_path_factory) -> Path:
    """A trained run with a probe and every dataset of forward passes: read it, do not write it."""
    path = trained_probe_lake.build(tmp_path_factory.mktemp("probed"))
    trained_probe_lake.extract_all(path)
    return path

"""What tests of several folders share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import (
    attribution_lake,
    downstream_lake,
    formation_lake,
    route_lake,
    s3_server,
    trained_probe_lake,
)


@pytest.fixture(scope="session")
def probe_lake_path(tmp_path_factory) -> Path:
    """A trained run with a probe and every dataset of forward passes: read it, do not write it."""
    path = trained_probe_lake.build(tmp_path_factory.mktemp("probed"))
    trained_probe_lake.extract_all(path)
    return path


@pytest.fixture(scope="session")
def formation_lake_path(tmp_path_factory) -> Path:
    """The formation run before its first step, with its probe: read it, do not write it."""
    return formation_lake.build(tmp_path_factory.mktemp("formation"))


@pytest.fixture(scope="session")
def route_lake_path(tmp_path_factory) -> Path:
    """A short recorded training with a probe and one of training records: read it, do not write it."""
    return route_lake.build(tmp_path_factory.mktemp("routes"))


@pytest.fixture(scope="session")
def attribution_lake_path(tmp_path_factory) -> Path:
    """A short recorded training with a probe; tests of reports copy it, and extract what they need: do not write it."""
    return attribution_lake.build(tmp_path_factory.mktemp("attributed"))


@pytest.fixture(scope="session")
def downstream_lake_path(tmp_path_factory) -> Path:
    """A short recorded training with a probe: copy it before you extract."""
    return downstream_lake.build(tmp_path_factory.mktemp("downstream"))


@pytest.fixture(scope="session")
def s3_session() -> Iterator[s3_server.Server]:
    """A local S3 server."""
    with s3_server.running() as server:
        yield server


@pytest.fixture
def s3(s3_session, monkeypatch) -> s3_server.Server:
    """The local S3 server, with the variables that lead there."""
    for name, value in s3_session.environment.items():
        monkeypatch.setenv(name, value)
    return s3_session


@pytest.fixture
def bucket(s3) -> str:
    """URI of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(name)
    return f"s3://{name}"


def pytest_collection_modifyitems(items):
    """Commands of the pages first: they take longest of all files, and workers take a file each, in order."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")

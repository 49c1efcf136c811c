"""The trained models, made once."""

from __future__ import annotations

import pytest
import torch

from tests.engine.adapters.families import FAMILIES, Family, gpt2, symbolic_kv


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """These matrices are tiny: on a busy machine a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return symbolic_kv() if request.param == "symbolic_kv" else gpt2(tmp_path_factory.mktemp("gpt2"))

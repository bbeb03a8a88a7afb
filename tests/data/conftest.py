"""Applies to the tests of the loaders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import make_image_folder


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine, waiting for a second thread costs far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["pil", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that decodes files."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="the dali loader needs NVIDIA DALI")
    return request.param


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 8 validation JPEGs in two classes, about 200 x 160 pixels. Read only."""
    return make_image_folder(tmp_path_factory.mktemp("images"), size=(200, 160))

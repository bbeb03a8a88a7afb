"""Applies to every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kernel_helpers import skip_unless_it_runs_on

# Test processes run side by side, and each has small tensors.
torch.set_num_threads(1)

# Triton reads this once, when it is first imported, which `import torch` does not do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes and generated images go to a temporary folder, never to the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def place(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    skip_unless_it_runs_on(request.param[0])
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_it_runs_on(request.param)
    return request.param


@pytest.fixture(autouse=True, scope="module")
def denormals_are_kept() -> Iterator[None]:
    """Training flushes them for the whole process: not in the tests of the next file."""
    yield
    torch.set_flush_denormal(False)

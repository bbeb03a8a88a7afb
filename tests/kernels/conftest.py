"""What all kernel tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernel_helpers import skip_unless_it_runs_on


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    skip_unless_it_runs_on(request.param[0])
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_it_runs_on(request.param)
    return request.param

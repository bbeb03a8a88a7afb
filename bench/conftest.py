"""What all benchmarks share: the device, a timer that waits for it, and what is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.models import roofline
from bench.support.installed import left_out
from bench.support.timing import DEVICE, ON_GPU
from rsfast.runtime.environment import describe


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second."""
    return roofline.copy_bandwidth(DEVICE)


def pytest_configure(config: Any) -> None:
    torch.backends.cudnn.benchmark = True  # as a run has it
    if hasattr(config.option, "benchmark_timer"):
        config.option.benchmark_timer = "bench.support.timing.synchronized_clock"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    # What the rivals' compilers warn of is not an error of ours.
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_report_header() -> list[str]:
    if ON_GPU:
        name = torch.cuda.get_device_name()
        return [f"benchmarks on {name}; not installed, so left out: {left_out()}"]
    return [
        "benchmarks on the CPU: small shapes in float32; left out: rsfast's Triton kernels, "
        f"torch.compile and {left_out()}, which need a GPU"
    ]


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["rsfast"] = describe(DEVICE)

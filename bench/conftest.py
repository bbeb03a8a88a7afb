"""What all benchmarks share: the device, a timer that waits for it, and what is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.timing import DEVICE
from rsfast.environment import describe


@pytest.fixture
def device() -> torch.device:
    return DEVICE


def pytest_configure(config: Any) -> None:
    if hasattr(config.option, "benchmark_timer"):
        config.option.benchmark_timer = "bench.timing.synchronized_clock"


def pytest_report_header() -> list[str]:
    left_out = "" if DEVICE.type == "cuda" else " (no GPU: small shapes, float32 only)"
    return [f"benchmarks on {DEVICE}{left_out}"]


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["rsfast"] = describe(DEVICE)

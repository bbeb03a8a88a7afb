"""What all benchmarks share: a timer that waits for the device."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from rsfast.environment import describe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized_clock() -> float:
    """Seconds, read after everything that was queued on the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture
def device() -> torch.device:
    return DEVICE


def pytest_configure(config: Any) -> None:
    if hasattr(config.option, "benchmark_timer"):
        from pytest_benchmark.utils import NameWrapper

        config.option.benchmark_timer = NameWrapper(synchronized_clock)


def pytest_report_header() -> list[str]:
    left_out = "" if DEVICE.type == "cuda" else " (no GPU: small shapes, float32 only)"
    return [f"benchmarks on {DEVICE}{left_out}"]


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["rsfast"] = describe(DEVICE)

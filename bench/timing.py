"""The clock of the benchmarks."""

from __future__ import annotations

import time

import torch

__all__ = ["DEVICE", "synchronized_clock"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized_clock() -> float:
    """Seconds, read after everything that was queued on the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

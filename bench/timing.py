"""The clocks of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["DEVICE", "synchronized_clock", "time_interleaved"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized_clock() -> float:
    """Seconds, read after everything that was queued on the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each round of each run; a round of one is followed by a round of the next.

    On a GPU the time is the device's, between two events: launches are queued behind a long
    kernel first, so that the host's share does not show. That share is what a CUDA graph removes.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_time_once(run, device))
    return times


def _time_once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # clock cycles, about a millisecond
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3

"""The clocks of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["DEVICE", "ON_GPU", "synchronized_clock", "time_interleaved", "time_steps"]

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def synchronized_clock() -> float:
    """Seconds, read after everything that was queued on the device is done."""
    if ON_GPU:
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

    On a GPU the time is the device's, between two events: the device waits first for twice as long
    as the host needs to queue the run, so that the host's share does not show. That share is what
    a CUDA graph removes. Caches are as the run before left them.
    """
    queueing = {name: max(_queue(run) for _ in range(warmup)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_time_once(run, device, queueing[name]))
    return times


def time_steps(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds per step in each round of each run, interleaved, by the wall clock: host included."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = synchronized_clock()
            for _ in range(steps):
                run()
            if number:  # the first round warms up
                times[name].append((synchronized_clock() - start) / steps)
    return times


def _queue(run: Callable[[], Any]) -> float:
    """Seconds until the host is through with a run; the first one of all compiles."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_once(run: Callable[[], Any], device: torch.device, queueing: float) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((2 * queueing + 1e-4) * 2e9))  # cycles, at 2 GHz or less
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3

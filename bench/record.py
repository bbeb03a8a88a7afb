"""What is checked before a time is taken, and what is kept with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.timing import DEVICE

__all__ = ["check_alike", "record"]


def check_alike(results: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    """No time is shown for a wrong result: differences stay within a few roundings of `dtype`."""
    for result, want in zip(results, wanted, strict=True):
        size = want.abs().max().double().clamp_min(1e-6)
        error = (result.double() - want.double()).abs().max() / size
        assert error <= 16 * torch.finfo(dtype).eps, f"off by {error:.1e} of the largest value"


def record(
    benchmark: Any,
    run: Callable[[], Any],
    group: str,
    moved_bytes: int,
    copy_bandwidth: float,
) -> None:
    """Times a run, and notes the bytes it must move, GB/s, and the share of a copy's bandwidth."""
    on_gpu = DEVICE.type == "cuda"
    benchmark.group = group
    benchmark.pedantic(
        run, rounds=50 if on_gpu else 3, warmup_rounds=10 if on_gpu else 1, iterations=1
    )
    bandwidth = moved_bytes / benchmark.stats.stats.median if benchmark.stats else 0.0
    benchmark.extra_info |= {
        "moved_bytes": moved_bytes,
        "bandwidth_gb_s": bandwidth / 1e9,
        "share_of_copy_bandwidth": bandwidth / copy_bandwidth,
        "copy_bandwidth_gb_s": copy_bandwidth / 1e9,
    }

"""What the card itself reaches: the ceilings that results are held against."""

from __future__ import annotations

import statistics

import torch

from bench.timing import time_interleaved

__all__ = ["copy_bandwidth", "matmul_rate"]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB (64 MiB on a CPU)."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_interleaved({"copy": lambda: target.copy_(source)}, device, rounds=20)
    return 2 * size / statistics.median(times["copy"])


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations per second of a large matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = time_interleaved({"matmul": lambda: a @ b}, device, rounds=20)
    return 2 * size**3 / statistics.median(times["matmul"])

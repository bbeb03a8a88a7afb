"""What the card itself reaches: the ceilings that results are held against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from bench.models import traffic
from bench.support.results_file import Results
from bench.support.shapes import batch_norm_of, hollow, observe
from bench.support.timing import DEVICE, time_interleaved
from rsfast import Pyramid
from rsfast.models.deploy import multiply_adds

__all__ = ["Floors", "copy_bandwidth", "matmul_rate", "measure_card", "step_floors"]


class Floors(NamedTuple):
    """What one image at all its resolutions costs at least, trained for one step.

    Attributes:
        flops: of convolutions and classifier, forward, input and weight gradients.
        bytes_16_bit: moved if every convolution reads its input and writes its output once for
            each of the three, and batch norm, with the stem's pooling, what rsfast's kernels take.
    """

    flops: float
    bytes_16_bit: float


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


def measure_card(results: Results) -> tuple[float, float]:
    """Copy bandwidth and matrix rate, also as rows of the results."""
    copy, rate = copy_bandwidth(DEVICE), matmul_rate(DEVICE)
    results.add("card/copy_bandwidth", [copy / 1e9], "GB/s")
    results.add("card/matmul_bf16", [rate / 1e12], "TFLOP/s")
    return copy, rate


def step_floors(arch: str, resolutions: Sequence[int]) -> Floors:
    """FLOPs and bytes of one image; divide the card's rates by them for images/s."""
    model, elements = hollow(arch, tuple(resolutions)), 0.0

    def count(_: nn.Module, inputs: tuple[Pyramid, ...], output: Pyramid) -> None:
        nonlocal elements
        # Forward reads x and writes y, dgrad reads dy and writes dx, wgrad reads x and dy.
        elements += 3 * inputs[0].numel() + 3 * output.numel()

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    found = [batch_norm_of(call) for call in observe(model)]
    elements += sum(traffic.rsfast(layer) for layer in found if layer is not None)
    for hook in hooks:
        hook.remove()
    plain = model.at(resolutions[0])
    macs = sum(multiply_adds(plain, r) for r in resolutions)
    return Floors(flops=3 * 2 * macs, bytes_16_bit=2 * elements)

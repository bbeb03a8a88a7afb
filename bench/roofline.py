"""What the card itself reaches: the ceilings that results are held against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.shapes import batch_norm_layers
from bench.timing import time_interleaved
from rsfast import Pyramid, create_model
from rsfast.models.deploy import multiply_adds
from rsfast.models.layers import Conv2d

__all__ = ["Floors", "copy_bandwidth", "matmul_rate", "step_floors"]


class Floors(NamedTuple):
    """What one image at all its resolutions costs at least, trained for one step.

    Attributes:
        flops: of convolutions and classifier, forward, input and weight gradients.
        bytes_16_bit: moved if every convolution reads its input and writes its output once for
            each of the three, and batch norm takes two kernels each way.
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


def step_floors(arch: str, resolutions: Sequence[int]) -> Floors:
    """FLOPs and bytes of one image; divide the card's rates by them for images/s."""
    elements = 0

    def count(conv: Conv2d, inputs: tuple[Pyramid, ...], output: Pyramid) -> None:
        nonlocal elements
        # Forward reads x and writes y, dgrad reads dy and writes dx, wgrad reads x and dy.
        elements += 3 * inputs[0].rows.numel() + 3 * output.rows.numel()

    with torch.device("meta"):
        model = create_model(arch, resolutions).eval()
        images: list[Tensor] = [torch.empty(1, 3, r, r) for r in resolutions]
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(count)
    model(images)
    for layer, number in batch_norm_layers(arch, resolutions).items():
        passes = 8 + 2 * layer.residual
        elements += number * passes * sum(layer.level_rows(1)) * layer.channels
    macs = sum(multiply_adds(model.at(r)) for r in resolutions)
    return Floors(flops=3 * 2 * macs, bytes_16_bit=2 * elements)

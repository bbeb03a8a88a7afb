"""The pixels that a strided 1x1 convolution reads: one launch over all levels, or slices of each.

"slices" is what PyTorch does with a list of tensors; its gradient is filled with zeros and written
once for each axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.support.record import as_packed, check_alike, record
from bench.support.shapes import (
    ARCHITECTURES,
    DTYPES,
    NUM_IMAGES,
    PASSES,
    RESOLUTIONS,
    StridedMap,
    short_name,
    strided_maps,
)
from bench.support.timing import DEVICE, ON_GPU
from rsfast import Pyramid
from rsfast.kernels import conv2d_sizes, subsample, subsample_reference

IMPLEMENTATIONS = ("slices", "reference", "rsfast") if ON_GPU else ("slices", "reference")


def layers(arch: str) -> Counter[StridedMap]:
    """What the strided 1x1 convolutions of a network read, and how many there are of each."""
    return strided_maps(arch, RESOLUTIONS)


CASES = sorted({layer for arch in ARCHITECTURES for layer in layers(arch)}, key=str)


def moved_bytes(layer: StridedMap, dtype: torch.dtype, direction: str) -> int:
    """The pixels once in and once out; backward their gradient, and that of the whole map."""
    pixels = NUM_IMAGES * sum(h * w for h, w in layer.sizes)
    read = NUM_IMAGES * sum(h * w for h, w in conv2d_sizes(layer.sizes, 1, layer.stride))
    rows = 3 * read + pixels if direction == "forward_backward" else 2 * read
    return rows * layer.channels * dtype.itemsize


def make_runs(
    layer: StridedMap, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: rows, then their gradient."""
    wants_grads = direction == "forward_backward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    out_sizes = conv2d_sizes(layer.sizes, 1, layer.stride)

    def normal(sizes: Any) -> Tensor:
        shape = NUM_IMAGES * sum(h * w for h, w in sizes), layer.channels
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    x, dy = normal(layer.sizes).requires_grad_(wants_grads), normal(out_sizes)
    levels = [v.detach() for v in Pyramid(x.detach(), layer.sizes, NUM_IMAGES).levels()]
    levels = [v.requires_grad_(wants_grads) for v in levels]
    dys = list(Pyramid(dy, out_sizes, NUM_IMAGES).levels())

    def run_packed(function: Callable[..., Tensor], x: Tensor, **backend: str) -> list[Tensor]:
        y = function(x, layer.sizes, NUM_IMAGES, layer.stride, **backend)
        return [y, *torch.autograd.grad(y, x, dy.to(y.dtype))] if wants_grads else [y]

    def slices() -> list[Any]:
        down, right = layer.stride
        ys = [
            v[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last) for v in levels
        ]
        return [ys, list(torch.autograd.grad(ys, levels, dys))] if wants_grads else [ys]

    exact = x.detach().double().requires_grad_(wants_grads)
    runs = {
        "exact": lambda: run_packed(subsample_reference, exact),
        "slices": slices,
        "reference": lambda: run_packed(subsample_reference, x),
    }
    if ON_GPU:
        runs["rsfast"] = lambda: run_packed(subsample, x, backend="triton")
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", CASES, ids=str)
def test_subsample(
    benchmark,
    copy_bandwidth: float,
    layer: StridedMap,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    check_alike(runs, [impl], as_packed)
    group = f"subsample/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)

"""k x k convolutions of all levels: into packed rows in place, packed afterwards, or left apart.

"separate" is what a list-of-tensors network does and leaves one tensor per level: the packed ones
can at best be as fast. "reference" concatenates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support.record import as_packed, check_alike, record
from bench.support.shapes import (
    ARCHITECTURES,
    DTYPES,
    NUM_IMAGES,
    PASSES,
    RESOLUTIONS,
    ConvLayer,
    conv_layers,
    short_name,
)
from bench.support.timing import DEVICE
from rsfast import Pyramid
from rsfast.kernels import conv2d, conv2d_reference

IMPLEMENTATIONS = ("separate", "reference", "rsfast")


def layers(arch: str) -> Counter[ConvLayer]:
    """Those of a network that the operation computes, and how many there are of each."""
    return conv_layers(arch, RESOLUTIONS)


CASES = sorted({layer for arch in ARCHITECTURES for layer in layers(arch)}, key=str)


def moved_bytes(layer: ConvLayer, dtype: torch.dtype, direction: str) -> int:
    """Inputs and outputs once in each of the one or three products; weights hardly count."""
    rows_in, rows_out = layer.rows(NUM_IMAGES)
    elements = rows_in * layer.c_in + rows_out * layer.c_out
    products = 3 if direction == "forward_backward" else 1
    return products * elements * dtype.itemsize


def make_runs(
    layer: ConvLayer, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: output, then gradients."""
    wants_grads = direction == "forward_backward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows_in, rows_out = layer.rows(NUM_IMAGES)
    fan_in = layer.c_in // layer.groups * layer.kernel**2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    x = normal(rows_in, layer.c_in).to(dtype).requires_grad_(wants_grads)
    weight = normal(layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel)
    weight = (weight / math.sqrt(fan_in)).to(dtype).contiguous(memory_format=torch.channels_last)
    weight.requires_grad_(wants_grads)
    dy = normal(rows_out, layer.c_out).to(dtype)
    levels = [v.detach() for v in Pyramid(x.detach(), layer.sizes, NUM_IMAGES).levels()]
    levels = [v.requires_grad_(wants_grads) for v in levels]
    dys = list(Pyramid(dy, layer.out_sizes, NUM_IMAGES).levels())

    def run_packed(function: Callable[..., Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
        y = function(x, weight, layer.sizes, NUM_IMAGES, **layer.geometry)
        return [y, *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))] if wants_grads else [y]

    def exact() -> list[Tensor]:
        inputs = (t.detach().double().requires_grad_(wants_grads) for t in (x, weight))
        return run_packed(conv2d_reference, *inputs)

    def separate() -> list[Any]:
        ys = [F.conv2d(v, weight, **layer.geometry) for v in levels]
        if not wants_grads:
            return [ys]
        *dxs, dweight = torch.autograd.grad(ys, [*levels, weight], dys)
        return [ys, dxs, dweight]

    return {
        "exact": exact,
        "separate": separate,
        "reference": lambda: run_packed(conv2d_reference, x, weight),
        "rsfast": lambda: run_packed(conv2d, x, weight),
    }


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", CASES, ids=str)
def test_conv2d(
    benchmark,
    copy_bandwidth: float,
    layer: ConvLayer,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    check_alike(runs, [impl], as_packed)
    group = f"conv2d/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)

"""1x1 convolutions that take in a pending batch norm and emit the moments of their output.

"product" is the matrix product alone, a floor: what is above it has to be less than the passes of
batch norm that it saves (rows of switchable_bn_act), or rsfast stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import check_alike, record
from bench.shapes import (
    ARCHITECTURES,
    DTYPES,
    NUM_IMAGES,
    PASSES,
    RESOLUTIONS,
    ConvLayer,
    pointwise_layers,
    short_name,
)
from bench.timing import DEVICE, ON_GPU
from rsfast.kernels import conv1x1, conv1x1_reference

IMPLEMENTATIONS = (
    ("product", "reference", "compiled", "rsfast") if ON_GPU else ("product", "reference")
)
UNCHECKED = ("product",)  # it computes less
CASES = sorted({n for arch in ARCHITECTURES for n in pointwise_layers(arch, RESOLUTIONS)}, key=str)


def moved_bytes(layer: ConvLayer, dtype: torch.dtype, direction: str) -> int:
    """Input and output once forward; backward the output's gradient twice, both, and dx."""
    rows, _ = layer.rows(NUM_IMAGES)
    elements = rows * (layer.c_in + layer.c_out)
    if direction == "forward_backward":
        elements += rows * (3 * layer.c_in + 4 * layer.c_out)
    return elements * dtype.itemsize


def make_runs(
    layer: ConvLayer, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: outputs, then gradients."""
    wants_grads = direction == "forward_backward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    level_rows = tuple(NUM_IMAGES * height * width for height, width in layer.sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    inputs = [normal(sum(level_rows), layer.c_in).to(dtype)]
    inputs += [(normal(layer.c_out, layer.c_in) / math.sqrt(layer.c_in)).to(dtype)]
    inputs += [normal(len(level_rows), layer.c_in) / 3 + offset for offset in (0.0, 1.0, 0.0)]
    inputs = [tensor.requires_grad_(wants_grads) for tensor in inputs]
    dys = [normal(sum(level_rows), layer.c_out).to(dtype)]
    dys += [normal(len(level_rows), layer.c_out) for _ in range(2)]

    def run(function: Callable[..., Any], tensors: list[Tensor], **options: Any) -> list[Tensor]:
        x, weight, center, scale, shift = tensors
        pending = {"center": center, "scale": scale, "shift": shift, "activation": "relu"}
        found = list(function(x, weight, level_rows, **pending, **options))
        if not wants_grads:
            return found
        grads = [dy.to(part.dtype) for dy, part in zip(dys, found, strict=True)]
        return [*found, *torch.autograd.grad(found, tensors, grads)]

    def product() -> list[Tensor]:
        y = F.linear(inputs[0], inputs[1])
        return [y, *torch.autograd.grad(y, inputs[:2], dys[0])] if wants_grads else [y]

    def exact() -> list[Tensor]:
        wide = [tensor.detach().double().requires_grad_(wants_grads) for tensor in inputs]
        return run(conv1x1_reference, wide)

    runs = {
        "exact": exact,
        "product": product,
        "reference": lambda: run(conv1x1_reference, inputs),
    }
    if ON_GPU:
        torch._dynamo.reset()  # after 8 shapes it would go on without compiling
        compiled = torch.compile(conv1x1_reference, dynamic=False, fullgraph=True)
        runs["compiled"] = lambda: run(compiled, inputs)
        runs["rsfast"] = lambda: run(conv1x1, inputs, backend="triton")
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", CASES, ids=str)
def test_conv1x1(
    benchmark,
    copy_bandwidth: float,
    layer: ConvLayer,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    check_alike(runs, [impl] if impl not in UNCHECKED else [], list)
    group = f"conv1x1/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)

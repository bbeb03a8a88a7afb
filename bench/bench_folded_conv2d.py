"""Convolutions that take in a pending batch norm and emit the moments of their output.

"product" is the vendor library's convolution alone, a floor: what is above it has to be less than
the passes of batch norm that it saves (rows of switchable_bn_act), or rsfast stays as it is.
"measured" is ours with nothing pending (`--fold-bn statistics`), whose backward is the library's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
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
    conv_layers,
    pointwise_layers,
    short_name,
)
from bench.timing import DEVICE, ON_GPU
from rsfast import Pyramid
from rsfast.kernels import conv2d, folded_conv2d, folded_conv2d_reference
from rsfast.kernels._checks import rows_of_levels

IMPLEMENTATIONS = (
    ("product", "measured", "reference", "compiled", "rsfast")
    if ON_GPU
    else ("product", "reference")
)
UNCHECKED = ("product", "measured")  # they compute less


def folded_layers(arch: str, resolutions: Sequence[int] = RESOLUTIONS) -> Counter[ConvLayer]:
    """The layers that batch norm can be folded into, and how many there are of each."""
    larger = conv_layers(arch, resolutions)
    plain = {n: count for n, count in larger.items() if n.groups == 1 and n.c_in > 4}
    return pointwise_layers(arch, resolutions) + Counter(plain)


CASES = sorted({n for arch in ARCHITECTURES for n in folded_layers(arch)}, key=str)


def moved_bytes(layer: ConvLayer, dtype: torch.dtype, direction: str) -> int:
    """Input and output once forward; backward both again, to dy and by way of it to dx and dweight.

    The pass for the moments' gradient reads dy and y and writes e, which both products read, like
    x; dgrad writes dx.
    """
    rows_in, rows_out = layer.rows(NUM_IMAGES)
    elements = rows_in * layer.c_in + rows_out * layer.c_out
    if direction == "forward_backward":
        elements += 3 * rows_in * layer.c_in + 5 * rows_out * layer.c_out
    return elements * dtype.itemsize


def make_runs(
    layer: ConvLayer, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: outputs, then gradients."""
    wants_grads = direction == "forward_backward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows_in, rows_out = layer.rows(NUM_IMAGES)
    num_levels, kernel = len(layer.sizes), layer.kernel

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    weight = normal(layer.c_out, layer.c_in, kernel, kernel) / (kernel * math.sqrt(layer.c_in))
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    inputs = [normal(rows_in, layer.c_in).to(dtype), weight]
    inputs += [normal(num_levels, layer.c_in) / 3 + offset for offset in (0.0, 1.0, 0.0)]
    inputs = [tensor.requires_grad_(wants_grads) for tensor in inputs]
    dys = [normal(rows_out, layer.c_out).to(dtype)]
    dys += [normal(num_levels, layer.c_out) for _ in range(2)]
    maps = layer.sizes, NUM_IMAGES

    def run(function: Callable[..., Any], tensors: list[Tensor], **options: Any) -> list[Tensor]:
        x, weight, center, scale, shift = tensors
        pending = {"center": center, "scale": scale, "shift": shift, "activation": "relu"}
        options |= {**pending, "stride": layer.stride}
        found = list(function(x, weight, *maps, **options))
        if not wants_grads:
            return found
        grads = [dy.to(part.dtype) for dy, part in zip(dys, found, strict=True)]
        return [*found, *torch.autograd.grad(found, tensors, grads)]

    def product() -> list[Tensor]:
        x, weight = inputs[:2]
        if kernel * layer.stride == 1:
            y = F.linear(x, weight.flatten(1))
        else:
            y = conv2d(x, weight, *maps, layer.stride)
        return [y, *torch.autograd.grad(y, inputs[:2], dys[0])] if wants_grads else [y]

    def measured() -> list[Tensor]:
        if kernel > 1:  # which a network leaves to the library
            return product()
        pyramid, step = Pyramid(inputs[0], layer.sizes, NUM_IMAGES), layer.stride
        if step > 1:
            pyramid = Pyramid.pack([level[:, :, ::step, ::step] for level in pyramid.levels()])
        found = folded_conv2d(pyramid.rows, inputs[1], pyramid.sizes, NUM_IMAGES, backend="triton")
        if not wants_grads:
            return list(found)
        return [*found, *torch.autograd.grad(found.y, inputs[:2], dys[0])]

    def exact() -> list[Tensor]:
        wide = [tensor.detach().double().requires_grad_(wants_grads) for tensor in inputs]
        return run(folded_conv2d_reference, wide)

    runs = {
        "exact": exact,
        "product": product,
        "reference": lambda: run(folded_conv2d_reference, inputs),
    }
    if ON_GPU:
        torch._dynamo.reset()  # after 8 shapes it would go on without compiling
        compiled = torch.compile(folded_conv2d_reference, dynamic=False, fullgraph=True)
        runs["compiled"] = lambda: run(compiled, inputs)
        if kernel == 1:
            _check_measured(*measured()[:3], product()[0], layer)
        runs["measured"] = measured
        runs["rsfast"] = lambda: run(folded_conv2d, inputs, backend="triton")
    return runs


def _check_measured(y: Tensor, mean: Tensor, var: Tensor, want: Tensor, layer: ConvLayer) -> None:
    """The product is the library's, and its moments are those of what is stored."""
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    level_rows = rows_of_levels(*zip(*layer.sizes, strict=True), NUM_IMAGES, layer.stride)
    for level, rows in enumerate(y.float().split(level_rows)):
        moments = torch.var_mean(rows, dim=0, correction=0)
        for ours, exact in zip((var[level], mean[level]), moments, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", CASES, ids=str)
def test_folded_conv2d(
    benchmark,
    copy_bandwidth: float,
    layer: ConvLayer,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    check_alike(runs, [impl] if impl not in UNCHECKED else [], list)
    group = f"folded_conv2d/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)

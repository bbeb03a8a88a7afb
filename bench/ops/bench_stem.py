"""The first convolution of a ResNet, 7x7 with stride 2: what its images are best handed over as.

"C3" are the colours, "C4" and "C8" have zeros behind them, and their weight likewise.
"space_to_depth" regroups 2 x 2 pixels of "C4" into 16 channels, with a border of zeros, so that a
4x4 weight with stride 1 and no padding is left: the 7x7 one behind a first row and column of zeros,

    y[i] = sum_k weight[k - 1] x[2 i + k - 4] = sum_b sum_d weight[2 b + d - 1] x[2 (i - 2 + b) + d]

with k = 2 b + d from 0 to 7, along both axes. Images are ready when the clock starts, as a loader
would hand them over, except in "space_to_depth_here" (forward only). The weight is kept as 7x7 of
3 channels: bringing it, and its gradient, into another form is inside the clock. The vendor library
computes all of them, level by level, and leaves levels apart; the images need no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support.record import as_packed, check_alike, record
from bench.support.shapes import DTYPES, NUM_IMAGES, RESOLUTIONS, ConvLayer, conv_layers, short_name
from bench.support.timing import DEVICE

IMPLEMENTATIONS = ("C3", "C4", "C8", "space_to_depth", "space_to_depth_here")
PASSES = ("forward", "wgrad")
# The same in every ResNet; the channels are those of the colours.
STEM = next(n for n in conv_layers("resnet50", RESOLUTIONS) if n.kernel == 7)._replace(c_in=3)


def moved_bytes(layer: ConvLayer, dtype: torch.dtype, direction: str) -> int:
    """The colours, and the output or its gradient, once: weights hardly count."""
    rows_in, rows_out = layer.rows(NUM_IMAGES)
    return (rows_in * layer.c_in + rows_out * layer.c_out) * dtype.itemsize


def regroup_images(images: Tensor) -> Tensor:
    """[N, C, H, W] as [N, 4 C, H / 2 + 3, W / 2 + 3], channels-last, zeros around.

    Channels are ordered by row, column and channel of the pixels; two blocks of zeros go before
    and one after, so that a 4x4 convolution needs no padding.

    Raises:
        ValueError: if a size is odd.
    """
    n, c, height, width = images.shape
    if height % 2 or width % 2:
        raise ValueError(f"images must have even sizes to be regrouped, got {height} x {width}")
    blocks = images.new_zeros(n, height // 2 + 3, width // 2 + 3, 4 * c)
    pixels = images.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    # [N, H / 2, W / 2, 2, 2, C], written in one copy.
    blocks[:, 2:-1, 2:-1].unflatten(3, (2, 2, c)).copy_(pixels.permute(0, 1, 3, 2, 4, 5))
    return blocks.permute(0, 3, 1, 2)


def regroup_weight(weight: Tensor) -> Tensor:
    """[C_out, C, 7, 7] as [C_out, 4 C, 4, 4], channels-last, for regrouped images; differentiable.

    Raises:
        ValueError: if the weight is not 7x7.
    """
    if weight.shape[2:] != (7, 7):
        raise ValueError(f"weight must be [C_out, C, 7, 7], got {tuple(weight.shape)}")
    taps = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    taps = taps.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # [C_out, 2, 2, C, 4, 4]
    return taps.contiguous(memory_format=torch.channels_last)


def make_runs(
    layer: ConvLayer,
    dtype: torch.dtype,
    direction: str,
    *,
    num_images: int = NUM_IMAGES,
) -> dict[str, Callable[[], list[Any]]]:
    """One callable per implementation on the same numbers: the outputs, or the weight's gradient.

    Gradients are those of a forward done before.

    Args:
        layer: 7x7 with stride 2, of 3 channels.
        dtype: of all tensors.
        direction: "forward" or "wgrad".
        num_images: N.

    Raises:
        ValueError: if a size is odd.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)
        return numbers.contiguous(memory_format=torch.channels_last)

    colours = [normal(num_images, layer.c_in, h, w) for h, w in layer.sizes]
    weight = normal(layer.c_out, layer.c_in, 7, 7) / math.sqrt(49 * layer.c_in)
    weight = weight.detach().requires_grad_(direction == "wgrad")
    dys = [normal(num_images, layer.c_out, h, w) for h, w in layer.out_sizes]

    def padded(tensor: Tensor, channels: int) -> Tensor:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, channels - layer.c_in))
        return tensor.contiguous(memory_format=torch.channels_last)

    def of_channels(images: list[Tensor], weight: Tensor) -> list[Tensor]:
        channels = images[0].shape[1]
        wide = padded(weight, channels) if channels > layer.c_in else weight
        return [F.conv2d(x, wide, stride=2, padding=3) for x in images]

    def regrouped(images: list[Tensor], weight: Tensor) -> list[Tensor]:
        blocks = regroup_weight(padded(weight, 4))
        return [F.conv2d(x, blocks) for x in images]

    def regrouped_here(images: list[Tensor], weight: Tensor) -> list[Tensor]:
        return regrouped([regroup_images(x) for x in images], weight)

    def timed(
        function: Callable[..., list[Tensor]], images: list[Tensor], weight: Tensor = weight
    ) -> Callable[[], list[Any]]:
        if direction == "forward":
            return lambda: [function(images, weight)]
        grads = [dy.to(weight.dtype) for dy in dys]
        ys = function(images, weight)
        return lambda: list(torch.autograd.grad(ys, weight, grads, retain_graph=True))

    def exact() -> list[Any]:
        wide = weight.detach().double().requires_grad_(direction == "wgrad")
        return timed(of_channels, [x.double() for x in colours], wide)()

    fours = [padded(x, 4) for x in colours]
    runs = {
        "exact": exact,
        "reference": timed(of_channels, colours),
        "C4": timed(of_channels, fours),
        "C8": timed(of_channels, [padded(x, 8) for x in colours]),
        "space_to_depth": timed(regrouped, [regroup_images(x) for x in fours]),
    }
    if direction == "forward":  # nothing of it is left for the gradient
        runs["space_to_depth_here"] = timed(regrouped_here, fours)
    return {**runs, "C3": runs["reference"]}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("layer", [STEM], ids=str)
def test_stem(
    benchmark,
    copy_bandwidth: float,
    layer: ConvLayer,
    dtype: torch.dtype,
    direction: str,
    impl: str,
) -> None:
    runs = make_runs(layer, dtype, direction)
    if impl not in runs:
        pytest.skip(f"{impl} is like space_to_depth in {direction}")
    check_alike(runs, [impl], as_packed)
    group = f"stem/{layer}/{short_name(dtype)}/{direction}"
    record(benchmark, runs[impl], group, moved_bytes(layer, dtype, direction), copy_bandwidth)

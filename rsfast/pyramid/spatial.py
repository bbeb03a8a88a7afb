"""Torch functions of whole images: convolutions, pooling, padding, resizing.

A 1x1 convolution of packed rows is one matrix product over all levels; any other convolution of
them goes through `rsfast.kernels.conv2d`. Everything else is computed level by level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast import kernels
from rsfast.pyramid.content import Content
from rsfast.pyramid.dispatch import function
from rsfast.pyramid.extent import of_level
from rsfast.pyramid.pixelwise import autocast_dtype, multiply, subsample
from rsfast.pyramid.pyramid import Pyramid

__all__ = ["PaddedImages"]


class PaddedImages:
    """Images whose channels are followed by zeros, as tensor cores want them; see `Pending`.

    A convolution reads them as they are, everything else without the zeros.
    """

    def __init__(self, padded: Pyramid, num_channels: int) -> None:
        self.padded = padded
        self.num_channels = num_channels
        self.like = padded.rows

    def compute(self) -> Content:
        """The rows without the zeros."""
        cut = self.padded.map_rows(lambda rows: rows[:, : self.num_channels].contiguous())
        return cut.content


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _padding(padding: Any, weight: Tensor, dilation: tuple[int, int]) -> tuple[int, int] | None:
    """Of both sides alike; None where "same" needs another one at the end."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding)
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)


@function(torch.conv2d)
def _conv2d(
    x: Pyramid,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Pyramid:
    dilation = _pair(dilation)
    if isinstance(x.content.pending, PaddedImages):
        x = x.content.pending.padded
        if groups == 1:
            weight = F.pad(weight, (0, 0, 0, 0, 0, x.num_channels - weight.shape[1]))
    both, strides = _padding(padding, weight, dilation), _pair(stride)
    is_pixelwise = tuple(weight.shape[2:]) == (1, 1) and both == (0, 0)
    if is_pixelwise and strides != (1, 1):
        # Only the pixels that it reads. (PyTorch 2.13 ends the process in the backward of a strided
        # 1x1 convolution of 3 channels on a CPU.)
        x = subsample(x, strides)
        strides = stride = (1, 1)
    fits = both is not None and weight.shape[1] * groups == x.num_channels
    if fits and not x.is_packed and x.device.type == "cpu" and groups == 1:
        dtype = autocast_dtype(x)
        levels = [level.to(dtype) for level in x.levels()]
        bias = bias if bias is None else bias.to(dtype)
        geometry = {"stride": strides, "padding": both, "dilation": dilation}
        return x.from_levels(kernels.conv2d_levels(levels, weight.to(dtype), bias, **geometry))
    if not x.is_packed or not fits:
        given = bias, stride, padding, dilation, groups
        return x.map_levels(lambda level: F.conv2d(level, weight, *given))
    if is_pixelwise and groups == 1:
        return multiply(x, weight.flatten(1), bias)
    dtype = autocast_dtype(x)
    weight = weight.to(dtype)
    geometry = {"stride": strides, "padding": both, "dilation": dilation}
    sizes = kernels.conv2d_sizes(x.sizes, tuple(weight.shape[2:]), **geometry)
    rows = x.handed_on.to(dtype)
    y = kernels.conv2d(rows, weight, x.sizes, x.num_images, **geometry, groups=groups)
    return x.like(Content(rows=y if bias is None else y + bias.to(dtype)), sizes)


@function(torch.max_pool2d, F.max_pool2d)
def _max_pool2d(
    x: Pyramid,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pyramid:
    kernel, reach = _pair(kernel_size), _pair(padding)
    step = _pair(stride) if stride not in (None, []) else kernel
    pending = x.content.pending
    plain = _pair(dilation) == (1, 1) and not ceil_mode
    if (kernel, step, reach) == ((3, 3), (2, 2), (1, 1)) and plain:
        pooled = getattr(pending, "pooled", lambda _: None)(x.content)
        if pooled is not None:
            sizes = [(-(-height // 2), -(-width // 2)) for height, width in x.sizes]
            return x.like(Content(pending=pooled), sizes)
    if plain and x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x.map_levels(lambda level: _MaxPool.apply(level, kernel, step, reach))
    given = kernel, step, reach, _pair(dilation), ceil_mode
    return x.map_levels(lambda level: F.max_pool2d(level, *given))


def _register_by_level(*torch_functions: Any) -> None:
    plain = torch_functions[0]

    @function(*torch_functions)
    def by_level(x: Pyramid, *args: Any, **kwargs: Any) -> Pyramid:
        images = []
        for index, level in enumerate(x.levels()):
            options = {name: of_level(value, index) for name, value in kwargs.items()}
            images.append(plain(level, *of_level(args, index), **options))
        return x.from_levels(images)


_register_by_level(F.avg_pool2d, torch._C._nn.avg_pool2d)
_register_by_level(F.lp_pool2d)
_register_by_level(F.adaptive_max_pool2d)
_register_by_level(F.interpolate)
_register_by_level(F.upsample)
_register_by_level(F.pad, torch._C._nn.pad)
_register_by_level(F.pixel_shuffle, torch.pixel_shuffle)
_register_by_level(F.pixel_unshuffle, torch.pixel_unshuffle)
_register_by_level(F.channel_shuffle, torch.channel_shuffle)
_register_by_level(F.group_norm, torch.group_norm)
_register_by_level(F.local_response_norm)
_register_by_level(torch.conv_transpose2d)


@function(F.instance_norm, torch.instance_norm)
def _instance_norm(x: Pyramid, *args: Any, **kwargs: Any) -> Pyramid:
    if not kwargs.get("use_input_stats", True):
        raise ValueError("instance norm with running statistics mixes those of all levels")
    return x.map_levels(lambda level: F.instance_norm(level, *args, **kwargs))


class _MaxPool(torch.autograd.Function):
    """PyTorch's CUDA kernel adds gradients of overlapping windows in any order; this does not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        y, largest = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
        ctx.save_for_backward(largest)
        ctx.shape, ctx.geometry = x.shape, (kernel, stride, padding)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (largest,) = ctx.saved_tensors
        dy, (kernel, stride, padding) = grads[0], ctx.geometry
        n, c, height, width = ctx.shape
        arange: Callable[..., Tensor] = torch.arange
        rows = stride[0] * arange(dy.shape[2], device=dy.device)
        cols = stride[1] * arange(dy.shape[3], device=dy.device)
        reach_y = max(stride[0] * dy.shape[2] + kernel[0], padding[0] + height)
        reach_x = max(stride[1] * dy.shape[3] + kernel[1], padding[1] + width)
        padded = dy.new_zeros(n, c, reach_y, reach_x)
        for y in range(kernel[0]):
            for x in range(kernel[1]):
                # Position in the image of the pixel that each window has at (y, x).
                col = cols + (x - padding[1])
                pixel = (rows[:, None] + (y - padding[0])) * width + col
                pixel = torch.where((col >= 0) & (col < width), pixel, -1)
                part = padded[:, :, y : y + stride[0] * dy.shape[2] : stride[0]]
                part = part[:, :, :, x : x + stride[1] * dy.shape[3] : stride[1]]
                part += torch.where(largest == pixel, dy, 0.0)
        dx = padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
        return dx, None, None, None

"""Convolution of levels in tensors of their own, on a CPU: small maps as matrix products.

    y[l] = conv2d(x[l], weight) + bias
    dx[l] = gradient of x[l]      dweight, dbias = sums over l of the gradients

On maps of a few pixels, as they are behind the last strides of a network, oneDNN is slow: its
gradient of the weight takes up to twelve times as long as a product. There the windows are gathered
instead, [n, k_h k_w C_in] for n pixels of y, and multiplied: by the weight, and for its gradient by
dy, all levels in one product, which adds them up in float32 and rounds once. dx of stride 1 is a
convolution of dy with the weight turned around and goes the same way. The windows take k_h k_w
times the memory of x and are gathered again in the backward. All else is the library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels.common.windows import Geometry, IntOrPair, conv2d_sizes, geometry_of
from rsfast.kernels.conv2d.op import library_gradients, turned_weight

__all__ = ["conv2d_levels"]

# Pixels of the map that is computed, or of dy, up to which a product is faster, in fp32 and bf16.
_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT = 4 * 4, 3 * 3, 7 * 7
_MOST_PIXELS_PER_CHANNEL = 64


def conv2d_levels(
    levels: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
) -> list[Tensor]:
    """Convolves images of several sizes with one weight, on a CPU.

    Differentiable, also twice.

    Args:
        levels: [N, C_in, H, W] each, floating point; channels-last spares a copy.
        weight: [C_out, C_in, k_h, k_w] in their dtype.
        bias: [C_out] likewise.
        stride: an int or a pair, as in `F.conv2d`.
        padding: zeros at either end, likewise.
        dilation: likewise.

    Returns:
        [N, C_out, H', W'] of each level.

    Raises:
        ValueError: if a level would have no pixels left, or naming the argument.
    """
    geometry = geometry_of(stride, padding, dilation)
    conv2d_sizes([_size(x) for x in levels], weight.shape, *geometry)
    return list(_Convolution.apply(weight, bias, geometry, *levels))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, geometry: Geometry, *levels: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *levels)
        ctx.geometry = geometry
        return tuple(_convolve(x, weight, bias, geometry) for x in levels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *levels = ctx.saved_tensors
        wants_dweight, wants_dbias, _, *wants_dx = ctx.needs_input_grad
        dxs = _input_gradients(grads, levels, weight, ctx.geometry, wants_dx)
        dweight = dbias = None
        if wants_dweight:
            dweight = _weight_gradient(grads, levels, weight, ctx.geometry)
        if wants_dbias:
            sums = [dy.sum((0, 2, 3), dtype=_wide(dy)) for dy in grads]
            dbias = torch.stack(sums).sum(0).to(weight.dtype)
        return dweight, dbias, None, *dxs


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    (size,) = conv2d_sizes([_size(x)], weight.shape, *geometry)
    if size[0] * size[1] > _FORWARD:
        return F.conv2d(x, weight, bias, *geometry)
    rows = F.linear(_windows([x], weight, geometry), _matrix(weight), bias)
    return rows.view(x.shape[0], *size, weight.shape[0]).permute(0, 3, 1, 2)


def _input_gradients(
    grads: Sequence[Tensor],
    levels: Sequence[Tensor],
    weight: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    # The library's product is as good where there is nothing to gather.
    has_windows = tuple(weight.shape[2:]) != (1, 1)
    small = [has_windows and x.shape[2:].numel() <= _INPUT_GRADIENT for x in levels]
    turned = turned_weight(weight, geometry, 1) if any(wanted) and any(small) else None
    return [
        None
        if not wants
        else _convolve(dy, turned[0], None, turned[1])
        if turned is not None and is_small
        else library_gradients(dy, x, weight, geometry, 1, (True, False))[0]
        for dy, x, wants, is_small in zip(grads, levels, wanted, small, strict=True)
    ]


def _weight_gradient(
    grads: Sequence[Tensor], levels: Sequence[Tensor], weight: Tensor, geometry: Geometry
) -> Tensor:
    small: list[tuple[Tensor, Tensor]] = []
    parts = []
    for dy, x in zip(grads, levels, strict=True):
        # The second bound is one of memory, for batches of thousands.
        fits = dy.numel() <= _MOST_PIXELS_PER_CHANNEL * dy.shape[1] ** 2
        if fits and dy.shape[2:].numel() <= _WEIGHT_GRADIENT:
            small.append((dy, x))
        else:
            parts.append(library_gradients(dy, x, weight, geometry, 1, (False, True))[1])
    if small:
        rows = torch.cat([dy.permute(0, 2, 3, 1).flatten(0, 2) for dy, _ in small])
        c_out, c_in, *kernel = weight.shape
        product = rows.t() @ _windows([x for _, x in small], weight, geometry)
        parts.append(product.view(c_out, *kernel, c_in).permute(0, 3, 1, 2))
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.to(_wide(part)) for part in parts]).sum(0).to(weight.dtype)


def _windows(levels: Sequence[Tensor], weight: Tensor, geometry: Geometry) -> Tensor:
    """[n, k_h k_w C_in], what each pixel of y is computed from."""
    kernel, c_in = weight.shape[2:], weight.shape[1]
    if tuple(kernel) == (1, 1) and max(geometry.stride) == 1 and not any(geometry.padding):
        rows = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in levels]
        return torch.cat(rows) if len(rows) > 1 else rows[0]
    (step_y, step_x), (pad_y, pad_x), (gap_y, gap_x) = geometry
    sizes = conv2d_sizes([_size(x) for x in levels], weight.shape, *geometry)
    counts = [x.shape[0] * height * width for x, (height, width) in zip(levels, sizes, strict=True)]
    windows = levels[0].new_empty(sum(counts), kernel[0] * kernel[1] * c_in)
    start = 0
    for x, size, count in zip(levels, sizes, counts, strict=True):
        images = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad_x, pad_x, pad_y, pad_y)).contiguous()
        image, row, pixel, channel = images.stride()
        strides = image, row * step_y, pixel * step_x, row * gap_y, pixel * gap_x, channel
        shape = x.shape[0], *size, *kernel, c_in
        windows[start : start + count].view(shape).copy_(images.as_strided(shape, strides))
        start += count
    return windows


def _matrix(weight: Tensor) -> Tensor:
    """[C_out, k_h k_w C_in]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

"""Convolution of every level with one weight, from packed rows into packed rows.

    y[l] = conv2d(x[l], weight)                      zero padding k // 2, stride s
    dx[l] = gradient of x[l]      dweight = sum over l of the gradients of the weight

Layout: x is [M, C_in] contiguous, the NHWC pixels of all levels one after another; y likewise. The
arithmetic is the vendor library's. Forward on a GPU, cuDNN reads and writes the rows of a level in
place: nothing is packed. Backward, the library allocates dx[l] itself, and one copy per level
brings it to its rows (16 bits: 4 bytes per element of x, against 4 that the gradient itself reads
and writes); the gradients of the weight are added up in float32 and rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels._checks import rows_of_levels

__all__ = ["conv2d", "conv2d_reference"]

_UNIT = [1, 1]
# Entered around the forward and the backward of each level, with its name; for profilers.
level_range: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: int = 1,
    groups: int = 1,
) -> Tensor:
    """Plain PyTorch, one `F.conv2d` per level; see :func:`conv2d`."""
    levels = _levels(x, [size[0] for size in sizes], [size[1] for size in sizes], num_images)
    padding = weight.shape[2] // 2
    outputs = [F.conv2d(level, weight, None, stride, padding, 1, groups) for level in levels]
    return torch.cat([y.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]) for y in outputs])


@torch.library.custom_op("rsfast::conv2d_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    weight: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: int,
    groups: int,
) -> Tensor:
    y = _empty_output(x, weight, heights, widths, num_images, stride)
    inputs, outputs = _in_and_out(x, y, heights, widths, num_images, stride)
    strides, padding = _geometry(weight, stride)
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    for level, output in zip(inputs, outputs, strict=True):
        with level_range(f"level {level.shape[2]}x{level.shape[3]}"):
            if x.is_cuda and cudnn.enabled and x.dtype != torch.float64:  # which has no NHWC
                torch.ops.aten.cudnn_convolution.out(
                    level,
                    weight,
                    padding,
                    strides,
                    _UNIT,
                    groups,
                    cudnn.benchmark,
                    deterministic,
                    cudnn.allow_tf32,
                    out=output,
                )
            else:  # nothing else in PyTorch writes where it is told to
                output.copy_(F.conv2d(level, weight, None, strides, padding, _UNIT, groups))
    return y


@_fwd.register_fake
def _(*arguments: Any) -> Tensor:
    *shape, _ = arguments  # all but the groups
    return _empty_output(*shape)


@torch.library.custom_op("rsfast::conv2d_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: int,
    groups: int,
    wants_dx: bool,
    wants_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dweight; empty where not wanted."""
    dx = x.new_empty(x.shape if wants_dx else 0)
    dweight = weight.new_empty(0)
    dy = dy.contiguous()  # a sum's has strides of 0
    strides, padding = _geometry(weight, stride)
    inputs, outputs = _in_and_out(x, dy, heights, widths, num_images, stride)
    targets = _levels(dx, heights, widths, num_images) if wants_dx else inputs
    sums = torch.promote_types(weight.dtype, torch.float32)
    total = None
    for level, target, output in zip(inputs, targets, outputs, strict=True):
        with level_range(f"level {level.shape[2]}x{level.shape[3]}"):
            level_dx, level_dweight, _ = torch.ops.aten.convolution_backward(
                output,
                level,
                weight,
                None,
                strides,
                padding,
                _UNIT,
                False,
                [0, 0],
                groups,
                [wants_dx, wants_dweight, False],
            )
            if wants_dx:
                target.copy_(level_dx)
            if wants_dweight:
                total = level_dweight.to(sums) if total is None else total.add_(level_dweight)
    if total is not None:
        # A copy of the strides too: gradients are to lie in memory as their weights do.
        dweight = torch.empty_like(weight).copy_(total)
    return dx, dweight


@_bwd.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, wants_dx, wants_dweight = arguments
    dx = x.new_empty(x.shape if wants_dx else 0)
    return dx, torch.empty_like(weight) if wants_dweight else weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wants_dx, wants_dweight, *rest = ctx.needs_input_grad
    dx, dweight = _bwd(dy, *ctx.saved_tensors, *ctx.geometry, wants_dx, wants_dweight)
    return dx if wants_dx else None, dweight if wants_dweight else None, *(None for _ in rest)


_fwd.register_autograd(_backward, setup_context=_setup_context)


def conv2d(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves every level, "same" padding for odd kernels.

    Args:
        x: [M, C_in] contiguous rows of all levels, floating point.
        weight: [C_out, C_in / groups, k, k] in the dtype of `x`, k odd; channels-last in memory
            spares a copy.
        sizes: (H, W) of each level.
        num_images: N.
        stride: s, the same along both axes.
        groups: as in `F.conv2d`.

    Returns:
        [M', C_out] rows of levels of ceil(H / s) x ceil(W / s) pixels.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous [M, C], got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be {x.dtype} on {x.device} like x, got {weight.dtype} on {weight.device}"
        )
    k = weight.shape[-1]
    if weight.dim() != 4 or weight.shape[2] != k or k % 2 == 0:
        raise ValueError(
            f"weight must be [C_out, C_in / groups, k, k] with k odd, got {tuple(weight.shape)}"
        )
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"weight must fit {x.shape[1]} channels in {groups} groups, got {tuple(weight.shape)}"
        )
    heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
    if x.shape[0] != sum(rows_of_levels(heights, widths, num_images)):
        raise ValueError(
            f"sizes must add up to the {x.shape[0]} rows of x for {num_images} images, "
            f"got {tuple(sizes)}"
        )
    return _fwd(x, weight, heights, widths, num_images, stride, groups)


def _strided(lengths: Sequence[int], stride: int) -> list[int]:
    return [-(-length // stride) for length in lengths]


def _empty_output(
    x: Tensor,
    weight: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: int,
) -> Tensor:
    rows = sum(rows_of_levels(heights, widths, num_images, stride))
    return x.new_empty(rows, weight.shape[0])


def _geometry(weight: Tensor, stride: int) -> tuple[list[int], list[int]]:
    """Strides and padding along both axes."""
    return [stride] * 2, [weight.shape[2] // 2] * 2


def _in_and_out(
    x: Tensor,
    y: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the levels of the input, and of the output or its gradient."""
    return (
        _levels(x, heights, widths, num_images),
        _levels(y, _strided(heights, stride), _strided(widths, stride), num_images),
    )


def _levels(
    rows: Tensor, heights: Sequence[int], widths: Sequence[int], num_images: int
) -> list[Tensor]:
    """[N, C, H, W] channels-last views of packed rows."""
    counts = rows_of_levels(heights, widths, num_images)
    return [
        part.view(num_images, h, w, rows.shape[1]).permute(0, 3, 1, 2)
        for part, h, w in zip(torch.split(rows, counts), heights, widths, strict=True)
    ]

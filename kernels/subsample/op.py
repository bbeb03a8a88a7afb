"""Every few pixels of packed rows, as a strided 1x1 convolution reads them.

    y[l][n, i, j]  = x[l][n, s_h i, s_w j]       i < ceil(H_l / s_h), j < ceil(W_l / s_w)
    dx[l][n, h, w] = dy[l][n, h / s_h, w / s_w]  where both divide, else 0

Layout: x is [M, C] contiguous, the NHWC pixels of all levels one after another; y likewise, with
levels of ceil(H / s_h) x ceil(W / s_w) pixels. Nothing is computed, so nothing is rounded.

Bytes, with backend "triton", in elements of x: 2 / (s_h s_w) forward, of which half is read and
half written; 1 / (s_h s_w) read and 1 written backward. One launch each way, over all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.common.checks import check_kernel_dtype, check_levels, check_rows
from rsfast.kernels.common.levels import rows_of_levels
from rsfast.kernels.common.windows import IntOrPair, conv2d_sizes, geometry_of
from rsfast.kernels.subsample.reference import subsample_reference

__all__ = ["subsample"]


@torch.library.custom_op("rsfast::subsample_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
) -> Tensor:
    sizes = list(zip(heights, widths, strict=True))
    y = _empty_output(x, sizes, num_images, stride)
    load_kernels("subsample.forward").forward(x, y, sizes, num_images, stride)
    return y


@_fwd.register_fake
def _(
    x: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
) -> Tensor:
    return _empty_output(x, list(zip(heights, widths, strict=True)), num_images, stride)


def _empty_output(
    x: Tensor, sizes: Sequence[tuple[int, int]], num_images: int, stride: Sequence[int]
) -> Tensor:
    out_sizes = conv2d_sizes(sizes, 1, stride)
    return x.new_empty(sum(rows_of_levels(out_sizes, num_images)), x.shape[1])


@torch.library.custom_op("rsfast::subsample_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
) -> Tensor:
    sizes = list(zip(heights, widths, strict=True))
    dx = dy.new_empty(sum(rows_of_levels(sizes, num_images)), dy.shape[1])
    load_kernels("subsample.backward").backward(
        dy.contiguous(), dx, sizes, num_images, stride
    )  # a sum's has strides of 0
    return dx


@_bwd.register_fake
def _(
    dy: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
) -> Tensor:
    sizes = list(zip(heights, widths, strict=True))
    return dy.new_empty(sum(rows_of_levels(sizes, num_images)), dy.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.maps = inputs[1:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _bwd(dy, *ctx.maps), None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def subsample(
    x: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: IntOrPair,
    *,
    backend: str = "torch",
) -> Tensor:
    """The first pixel of each `stride`, down and to the right; sizes are those of `conv2d_sizes`.

    Args:
        x: [M, C] contiguous rows of all levels, floating point. For "triton" float16, bfloat16 or
            float32, with at most 8 levels of at least one row.
        sizes: (H, W) of each level.
        num_images: N.
        stride: an int or a pair, as in `F.conv2d`.
        backend: "torch" for the reference, "triton" for the fused kernels.

    Returns:
        [M', C] rows of all levels.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    check_rows(x)
    level_rows = rows_of_levels(sizes, num_images)
    if x.shape[0] != sum(level_rows):
        raise ValueError(
            f"sizes must add up to the {x.shape[0]} rows of x for {num_images} images, "
            f"got {tuple(sizes)}"
        )
    pair = geometry_of(stride, 0, 1).stride
    if check_backend(backend) == "torch":
        return subsample_reference(x, sizes, num_images, pair)
    check_kernel_dtype("x", x)
    check_levels(level_rows)
    heights, widths = zip(*sizes, strict=True)
    return _fwd(x, heights, widths, num_images, pair)

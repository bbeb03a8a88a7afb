"""Every few pixels of packed rows, as a strided 1x1 convolution reads them.

    y[l][n, i, j]  = x[l][n, s_h i, s_w j]       i < ceil(H_l / s_h), j < ceil(W_l / s_w)
    dx[l][n, h, w] = dy[l][n, h / s_h, w / s_w]  where both divide, else 0

Layout: x is [M, C] contiguous, the NHWC pixels of all levels one after another; y likewise, with
levels of ceil(H / s_h) x ceil(W / s_w) pixels. Nothing is computed, so nothing is rounded.

Bytes, with backend "triton", in elements of x: 2 / (s_h s_w) forward, of which half is read and
half written; backward 1 / (s_h s_w) read and 1 written, or 2 / (s_h s_w) read and half of that
written where it is added to another gradient. One launch each way, over all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.common.checks import (
    check_companion,
    check_kernel_dtype,
    check_levels,
    check_rows,
)
from rsfast.kernels.common.levels import rows_of_levels
from rsfast.kernels.common.windows import IntOrPair, conv2d_sizes, geometry_of
from rsfast.kernels.subsample.reference import (
    subsample_gradient_reference,
    subsample_reference,
)

__all__ = ["subsample", "subsample_gradient"]


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


@torch.library.custom_op("rsfast::subsample_add", mutates_args=("dx",))
def _add(
    dy: Tensor,
    dx: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    num_images: int,
    stride: Sequence[int],
) -> None:
    sizes = list(zip(heights, widths, strict=True))
    load_kernels("subsample.backward").add(dy.contiguous(), dx, sizes, num_images, stride)


@_add.register_fake
def _(dy: Tensor, dx: Tensor, *_: Any) -> None:
    return None


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
    _check("x", x, sizes, num_images)
    pair = geometry_of(stride, 0, 1).stride
    if check_backend(backend) == "torch":
        return subsample_reference(x, sizes, num_images, pair)
    _check_for_triton("x", x, sizes, num_images)
    heights, widths = zip(*sizes, strict=True)
    return _fwd(x, heights, widths, num_images, pair)


def subsample_gradient(
    dy: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: IntOrPair,
    *,
    add_to: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """The gradient of `x` in :func:`subsample`; autograd does not follow it.

    Args:
        dy: [M', C], the gradient of its result.
        sizes: (H, W) of each level of `x`.
        num_images: N.
        stride: as there.
        add_to: [M, C] contiguous and like `dy`, another gradient of `x`, which it is added to in
            place.
        backend: as there.

    Returns:
        [M, C]; `add_to` itself, if it is given.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    pair = geometry_of(stride, 0, 1).stride
    _check("dy", dy, conv2d_sizes(sizes, 1, pair), num_images)
    if add_to is not None:
        _check("add_to", add_to, sizes, num_images)
    if check_backend(backend) == "torch":
        return subsample_gradient_reference(dy, sizes, num_images, pair, add_to)
    _check_for_triton("dy", dy, sizes, num_images)
    heights, widths = zip(*sizes, strict=True)
    if add_to is None:
        return _bwd(dy, heights, widths, num_images, pair)
    check_companion("add_to", add_to, dy.dtype, dy.device)
    _add(dy, add_to, heights, widths, num_images, pair)
    return add_to


def _check(name: str, rows: Tensor, sizes: Sequence[tuple[int, int]], num_images: int) -> None:
    check_rows(rows, name=name)
    if rows.shape[0] != sum(rows_of_levels(sizes, num_images)):
        raise ValueError(
            f"sizes must add up to the {rows.shape[0]} rows of {name} for {num_images} images, "
            f"got {tuple(sizes)}"
        )


def _check_for_triton(
    name: str, rows: Tensor, sizes: Sequence[tuple[int, int]], num_images: int
) -> None:
    check_kernel_dtype(name, rows)
    check_levels(rows_of_levels(sizes, num_images))

"""Global average pooling of packed rows: the mean over the pixels of each image and level.

    y[l * N + n] = mean over the H_l * W_l rows of image n in level l
    dx[row]      = dy[image of the row] / (H_l * W_l)

Layout: x is [M, C] contiguous, rows of all levels one after another, N images in each. Sums are in
float32. Bytes: one read of x and one write of [L * N, C] forward, the reverse backward, in one
launch each with backend "triton".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.common.checks import check_kernel_dtype, check_levels
from rsfast.kernels.global_avg_pool.reference import global_avg_pool_reference

__all__ = ["global_avg_pool"]


@torch.library.custom_op("rsfast::global_avg_pool_fwd", mutates_args=())
def _fwd(x: Tensor, level_rows: Sequence[int], num_images: int) -> Tensor:
    y = x.new_empty(len(level_rows) * num_images, x.shape[1])
    load_kernels("global_avg_pool.forward").forward(x, y, level_rows, num_images)
    return y


@_fwd.register_fake
def _(x: Tensor, level_rows: Sequence[int], num_images: int) -> Tensor:
    return x.new_empty(len(level_rows) * num_images, x.shape[1])


@torch.library.custom_op("rsfast::global_avg_pool_bwd", mutates_args=())
def _bwd(dy: Tensor, level_rows: Sequence[int], num_images: int) -> Tensor:
    dx = dy.new_empty(sum(level_rows), dy.shape[1])
    load_kernels("global_avg_pool.backward").backward(
        dy.contiguous(), dx, level_rows, num_images
    )  # a sum's has strides of 0
    return dx


@_bwd.register_fake
def _(dy: Tensor, level_rows: Sequence[int], num_images: int) -> Tensor:
    return dy.new_empty(sum(level_rows), dy.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.level_rows, ctx.num_images = inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _bwd(dy, ctx.level_rows, ctx.num_images), None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def global_avg_pool(
    x: Tensor, level_rows: Sequence[int], num_images: int, *, backend: str = "torch"
) -> Tensor:
    """Averages the pixels of each image.

    Args:
        x: [M, C] contiguous rows of all levels, floating point. For "triton" float16, bfloat16 or
            float32, not empty, with at most 8 levels.
        level_rows: rows of each of the L levels, multiples of `num_images`; their sum is M.
        num_images: N.
        backend: "torch" for the reference, "triton" for the fused kernels.

    Returns:
        [L * N, C] in the dtype of `x`, level by level.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous [M, C], got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if sum(level_rows) != x.shape[0] or any(rows % num_images for rows in level_rows):
        raise ValueError(
            f"level_rows must be multiples of {num_images} images that add up to the "
            f"{x.shape[0]} rows of x, got {tuple(level_rows)}"
        )
    if check_backend(backend) == "torch":
        return global_avg_pool_reference(x, level_rows, num_images)
    check_kernel_dtype("x", x)
    check_levels(level_rows)
    return _fwd(x, level_rows, num_images)

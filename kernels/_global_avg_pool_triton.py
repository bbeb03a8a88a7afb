"""The Triton kernels of :mod:`rsfast.kernels.global_avg_pool`.

One program per image of a level and BLOCK_C channels; it finds its level from the row counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels._launch import OPTIONS, level_arguments, on_device_of

__all__ = ["backward", "forward", "tile"]

TILE_ELEMENTS = 2048  # 16 for each of 128 threads; not timed on a GPU yet


def tile(num_channels: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C), pixels and channels."""
    block_c = min(max(triton.next_power_of_2(num_channels), 16), 128)
    return TILE_ELEMENTS // block_c, block_c


@triton.jit
def _find_image(
    image,  # over all levels
    level_rows,  # L row counts, as of level_arguments
    num_images,  # N
    L: tl.constexpr,
):
    """(first row, number of pixels) of the image."""
    first = 0
    num_pixels = 0
    earlier_rows = 0
    for level in tl.static_range(L):
        rows = (level_rows[level] >> 1) - 1
        pixels = rows // num_images
        index = image - level * num_images
        inside = (index >= 0) & (index < num_images)
        first = tl.where(inside, earlier_rows + index * pixels, first)
        num_pixels = tl.where(inside, pixels, num_pixels)
        earlier_rows += rows
    return first.to(tl.int64), num_pixels


@triton.jit(do_not_specialize=["num_images"])
def _global_avg_pool_fwd_kernel(
    x_ptr,  # [M, C]
    y_ptr,  # [L * N, C] like x, fully overwritten
    level_rows,
    num_images,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0)
    first, num_pixels = _find_image(image, level_rows, num_images, L)
    lanes = tl.arange(0, BLOCK_P)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + first * C + (lanes * C + cols[None, :])
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, num_pixels, BLOCK_P):
        mask = (start + lanes < num_pixels) & (cols < C)[None, :]
        total += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        x_ptrs += BLOCK_P * C
    mean = tl.sum(total, 0) / num_pixels
    y_ptr += image.to(tl.int64) * C + cols
    tl.store(y_ptr, mean.to(y_ptr.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=["num_images"])
def _global_avg_pool_bwd_kernel(
    dy_ptr,  # [L * N, C]
    dx_ptr,  # [M, C] like dy, fully overwritten
    level_rows,
    num_images,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0)
    first, num_pixels = _find_image(image, level_rows, num_images, L)
    lanes = tl.arange(0, BLOCK_P)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dy_ptr += image.to(tl.int64) * C + cols
    dy = tl.load(dy_ptr, mask=cols < C, other=0.0).to(tl.float32)
    dx = tl.broadcast_to((dy / num_pixels)[None, :], (BLOCK_P, BLOCK_C))
    dx = dx.to(dx_ptr.dtype.element_ty)
    dx_ptrs = dx_ptr + first * C + (lanes * C + cols[None, :])
    for start in range(0, num_pixels, BLOCK_P):
        mask = (start + lanes < num_pixels) & (cols < C)[None, :]
        tl.store(dx_ptrs, dx, mask=mask)
        dx_ptrs += BLOCK_P * C


def forward(x: Tensor, y: Tensor, level_rows: Sequence[int], num_images: int) -> None:
    """Fills `y` [L * N, C] with the means of `x` [M, C]."""
    _launch(_global_avg_pool_fwd_kernel, x, y, level_rows, num_images)


def backward(dy: Tensor, dx: Tensor, level_rows: Sequence[int], num_images: int) -> None:
    """Fills `dx` [M, C] with the gradient for `dy` [L * N, C]."""
    _launch(_global_avg_pool_bwd_kernel, dy, dx, level_rows, num_images)


def _launch(
    kernel: triton.JITFunction,
    source: Tensor,
    target: Tensor,
    level_rows: Sequence[int],
    num_images: int,
) -> None:
    num_levels, num_channels = len(level_rows), source.shape[1]
    block_p, block_c = tile(num_channels)
    with on_device_of(source):
        # Images come first: the second axis ends at 65,535 programs.
        kernel[num_levels * num_images, triton.cdiv(num_channels, block_c)](
            source,
            target,
            level_arguments(level_rows),
            num_images,
            L=num_levels,
            C=num_channels,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            **OPTIONS,
        )

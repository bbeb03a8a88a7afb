"""Backward Triton kernels of :mod:`rsfast.kernels.subsample.op`."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.subsample.tiles import find_line, launch

__all__ = ["add", "backward"]


@triton.jit(do_not_specialize=["num_images"])
def _subsample_bwd_kernel(
    dy_ptr,  # [M', C]
    dx_ptr,  # [M, C] like dy, fully overwritten
    heights,  # of the input
    widths,
    num_images,
    L: tl.constexpr,
    C: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    line = tl.program_id(0)
    first_out, first_in, width, num_lines = find_line(
        line, heights, widths, num_images, L, DOWN, RIGHT
    )
    lanes = tl.arange(0, BLOCK_P)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dy_ptr += first_out * C
    dx_ptr += first_in * C
    zeros = tl.zeros((BLOCK_P, BLOCK_C), dx_ptr.dtype.element_ty)
    for start in range(0, width, BLOCK_P):
        pixels = start + lanes
        mask = (pixels < width) & (cols < C)
        read = mask & (pixels % RIGHT == 0)
        dx = tl.load(dy_ptr + (pixels // RIGHT * C + cols), mask=read, other=0.0)
        tl.store(dx_ptr + (pixels * C + cols), dx, mask=mask)
        for below in range(1, num_lines):  # lines that nobody read
            tl.store(dx_ptr + ((below * width + pixels) * C + cols), zeros, mask=mask)


@triton.jit(do_not_specialize=["num_images"])
def _subsample_add_kernel(
    dy_ptr,  # [M', C]
    dx_ptr,  # [M, C] like dy; dy is added to the pixels that the forward read
    heights,  # of the input
    widths,
    num_images,
    L: tl.constexpr,
    C: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    line = tl.program_id(0)
    first_out, first_in, width, _ = find_line(line, heights, widths, num_images, L, DOWN, RIGHT)
    num_pixels = tl.cdiv(width, RIGHT)
    lanes = tl.arange(0, BLOCK_P)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dy_ptr += first_out * C
    dx_ptr += first_in * C
    for start in range(0, num_pixels, BLOCK_P):
        pixels = start + lanes
        mask = (pixels < num_pixels) & (cols < C)
        dx_ptrs = dx_ptr + (pixels * RIGHT * C + cols)
        dy = tl.load(dy_ptr + (pixels * C + cols), mask=mask).to(tl.float32)
        dx = tl.load(dx_ptrs, mask=mask).to(tl.float32) + dy
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def backward(
    dy: Tensor,
    dx: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: Sequence[int],
) -> None:
    """Fills `dx` [M, C] with the gradient for `dy` [M', C]. One launch."""
    launch(_subsample_bwd_kernel, dy, dx, sizes, num_images, stride)


def add(
    dy: Tensor,
    dx: Tensor,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    stride: Sequence[int],
) -> None:
    """Adds that gradient to `dx`. One launch."""
    launch(_subsample_add_kernel, dy, dx, sizes, num_images, stride)

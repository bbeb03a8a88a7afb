"""Triton kernels of :mod:`rsfast.kernels.bn_act_max_pool`, which holds the equations.

Forward a program takes output pixels and reads the nine of each window, of which its neighbours
find most in the cache. Backward it takes squares of four input pixels, one for each output pixel,
and gathers from the four windows that hold any of them: nine pairs of pixel and window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels._bn_backward import finalize_sums
from rsfast.kernels._bn_tiles import activate, find_chunk, find_map, load_affine, share_out
from rsfast.kernels._checks import rows_of_levels
from rsfast.kernels._launch import OPTIONS, level_arguments, on_device_of

__all__ = ["TILE_ELEMENTS", "backward", "forward"]

# One 16-byte load for each of 128 threads; with two, addresses take twice the registers, and some
# shapes spill. Not timed on a GPU yet.
TILE_ELEMENTS = 1024

Maps = tuple[Sequence[int], Sequence[int], int, Sequence[int]]  # heights, widths, N, banks
Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # mean, var, weight, bias


@triton.jit(do_not_specialize=["num_images"])
def _bn_act_max_pool_fwd_kernel(
    x_ptr,  # [M, C]
    mean_ptr,  # [L, C] float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    y_ptr,  # [M', C] like x, fully overwritten
    largest_ptr,  # [M', C] uint8, fully overwritten
    level_rows,  # of the output
    banks,
    chunk_rows,
    heights,  # of the input
    widths,
    num_images,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(1)
    level, bank, level_first, _, first, count = find_chunk(chunk, level_rows, banks, chunk_rows, L)
    height, width, first_in, _ = find_map(level, heights, widths, num_images, L, 2)
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (cols < C)[None, :]
    mean, scale, beta, _ = load_affine(
        mean_ptr, var_ptr, gamma_ptr, beta_ptr, level, bank, cols, eps, C
    )
    # What batch norm and activation do never turns an order around, but for a negative scale: the
    # largest output is that of the largest input, or of the smallest.
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    x_ptr += first_in * C
    for start in range(0, count, BLOCK_M):
        pixel = (first - level_first).to(tl.int32) + start + lanes
        image = pixel // (out_height * out_width)
        rest = pixel % (out_height * out_width)
        row, col = 2 * (rest // out_width), 2 * (rest % out_width)  # of the pixel in the middle
        middle = x_ptr + ((image * height + row) * width + col).to(tl.int64) * C + cols[None, :]
        mask = (start + lanes < count) & inside
        best = tl.zeros((BLOCK_M, BLOCK_C), tl.float32) + tl.where(mask, float("-inf"), 0.0)
        largest = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
        for down in tl.static_range(-1, 2):
            for right in tl.static_range(-1, 2):
                exists = mask
                if down != 0:
                    exists = exists & (row + down >= 0) & (row + down < height)
                if right != 0:
                    exists = exists & (col + right >= 0) & (col + right < width)
                x_ptrs = middle + (down * width + right) * C
                x = tl.load(x_ptrs, mask=exists, other=0.0).to(tl.float32) * sign[None, :]
                x = tl.where(exists, x, float("-inf"))
                largest = tl.where(x > best, 3 * down + right + 4, largest)
                best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
        y = (best * sign[None, :] - mean[None, :]) * scale[None, :] + beta[None, :]
        if ACTIVATION is not None:
            y, _kept = activate(y, ACTIVATION)
        offsets = (first + start + lanes) * C + cols[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(largest_ptr + offsets, largest.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["num_images"])
def _bn_act_max_pool_bwd_kernel(
    dy_ptr,  # [M', C]
    largest_ptr,  # [M', C] uint8
    x_ptr,  # [M, C]
    mean_ptr,  # [L, C] float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    partial_ptr,  # [2, chunks, C] float32: sums of dz and dz * (x - mean); None to write dx
    sums_ptr,  # [2, L, C] float32: dbeta and dgamma of each level; None to write sums
    dx_ptr,  # [M, C] like x, or None; what is written is fully overwritten
    level_rows,  # of the output
    banks,
    chunk_rows,
    heights,  # of the input
    widths,
    num_images,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WRITE_DX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(1)
    if WRITE_DX:  # from the last chunk on: the sums went over those last, they are still cached
        chunk = tl.num_programs(1) - 1 - chunk
    level, bank, level_first, _, first, count = find_chunk(chunk, level_rows, banks, chunk_rows, L)
    height, width, first_in, _ = find_map(level, heights, widths, num_images, L, 2)
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    mean, scale, beta, invstd = load_affine(
        mean_ptr, var_ptr, gamma_ptr, beta_ptr, level, bank, cols, eps, C
    )
    if WRITE_DX:
        total = (num_images * height * width).to(tl.float32)
        mean_dz = tl.load(sums_ptr + level * C + cols, mask=inside, other=0.0) / total
        slope = tl.load(sums_ptr + (L + level) * C + cols, mask=inside, other=0.0)
        slope *= invstd / total
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_M):
        pixel = (first - level_first).to(tl.int32) + start + lanes
        image, rest = pixel // (out_height * out_width), pixel % (out_height * out_width)
        row, col = rest // out_width, rest % out_width
        mask = (start + lanes < count) & inside[None, :]
        windows = (first + start + lanes) * C + cols[None, :]
        corner = first_in + ((image * height + 2 * row) * width + 2 * col)
        for down in tl.static_range(2):
            for right in tl.static_range(2):  # of the pixel in its square
                exists = mask & (2 * row + down < height) & (2 * col + right < width)
                dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                # A pixel in an even row is in the middle of its window; one in an odd row is at the
                # end of its window and at the beginning of the next. Columns likewise.
                for below in tl.static_range(down + 1):
                    for beside in tl.static_range(right + 1):
                        there = mask & (row + below < out_height) & (col + beside < out_width)
                        offsets = windows + (below * out_width + beside) * C
                        largest = tl.load(largest_ptr + offsets, mask=there, other=9)
                        dy = tl.load(dy_ptr + offsets, mask=there, other=0.0).to(tl.float32)
                        in_window = 3 * (1 + down - 2 * below) + (1 + right - 2 * beside)
                        dz += tl.where(largest == in_window, dy, 0.0)
                offsets = (corner + (down * width + right)) * C + cols[None, :]
                x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32) - mean[None, :]
                if ACTIVATION is not None:
                    _z, kept = activate(x * scale[None, :] + beta[None, :], ACTIVATION)
                    dz = tl.where(kept, dz, 0.0)
                if WRITE_DX:
                    dx = scale[None, :] * (dz - mean_dz[None, :] - x * slope[None, :])
                    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=exists)
                else:
                    sum_dz += dz
                    sum_dz_x += dz * x
    if not WRITE_DX:
        partial_ptr += chunk.to(tl.int64) * C + cols
        tl.store(partial_ptr, tl.sum(sum_dz, 0), mask=inside)
        partial_ptr += tl.num_programs(1).to(tl.int64) * C
        tl.store(partial_ptr, tl.sum(sum_dz_x, 0), mask=inside)


def forward(
    x: Tensor,
    moments: Moments,
    y: Tensor,
    largest: Tensor,
    maps: Maps,
    activation: str | None,
    eps: float,
) -> None:
    """Fills `y` and `largest`. One launch."""
    heights, widths, num_images, banks = maps
    level_rows = rows_of_levels(heights, widths, num_images, 2)
    chunks = share_out(level_rows, banks, x.shape[1], TILE_ELEMENTS)
    with on_device_of(x):
        _bn_act_max_pool_fwd_kernel[chunks.grid](
            x,
            *moments,
            y,
            largest,
            *chunks.levels,
            *_map_arguments(maps),
            eps,
            **chunks.sizes,
            ACTIVATION=activation,
            **chunks.tile,
            **OPTIONS,
        )


def backward(
    dy: Tensor,
    largest: Tensor,
    x: Tensor,
    moments: Moments,
    maps: Maps,
    activation: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias. Three launches."""
    heights, widths, num_images, banks = maps
    level_rows = rows_of_levels(heights, widths, num_images, 2)
    chunks = share_out(level_rows, banks, x.shape[1], TILE_ELEMENTS)
    _, var, weight, _ = moments
    dx = torch.empty_like(x)
    partial = x.new_empty(2, chunks.count, x.shape[1], dtype=torch.float32)

    def launch(partial: Tensor | None, sums: Tensor | None, dx: Tensor | None) -> None:
        with on_device_of(x):
            _bn_act_max_pool_bwd_kernel[chunks.grid](
                dy,
                largest,
                x,
                *moments,
                partial,
                sums,
                dx,
                *chunks.levels,
                *_map_arguments(maps),
                eps,
                **chunks.sizes,
                ACTIVATION=activation,
                WRITE_DX=dx is not None,
                **chunks.tile,
                **OPTIONS,
            )

    launch(partial, None, None)
    sums, dweight, dbias = finalize_sums(partial, var, weight, chunks, eps)
    launch(None, sums, dx)
    return dx, dweight, dbias


def _map_arguments(maps: Maps) -> tuple[Any, ...]:
    heights, widths, num_images, _ = maps
    return level_arguments(heights), level_arguments(widths), num_images

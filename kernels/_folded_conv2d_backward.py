"""Backward Triton kernels of :mod:`rsfast.kernels.folded_conv2d`, which holds the equations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels._bn_tiles import activate, find_chunk, find_map
from rsfast.kernels._folded_conv2d_tiles import (
    Affine,
    Maps,
    constants,
    find_window,
    launch_arguments,
    load_affine,
    load_input,
    merge,
    row_tiles,
    rows_at_tap,
    tiles,
)
from rsfast.kernels._launch import on_device_of

__all__ = ["dgrad", "dgrad_tiles", "wgrad", "wgrad_tiles"]

# Programs of the weight's gradient: two for each of 132 multiprocessors. A constant, so that sums
# are split, and results rounded, alike on every GPU.
PROGRAMS = 264


def dgrad_tiles(dtype: torch.dtype, num_in: int, num_out: int) -> dict[str, int]:
    """Like :func:`tiles`; the inner dimension is that of the output."""
    tile = tiles(dtype, num_out, num_in)
    return {**tile, "BLOCK_N": tile["BLOCK_K"], "BLOCK_K": tile["BLOCK_N"]}


def wgrad_tiles(dtype: torch.dtype, num_in: int, num_out: int) -> dict[str, int]:
    """Like :func:`tiles`; the inner dimension is that of the rows."""
    tile = tiles(dtype, num_in, num_out)
    return {**tile, "BLOCK_M": min(tile["BLOCK_M"], 64)}


@triton.jit(do_not_specialize=["num_images", "num_columns"])
def _folded_conv2d_dgrad_kernel(
    dy_ptr,  # [M, C_OUT]
    weight_ptr,  # [C_OUT, KERNEL, KERNEL, C_IN]
    x_ptr,  # [M, C_IN]
    center_ptr,  # [L, C_IN] float32
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    dx_ptr,  # [M, C_IN], fully overwritten
    partial_ptr,  # [2, row tiles, C_IN] float32: sums for shift and scale, fully overwritten
    level_rows,  # of the input
    heights,  # of the input
    widths,
    num_images,
    num_columns,  # tiles of input channels
    L: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # output channels, the inner dimension
    BLOCK_K: tl.constexpr,  # input channels
):
    chunk = tl.program_id(0) // num_columns
    level, _, level_first, _, first, count = find_chunk(chunk, level_rows, level_rows, BLOCK_M, L)
    lanes = tl.arange(0, BLOCK_M)
    rows = (first + lanes)[:, None]
    inside = (lanes < count)[:, None]
    height, width, _, first_out = find_map(level, heights, widths, num_images, L, STRIDE)
    out_height, out_width = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    pixel = (rows - level_first).to(tl.int32)
    image, rest = pixel // (height * width), pixel % (height * width)
    row, col = rest // width + KERNEL // 2, rest % width + KERNEL // 2
    cols_k = tl.program_id(0) % num_columns * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    STEPS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    for step in range(0, KERNEL * KERNEL * STEPS):
        tap, cols_n = step // STEPS, step % STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
        rows_out = rows
        exist = inside
        if KERNEL * STRIDE > 1:  # the window that sees the pixel at this tap, if there is one
            up, left = row - tap // KERNEL, col - tap % KERNEL
            exist = inside & (up >= 0) & (left >= 0) & (up % STRIDE == 0) & (left % STRIDE == 0)
            up, left = up // STRIDE, left // STRIDE
            exist = exist & (up < out_height) & (left < out_width)
            rows_out = first_out + ((image * out_height + up) * out_width + left)
        dy = tl.load(
            dy_ptr + rows_out * C_OUT + cols_n[None, :],
            mask=exist & (cols_n < C_OUT)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr
            + cols_n[:, None] * (KERNEL * KERNEL * C_IN)
            + (tap * C_IN + cols_k)[None, :],
            mask=(cols_n < C_OUT)[:, None] & (cols_k < C_IN)[None, :],
            other=0.0,
        )
        acc = tl.dot(dy, weight, acc, input_precision="ieee")
    # Stored as it is, and read again: where the product leaves it, a thread has many columns, each
    # of which would take shuffles to be summed over rows.
    cols_inside = cols_k < C_IN
    acc = acc.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + rows * C_IN + cols_k[None, :], acc, mask=inside & cols_inside[None, :])
    tl.debug_barrier()
    center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, level, cols_k, C_IN)
    PART: tl.constexpr = 32  # rows at once: all of them would take all registers
    sum_du = tl.zeros((PART, BLOCK_K), tl.float32)
    sum_du_x = tl.zeros((PART, BLOCK_K), tl.float32)
    for start in range(0, BLOCK_M, PART):
        part = start + tl.arange(0, PART)[:, None]
        mask = (part < count) & cols_inside[None, :]
        offsets = (first + part) * C_IN + cols_k[None, :]
        du = tl.load(dx_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - center[None, :]
        if ACTIVATION is not None:
            _u, kept = activate(x * scale[None, :] + shift[None, :], ACTIVATION)
            du = tl.where(kept, du, 0.0)
        tl.store(dx_ptr + offsets, (du * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
        sum_du += du
        sum_du_x += du * x
    partial_ptr += chunk.to(tl.int64) * C_IN + cols_k
    tl.store(partial_ptr, tl.sum(sum_du, 0), mask=cols_inside)
    partial_ptr += (tl.num_programs(0) // num_columns).to(tl.int64) * C_IN
    tl.store(partial_ptr, tl.sum(sum_du_x, 0), mask=cols_inside)


@triton.jit(do_not_specialize=["num_images", "tiles_per_split"])
def _folded_conv2d_wgrad_kernel(
    dy_ptr,  # [M, C_OUT]
    x_ptr,  # [M, C_IN]
    center_ptr,  # [L, C_IN] float32
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    partial_ptr,  # [splits, C_OUT, KERNEL, KERNEL, C_IN] float32, fully overwritten
    level_rows,  # of the output
    heights,  # of the input
    widths,
    num_images,
    tiles_per_split,
    L: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows, the inner dimension
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(2)
    lanes = tl.arange(0, BLOCK_M)
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    tap = tl.program_id(0) // STEPS
    cols_k = tl.program_id(0) % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    cols_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for index in range(0, tiles_per_split):
        # Behind the last tile there are no rows.
        level, _, level_first, _, first, count = find_chunk(
            split * tiles_per_split + index, level_rows, level_rows, BLOCK_M, L
        )
        rows = (first + lanes)[:, None]
        inside = (lanes < count)[:, None]
        dy = tl.load(
            dy_ptr + rows * C_OUT + cols_n[None, :],
            mask=inside & (cols_n < C_OUT)[None, :],
            other=0.0,
        )
        window = find_window(level, level_first, rows, heights, widths, num_images, L, STRIDE)
        rows_in, exist = rows_at_tap(window, rows, inside, tap, KERNEL, STRIDE)
        x = load_input(
            x_ptr + rows_in * C_IN + cols_k[None, :],
            exist & (cols_k < C_IN)[None, :],
            center_ptr,
            scale_ptr,
            shift_ptr,
            level,
            cols_k,
            C_IN,
            True,  # an infinite one would make the sum NaN, although dy is 0 there
            ACTIVATION,
            True,
        )
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    TAPS: tl.constexpr = KERNEL * KERNEL
    offsets = cols_n[:, None] * (TAPS * C_IN) + (tap * C_IN + cols_k)[None, :]
    mask = (cols_n < C_OUT)[:, None] & (cols_k < C_IN)[None, :]
    tl.store(partial_ptr + split.to(tl.int64) * (C_OUT * TAPS * C_IN) + offsets, acc, mask=mask)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    affine: Affine,
    maps: Maps,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dshift and dscale [L, C_in]."""
    num_out, num_in = weight.shape[:2]
    tile = dgrad_tiles(x.dtype, num_in, num_out)
    level_rows = maps.rows_in
    count, num_columns = (
        row_tiles(level_rows, tile["BLOCK_M"]),
        triton.cdiv(num_in, tile["BLOCK_K"]),
    )
    dx = torch.empty_like(x)
    partial = x.new_empty(2, count, num_in, dtype=torch.float32)
    with on_device_of(x):
        _folded_conv2d_dgrad_kernel[(num_columns * count,)](
            dy,
            weight,
            x,
            *affine,
            dx,
            partial,
            *launch_arguments(maps, level_rows),
            num_columns,
            **constants(weight, maps, activation),
            **tile,
        )
    return dx, *merge(partial, level_rows, tile["BLOCK_M"], moments=False)


def wgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    affine: Affine,
    maps: Maps,
    activation: str | None,
) -> Tensor:
    """dweight in the type of the weight; partial sums in float32."""
    num_out, num_in, kernel, _ = weight.shape
    tile = wgrad_tiles(x.dtype, num_in, num_out)
    columns = (
        kernel**2 * triton.cdiv(num_in, tile["BLOCK_K"]),
        triton.cdiv(num_out, tile["BLOCK_N"]),
    )
    level_rows = maps.rows_out
    count = row_tiles(level_rows, tile["BLOCK_M"])
    per_split = triton.cdiv(count, max(1, PROGRAMS // (columns[0] * columns[1])))
    splits = triton.cdiv(count, per_split)
    partial = x.new_empty(splits, num_out, kernel, kernel, num_in, dtype=torch.float32)
    with on_device_of(x):
        _folded_conv2d_wgrad_kernel[(*columns, splits)](
            dy,
            x,
            *affine,
            partial,
            *launch_arguments(maps, level_rows),
            per_split,
            **constants(weight, maps, activation),
            **tile,
        )
    return partial.sum(0).to(weight.dtype).permute(0, 3, 1, 2)

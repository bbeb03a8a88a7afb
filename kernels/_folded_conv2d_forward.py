"""Forward Triton kernel of :mod:`rsfast.kernels.folded_conv2d`, which holds the equations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels._bn_tiles import find_chunk
from rsfast.kernels._folded_conv2d_tiles import (
    Affine,
    Maps,
    constants,
    find_window,
    launch_arguments,
    load_input,
    merge,
    row_tiles,
    rows_at_tap,
    tiles,
)
from rsfast.kernels._launch import on_device_of

__all__ = ["forward"]


@triton.jit(do_not_specialize=["num_images", "num_columns"])
def _folded_conv2d_fwd_kernel(
    x_ptr,  # [M, C_IN]
    weight_ptr,  # [C_OUT, KERNEL, KERNEL, C_IN]
    center_ptr,  # [L, C_IN] float32 or None
    scale_ptr,  # like center_ptr
    shift_ptr,  # like center_ptr
    y_ptr,  # [M, C_OUT], fully overwritten
    partial_ptr,  # [2 or 3, row tiles, C_OUT] float32 or None: mean, m2, rest; overwritten
    level_rows,  # of the output
    heights,  # of the input
    widths,
    num_images,
    num_columns,  # tiles of output channels
    L: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    WRITE_STATISTICS: tl.constexpr,
    WRITE_REST: tl.constexpr,  # where numbers of x have as many digits as sums
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share rows of x, which are many; the weight stays in the L2 cache. On
    # one axis, because there are more row tiles than the others have room for.
    chunk = tl.program_id(0) // num_columns
    level, _, level_first, _, first, count = find_chunk(chunk, level_rows, level_rows, BLOCK_M, L)
    lanes = tl.arange(0, BLOCK_M)
    rows = (first + lanes)[:, None]
    inside = (lanes < count)[:, None]
    cols_n = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    window = find_window(level, level_first, rows, heights, widths, num_images, L, STRIDE)
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    for step in range(0, KERNEL * KERNEL * STEPS):
        tap, cols_k = step // STEPS, step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
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
            KERNEL > 1,  # rows behind the last one have products that nobody wants
            ACTIVATION,
            HAS_AFFINE,
        )
        weight = tl.load(
            weight_ptr
            + cols_n[None, :] * (KERNEL * KERNEL * C_IN)
            + (tap * C_IN + cols_k)[:, None],
            mask=(cols_n < C_OUT)[None, :] & (cols_k < C_IN)[:, None],
            other=0.0,
        )
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    y = acc.to(y_ptr.dtype.element_ty)
    y_ptrs = y_ptr + rows * C_OUT + cols_n[None, :]
    mask = inside & (cols_n < C_OUT)[None, :]
    tl.store(y_ptrs, y, mask=mask)
    if WRITE_STATISTICS:
        # Of what is stored, as a batch norm that reads it would see; about the tile's own mean.
        # Read again, so that a thread has a few columns and many rows: where the product leaves
        # them it has many columns, and each sum takes shuffles for all of those.
        tl.debug_barrier()
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(y, 0) / count
        deviation = tl.where(inside, y - mean[None, :], 0.0)
        partial_ptr += chunk.to(tl.int64) * C_OUT + cols_n
        stride = (tl.num_programs(0) // num_columns).to(tl.int64) * C_OUT
        tl.store(partial_ptr, mean, mask=cols_n < C_OUT)
        if WRITE_REST:  # the digits that a large mean has no room for
            rest = tl.sum(deviation, 0) / count
            tl.store(partial_ptr + 2 * stride, rest, mask=cols_n < C_OUT)
            deviation = tl.where(inside, deviation - rest[None, :], 0.0)
        m2 = tl.sum(deviation * deviation, 0)
        tl.store(partial_ptr + stride, m2, mask=cols_n < C_OUT)


def forward(
    x: Tensor,
    weight: Tensor,
    affine: Affine | None,
    maps: Maps,
    activation: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and biased variance [L, C_out] of it (no rows without `statistics`)."""
    num_out, num_in = weight.shape[:2]
    tile = tiles(x.dtype, num_in, num_out)
    level_rows = maps.rows_out
    count, num_columns = (
        row_tiles(level_rows, tile["BLOCK_M"]),
        triton.cdiv(num_out, tile["BLOCK_N"]),
    )
    y = x.new_empty(sum(level_rows), num_out)
    has_rest = x.dtype == torch.float32
    parts = 2 + has_rest
    partial = x.new_empty(parts, count, num_out, dtype=torch.float32) if statistics else None
    with on_device_of(x):
        _folded_conv2d_fwd_kernel[(num_columns * count,)](
            x,
            weight,
            *(affine or (None,) * 3),
            y,
            partial,
            *launch_arguments(maps, level_rows),
            num_columns,
            **constants(weight, maps, activation, wide=affine is not None),
            HAS_AFFINE=affine is not None,
            WRITE_STATISTICS=statistics,
            WRITE_REST=has_rest,
            **tile,
        )
    if partial is None:
        return y, *(x.new_empty(0, num_out, dtype=torch.float32) for _ in range(2))
    return y, *merge(partial, level_rows, tile["BLOCK_M"], moments=True)

"""Backward Triton kernel of :mod:`rsfast.kernels.bn_act_max_pool.op`, which holds the equations.

A program takes squares of four input pixels, one for each output pixel, and gathers from the four
windows that hold any of them: nine pairs of pixel and window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsfast.kernels.bn_act_max_pool.tiles import OPTIONS, map_arguments, share_out_windows
from rsfast.kernels.common.launch import on_device_of
from rsfast.kernels.common.levels import Affine
from rsfast.kernels.common.tiles import find_map, find_share
from rsfast.kernels.switchable_bn_act.backward import finalize_sums
from rsfast.kernels.switchable_bn_act.tiles import load_affine

__all__ = ["backward"]


@triton.jit
def _load_window(
    dy_ptr,  # [M', C]
    largest_ptr,  # [M', C] uint8
    offsets,
    mask,
):
    """(dy, place of the largest pixel) of windows; without one, 0 and no place."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
    return dy, tl.load(largest_ptr + offsets, mask=mask, other=9)


@triton.jit(do_not_specialize=["share_rows", "num_images"])
def _bn_act_max_pool_bwd_kernel(
    dy_ptr,  # [M', C]
    largest_ptr,  # [M', C] uint8: 0 to 8, or 9 where there is no gradient
    x_ptr,  # [M, C]
    mean_ptr,  # [L, C] of the batch or [B, C] running, float32
    var_ptr,  # like mean_ptr, biased
    gamma_ptr,  # [B, C] float32
    beta_ptr,  # [B, C] float32
    partial_ptr,  # [2, shares, C] float32: sums of dz and dz * (x - mean); None to write dx
    sums_ptr,  # [2, L, C] float32: dbeta and dgamma of each level; None to write sums
    dx_ptr,  # [M, C] like x, or None; what is written is fully overwritten
    level_rows,  # of the output
    banks,
    share_rows,
    heights,  # of the input
    widths,
    num_images,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    WRITE_DX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share = tl.program_id(1)
    level, bank, first, count, place, shares = find_share(share, level_rows, banks, share_rows, L)
    height, width, first_in = find_map(level, heights, widths, num_images, L)
    row_of_statistics = level if BATCH_STATISTICS else bank
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    lanes = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    mean, scale, _, invstd = load_affine(
        mean_ptr, var_ptr, gamma_ptr, beta_ptr, row_of_statistics, bank, cols, eps, C
    )
    mean_dz = tl.zeros((BLOCK_C,), tl.float32)
    slope = tl.zeros((BLOCK_C,), tl.float32)
    if WRITE_DX and BATCH_STATISTICS:
        total = (num_images * height * width).to(tl.float32)
        mean_dz = tl.load(sums_ptr + level * C + cols, mask=inside, other=0.0) / total
        slope = tl.load(sums_ptr + (L + level) * C + cols, mask=inside, other=0.0)
        slope *= invstd / total
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    tiles = tl.cdiv(count, BLOCK_M)
    for step in range(place, tiles, shares):
        # dx from the last tile to the first: the sums read those last, they are still cached.
        tile = tiles - 1 - step if WRITE_DX else step
        pixel = tile * BLOCK_M + lanes
        image, rest = pixel // (out_height * out_width), pixel % (out_height * out_width)
        row, col = rest // out_width, rest % out_width
        mask = (pixel < count) & inside[None, :]
        offsets = (first + pixel) * C + cols[None, :]
        not_last_col = mask & (col + 1 < out_width)
        not_last_row = mask & (row + 1 < out_height)
        both = not_last_col & not_last_row
        windows = (
            _load_window(dy_ptr, largest_ptr, offsets, mask),
            _load_window(dy_ptr, largest_ptr, offsets + C, not_last_col),
            _load_window(dy_ptr, largest_ptr, offsets + out_width * C, not_last_row),
            _load_window(dy_ptr, largest_ptr, offsets + (out_width + 1) * C, both),
        )
        corner = first_in + ((image * height + 2 * row) * width + 2 * col)
        for down in tl.static_range(2):
            for right in tl.static_range(2):  # of the pixel in its square
                exists = mask & (2 * row + down < height) & (2 * col + right < width)
                dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                # A pixel in an even row is in the middle of its window; one in an odd row is at the
                # end of its window and at the beginning of the next. Columns likewise.
                for below in tl.static_range(down + 1):
                    for beside in tl.static_range(right + 1):
                        dy, largest = windows[2 * below + beside]
                        in_window = 3 * (1 + down - 2 * below) + (1 + right - 2 * beside)
                        dz += tl.where(largest == in_window, dy.to(tl.float32), 0.0)
                offsets = (corner + (down * width + right)) * C + cols[None, :]
                x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32) - mean[None, :]
                if WRITE_DX:
                    dx = scale[None, :] * (dz - mean_dz[None, :] - x * slope[None, :])
                    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=exists)
                else:
                    sum_dz += dz
                    sum_dz_x += dz * x
    if not WRITE_DX:
        partial_ptr += share.to(tl.int64) * C + cols
        tl.store(partial_ptr, tl.sum(sum_dz, 0), mask=inside)
        partial_ptr += tl.num_programs(1).to(tl.int64) * C
        tl.store(partial_ptr, tl.sum(sum_dz_x, 0), mask=inside)


def backward(
    dy: Tensor,
    largest: Tensor,
    x: Tensor,
    affine: Affine,
    *,
    sizes: Sequence[tuple[int, int]],
    num_images: int,
    banks: Sequence[int],
    batch_statistics: bool,
    eps: float,
    join: Callable[[Tensor], object] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias. Three launches.

    `join` makes the sums of each level, [2, L, C], those of all ranks before dx is computed.
    """
    shares = share_out_windows(sizes, num_images, banks, x)
    dx = torch.empty_like(x)
    partial = x.new_empty(2, shares.total, x.shape[1], dtype=torch.float32)

    def launch(partial: Tensor | None, sums: Tensor | None, dx: Tensor | None) -> None:
        with on_device_of(x):
            _bn_act_max_pool_bwd_kernel[shares.grid](
                dy,
                largest,
                x,
                *affine,
                partial,
                sums,
                dx,
                *shares.levels,
                *map_arguments(sizes, num_images),
                eps,
                **shares.sizes,
                BATCH_STATISTICS=batch_statistics,
                WRITE_DX=dx is not None,
                **shares.tile,
                **OPTIONS,
            )

    launch(partial, None, None)
    sums, dweight, dbias = finalize_sums(partial, affine, shares, eps, batch_statistics)
    if join is not None:
        join(sums)
    launch(None, sums, dx)
    return dx, dweight, dbias
